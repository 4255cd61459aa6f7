//! Entries of the flow table as text: any text is an entry or an error that
//! points into it, and what was read is written and read again as the same.
#![no_main]

use blanket_overlay::flow::text::{
    TextError, no_names, parse_filter, parse_flow, parse_match, parse_packet,
};
use blanket_overlay::flow::{Control, trace};
use libfuzzer_sys::fuzz_target;

fn points(text: &str, error: &TextError) {
    assert!((1..=text.chars().count() + 1).contains(&error.column));
    assert!(!error.what.is_empty());
}

fuzz_target!(|text: &str| {
    match parse_flow(text, &no_names) {
        Ok(flow) => {
            let written = flow.to_string();
            assert_eq!(parse_flow(&written, &no_names), Ok(flow), "{written}");
        }
        Err(error) => points(text, &error),
    }
    match parse_match(text, &no_names) {
        Ok(matches) => assert_eq!(parse_match(&matches.to_string(), &no_names), Ok(matches)),
        Err(error) => points(text, &error),
    }
    if let Err(error) = parse_filter(text, true, &no_names) {
        points(text, &error);
    }
    match parse_packet(text, &no_names) {
        Ok((key, state)) => {
            let control = Control::bridging();
            assert!(!trace(control.tables(), &key, state).lines.is_empty());
        }
        Err(error) => points(text, &error),
    }
});
