//! Memory is sent as less than it is, where that is quicker: compressed, or as
//! what has changed since it was sent last.
//!
//! It is quicker where the link is slow and memory can be compressed. Both are
//! measured all the time: how long sending holds a stream up (in its socket, and
//! in the limit of `--bandwidth`), how long compressing takes, and what is left
//! of it. While memory is sent as it is, a sample of it is compressed now and
//! then; while it is compressed, it is sent as it is for a moment now and then
//! unless the link is what it waits for. All times are those of one stream: what
//! streams share, link and processors, is in them.

mod judge;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blanket_memory::GuestRam;
use blanket_memory::dirty::PAGE;
use vm_memory::{Bytes, GuestAddress};

use crate::batch::{Batch, is_zero};
use crate::delta::{self, Cache, Known, Page};
use crate::status::{Compress, Options, Packed};
use crate::wire::{self, Kind, MOST_MEMORY, PLACE};

use judge::{Judge, Sums, per};

/// What remembering and comparing takes at first: seconds per byte.
const COMPARING: f64 = 0.5e-9;
/// The link has to be so much slower than that.
const WORTH: f64 = 4.0;
/// Rounds without changes where they brought nothing.
const REST: u32 = 4;

/// What precedes a compressed run of pages: where it belongs, and its length.
const LZ4_HEAD: usize = PLACE + 4;
/// What precedes a change: where the page is, its checksum, and how many bytes
/// the change has.
const CHANGE_HEAD: usize = 8 + 4 + 2;

/// Most pages in a frame.
const MOST: usize = MOST_MEMORY / PAGE;

/// Whether changes are told.
#[derive(Debug, Default)]
struct Changes {
    /// They are in this round.
    on: bool,
    /// There are pages from an earlier round.
    filled: bool,
    /// What it took in this round.
    sums: Sums,
    /// What it takes: seconds per byte, once that is known.
    takes: Option<f64>,
    /// So many rounds without.
    rest: u32,
}

/// Makes less of memory, on all streams of a migration.
pub(crate) struct Squeeze {
    wanted: Compress,
    judge: Mutex<Judge>,
    changes: Mutex<Changes>,
    cache: Cache,
    compressed: [AtomicU64; 2],
    changed: [AtomicU64; 2],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn count(pair: &[AtomicU64; 2], before: usize, after: usize) {
    for (sum, more) in pair.iter().zip([before, after]) {
        sum.fetch_add(more as u64, Ordering::Relaxed);
    }
}

impl Squeeze {
    pub(crate) fn new(options: &Options) -> Self {
        let bytes = match options.compress {
            Compress::Off => 0,
            Compress::Auto | Compress::Lz4 => options.delta_cache,
        };
        Self {
            wanted: options.compress,
            judge: Mutex::default(),
            changes: Mutex::default(),
            cache: Cache::new(bytes),
            compressed: [const { AtomicU64::new(0) }; 2],
            changed: [const { AtomicU64::new(0) }; 2],
        }
    }

    /// A round over memory begins; `again`: over what has been sent already.
    /// Nothing is on its way then.
    pub(crate) fn begin_round(&self, again: bool) {
        let link = lock(&self.judge).link;
        let mut changes = lock(&self.changes);
        let sums = std::mem::take(&mut changes.sums);
        if sums.before > 0 {
            let takes = per(sums.work, sums.before);
            changes.takes = Some(takes);
            let saved = sums.before.saturating_sub(sums.after) as f64 * link;
            if changes.filled && saved < takes * sums.before as f64 {
                changes.rest = REST;
            }
            changes.filled = true;
        }
        let slow = link > WORTH * changes.takes.unwrap_or(COMPARING);
        let wanted = match self.wanted {
            Compress::Off => false,
            Compress::Lz4 => true,
            Compress::Auto => changes.rest == 0 && slow,
        };
        changes.rest = changes.rest.saturating_sub(1);
        changes.on = again && wanted && !self.cache.is_empty();
        if !changes.on {
            changes.filled = false;
            // It would not hear of what is sent.
            self.cache.clear();
        }
    }

    /// What a stream makes less with, in the round of this number; in none,
    /// nothing is known of what the destination has.
    pub(crate) fn packer(&self, round: Option<u32>) -> Packer<'_> {
        let mut packer = Packer {
            squeeze: self,
            round: round.unwrap_or_default(),
            changes: round.is_some() && lock(&self.changes).on,
            compress: false,
            most: 0,
            batch: Sums::default(),
            sample: Sums::default(),
            told: Sums::default(),
            out: Vec::new(),
            list: Vec::new(),
        };
        packer.plan();
        packer
    }

