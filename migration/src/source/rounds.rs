//! What goes over the streams: round after round, all of the disks and of
//! memory, then what was written meanwhile.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use blanket_memory::GuestRam;
use blanket_memory::dirty::{PAGE, Pages};
use vm_memory::{Bytes, GuestAddress};

use super::{Error, Guest, How, Source};
use crate::batch::Batch;
use crate::disk::{self, Disks, Extent, Whole};
use crate::squeeze::{Packer, Squeeze};
use crate::status::{Mode, Pace, Phase, Progress, Round, micros};
use crate::way::Stream;
use crate::wire::{self, Kind, MOST_MEMORY};

/// Bytes that are sent at once.
const BATCH: usize = 256 << 10;
/// Pages that one stream sends alone: more threads would take longer.
const FEW: u64 = 256;
/// A round of so many bytes tells the rate.
const TELLING: u64 = 1 << 20;
/// What is left may not become less as well as what was sent: it is not expected
/// to save more than so many times of what is sent.
const MOST_SAVED: u64 = 3;
/// Bytes of a disk that are sent before the destination has to have them on its
/// own.
const STRETCH: u64 = 128 << 20;
/// Rounds over what is written to the disks, before memory's turn comes.
const DISK_ROUNDS: u32 = 8;
/// So many bytes of disks are left for the rounds over memory.
pub(super) const LITTLE: u64 = 8 << 20;

/// Of what the destination has nothing but zeros yet: those are not sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fresh {
    Nothing,
    Memory,
    /// What is sent of the disks.
    Disks,
}

impl Fresh {
    /// In this round over memory.
    pub(super) fn in_round(number: u32) -> Self {
        match number {
            0 => Self::Memory,
            _ => Self::Nothing,
        }
    }
}

/// What a round sends.
pub(super) struct Load {
    pub(super) pages: Pages,
    pub(super) extents: Vec<Extent>,
}

impl Load {
    fn bytes(&self) -> u64 {
        self.pages.count() * PAGE as u64 + disk::bytes(&self.extents)
    }

    /// What has been written since the last time, if disks are copied as memory is.
    pub(super) fn written(guest: &mut dyn Guest) -> Result<Self, Error> {
        Ok(Self {
            pages: guest.dirty().map_err(Error::Guest)?,
            extents: disk::written(&guest.disks()),
        })
    }
}

impl Source {
    /// When the guest changes hands, as far as the destination can have it so.
    pub(super) fn mode(&mut self, how: &How<'_>) -> Mode {
        match (how.options.mode, self.unable.take()) {
            (Mode::PreCopy, _) => Mode::PreCopy,
            (_, Some(reason)) => {
                how.progress.lock().unable = Some(reason);
                Mode::PreCopy
            }
            (mode, None) => mode,
        }
    }

    /// Sends the disks' content, until little is written to them meanwhile;
    /// what is left.
    pub(super) fn copy_disks(
        &mut self,
        guest: &mut dyn Guest,
        how: &How<'_>,
    ) -> Result<Vec<Extent>, Error> {
        let disks = guest.disks();
        if disks.is_empty() {
            return Ok(Vec::new());
        }
        self.look_over(guest, how, |this, guest, blank, extents| {
            if extents.is_empty() {
                return Ok(());
            }
            let fresh = if blank { Fresh::Disks } else { Fresh::Nothing };
            this.disk_round(guest, extents, fresh, how)
        })?;
        let left = disk::written(&disks);
        self.thin_out(guest, left, LITTLE, how)
    }

