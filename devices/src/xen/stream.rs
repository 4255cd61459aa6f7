//! Byte streams through a page that the guest shares: the xenstore's and the
//! console's rings (`xs_wire.h`, `console.h`).
//!
//! Both indices run freely; the data lies at the index modulo the ring's size.
//! The guest may write any of it at any time: each index is read once and
//! checked.

use std::sync::atomic::Ordering;

use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// The guest has written indices that cannot be, or the page is not in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ring's indices make no sense")]
pub struct Broken;

impl From<vm_memory::GuestMemoryError> for Broken {
    fn from(_: vm_memory::GuestMemoryError) -> Self {
        Self
    }
}

/// Where the parts of a stream lie, as offsets in the page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// The data.
    pub(super) data: u64,
    /// Bytes of the data, a power of two.
    pub(super) size: u32,
    /// The consumer's index.
    pub(super) consumer: u64,
    /// The producer's index.
    pub(super) producer: u64,
}

/// One direction.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    memory: GuestRam,
    page: GuestAddress,
    layout: Layout,
}

impl Stream {
    /// The stream in `page`, a multiple of 4096.
    pub(super) fn new(memory: GuestRam, page: GuestAddress, layout: Layout) -> Self {
        Self {
            memory,
            page,
            layout,
        }
    }

    fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.page.0.wrapping_add(offset))
    }

    fn load(&self, offset: u64) -> Result<u32, Broken> {
        Ok(self.memory.load(self.at(offset), Ordering::Acquire)?)
    }

    fn store(&self, value: u32, offset: u64) -> Result<(), Broken> {
        Ok(self
            .memory
            .store(value, self.at(offset), Ordering::Release)?)
    }

    /// The consumer's index, and how many bytes wait from there on.
    fn waiting(&self) -> Result<(u32, u32), Broken> {
        let consumer = self.load(self.layout.consumer)?;
        let waiting = self.load(self.layout.producer)?.wrapping_sub(consumer);
        if waiting > self.layout.size {
            return Err(Broken);
        }
        Ok((consumer, waiting))
    }

    /// How many bytes can be written.
    pub(super) fn room(&self) -> Result<usize, Broken> {
        Ok((self.layout.size - self.waiting()?.1) as usize)
    }

    /// The one or two pieces of `len` bytes from `index` on: address, length.
    fn pieces(&self, index: u32, len: usize) -> [(GuestAddress, usize); 2] {
        let start = index % self.layout.size;
        let first = len.min((self.layout.size - start) as usize);
        [
            (self.at(self.layout.data + u64::from(start)), first),
            (self.at(self.layout.data), len - first),
        ]
    }

    /// Takes what has arrived, as far as it fits; returns how much.
    pub(super) fn read(&self, buffer: &mut [u8]) -> Result<usize, Broken> {
        let (consumer, waiting) = self.waiting()?;
        let n = buffer.len().min(waiting as usize);
        let mut rest = &mut buffer[..n];
        for (address, len) in self.pieces(consumer, n) {
            let (piece, tail) = rest.split_at_mut(len);
            self.memory.read_slice(piece, address)?;
            rest = tail;
        }
        if n > 0 {
            self.store(consumer.wrapping_add(n as u32), self.layout.consumer)?;
        }
        Ok(n)
    }

    /// Sends `data`, as far as there is room; returns how much.
    pub(super) fn write(&self, data: &[u8]) -> Result<usize, Broken> {
        let (consumer, waiting) = self.waiting()?;
        let n = data.len().min((self.layout.size - waiting) as usize);
        let producer = consumer.wrapping_add(waiting);
        let mut rest = &data[..n];
        for (address, len) in self.pieces(producer, n) {
            let (piece, tail) = rest.split_at(len);
            self.memory.write_slice(piece, address)?;
            rest = tail;
        }
        if n > 0 {
            self.store(producer.wrapping_add(n as u32), self.layout.producer)?;
        }
        Ok(n)
    }

    /// Empties the stream.
    pub(super) fn clear(&self) -> Result<(), Broken> {
        self.store(0, self.layout.consumer)?;
        self.store(0, self.layout.producer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::ram;

    const LAYOUT: Layout = Layout {
        data: 64,
        size: 16,
        consumer: 0,
        producer: 4,
    };

    fn stream(start: u32) -> Stream {
        let stream = Stream::new(ram(0x1000), GuestAddress(0), LAYOUT);
        stream.store(start, LAYOUT.consumer).unwrap();
        stream.store(start, LAYOUT.producer).unwrap();
        stream
    }

    proptest! {
        #[test]
        fn bytes_arrive_once_and_in_order(
            start in any::<u32>(),
            steps in proptest::collection::vec((any::<bool>(), 0usize..20), 1..60),
        ) {
            let stream = stream(start);
            let (mut sent, mut received) = (0u8, 0u8);
            for (send, len) in steps {
                if send {
                    let room = stream.room().unwrap();
                    let data: Vec<u8> = (0..len as u8).map(|i| sent.wrapping_add(i)).collect();
                    let n = stream.write(&data).unwrap();
                    prop_assert_eq!(n, len.min(room));
                    sent = sent.wrapping_add(n as u8);
                } else {
                    let mut data = vec![0; len];
                    let n = stream.read(&mut data).unwrap();
                    for byte in &data[..n] {
                        prop_assert_eq!(*byte, received);
                        received = received.wrapping_add(1);
                    }
                }
            }
        }

        #[test]
        fn hostile_indices_are_refused_or_move_no_more_than_a_ring(
            consumer in any::<u32>(),
            distance in prop_oneof![0u32..40, any::<u32>()],
        ) {
            let stream = stream(consumer);
            stream.store(consumer.wrapping_add(distance), LAYOUT.producer).unwrap();
            let mut data = [0; 64];
            let sane = distance <= LAYOUT.size;
            prop_assert_eq!(stream.room().is_ok(), sane);
            prop_assert_eq!(stream.write(&[]).is_ok(), sane);
            let read = stream.read(&mut data);
            prop_assert_eq!(read, if sane { Ok(distance as usize) } else { Err(Broken) });
        }
    }

    #[test]
    fn a_page_outside_memory_is_no_panic() {
        for page in [0x1000, !0xfff] {
            let stream = Stream::new(ram(0x1000), GuestAddress(page), LAYOUT);
            assert_eq!(stream.read(&mut [0]), Err(Broken));
            assert_eq!(stream.write(&[0]), Err(Broken));
            assert_eq!(stream.clear(), Err(Broken));
        }
    }
}
