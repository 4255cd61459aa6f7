//! What is read and written without keys.

use proptest::prelude::*;

use super::super::wire::{Datagram, Facts, RECORD, Record};
use super::super::{geneve, vxlan};
use super::net::{offload, with_frame};
use crate::drops::Reason;
use crate::frame::{Frame, Head, Offload, Vni};

fn plain(bytes: &[u8]) -> Frame<'static> {
    Frame {
        head: Head::of(bytes),
        body: &[],
        offload: Offload::default(),
    }
}

#[test]
fn vxlan_is_as_in_the_rfc() {
    let vni = Vni::new(0x12_3456).expect("24 bits");
    let mut to = [0xff; 100];
    let len = vxlan::write(vni, &plain(&[9; 60]), &mut to).expect("room");
    assert_eq!(to[..9], [8, 0, 0, 0, 0x12, 0x34, 0x56, 0, 9]);
    assert_eq!(vxlan::parse(&mut to[..len]), Ok((vni, &mut [9; 60][..])));
    assert_eq!(
        vxlan::write(vni, &plain(&[9; 93]), &mut to),
        Err(Reason::TooBig)
    );
    to[0] = 0;
    assert_eq!(vxlan::parse(&mut to[..len]), Err(Reason::Malformed));
    assert_eq!(vxlan::parse(&mut [8; 7]), Err(Reason::Malformed));
    let large = vec![0; 3000];
    let sent = with_frame(&large, |frame| vxlan::write(vni, frame, &mut [0; 4000]));
    assert_eq!(sent, Err(Reason::TooBig), "it is to be segmented");
}

#[test]
fn checksums_are_computed_for_others() {
    // UDP from 10.0.0.1 port 1 to 10.0.0.2 port 2, with the pseudo header's sum.
    let mut bytes = vec![0; 34];
    bytes.extend([0, 1, 0, 2, 0, 11, 0, 0, b'a', b'b', b'c']);
    let pseudo = 0x0a00_u32 + 1 + 0x0a00 + 2 + 17 + 11;
    bytes[40..42].copy_from_slice(&(pseudo as u16).to_be_bytes());
    let mut frame = plain(&bytes);
    frame.offload.checksum = Some(crate::frame::Checksum {
        start: 34,
        offset: 6,
    });
    let mut to = [0; 100];
    let len = geneve::write(Vni::default(), &frame, &mut to).expect("room");
    let (_, out) = geneve::parse(&mut to[..len]).expect("sound");
    let words = out[34..].chunks(2);
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    sum += 0x0a00 + 1 + 0x0a00 + 2 + 17 + 11;
    sum = (sum & 0xffff) + (sum >> 16);
    assert_eq!(sum & 0xffff, 0xffff);
}

#[test]
fn geneve_is_as_in_the_rfc() {
    let vni = Vni::new(7).expect("24 bits");
    let mut to = [0xff; 100];
    let len = geneve::write(vni, &plain(&[9; 60]), &mut to).expect("room");
    assert_eq!(to[..9], [0, 0, 0x65, 0x58, 0, 0, 7, 0, 9]);
    assert_eq!(geneve::parse(&mut to[..len]), Ok((vni, &mut [9; 60][..])));
    let read = |bytes: &[u8]| geneve::parse(&mut bytes.to_vec()).map(|(_, frame)| frame.len());
    // An option of a word is skipped, a critical one is not.
    let mut option = vec![2, 0, 0x65, 0x58, 0, 0, 7, 0, 1, 2, 3, 1, 0, 0, 0, 0, 5, 5];
    assert_eq!(read(&option), Ok(2));
    for (at, byte) in [
        (10, 0x83),
        (11, 2),
        (1, 0x40),
        (1, 0x80),
        (0, 0x42),
        (0, 63),
        (3, 0),
    ] {
        let before = std::mem::replace(&mut option[at], byte);
        assert_eq!(read(&option), Err(Reason::Malformed), "{at} {byte}");
        option[at] = before;
    }
}

#[test]
fn records_are_as_documented() {
    let vni = Vni::new(0x01_0203).expect("24 bits");
    let facts = Facts::of(vni, 0x01_0001, offload(0x01_0001)).expect("sound");
    let bytes = Record::Chunk(facts, 5).write();
    let like = [
        2,
        5,
        0x15,
        1,
        2,
        3,
        1,
        0,
        1,
        16,
        0,
        34,
        1448_u16.to_be_bytes()[0],
        1448_u16.to_be_bytes()[1],
        0,
        54,
    ];
    assert_eq!(bytes, like);
}

proptest! {
    #[test]
    fn any_bytes_are_a_record_or_not(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), kind in 0_u8..6) {
        if let Some(first) = bytes.first_mut() {
            *first = kind;
        }
        let _ = Datagram::parse(&bytes);
        let mut copy = bytes.clone();
        if let Ok((record, body, rest)) = Record::split(&mut copy) {
            if let Record::Chunk(facts, index) = record {
                prop_assert!(usize::from(index) * body.len() < facts.len);
            }
            if let Record::Frame(facts) = record {
                prop_assert_eq!(facts.len, body.len());
            }
            if record != Record::Padding {
                prop_assert_eq!(RECORD + body.len() + rest.len(), bytes.len());
                let again = record.write();
                let mut copy = [&again[..], &bytes[RECORD..]].concat();
                prop_assert_eq!(Record::split(&mut copy).map(|(again, _, _)| again), Ok(record));
            }
        }
    }

    #[test]
    fn any_bytes_are_vxlan_or_not(mut bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let len = bytes.len();
        if let Ok((_, frame)) = vxlan::parse(&mut bytes) {
            prop_assert_eq!(frame.len() + vxlan::HEADER, len);
        }
        if let Ok((_, frame)) = geneve::parse(&mut bytes) {
            prop_assert!(frame.len() + geneve::HEADER <= len);
        }
    }
}