    /// Goes through all disks, of which what is written is noted from now on, and
    /// gives `each` what the destination lacks of them, a stretch at a time, and
    /// whether it has nothing of that disk.
    pub(super) fn look_over(
        &mut self,
        guest: &mut dyn Guest,
        how: &How<'_>,
        mut each: impl FnMut(&mut Self, &mut dyn Guest, bool, Vec<Extent>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let disks = guest.disks();
        {
            let mut status = how.progress.lock();
            status.phase = Phase::Disks;
            status.disks = disks.iter().map(|disk| disk.capacity()).sum();
        }
        for (index, disk) in disks.iter().enumerate() {
            disk.watch()?;
            let blank = self.blank.get(index).copied().unwrap_or(false);
            let mut whole = Whole::of(&**disk, index, !blank);
            loop {
                let extents = whole.next(STRETCH)?;
                if extents.is_empty() {
                    break;
                }
                let extents = match blank {
                    true => extents,
                    false => self.differing(&**disk, &extents, how)?,
                };
                each(self, guest, blank, extents)?;
            }
        }
        if self.blank.iter().any(|blank| !blank) {
            // What it had may not be durable there, and nothing else be sent.
            self.flush()?;
        }
        Ok(())
    }

    /// Sends what was written to the disks, until `little` is written meanwhile
    /// or it becomes no less; what is left.
    pub(super) fn thin_out(
        &mut self,
        guest: &mut dyn Guest,
        mut left: Vec<Extent>,
        little: u64,
        how: &How<'_>,
    ) -> Result<Vec<Extent>, Error> {
        for _ in 0..DISK_ROUNDS {
            let before = disk::bytes(&left);
            if before <= little {
                break;
            }
            self.disk_round(guest, left, Fresh::Nothing, how)?;
            left = disk::written(&guest.disks());
            // The guest writes as fast as can be sent.
            if disk::bytes(&left) > before / 4 * 3 {
                break;
            }
        }
        Ok(left)
    }

    fn disk_round(
        &mut self,
        guest: &mut dyn Guest,
        extents: Vec<Extent>,
        fresh: Fresh,
        how: &How<'_>,
    ) -> Result<(), Error> {
        let load = Load {
            pages: Pages::none(guest.ram()),
            extents,
        };
        let round = self.round(guest.ram(), &guest.disks(), &load, fresh, how)?;
        note(how.progress, round);
        self.flush()
    }

    /// Waits until the destination has made durable what it has of the disks.
    pub(super) fn flush(&mut self) -> Result<(), Error> {
        wire::send(&mut self.control, Kind::Flush, &[])?;
        wire::expect(&mut self.control, Kind::Flush)?;
        Ok(())
    }

    /// Sends `load` over all streams, and waits until it is in place.
    pub(super) fn round(
        &mut self,
        ram: &GuestRam,
        disks: &Disks,
        load: &Load,
        fresh: Fresh,
        how: &How<'_>,
    ) -> Result<Round, Error> {
        let progress = how.progress;
        let start = Instant::now();
        let before = progress.bytes();
        let saved = how.squeeze.packed().saved();
        if !load.pages.is_empty() {
            how.squeeze.begin_round(fresh != Fresh::Memory);
        }
        let bytes = load.bytes();
        progress.begin_round(bytes);
        let memory = load.pages.runs(ram, MOST_MEMORY).into_iter();
        let memory = memory.map(|(at, len)| Piece::Memory(at, len));
        let extents = load.extents.iter().copied().map(Piece::Disk);
        let pieces: Vec<_> = extents.chain(memory).collect();
        self.rounds = self.rounds.wrapping_add(1);
        let work = Work {
            ram,
            disks,
            pieces: &pieces,
            next: AtomicUsize::new(0),
            fresh,
            number: self.rounds,
            failed: AtomicBool::new(false),
            pace: &how.pace,
            squeeze: &how.squeeze,
            progress,
        };
        let few = bytes <= FEW * PAGE as u64;
        let streams = if few { 1 } else { self.data.len() };
        let (here, others) = self.data[..streams].split_at_mut(1);
        let result = std::thread::scope(|scope| {
            let others: Vec<_> = others
                .iter_mut()
                .map(|stream| scope.spawn(|| work.send(stream)))
                .collect();
            let mut result = here.iter_mut().try_for_each(|stream| work.send(stream));
            for other in others {
                let sent = other.join();
                let sent = sent.unwrap_or(Err(Error::Guest("a sender died".to_owned())));
                result = result.and(sent);
            }
            result
        });
        result?;
        let disk = disk::bytes(&load.extents);
        let packed = how.squeeze.packed();
        let mut status = progress.lock();
        status.disks_sent += disk;
        status.packed = packed;
        Ok(Round {
            pages: load.pages.count(),
            disk,
            bytes: progress.bytes() - before,
            saved: packed.saved() - saved,
            us: micros(start.elapsed()),
            throttle: status.throttle,
            ..Round::default()
        })
    }
}

/// Notes how a round went; the expected downtime in microseconds.
pub(super) fn note(progress: &Progress, round: Round) -> u64 {
    let mut status = progress.lock();
    let us = round.us.max(1);
    if round.bytes + round.saved >= TELLING || status.rate == 0 {
        status.rate = (round.bytes * 1_000_000 / us).max(1);
        let saved = round.saved.min(round.bytes * MOST_SAVED);
        status.memory_rate = ((round.bytes + saved) * 1_000_000 / us).max(1);
    }
    let memory = round.dirty * PAGE as u64;
    status.dirty_rate = (memory + round.dirty_disk) * 1_000_000 / us;
    status.expected_downtime_us =
        memory * 1_000_000 / status.memory_rate + round.dirty_disk * 1_000_000 / status.rate;
    status.rounds.push(round);
    status.expected_downtime_us
}

/// What a frame can carry.
#[derive(Clone, Copy)]
enum Piece {
    Memory(GuestAddress, usize),
    Disk(Extent),
}

/// What the streams of a round share.
struct Work<'a> {
    ram: &'a GuestRam,
    disks: &'a Disks,
    pieces: &'a [Piece],
    next: AtomicUsize,
    fresh: Fresh,
    number: u32,
    failed: AtomicBool,
    pace: &'a Pace,
    squeeze: &'a Squeeze,
    progress: &'a Progress,
}

