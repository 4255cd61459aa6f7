//! Memory and disks in frames.

use blanket_memory::dirty::PAGE;

use crate::wire::{Frames, Kind, MOST_MEMORY};

/// What is to be sent at once.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) frames: Frames,
    /// Ranges of memory: pairs of address and length.
    zeros: Vec<u8>,
    /// Ranges of disks: triples of disk, offset and length.
    holes: Vec<u8>,
}

impl Batch {
    pub(crate) fn len(&self) -> usize {
        self.frames.bytes().len() + self.zeros.len() + self.holes.len()
    }

    /// Adds frames with the ranges that are all zeros.
    pub(crate) fn add_zeros(&mut self) {
        for (kind, zeros) in [(Kind::Zeros, &self.zeros), (Kind::Holes, &self.holes)] {
            // Whole entries of both.
            for some in zeros.chunks(MOST_MEMORY / 48 * 48) {
                self.frames.begin();
                self.frames.push(some);
                self.frames.end(kind);
            }
        }
    }

    /// Forgets which memory is zeros.
    pub(crate) fn forget_zeros(&mut self) {
        self.zeros.clear();
    }

    /// Forgets where there are zeros on disks.
    pub(crate) fn forget_holes(&mut self) {
        self.holes.clear();
    }

    pub(crate) fn clear(&mut self) {
        self.frames.clear();
        self.zeros.clear();
        self.holes.clear();
    }

    /// Memory from `at` on is zeros.
    pub(crate) fn add_zero(&mut self, at: u64, len: u64) {
        self.zeros.extend(at.to_le_bytes());
        self.zeros.extend(len.to_le_bytes());
    }

    /// Packs the pages of `bytes`, which are at `at` of a disk or of memory:
    /// those that are all zeros, and the others.
    pub(crate) fn pack(&mut self, disk: Option<u64>, at: u64, bytes: &[u8]) {
        let mut place = at;
        let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
        for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let len: usize = run.iter().map(|page| page.len()).sum();
            let numbers = disk.into_iter().chain([place]);
            if run.first().is_some_and(|page| is_zero(page)) {
                let ranges = match disk {
                    Some(_) => &mut self.holes,
                    None => &mut self.zeros,
                };
                for number in numbers.chain([len as u64]) {
                    ranges.extend(number.to_le_bytes());
                }
            } else {
                self.frames.begin();
                for number in numbers {
                    self.frames.push(&number.to_le_bytes());
                }
                run.iter().for_each(|page| self.frames.push(page));
                self.frames.end(match disk {
                    Some(_) => Kind::Blocks,
                    None => Kind::Pages,
                });
            }
            place += len as u64;
        }
    }
}

pub(crate) fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|byte| *byte == 0)
}
