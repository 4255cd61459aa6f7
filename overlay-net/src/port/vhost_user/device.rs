//! What the worker has of a port: the rings that are served.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use virtio_bindings::virtio_net as net;

use super::fault;
use super::features::{LOG_ALL, has};
use super::memory::{Log, Memory};
use super::packet::{self, Source};
use super::ring::{Broken, CHAIN, Ring};
use crate::drops::{Drops, Reason};
use crate::frame::{Frame, Pieces, Segmenter, finish_checksum};

/// Buffers that one frame is merged into at most.
const MERGED: u16 = 80;

/// Buffers ahead of the next one that are fetched while a frame is sent.
const AHEAD: u16 = 8;

/// All rings, and what they have in common.
pub(super) struct Device {
    pub(super) memory: Memory,
    pub(super) log: Option<Arc<Log>>,
    features: u64,
    /// By number: of each pair, the one to the guest first.
    rings: Vec<Option<Ring>>,
    /// Pairs that frames to the guest may take.
    open: Vec<u16>,
    /// Whose turn it is to be received from first.
    turn: usize,
    /// Ends the connection.
    pub(super) connection: Option<UnixStream>,
    faults: u64,
    /// It broke the rules: its rings are left alone until it is gone.
    broken: bool,
    max_frame: usize,
    pub(super) drops: Drops,
}

impl Device {
    pub(super) fn new(pairs: u16, max_frame: usize) -> Self {
        Self {
            memory: Memory::default(),
            log: None,
            features: 0,
            rings: (0..2 * pairs).map(|_| None).collect(),
            open: Vec::with_capacity(pairs.into()),
            turn: 0,
            connection: None,
            faults: fault::count(),
            broken: false,
            max_frame,
            drops: Drops::default(),
        }
    }

    /// Without a front end. What it had, to be dropped elsewhere.
    pub(super) fn clear(&mut self) -> (Memory, Option<Arc<Log>>, Vec<Option<Ring>>) {
        self.connection = None;
        self.features = 0;
        self.broken = false;
        self.open.clear();
        let none = self.rings.iter().map(|_| None).collect();
        (
            std::mem::take(&mut self.memory),
            self.log.take(),
            std::mem::replace(&mut self.rings, none),
        )
    }

    pub(super) fn set_features(&mut self, features: u64) {
        self.features = features;
        for ring in self.rings.iter_mut().flatten() {
            ring.set_features(features);
        }
    }

    fn log(&self) -> Option<&Log> {
        noted(&self.log, self.features)
    }

    pub(super) fn install(&mut self, index: usize, mut ring: Ring) -> Option<Ring> {
        ring.want_kicks(false, self.log());
        ring.tell();
        let old = self
            .rings
            .get_mut(index)
            .and_then(|place| place.replace(ring));
        self.count_open();
        old
    }

    pub(super) fn remove(&mut self, index: usize) -> Option<Ring> {
        let mut ring = self.rings.get_mut(index)?.take()?;
        self.count_open();
        ring.publish(self.log());
        Some(ring)
    }

    pub(super) fn ring(&mut self, index: usize) -> Option<&mut Ring> {
        self.rings.get_mut(index)?.as_mut()
    }

    /// The rings are in this memory now, in which their places may have moved;
    /// false if one is not. The old one.
    pub(super) fn replace_memory(&mut self, memory: Memory) -> (Memory, bool) {
        let mut moved = true;
        for ring in self.rings.iter_mut().flatten() {
            moved &= ring.move_to(None, &memory);
        }
        (std::mem::replace(&mut self.memory, memory), moved)
    }

    pub(super) fn enable(&mut self, index: usize, enabled: bool) {
        if let Some(ring) = self.ring(index) {
            ring.enabled = enabled;
        }
        self.count_open();
    }

