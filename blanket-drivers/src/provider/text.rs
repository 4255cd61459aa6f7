//! Text that somebody else wrote.

/// So many characters of a text are kept.
pub(super) const LONGEST: usize = 256;

/// One line of plain text from bytes that may be anything: what is no letter,
/// digit, blank or sign of ASCII becomes `?`. `None` if nothing is left.
pub(crate) fn clean(raw: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(raw);
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    let plain = |c: char| c.is_ascii_graphic() || c == ' ' || c.is_alphanumeric();
    let text: String = text
        .chars()
        .take(LONGEST)
        .map(|c| if plain(c) { c } else { '?' })
        .collect();
    let text = text.trim_end();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_become_one_plain_line() {
        for (raw, text) in [
            (&b"Amazon EC2\n"[..], Some("Amazon EC2")),
            (b"\0\0 x \0\n", Some("x")),
            (b"a\x1b[31mb\nc", Some("a?[31mb?c")),
            ("node-\u{e4}\u{202e}".as_bytes(), Some("node-\u{e4}?")),
            (b"\xff\xfe", Some("??")),
            (b" \n\t", None),
            (b"", None),
        ] {
            assert_eq!(clean(raw).as_deref(), text);
        }
        assert_eq!(clean(&[b'x'; 5000]).unwrap().len(), LONGEST);
    }

    proptest! {
        #[test]
        fn what_is_clean_stays_as_it_is(raw: Vec<u8>) {
            if let Some(text) = clean(&raw) {
                let again = clean(text.as_bytes());
                prop_assert_eq!(again, Some(text));
            }
        }
    }
}
