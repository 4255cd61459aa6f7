//! What of a disk has not come yet, while its guest uses it.
//!
//! A disk whose content follows its guest ([`Absent::expect`]) has three who
//! meet here: the guest's queues, which may not read what is missing, and wait
//! for it; whoever brings it ([`Absent::bring`]), who may not write over what the
//! guest has written meanwhile; and nobody else. A write that covers whole blocks
//! need not wait: what it has written is there, and is not brought any more.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Bytes of a block: it is missing as a whole, or there. A disk's last one may be
/// shorter.
pub const BLOCK: u64 = 4096;

/// What a range of a disk is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// To be read.
    Read,
    /// To be written, or emptied.
    Write,
}

/// Whether a range can be used.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// It can.
    Free,
    /// It can, to be written; what was missing of it is nobody else's until
    /// [`Absent::written`].
    Claimed(Claim),
    /// Not before more has come.
    Wait,
    /// Never: what is missing of it does not come.
    Lost,
}

/// Blocks that are missing, and being written.
#[derive(Debug, PartialEq, Eq)]
pub struct Claim(Vec<Range<u64>>);

/// See [the module](self).
#[derive(Debug)]
pub struct Absent {
    capacity: u64,
    /// Something may be missing.
    any: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// A bit per block that is missing, made when one is.
    words: Vec<u64>,
    missing: u64,
    /// Blocks that are being written, by the guest or by who brings them.
    busy: Vec<Range<u64>>,
    /// What somebody has begun to wait for, in bytes.
    wanted: Vec<Range<u64>>,
    /// Who brings it is told of these.
    bringer: Option<EventFd>,
    /// Those who wait.
    users: Vec<EventFd>,
    lost: bool,
}

