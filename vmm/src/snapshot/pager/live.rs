//! Memory that is sent as it was while the guest changes it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::task::{Context, Poll};
use std::time::Duration;

use blanket_memory::uffd::Mode;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{Thread, give_up};
use crate::snapshot::stream::{END, PAGES, REPORT, chunk as framed};
use crate::snapshot::{CHUNK, PAGE, Report, Touched, encode};

/// Bytes on their way before the thread waits for the reader with what nobody
/// is about to change.
const AHEAD: usize = 16 << 20;
/// Bytes on their way from which on the guest is slowed.
const MANY: usize = 128 << 20;
/// By so much for each chunk of 64 KiB that it changes.
const SLOWER: Duration = Duration::from_millis(1);

/// A snapshot that is on its way.
pub struct Live {
    pieces: UnboundedReceiver<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
    /// What comes before the memory, and was not returned yet: last first.
    start: Vec<Vec<u8>>,
}

/// What the thread is given for it.
pub(super) struct Order {
    pieces: UnboundedSender<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
    touched: Touched,
}

pub(super) fn order(start: Vec<u8>, touched: Touched) -> (Order, Live) {
    let (sender, pieces) = unbounded_channel();
    let waiting = Arc::new(AtomicUsize::new(0));
    let order = Order {
        pieces: sender,
        waiting: Arc::clone(&waiting),
        touched,
    };
    let live = Live {
        pieces,
        waiting,
        start: vec![start],
    };
    (order, live)
}

impl Live {
    /// Notes for how long the guest stood still.
    ///
    /// # Errors
    /// That cannot be encoded.
    pub fn paused(&mut self, pause: Duration) -> io::Result<()> {
        let report = Report {
            pause_us: u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
        };
        self.start.insert(0, framed(REPORT, &encode(&report)?));
        Ok(())
    }

    /// The next piece of the stream; none at its end.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        if let Some(start) = self.start.pop() {
            return Poll::Ready(Some(start));
        }
        let piece = self.pieces.poll_recv(context);
        if let Poll::Ready(Some(piece)) = &piece {
            self.waiting.fetch_sub(piece.len(), Ordering::Relaxed);
        }
        piece
    }
}

/// What is left to be sent, and where to.
struct Sending {
    order: Order,
    /// Whether a chunk has been sent.
    sent: Vec<bool>,
    chunks: u64,
}

/// Nobody reads any more.
struct Gone;

impl Thread {
    /// Holds all memory as it is, answers, and sends it.
    pub(super) fn live(&self, order: Order, answer: &SyncSender<io::Result<()>>) {
        let armed = self.hold();
        if armed.is_err() {
            let _ = self.release();
            return drop(answer.send(armed));
        }
        let mut sending = Sending {
            sent: vec![false; self.geometry.chunks() as usize],
            order,
            chunks: 0,
        };
        // The owner waits for it.
        let _ = answer.send(Ok(()));
        let all = self.send_all(&mut sending);
        // Vital: who waits would wait for ever.
        if let Err(error) = self.release() {
            give_up(&error);
        }
        match all {
            Ok(Ok(())) => sending.end(),
            // The reader sees that the end is missing.
            Ok(Err(Gone)) => {}
            Err(error) => give_up(&error),
        }
    }

    fn hold(&self) -> io::Result<()> {
        for region in self.ram.iter() {
            let start = region.as_ptr() as u64;
            self.uffd
                .register(start, region.len(), Mode::WriteProtect)?;
            self.uffd.protect(start, region.len(), true)?;
        }
        Ok(())
    }

    fn release(&self) -> io::Result<()> {
        for region in self.ram.iter() {
            self.uffd.unregister(region.as_ptr() as u64, region.len())?;
        }
        Ok(())
    }