    /// What has been made less so far.
    pub(crate) fn packed(&self) -> Packed {
        let load = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
        let [compressed, compressed_to] = self.compressed.each_ref().map(load);
        let [changed, changed_to] = self.changed.each_ref().map(load);
        Packed {
            compressed,
            compressed_to,
            changed,
            changed_to,
        }
    }
}

/// Puts memory into batches, on one stream.
pub(crate) struct Packer<'a> {
    squeeze: &'a Squeeze,
    round: u32,
    /// Changes are told.
    changes: bool,
    /// This batch is compressed.
    compress: bool,
    /// Most bytes of a change: more would be compressed to less.
    most: usize,
    batch: Sums,
    sample: Sums,
    told: Sums,
    out: Vec<u8>,
    /// Changes of a piece of memory.
    list: Vec<u8>,
}

/// How a page is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Zeros,
    Change,
    Whole,
}

impl Packer<'_> {
    /// Whether the next batch is compressed.
    fn plan(&mut self) {
        self.compress = match self.squeeze.wanted {
            Compress::Off => false,
            Compress::Lz4 => true,
            Compress::Auto => lock(&self.squeeze.judge).plan(),
        };
        let whole = PAGE - CHANGE_HEAD - 1;
        self.most = match self.compress {
            true => whole.min((lock(&self.squeeze.judge).samples.ratio() * PAGE as f64) as usize),
            false => whole,
        };
        if self.compress && self.most == 0 {
            // It has not been compressed before.
            self.most = whole;
        }
    }

    /// Packs the pages that are at `at`.
    pub(crate) fn pack(&mut self, at: u64, pages: &[u8], batch: &mut Batch) {
        let (pages, _) = pages.as_chunks::<PAGE>();
        let mut place = at;
        for some in pages.chunks(MOST) {
            self.pack_some(place, some, batch);
            place += (some.len() * PAGE) as u64;
        }
    }

    fn pack_some(&mut self, at: u64, pages: &[Page], batch: &mut Batch) {
        let mut hows = [How::Whole; MOST];
        let began = Instant::now();
        let hows = &mut hows[..pages.len()];
        for ((how, page), number) in hows.iter_mut().zip(pages).zip(0..) {
            *how = self.how(at + number * PAGE as u64, page);
        }
        if self.changes {
            self.told.work += began.elapsed();
        }
        if !self.list.is_empty() {
            batch.frames.begin();
            batch.frames.push(&self.list);
            batch.frames.end(Kind::Change);
            self.list.clear();
        }
        let mut first = 0;
        for run in hows.chunk_by(|a, b| a == b) {
            let place = at + (first * PAGE) as u64;
            let bytes = pages[first..first + run.len()].as_flattened();
            match run[0] {
                How::Zeros => batch.add_zero(place, bytes.len() as u64),
                How::Change => {}
                How::Whole => self.whole(place, bytes, batch),
            }
            first += run.len();
        }
    }

    /// How a page is sent; what has changed in it is in the list then.
    fn how(&mut self, at: u64, page: &Page) -> How {
        let cache = &self.squeeze.cache;
        if is_zero(page) {
            if self.changes {
                cache.forget(at);
            }
            return How::Zeros;
        }
        if !self.changes {
            return How::Whole;
        }
        self.told.before += PAGE as u64;
        let start = self.list.len();
        // Its head follows when it is known.
        self.list.extend([0; CHANGE_HEAD]);
        let known = cache.again(at, page, self.round, self.most, &mut self.list);
        if known != Known::Change {
            self.list.truncate(start);
            self.told.after += PAGE as u64;
            return How::Whole;
        }
        let len = self.list.len() - start;
        let head = &mut self.list[start..start + CHANGE_HEAD];
        head[..8].copy_from_slice(&at.to_le_bytes());
        head[8..12].copy_from_slice(&crc32fast::hash(page).to_le_bytes());
        head[12..].copy_from_slice(&((len - CHANGE_HEAD) as u16).to_le_bytes());
        self.told.after += len as u64;
        count(&self.squeeze.changed, PAGE, len);
        How::Change
    }

    /// Packs pages as a whole, compressed or not.
    fn whole(&mut self, at: u64, bytes: &[u8], batch: &mut Batch) {
        if self.compress {
            let began = Instant::now();
            let most = lz4_flex::block::get_maximum_output_size(bytes.len());
            self.out.resize(most.max(self.out.len()), 0);
            let done = lz4_flex::block::compress_into(bytes, &mut self.out);
            let len = done.unwrap_or(usize::MAX);
            let less = len.saturating_add(LZ4_HEAD) < bytes.len();
            let work = began.elapsed();
            self.batch.work += work;
            self.sample.add(&Sums {
                before: bytes.len() as u64,
                after: len.min(bytes.len()) as u64,
                work,
                send: Duration::ZERO,
            });
            if less {
                batch.frames.begin();
                batch.frames.push(&at.to_le_bytes());
                batch.frames.push(&(bytes.len() as u32).to_le_bytes());
                batch.frames.push(&self.out[..len]);
                batch.frames.end(Kind::Lz4);
                count(&self.squeeze.compressed, bytes.len(), len);
                // What was saved; the rest is known when it is sent.
                self.batch.before += (bytes.len() - len) as u64;
                return;
            }
        }
        batch.frames.begin();
        batch.frames.push(&at.to_le_bytes());
        batch.frames.push(bytes);
        batch.frames.end(Kind::Pages);
    }

    /// A batch of so many bytes has been sent, which took so long; another one
    /// begins.
    pub(crate) fn sent(&mut self, bytes: usize, took: Duration) {
        self.batch.before += bytes as u64;
        self.batch.after += bytes as u64;
        self.batch.send += took;
        let batch = std::mem::take(&mut self.batch);
        let sample = std::mem::take(&mut self.sample);
        let told = std::mem::take(&mut self.told);
        if self.squeeze.wanted == Compress::Auto {
            lock(&self.squeeze.judge).note(&batch, &sample);
            lock(&self.squeeze.changes).sums.add(&told);
        }
        self.plan();
    }
}

