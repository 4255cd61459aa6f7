//! One result, and how results are shown and kept.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

/// One measured metric. The JSON format is described in `docs/benchmarks.md`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub metric: String,
    /// Unit of `ours` and `peer`.
    pub unit: String,
    /// Median of our runs.
    pub ours: f64,
    /// Whom we are compared with.
    pub peer_name: Option<String>,
    /// Median of the peer's runs.
    pub peer: Option<f64>,
    /// `ours / peer`; absent without a peer, or where the peer measured 0.
    pub ratio: Option<f64>,
    /// Number of our runs.
    pub runs: usize,
}

impl Row {
    /// The median of `runs`; none without a run.
    #[must_use]
    pub fn new(metric: &str, unit: &str, runs: &[f64]) -> Option<Self> {
        Some(Self {
            metric: metric.into(),
            unit: unit.into(),
            ours: median(runs)?,
            peer_name: None,
            peer: None,
            ratio: None,
            runs: runs.len(),
        })
    }

    /// This row beside the median of a peer's runs; unchanged without a run.
    #[must_use]
    pub fn against(mut self, name: &str, runs: &[f64]) -> Self {
        if let Some(peer) = median(runs) {
            self.peer_name = Some(name.into());
            self.peer = Some(peer);
            self.ratio = (peer != 0.0).then(|| self.ours / peer);
        }
        self
    }
}

/// The middle value, or the mean of the two middle ones; none of nothing.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some(f64::midpoint(sorted[middle - 1], upper))
}

/// The rows for people.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.3}"));
    let cells = rows.iter().map(|row| {
        [
            row.metric.clone(),
            row.unit.clone(),
            number(Some(row.ours)),
            row.peer_name.clone().unwrap_or_else(|| "-".into()),
            number(row.peer),
            number(row.ratio),
            row.runs.to_string(),
        ]
    });
    let head = ["metric", "unit", "ours", "peer", "peer's", "ratio", "runs"].map(String::from);
    let lines: Vec<[String; 7]> = std::iter::once(head).chain(cells).collect();
    let width = |column: usize| {
        let widths = lines.iter().map(|line| line[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let mut out = String::new();
    for line in &lines {
        let padded: Vec<String> = line
            .iter()
            .enumerate()
            .map(|(column, cell)| {
                let width = width(column);
                // Names to the left, numbers to the right.
                if matches!(column, 0 | 1 | 3) {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            })
            .collect();
        out.push_str(padded.join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// Writes the rows to `NAME.json` in `folder`.
///
/// # Errors
/// The folder or the file cannot be written.
pub fn write(folder: &Path, name: &str, rows: &[Row]) -> Result<PathBuf> {
    let path = folder.join(format!("{name}.json"));
    let json = serde_json::to_string_pretty(rows)? + "\n";
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&path, json))
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Row> {
        vec![
            Row::new("time to init", "ms", &[300.0, 100.0, 200.0])
                .unwrap()
                .against("qemu", &[400.0, 420.0]),
            Row::new("overhead", "MiB", &[4.25]).unwrap(),
        ]
    }

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two_middle_values() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7.0]), Some(7.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn a_row_has_a_ratio_only_with_a_peer_that_is_not_zero() {
        let rows = rows();
        assert_eq!(rows[0].peer, Some(410.0));
        assert_eq!(rows[0].ratio, Some(200.0 / 410.0));
        assert_eq!(rows[0].runs, 3);
        assert_eq!(rows[1].ratio, None);
        assert_eq!(rows[1].clone().against("qemu", &[]), rows[1]);
        assert_eq!(rows[1].clone().against("qemu", &[0.0]).ratio, None);
        assert_eq!(Row::new("nothing", "ms", &[]), None);
    }

    #[test]
    fn the_table_lines_up() {
        assert_eq!(
            table(&rows()),
            "metric        unit     ours  peer   peer's  ratio  runs\n\
             time to init  ms    200.000  qemu  410.000  0.488     3\n\
             overhead      MiB     4.250  -           -      -     1\n"
        );
    }

    #[test]
    fn the_file_is_an_array_of_rows_with_null_for_what_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(&folder.path().join("bench"), "boot", &rows()).unwrap();
        let json: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(json[0]["peer_name"], "qemu");
        assert_eq!(json[0]["runs"], 3);
        assert_eq!(
            json[1],
            serde_json::json!({"metric": "overhead", "unit": "MiB", "ours": 4.25,
                "peer_name": null, "peer": null, "ratio": null, "runs": 1})
        );
    }
}