    /// Sends chunk by chunk: first those that somebody is about to change.
    fn send_all(&self, sending: &mut Sending) -> io::Result<Result<(), Gone>> {
        let mut next = 0;
        while next < sending.sent.len() as u64 {
            while let Some(fault) = self.uffd.fault()? {
                let chunk = self.chunk_at(fault.address);
                let chunk = chunk.ok_or_else(|| io::Error::other("no such memory"))?;
                if sending.order.waiting.load(Ordering::Relaxed) > MANY {
                    std::thread::sleep(SLOWER);
                }
                if self.send(chunk, sending)?.is_err() {
                    return Ok(Err(Gone));
                }
            }
            if sending.order.pieces.is_closed() {
                return Ok(Err(Gone));
            }
            if sending.order.waiting.load(Ordering::Relaxed) > AHEAD {
                self.wait(1)?;
                continue;
            }
            if !sending.sent[next as usize] && self.send(next, sending)?.is_err() {
                return Ok(Err(Gone));
            }
            next += 1;
        }
        Ok(Ok(()))
    }

    /// Sends a chunk if that was not done, and lets it be changed.
    fn send(&self, chunk: u64, sending: &mut Sending) -> io::Result<Result<(), Gone>> {
        let memory = self.geometry.memory(chunk);
        let place = memory.and_then(|(address, len)| Some((address, len, self.host(address)?)));
        let (address, len, host) = place.ok_or_else(|| io::Error::other("no such memory"))?;
        let sent = &mut sending.sent[chunk as usize];
        if std::mem::replace(sent, true) {
            // Who waits came late.
            self.uffd.protect(host, len as u64, false)?;
            return Ok(Ok(()));
        }
        let mut content = vec![0; CHUNK];
        let any = self.copy(address, &mut sending.order.touched, &mut content[..len])?;
        let result = match any {
            true => sending.send(address, &content[..len]),
            false => Ok(()),
        };
        self.uffd.protect(host, len as u64, false)?;
        Ok(result)
    }

    /// Copies the pages that were there when all was held: those that still are.
    /// The others were zeros. Whether there was one.
    fn copy(&self, address: u64, touched: &mut Touched, content: &mut [u8]) -> io::Result<bool> {
        let region = self.ram.find_region(GuestAddress(address));
        let region = region.ok_or_else(|| io::Error::other("no such memory"))?;
        let start = address - region.start_addr().0;
        let mut any = false;
        for (page, bytes) in content.chunks_exact_mut(PAGE).enumerate() {
            let offset = start + (page * PAGE) as u64;
            if touched.is_held(region.as_ptr() as u64 + offset) {
                let at = MemoryRegionAddress(offset);
                region.read_slice(bytes, at).map_err(io::Error::other)?;
                any = true;
            }
        }
        Ok(any)
    }
}

impl Sending {
    /// Sends what is not zeros of a chunk.
    fn send(&mut self, address: u64, content: &[u8]) -> Result<(), Gone> {
        let is_zero = |at: usize| content[at..at + PAGE].iter().all(|byte| *byte == 0);
        let mut at = 0;
        while at < content.len() {
            let start = at;
            while at < content.len() && !is_zero(at) {
                at += PAGE;
            }
            if at == start {
                at += PAGE;
                continue;
            }
            let mut payload = (address + start as u64).to_le_bytes().to_vec();
            payload.extend(&content[start..at]);
            self.chunks += 1;
            self.piece(framed(PAGES, &payload))?;
        }
        Ok(())
    }

    fn piece(&self, piece: Vec<u8>) -> Result<(), Gone> {
        self.order.waiting.fetch_add(piece.len(), Ordering::Relaxed);
        self.order.pieces.send(piece).map_err(|_| Gone)
    }

    /// Sends what comes behind the memory.
    fn end(&self) {
        // A guest that was started has used memory: a kernel that does not tell
        // (before Linux 5.14) leaves the stream without an end.
        if self.chunks == 0 {
            return;
        }
        // Who does not read any more needs no end.
        let _ = self.piece(framed(END, &self.chunks.to_le_bytes()));
    }
}
