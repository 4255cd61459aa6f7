//! Bytes on the wire: big endian, padded to eight.

use super::error::{Code, Wrong};

/// Reads fields one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    /// The next bytes.
    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], Wrong> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Code::LENGTH)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn skip(&mut self, len: usize) -> Result<(), Wrong> {
        self.take(len).map(|_| ())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Wrong> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Code::LENGTH)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Wrong> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Wrong> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Wrong> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Wrong> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Writes fields one after the other.
pub(super) trait Put {
    fn u8(&mut self, value: u8) -> &mut Self;
    fn u16(&mut self, value: u16) -> &mut Self;
    fn u32(&mut self, value: u32) -> &mut Self;
    fn u64(&mut self, value: u64) -> &mut Self;
    fn zeros(&mut self, count: usize) -> &mut Self;
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self;
    /// Text in so many bytes, the last of which is 0.
    fn text(&mut self, text: &str, room: usize) -> &mut Self;
    /// Zeros until what began at `start` is a multiple of eight.
    fn align(&mut self, start: usize) -> &mut Self;
    /// Writes the bytes since `start` as a length there, `at` bytes after it.
    fn length(&mut self, start: usize, at: usize) -> &mut Self;
}

impl Put for Vec<u8> {
    fn u8(&mut self, value: u8) -> &mut Self {
        self.push(value);
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    fn zeros(&mut self, count: usize) -> &mut Self {
        self.resize(self.len() + count, 0);
        self
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.extend_from_slice(bytes);
        self
    }

    fn text(&mut self, text: &str, room: usize) -> &mut Self {
        let bytes = text.as_bytes();
        let len = bytes.len().min(room.saturating_sub(1));
        self.bytes(&bytes[..len]).zeros(room - len)
    }

    fn align(&mut self, start: usize) -> &mut Self {
        let len = self.len() - start;
        self.zeros(len.next_multiple_of(8) - len)
    }

    fn length(&mut self, start: usize, at: usize) -> &mut Self {
        let len = u16::try_from(self.len() - start).unwrap_or(u16::MAX);
        self[start + at..start + at + 2].copy_from_slice(&len.to_be_bytes());
        self
    }
}