impl Absent {
    /// Of a disk of so many bytes, all of which is there.
    #[must_use]
    pub fn new(capacity: u64) -> Self {
        Self {
            capacity,
            any: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something may be missing.
    #[must_use]
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Tells `event` from now on when something has come.
    pub fn add_user(&self, event: EventFd) {
        self.lock().users.push(event);
    }

    /// Tells `event` when somebody has begun to wait.
    pub fn set_bringer(&self, event: EventFd) {
        self.lock().bringer = Some(event);
    }

    /// These bytes have not come: nobody has used them.
    pub fn expect(&self, range: Range<u64>) {
        let end = range.end.min(self.capacity);
        let blocks = range.start / BLOCK..end.div_ceil(BLOCK);
        if range.start >= end {
            return;
        }
        let mut state = self.lock();
        let words = usize::try_from(self.capacity.div_ceil(BLOCK).div_ceil(64));
        // More than can be addressed is not on any disk.
        let words = words.unwrap_or(usize::MAX);
        if state.words.len() < words {
            state.words.resize(words, 0);
        }
        state.add(blocks);
        self.any.store(true, Ordering::Release);
    }

    /// Bytes that are missing, or being written for the first time.
    #[must_use]
    pub fn left(&self) -> u64 {
        let state = self.lock();
        let busy: u64 = state.busy.iter().map(|run| run.end - run.start).sum();
        (state.missing + busy) * BLOCK
    }

    /// The next run of bytes from `at` on that is missing, no longer than `most`.
    #[must_use]
    pub fn next(&self, at: u64, most: u64) -> Option<Range<u64>> {
        let run = self
            .lock()
            .next(at.div_ceil(BLOCK), (most / BLOCK).max(1))?;
        Some(self.bytes(run))
    }

    /// Whether something of these bytes is missing.
    #[must_use]
    pub fn is_missing(&self, range: &Range<u64>) -> bool {
        let next = self.lock().next(range.start / BLOCK, 1);
        next.is_some_and(|run| run.start * BLOCK < range.end)
    }

    /// What somebody has begun to wait for since the last time, as far as it is
    /// still missing.
    #[must_use]
    pub fn take_wanted(&self) -> Vec<Range<u64>> {
        let mut state = self.lock();
        let mut all = Vec::new();
        for range in std::mem::take(&mut state.wanted) {
            let mut at = range.start / BLOCK;
            let end = range.end.div_ceil(BLOCK);
            while let Some(run) = state.next(at, end.saturating_sub(at)) {
                if run.start >= end {
                    break;
                }
                at = run.end;
                all.push(self.bytes(run.start..run.end.min(end)));
            }
        }
        all
    }

    /// Whether `range` can be used; if it cannot, it is asked for, but for who has
    /// `asked` already.
    #[must_use]
    pub fn enter(&self, what: Use, range: &Range<u64>, asked: bool) -> Entry {
        if !self.any() || range.is_empty() {
            return Entry::Free;
        }
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
        let mut state = self.lock();
        if state.busy.iter().any(|busy| overlap(busy, &blocks)) {
            return Entry::Wait;
        }
        let needed = match what {
            Use::Read => vec![blocks.clone()],
            // What is written in part.
            Use::Write => {
                let end = range.end.min(self.capacity);
                let head = !range.start.is_multiple_of(BLOCK);
                let tail = !end.is_multiple_of(BLOCK) && end < self.capacity;
                let head = head.then(|| blocks.start..blocks.start + 1);
                let tail = tail.then(|| blocks.end - 1..blocks.end);
                head.into_iter().chain(tail).collect()
            }
        };
        let missing = needed.into_iter().filter(|run| state.lacks(run));
        let missing: Vec<_> = missing.map(|run| self.bytes(run)).collect();
        if !missing.is_empty() {
            if state.lost {
                return Entry::Lost;
            }
            if !asked {
                state.wanted.extend(missing);
                if let Some(bringer) = &state.bringer {
                    let _ = bringer.write(1);
                }
            }
            return Entry::Wait;
        }
        match what {
            Use::Read => Entry::Free,
            Use::Write => {
                let runs = state.take(blocks);
                if runs.is_empty() {
                    return Entry::Free;
                }
                state.busy.extend(runs.iter().cloned());
                Entry::Claimed(Claim(runs))
            }
        }
    }

    /// A write is over: what it has claimed is there; or, if it has failed, missing
    /// as before.
    pub fn written(&self, claim: &Claim, done: bool) {
        let mut state = self.lock();
        for run in &claim.0 {
            state.busy.retain(|busy| busy != run);
            if !done {
                state.add(run.clone());
            }
        }
        self.settle(&mut state);
    }

    /// Has `put` write those of these bytes that are missing; they are there then.
    ///
    /// # Errors
    /// `put` fails: they are missing on.
    pub fn bring(
        &self,
        range: Range<u64>,
        mut put: impl FnMut(Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = range.end.min(self.capacity);
        // Blocks that have come as a whole.
        let last = match end == self.capacity {
            true => end.div_ceil(BLOCK),
            false => end / BLOCK,
        };
        let blocks = range.start.div_ceil(BLOCK)..last;
        let mut state = self.lock();
        let runs = state.take(blocks);
        state.busy.extend(runs.iter().cloned());
        drop(state);
        let mut result = Ok(());
        for run in &runs {
            let put = match result {
                Ok(()) => put(self.bytes(run.clone())),
                Err(_) => Err(io::ErrorKind::Interrupted.into()),
            };
            let mut state = self.lock();
            state.busy.retain(|busy| busy != run);
            if put.is_err() {
                state.add(run.clone());
            }
            drop(state);
            result = result.and(put);
        }
        let mut state = self.lock();
        self.settle(&mut state);
        result
    }

    /// What is missing does not come any more: who needs it is told so.
    pub fn lose(&self) {
        let mut state = self.lock();
        state.lost = true;
        self.settle(&mut state);
    }

    /// Waits until something has changed, or for a moment.
    pub fn wait(&self) {
        let moment = std::time::Duration::from_millis(20);
        // It is looked at in any case.
        let _ = self.changed.wait_timeout(self.lock(), moment);
    }

    fn settle(&self, state: &mut State) {
        if state.missing == 0 && state.busy.is_empty() {
            self.any.store(false, Ordering::Release);
        }
        for user in &state.users {
            // Full is as good as told.
            let _ = user.write(1);
        }
        self.changed.notify_all();
    }

    fn bytes(&self, blocks: Range<u64>) -> Range<u64> {
        blocks.start * BLOCK..(blocks.end * BLOCK).min(self.capacity)
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

impl State {
    fn has(&self, block: u64) -> bool {
        let word = self.words.get((block / 64) as usize);
        word.is_some_and(|word| word & 1 << (block % 64) != 0)
    }

    /// Whether something of these blocks is missing.
    fn lacks(&self, blocks: &Range<u64>) -> bool {
        let next = self.next(blocks.start, 1);
        next.is_some_and(|run| run.start < blocks.end)
    }

    /// The next blocks from `from` on that are missing, no more than `most`.
    fn next(&self, from: u64, most: u64) -> Option<Range<u64>> {
        let mut index = (from / 64) as usize;
        let mut word = self.words.get(index)? & u64::MAX << (from % 64);
        while word == 0 {
            index += 1;
            word = *self.words.get(index)?;
        }
        let start = index as u64 * 64 + u64::from(word.trailing_zeros());
        let mut end = start;
        while end - start < most && self.has(end) {
            end += 1;
        }
        (end > start).then_some(start..end)
    }

    fn add(&mut self, blocks: Range<u64>) {
        for block in blocks {
            if let Some(word) = self.words.get_mut((block / 64) as usize) {
                let bit = 1 << (block % 64);
                self.missing += u64::from(*word & bit == 0);
                *word |= bit;
            }
        }
    }

    /// Takes those of these blocks that are missing: they are not any more.
    fn take(&mut self, blocks: Range<u64>) -> Vec<Range<u64>> {
        let mut all = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end
            && let Some(run) = self.next(at, blocks.end - at)
            && run.start < blocks.end
        {
            let run = run.start..run.end.min(blocks.end);
            for block in run.clone() {
                if let Some(word) = self.words.get_mut((block / 64) as usize) {
                    *word &= !(1 << (block % 64));
                }
            }
            self.missing -= run.end - run.start;
            at = run.end;
            all.push(run);
        }
        all
    }
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "ranges are what is compared here"
)]
mod tests {
    use super::*;

    const CAPACITY: u64 = 200 * BLOCK + 512;

    fn absent() -> Absent {
        let absent = Absent::new(CAPACITY);
        absent.expect(10 * BLOCK..20 * BLOCK);
        absent.expect(150 * BLOCK..CAPACITY);
        absent
    }

    #[test]
    fn who_reads_what_is_missing_waits_until_all_of_it_has_come() {
        let absent = absent();
        let before = 0..10 * BLOCK;
        assert_eq!(absent.enter(Use::Read, &before, false), Entry::Free);
        assert_eq!(absent.take_wanted(), []);
        let range = 9 * BLOCK..12 * BLOCK;
        assert_eq!(absent.enter(Use::Read, &range, false), Entry::Wait);
        assert_eq!(absent.take_wanted(), [10 * BLOCK..12 * BLOCK]);
        assert_eq!(absent.enter(Use::Read, &range, true), Entry::Wait);
        assert_eq!(absent.take_wanted(), []);
        let mut put = Vec::new();
        // Half a block has not come.
        let half = 8 * BLOCK..11 * BLOCK + 512;
        let brought = absent.bring(half, |run| {
            put.push(run);
            Ok(())
        });
        brought.unwrap();
        assert_eq!(put, [10 * BLOCK..11 * BLOCK]);
        assert_eq!(absent.enter(Use::Read, &range, true), Entry::Wait);
        absent.bring(11 * BLOCK..13 * BLOCK, |_| Ok(())).unwrap();
        assert_eq!(absent.enter(Use::Read, &range, true), Entry::Free);
        assert_eq!(absent.next(0, 1 << 20), Some(13 * BLOCK..20 * BLOCK));
    }

    #[test]
    fn what_the_guest_has_written_is_not_brought() {
        let absent = absent();
        let range = 8 * BLOCK..13 * BLOCK;
        let Entry::Claimed(claim) = absent.enter(Use::Write, &range, false) else {
            panic!("it waits");
        };
        assert_eq!(
            absent.enter(Use::Read, &(0..11 * BLOCK), false),
            Entry::Wait
        );
        let nothing = |run: Range<u64>| panic!("{run:?} is written by the guest");
        absent.bring(8 * BLOCK..13 * BLOCK, nothing).unwrap();
        absent.written(&claim, true);
        absent.bring(8 * BLOCK..13 * BLOCK, nothing).unwrap();
        assert_eq!(
            absent.enter(Use::Read, &(0..13 * BLOCK), false),
            Entry::Free
        );
        // One that failed is as if it had not been.
        let range = 13 * BLOCK..14 * BLOCK;
        let Entry::Claimed(claim) = absent.enter(Use::Write, &range, false) else {
            panic!("it waits");
        };
        absent.written(&claim, false);
        assert_eq!(absent.enter(Use::Read, &range, false), Entry::Wait);
        assert_eq!(absent.left(), (7 + 51) * BLOCK);
    }

    #[test]
    fn who_writes_a_part_of_a_missing_block_waits_for_the_rest_of_it() {
        let absent = absent();
        let range = 11 * BLOCK + 512..14 * BLOCK - 512;
        assert_eq!(absent.enter(Use::Write, &range, false), Entry::Wait);
        let ends = [11 * BLOCK..12 * BLOCK, 13 * BLOCK..14 * BLOCK];
        assert_eq!(absent.take_wanted(), ends);
        for end in ends {
            absent.bring(end, |_| Ok(())).unwrap();
        }
        let claimed = absent.enter(Use::Write, &range, true);
        assert_eq!(claimed, Entry::Claimed(Claim(vec![12..13])));
        // The disk's last block is shorter, and is covered where the disk ends.
        let last = 200 * BLOCK..CAPACITY;
        let claimed = absent.enter(Use::Write, &last, false);
        assert_eq!(claimed, Entry::Claimed(Claim(vec![200..201])));
    }

    #[test]
    fn what_cannot_be_put_is_missing_on_and_what_is_lost_is_told() {
        let absent = absent();
        let full = |_: Range<u64>| Err(io::ErrorKind::StorageFull.into());
        assert!(absent.bring(0..CAPACITY, full).is_err());
        assert_eq!(absent.left(), (10 + 51) * BLOCK);
        absent.lose();
        assert_eq!(absent.enter(Use::Read, &(0..CAPACITY), false), Entry::Lost);
        assert_eq!(absent.enter(Use::Read, &(0..BLOCK), false), Entry::Free);
        let whole = 10 * BLOCK..11 * BLOCK;
        let entered = absent.enter(Use::Write, &whole, false);
        assert!(matches!(entered, Entry::Claimed(_)));
    }

    #[test]
    fn when_all_has_come_nobody_looks_any_more() {
        let absent = absent();
        absent.bring(0..20 * BLOCK, |_| Ok(())).unwrap();
        assert!(absent.any());
        absent.bring(0..CAPACITY, |_| Ok(())).unwrap();
        assert!(!absent.any() && absent.next(0, 1 << 20).is_none());
    }
}