    fn count_open(&mut self) {
        self.open.clear();
        for (pair, rings) in self.rings.chunks(2).enumerate() {
            if rings[0].as_ref().is_some_and(|ring| ring.enabled) {
                self.open.push(pair as u16);
            }
        }
    }

    /// Whether frames can be sent to the guest.
    pub(super) fn is_up(&self) -> bool {
        !self.open.is_empty()
    }

    /// Has no more to do with a front end that broke the rules; the control
    /// thread cleans up.
    pub(super) fn fail(&mut self, broken: Broken) {
        if !std::mem::replace(&mut self.broken, true) {
            tracing::warn!(%broken, "a vhost-user front end is disconnected");
        }
        self.open.clear();
        if let Some(connection) = &self.connection {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Looks whether the front end took its memory away, if anybody's did.
    fn check(&mut self) {
        if fault::count() == self.faults {
            return;
        }
        self.faults = fault::count();
        let log = self.log.as_ref();
        if self.memory.is_cut() || log.is_some_and(|log| log.is_cut()) {
            self.fail(Broken::Cut);
        }
    }

    /// Receives from all pairs, beginning with another one each time.
    pub(super) fn receive(&mut self, most: usize, each: &mut dyn FnMut(&mut Frame<'_>)) -> usize {
        let pairs = self.rings.len() / 2;
        let mut done = 0;
        for i in 0..pairs {
            if done == most || self.broken {
                break;
            }
            let pair = (self.turn + i) % pairs;
            match self.receive_from(2 * pair + 1, most - done, each) {
                Ok(count) => done += count,
                Err(broken) => self.fail(broken),
            }
        }
        if done > 0 {
            self.turn = (self.turn + 1) % pairs;
            self.check();
        }
        done
    }

    fn receive_from(
        &mut self,
        index: usize,
        most: usize,
        each: &mut dyn FnMut(&mut Frame<'_>),
    ) -> Result<usize, Broken> {
        let ring = self.rings.get_mut(index).and_then(Option::as_mut);
        // One that is not enabled yet waits, as with DPDK: after a restart of
        // the switch, there are frames in it.
        let Some(ring) = ring.filter(|ring| ring.enabled) else {
            return Ok(0);
        };
        let count = usize::from(ring.available()?).min(most);
        if count == 0 {
            return Ok(0);
        }
        let log = noted(&self.log, self.features);
        let mut pieces = Pieces::default();
        ring.fetch(&self.memory, 0, count as u16);
        for _ in 0..count {
            pieces.clear();
            let (mut len, mut fits) = (0_usize, true);
            let mut budget = CHAIN;
            let chain = ring.chain(&self.memory, 0, false, &mut budget, &mut |_, piece| {
                len = len.saturating_add(piece.len());
                fits &= pieces.push(piece);
            });
            let head = match chain {
                Ok(head) => head,
                Err(broken) => {
                    ring.publish(log);
                    return Err(broken);
                }
            };
            ring.take(1);
            // The head is filled where it stays.
            let mut frame = Frame::default();
            let taken = if fits {
                packet::take(&mut pieces, len, self.features, &mut frame.head)
            } else {
                Err(Reason::TooBig)
            };
            match taken {
                Ok(offload) => {
                    (frame.body, frame.offload) = (pieces.list(), offload);
                    each(&mut frame);
                }
                Err(reason) => self.drops.add(reason),
            }
            ring.hand_back(head, 0, log);
        }
        ring.publish(log);
        Ok(count)
    }

    /// Sends a frame to the guest, cut or with its checksum computed if the
    /// guest does not do so.
    pub(super) fn send(&mut self, frame: &Frame<'_>) -> Result<(), Reason> {
        let index = match self.open.as_slice() {
            [] => return Err(Reason::Down),
            [pair] => *pair,
            pairs => pairs[packet::flow(frame.head.bytes()) as usize % pairs.len()],
        };
        let index = 2 * usize::from(index);
        let sums = has(self.features, net::VIRTIO_NET_F_GUEST_CSUM);
        let segments = frame.offload.segments.as_ref();
        if segments.is_some_and(|segments| !packet::takes(self.features, segments)) {
            let mut smalls = Segmenter::new(frame, self.max_frame, !sums)?;
            while let Some(small) = smalls.next() {
                self.send_on(index, &small, sums)?;
            }
            return Ok(());
        }
        if frame.offload.checksum.is_some() && !sums {
            let mut whole = frame.clone();
            finish_checksum(&mut whole)?;
            return self.send_on(index, &whole, sums);
        }
        self.send_on(index, frame, sums)
    }

    fn send_on(&mut self, index: usize, frame: &Frame<'_>, sums: bool) -> Result<(), Reason> {
        match self.copy_out(index, frame, sums) {
            Ok(result) => result,
            Err(broken) => {
                self.fail(broken);
                Err(Reason::Down)
            }
        }
    }

    /// Copies a frame into the next buffers of a ring.
    fn copy_out(
        &mut self,
        index: usize,
        frame: &Frame<'_>,
        sums: bool,
    ) -> Result<Result<(), Reason>, Broken> {
        let log = noted(&self.log, self.features);
        let Some(ring) = self.rings.get_mut(index).and_then(Option::as_mut) else {
            return Ok(Err(Reason::Down));
        };
        let header_len = packet::header_len(self.features);
        let mut header = frame.offload.to_virtio();
        if !sums {
            // Flags are for those who take checksums.
            header[0] = 0;
        }
        let merges = has(self.features, net::VIRTIO_NET_F_MRG_RXBUF);
        let most = if merges { MERGED } else { 1 };
        let mut source = Source::new(&header[..header_len], frame);
        let (mut count, mut budget) = (0_u16, CHAIN);
        while source.left() > 0 {
            if count == most {
                ring.keep(count);
                return Ok(Err(Reason::TooBig));
            }
            if count >= ring.available()? && count >= ring.look()? {
                ring.keep(count);
                return Ok(Err(Reason::Full));
            }
            let before = source.left();
            let mut fill = |at, piece| {
                let len = source.fill(piece);
                if let Some(log) = log {
                    log.note(at, len);
                }
            };
            let head = ring.chain(&self.memory, count, true, &mut budget, &mut fill)?;
            ring.hand_back(head, (before - source.left()) as u32, log);
            count += 1;
        }
        if merges {
            source.set_count(count);
        }
        ring.take(count);
        // What the next frames may be put into.
        ring.fetch(&self.memory, AHEAD, 1);
        Ok(Ok(()))
    }

    /// Lets the guest know of what was sent.
    pub(super) fn flush(&mut self) {
        let log = noted(&self.log, self.features);
        for ring in self.rings.iter_mut().step_by(2).flatten() {
            ring.publish(log);
        }
        self.check();
    }

    /// Asks for notifications of frames to be received; false if there are
    /// some already.
    pub(super) fn arm(&mut self) -> bool {
        if self.broken {
            return true;
        }
        let log = noted(&self.log, self.features);
        for ring in self.rings.iter_mut().skip(1).step_by(2).flatten() {
            ring.drain();
            if !ring.enabled {
                continue;
            }
            ring.want_kicks(true, log);
            match ring.look() {
                Ok(0) => {}
                Ok(_) => {
                    self.disarm();
                    return false;
                }
                Err(broken) => {
                    self.fail(broken);
                    return true;
                }
            }
        }
        true
    }

    pub(super) fn disarm(&mut self) {
        let log = noted(&self.log, self.features);
        for ring in self.rings.iter_mut().skip(1).step_by(2).flatten() {
            ring.want_kicks(false, log);
        }
    }
}

/// Where to note what is written, if the features say so.
fn noted(log: &Option<Arc<Log>>, features: u64) -> Option<&Log> {
    let log = log.as_deref();
    log.filter(|_| has(features, LOG_ALL))
}