/// What a [`Kind::Lz4`] frame brings: an address, and the pages from there on.
///
/// # Errors
/// It is damaged.
pub(crate) fn unpack(payload: &[u8]) -> Result<(u64, Vec<u8>), wire::Error> {
    let damaged = wire::Error::Damaged("compressed memory without a place");
    let (at, rest) = payload.split_first_chunk().ok_or(damaged)?;
    let damaged = wire::Error::Damaged("compressed memory without a length");
    let (len, bytes) = rest.split_first_chunk().ok_or(damaged)?;
    let len = u32::from_le_bytes(*len) as usize;
    // Before there is room for it.
    if len > MOST_MEMORY || !len.is_multiple_of(PAGE) {
        return Err(wire::Error::Damaged("compressed memory is too long"));
    }
    let mut pages = vec![0; len];
    match lz4_flex::block::decompress_into(bytes, &mut pages) {
        Ok(made) if made == len => Ok((u64::from_le_bytes(*at), pages)),
        _ => Err(wire::Error::Damaged("compressed memory is no such")),
    }
}

/// Carries out a [`Kind::Change`] frame.
///
/// # Errors
/// It is damaged, or changes other pages than those that are here.
pub(crate) fn change(payload: &[u8], ram: &GuestRam) -> Result<(), wire::Error> {
    let part = || wire::Error::Damaged("a part of a change");
    let outside = |_| wire::Error::Damaged("changes outside memory");
    let mut rest = payload;
    let mut page = [0; PAGE];
    while !rest.is_empty() {
        let (at, more) = rest.split_first_chunk().ok_or_else(part)?;
        let (sum, more) = more.split_first_chunk().ok_or_else(part)?;
        let (len, more) = more.split_first_chunk().ok_or_else(part)?;
        let len = usize::from(u16::from_le_bytes(*len));
        let (bytes, more) = more.split_at_checked(len).ok_or_else(part)?;
        rest = more;
        let (at, sum) = (u64::from_le_bytes(*at), u32::from_le_bytes(*sum));
        if !at.is_multiple_of(PAGE as u64) {
            return Err(wire::Error::Damaged("a change of parts of pages"));
        }
        ram.read_slice(&mut page, GuestAddress(at))
            .map_err(outside)?;
        delta::apply(bytes, &mut page).ok_or_else(part)?;
        if crc32fast::hash(&page) != sum {
            return Err(wire::Error::Damaged("a change of another page"));
        }
        ram.write_slice(&page, GuestAddress(at)).map_err(outside)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
