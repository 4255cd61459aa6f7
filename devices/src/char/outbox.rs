//! Bytes on their way out, bounded.

use std::collections::VecDeque;
use std::io;

/// A queue of bytes that forgets the oldest when it is full.
#[derive(Debug)]
pub struct Outbox {
    bytes: VecDeque<u8>,
    limit: usize,
}

impl Outbox {
    /// An empty queue for `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            limit,
        }
    }

    /// Appends `data`; returns how many of the oldest bytes were forgotten.
    pub fn push(&mut self, data: &[u8]) -> usize {
        let skipped = data.len().saturating_sub(self.limit);
        let data = &data[skipped..];
        let excess = (self.bytes.len() + data.len()).saturating_sub(self.limit);
        self.bytes.drain(..excess);
        self.bytes.extend(data);
        skipped + excess
    }

    /// Bytes that fit without forgetting any.
    #[must_use]
    pub fn room(&self) -> usize {
        self.limit - self.bytes.len()
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// A copy of the bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }

    /// Takes the bytes out.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes).into()
    }

    /// Writes as much as `to` takes without blocking.
    ///
    /// # Errors
    /// Whatever `to` fails with, except that it would block.
    pub fn flush(&mut self, mut to: impl io::Write) -> io::Result<()> {
        while !self.bytes.is_empty() {
            let (front, _) = self.bytes.as_slices();
            match to.write(front) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.bytes.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
