//! Tunnels over uplinks: what has come is opened, what was sealed is sent, in
//! batches.
//!
//! ```no_run
//! # use std::time::Instant;
//! # use blanket_overlay::tunnel::{TrainBuffer, Tunnels, io::Links};
//! # fn work(mut tunnels: Tunnels, mut links: Links) -> std::io::Result<()> {
//! let (start, mut out) = (Instant::now(), TrainBuffer::default());
//! loop {
//!     let now = start.elapsed();
//!     links.receive(now, &mut tunnels, &mut out, &mut |peer, vni, frame| {
//!         println!("{} bytes of network {vni} from peer {}", frame.len(), peer.0);
//!     })?;
//!     // Frames of ports: `tunnels.seal`, and `links.send` when `out.is_full()`.
//!     if now >= tunnels.due() {
//!         tunnels.tick(now, &mut out);
//!     }
//!     links.send(now, &mut tunnels, &mut out)?;
//! }
//! # }
//! ```

use std::io;

use blanket_drivers::uplink::{RX_BUFFER, RxBuffer, TxPacket, Uplink};

use super::{Each, Received, Time, TrainBuffer, Tunnels};
use crate::drops::{Drops, Reason};

/// Buffers that are received into at once, and trains that are sent at once.
const BATCH: usize = 16;
/// How often an uplink without room is asked again.
const PATIENCE: usize = 8;

/// A worker's uplinks. Their places are the numbers that paths have.
pub struct Links {
    uplinks: Vec<Box<dyn Uplink>>,
    buffers: Vec<Box<[u8]>>,
    drops: Drops,
}

impl Links {
    /// Takes uplinks over.
    #[must_use]
    pub fn new(uplinks: Vec<Box<dyn Uplink>>) -> Self {
        let buffer = || vec![0; RX_BUFFER].into_boxed_slice();
        Self {
            uplinks,
            buffers: (0..BATCH).map(|_| buffer()).collect(),
            drops: Drops::default(),
        }
    }

    /// The uplinks, for their descriptions, counters and file descriptors.
    #[must_use]
    pub fn uplinks(&self) -> &[Box<dyn Uplink>] {
        &self.uplinks
    }

    /// What could not be sent.
    #[must_use]
    pub fn drops(&self) -> &Drops {
        &self.drops
    }

    /// Receives once from each uplink, and hands on the frames. How many
    /// datagrams or trains there were: if there were any, there may be more.
    ///
    /// # Errors
    ///
    /// Of the first uplink that has gone or is down: the others are served.
    pub fn receive(
        &mut self,
        now: Time,
        tunnels: &mut Tunnels,
        out: &mut TrainBuffer,
        each: &mut Each<'_>,
    ) -> io::Result<usize> {
        let (mut total, mut outcome) = (0, Ok(()));
        for (number, uplink) in self.uplinks.iter_mut().enumerate() {
            let mut rooms = self.buffers.iter_mut();
            // There are as many of them.
            let mut buffers: [RxBuffer<'_>; BATCH] = std::array::from_fn(|_| match rooms.next() {
                Some(room) => RxBuffer::new(room),
                None => RxBuffer::new(&mut []),
            });
            let count = match uplink.rx(&mut buffers) {
                Ok(count) => count,
                Err(error) => {
                    outcome = outcome.and(Err(error));
                    continue;
                }
            };
            total += count;
            let batch = buffers.iter_mut().take(count);
            let batch = batch.map(|buffer| Received::of(number as u8, buffer));
            tunnels.open(now, batch, out, each);
        }
        outcome.map(|()| total)
    }

    /// Finishes what was sealed, sends it, and empties `out`. What an uplink
    /// has no room for after some patience is dropped and counted, by trains.
    ///
    /// # Errors
    ///
    /// Of the first uplink that has gone or is down: what is for it is lost.
    pub fn send(
        &mut self,
        now: Time,
        tunnels: &mut Tunnels,
        out: &mut TrainBuffer,
    ) -> io::Result<()> {
        tunnels.finish(now, out);
        let mut outcome = Ok(());
        let mut packets = out.packets().peekable();
        while let Some(&(number, packet)) = packets.peek() {
            let mut batch = [packet; BATCH];
            let mut count = 0;
            while let Some((_, packet)) = packets.next_if(|next| next.0 == number) {
                batch[count] = packet;
                count += 1;
                if count == BATCH {
                    break;
                }
            }
            let uplink = self.uplinks.get_mut(usize::from(number));
            let lost = match uplink {
                Some(uplink) => transmit(uplink.as_mut(), &batch[..count]),
                None => Ok(count),
            };
            match lost {
                Ok(lost) => (0..lost).for_each(|_| self.drops.add(Reason::Full)),
                Err(error) => {
                    (0..count).for_each(|_| self.drops.add(Reason::Down));
                    outcome = outcome.and(Err(error));
                }
            }
        }
        drop(packets);
        out.clear();
        outcome
    }

    /// Sends trains of a caller's own buffer ([`Tunnels::seal_gapped`]).
    ///
    /// # Errors
    ///
    /// As [`Links::send`].
    pub fn send_trains(&mut self, trains: &[super::Train], buffer: &[u8]) -> io::Result<()> {
        let mut outcome = Ok(());
        for train in trains {
            let bytes = buffer.get(train.bytes.clone()).unwrap_or_default();
            let packet = TxPacket::train(train.to, bytes, train.segment);
            let uplink = self.uplinks.get_mut(usize::from(train.uplink));
            let lost = uplink.map_or(Ok(1), |uplink| transmit(uplink.as_mut(), &[packet]));
            match lost {
                Ok(lost) => (0..lost).for_each(|_| self.drops.add(Reason::Full)),
                Err(error) => {
                    self.drops.add(Reason::Down);
                    outcome = outcome.and(Err(error));
                }
            }
        }
        outcome
    }
}

/// How many could not be sent.
fn transmit(uplink: &mut dyn Uplink, packets: &[TxPacket<'_>]) -> io::Result<usize> {
    let (mut done, mut patience) = (0, PATIENCE);
    while done < packets.len() && patience > 0 {
        let sent = uplink.tx(&packets[done..])?;
        done += sent;
        if sent == 0 {
            patience -= 1;
            std::thread::yield_now();
        }
    }
    Ok(packets.len() - done)
}
