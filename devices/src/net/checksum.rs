//! The checksum of the Internet.

use blanket_memory::{IoVec, iovec};

use super::copy_at;

/// A sum in ones' complement (RFC 1071).
#[derive(Debug, Default)]
pub(crate) struct Sum {
    sum: u64,
    /// Whether an odd number of bytes came so far.
    odd: bool,
}

impl Sum {
    /// Adds a few (less than 2³²) bytes.
    pub(crate) fn add(&mut self, mut bytes: &[u8]) {
        if self.odd
            && let Some((first, rest)) = bytes.split_first()
        {
            self.sum += u64::from(*first);
            self.odd = false;
            bytes = rest;
        }
        let words = bytes.chunks_exact(2);
        if let [last] = words.remainder() {
            self.sum += u64::from(*last) << 8;
            self.odd = true;
        }
        self.sum += words
            .map(|word| u64::from(word[0]) << 8 | u64::from(word[1]))
            .sum::<u64>();
    }

    /// Both halves added up.
    pub(crate) fn folded(&self) -> u16 {
        let mut sum = self.sum;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }
}

/// Completes a checksum over the bytes of `packet` from `start` on, with its
/// place `offset` behind that and the sum over the pseudo header in it. False
/// if the place is not in the packet.
pub(crate) fn complete(packet: &[IoVec], start: usize, offset: usize) -> bool {
    let mut rest = packet.to_vec();
    iovec::advance(&mut rest, start);
    if IoVec::total(&rest) < offset + 2 {
        return false;
    }
    let mut sum = Sum::default();
    let mut chunk = [0; 2048];
    while !rest.is_empty() {
        let n = iovec::read_bytes(&rest, &mut chunk);
        sum.add(&chunk[..n]);
        iovec::advance(&mut rest, n);
    }
    // 0 would mean that UDP has no checksum (RFC 768).
    let sum = match !sum.folded() {
        0 => 0xffff,
        sum => sum,
    };
    copy_at(packet, start + offset, &sum.to_be_bytes());
    true
}