impl Work<'_> {
    fn send(&self, stream: &mut Stream) -> Result<(), Error> {
        let sent = self.send_runs(stream);
        if sent.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        if let Err(Error::Wire(wire::Error::Cut)) = sent
            && let Err(reason @ wire::Error::Aborted(_)) = wire::receive(stream, &mut Vec::new())
        {
            return Err(reason.into());
        }
        sent
    }

    fn send_runs(&self, stream: &mut Stream) -> Result<(), Error> {
        let mut batch = Batch::default();
        let mut packer = self.squeeze.packer(Some(self.number));
        let mut buffer = vec![0; MOST_MEMORY];
        while let Some(piece) = self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            if self.progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if self.failed.load(Ordering::Relaxed) {
                // Another stream has the reason.
                return Ok(());
            }
            let len = self.pack(*piece, &mut buffer, &mut packer, &mut batch)?;
            self.progress.saw(len as u64);
            if batch.len() >= BATCH {
                self.flush(stream, &mut packer, &mut batch)?;
            }
        }
        self.flush(stream, &mut packer, &mut batch)?;
        let last = Instant::now();
        wire::send(stream, Kind::Sync, &self.number.to_le_bytes())?;
        let back = wire::expect(stream, Kind::Sync)?;
        // What was on its way still.
        packer.sent(0, last.elapsed());
        if back != self.number.to_le_bytes() {
            return Err(wire::Error::Damaged("another round was acknowledged").into());
        }
        Ok(())
    }

    /// Reads a piece and puts it into the batch; its bytes.
    fn pack(
        &self,
        piece: Piece,
        buffer: &mut [u8],
        packer: &mut Packer<'_>,
        batch: &mut Batch,
    ) -> Result<usize, Error> {
        match piece {
            Piece::Memory(at, len) => {
                let memory = &mut buffer[..len];
                let read = self.ram.read_slice(memory, at);
                read.map_err(|error| Error::Guest(error.to_string()))?;
                packer.pack(at.0, memory, batch);
                Ok(len)
            }
            Piece::Disk(Extent { disk, at, len }) => {
                let bytes = &mut buffer[..len];
                let read = self.disks[disk].read(at, bytes);
                read.map_err(|error| Error::Guest(format!("a disk cannot be read: {error}")))?;
                batch.pack(Some(disk as u64), at, bytes);
                Ok(len)
            }
        }
    }

    fn flush(
        &self,
        stream: &mut Stream,
        packer: &mut Packer<'_>,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        match self.fresh {
            Fresh::Nothing => {}
            Fresh::Memory => batch.forget_zeros(),
            Fresh::Disks => batch.forget_holes(),
        }
        batch.add_zeros();
        let bytes = batch.frames.bytes().len();
        let began = Instant::now();
        self.pace.wait(bytes);
        stream.send(&mut batch.frames).map_err(wire::Error::from)?;
        self.progress.sent(bytes as u64);
        packer.sent(bytes, began.elapsed());
        batch.clear();
        Ok(())
    }
}
