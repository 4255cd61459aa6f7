//! Aligned columns and human figures.

/// Lays rows out in columns two blanks apart. The last column is not padded.
pub(crate) fn render(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|c| {
            rows.iter()
                .filter_map(|row| row.get(c))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A duration in its two largest units, like `3m 12s`.
pub(crate) fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0 => format!("{ms}ms"),
        1..60 => format!("{s}s"),
        60..3600 => format!("{}m {}s", s / 60, s % 60),
        3600..86400 => format!("{}h {}m", s / 3600, s / 60 % 60),
        _ => format!("{}d {}h", s / 86400, s / 3600 % 24),
    }
}

/// Bytes with a binary unit and one decimal, like `1.5 GiB`.
pub(crate) fn bytes(n: u64) -> String {
    let unit = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")]
        .into_iter()
        .find(|(shift, _)| n >= 1 << shift);
    match unit {
        Some((shift, name)) => {
            let tenths = u128::from(n) * 10 / (1 << shift);
            if tenths % 10 == 0 {
                format!("{} {name}", tenths / 10)
            } else {
                format!("{}.{} {name}", tenths / 10, tenths % 10)
            }
        }
        None => format!("{n} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn columns_line_up_and_lines_have_no_blanks_at_their_ends() {
        let rows = [["NAME", "STATE"], ["a", "running"], ["a-long-one", ""]]
            .map(|row| row.map(String::from).to_vec());
        assert_eq!(
            render(&rows),
            "NAME        STATE\na           running\na-long-one\n"
        );
        assert_eq!(render(&[]), "");
    }

    #[test]
    fn durations_show_their_two_largest_units() {
        for (ms, text) in [
            (0, "0ms"),
            (999, "999ms"),
            (59_999, "59s"),
            (60_000, "1m 0s"),
            (3_599_999, "59m 59s"),
            (3_600_000, "1h 0m"),
            (90_061_000, "1d 1h"),
        ] {
            assert_eq!(duration(ms), text);
        }
    }

    #[test]
    fn bytes_have_binary_units() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (512 << 20, "512 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    proptest! {
        #[test]
        fn no_figure_panics(n: u64) {
            prop_assert!(!duration(n).is_empty() && !bytes(n).is_empty());
        }
    }
}
