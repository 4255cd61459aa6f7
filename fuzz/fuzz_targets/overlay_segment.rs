//! Frames and what their offload headers leave to be done: any bytes are cut
//! and summed up, or refused; what is cut comes out whole.
#![no_main]

use arbitrary::Arbitrary;
use blanket_overlay::frame::{
    Frame, HEAD, Head, OFFLOAD_BYTES, Offload, Segmenter, finish_checksum,
};
use libfuzzer_sys::fuzz_target;
use vm_memory::VolatileSlice;

#[derive(Arbitrary, Debug)]
struct Input {
    header: [u8; OFFLOAD_BYTES],
    /// The headers of TCP over IPv4, or of UDP over IPv6, are put in.
    like: Option<bool>,
    bytes: Vec<u8>,
    /// More bytes of payload.
    more: u16,
    cut: u16,
    tag: bool,
    finish: bool,
}

fuzz_target!(|input: Input| {
    let mut bytes = input.bytes;
    bytes.resize(bytes.len() + usize::from(input.more), 1);
    if let Some(tcp) = input.like
        && bytes.len() > 80
    {
        bytes[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 8, 0]);
        if tcp {
            bytes[14..24].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6]);
            bytes[46] = 0x50;
        } else {
            bytes[12..14].copy_from_slice(&[0x86, 0xdd]);
            bytes[14..21].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, 17]);
        }
    }
    let len = bytes.len();
    let Ok(offload) = Offload::from_virtio(&input.header, len) else {
        return;
    };
    let mut head = Head::of(&bytes);
    let offload = match input.tag && head.insert(12.min(len), [0x81, 0, 0, 5]) {
        true => offload.moved(4).unwrap_or(offload),
        false => offload,
    };
    let rest = &mut bytes[len.min(HEAD)..];
    let cut = usize::from(input.cut).min(rest.len());
    let (one, two) = rest.split_at_mut(cut);
    let body = [VolatileSlice::from(one), VolatileSlice::from(two)];
    let mut frame = Frame {
        head,
        body: &body,
        offload,
    };
    if let Ok(mut segments) = Segmenter::new(&frame, 9000, input.finish) {
        let (mut total, mut count, mut first) = (0, 0, None);
        while let Some(small) = segments.next() {
            assert!(small.len() <= 9000);
            assert!(small.offload.segments.is_none());
            assert_eq!(small.offload.checksum.is_none(), input.finish);
            total += small.len();
            count += 1;
            first.get_or_insert(small.len());
        }
        // Each has all headers, and nothing comes twice or not at all.
        let size = offload
            .segments
            .map_or(0, |segments| usize::from(segments.size));
        let headers = first.expect("one at least") - size.min(first.unwrap_or(0));
        if count > 1 {
            assert_eq!(total - headers * count, frame.len() - headers);
        } else {
            assert_eq!(total, frame.len());
        }
    }
    let before = frame.len();
    let _ = finish_checksum(&mut frame);
    assert_eq!(frame.len(), before);
});
