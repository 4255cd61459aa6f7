//! A page that is sent again, as what has changed in it since.
//!
//! A change is a number of bytes that are as they were, a number of bytes that
//! are others, and these; as many of them as it takes. Numbers have seven bits to
//! a byte, the lowest first; the highest bit says that there is one more byte.
//!
//! The source remembers pages as it last sent them ([`Cache`]): what it reads of
//! the guest's memory is what it sends or compares, and what it remembers. A page
//! is sent once in a round, and no round begins before all of the last one is in
//! place: so what is remembered is what the destination has, whichever streams
//! brought it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use blanket_memory::dirty::PAGE;

/// The bytes of a page.
pub(crate) type Page = [u8; PAGE];

/// Equal bytes between two changes that are not worth a pair of numbers.
const GAP: usize = 4;
/// Most bytes of a number: for those up to the size of a page.
const DIGITS: usize = 2;

/// Where pages differ from `at` on.
fn differs(old: &Page, new: &Page, at: usize) -> Option<usize> {
    let mut at = at;
    while at < PAGE && !at.is_multiple_of(16) {
        if old[at] != new[at] {
            return Some(at);
        }
        at += 1;
    }
    let (old_words, new_words) = (old[at..].as_chunks::<16>().0, new[at..].as_chunks::<16>().0);
    let word = old_words.iter().zip(new_words).position(|(a, b)| a != b)?;
    let start = at + word * 16;
    (start..start + 16).find(|at| old[*at] != new[*at])
}

fn push(number: usize, out: &mut Vec<u8>) {
    let mut rest = number;
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

fn pop(bytes: &mut &[u8]) -> Option<usize> {
    let mut number = 0;
    for digit in 0..DIGITS {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= usize::from(byte & 0x7f) << (7 * digit);
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Appends what makes `new` of `old`, unless it is more than `most` bytes;
/// whether it did.
pub(crate) fn encode(old: &Page, new: &Page, most: usize, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let mut done = 0;
    let mut next = differs(old, new, 0);
    while let Some(from) = next {
        let mut to = from;
        next = loop {
            while to < PAGE && old[to] != new[to] {
                to += 1;
            }
            match differs(old, new, to) {
                Some(again) if again - to < GAP => to = again,
                other => break other,
            }
        };
        push(from - done, out);
        push(to - from, out);
        out.extend_from_slice(&new[from..to]);
        done = to;
        if out.len() - start > most {
            out.truncate(start);
            return false;
        }
    }
    true
}

/// Changes a page; none if that is no change of a page.
pub(crate) fn apply(mut change: &[u8], page: &mut Page) -> Option<()> {
    let mut at = 0;
    while !change.is_empty() {
        at += pop(&mut change)?;
        let len = pop(&mut change)?;
        let bytes = change.split_off(..len)?;
        page.get_mut(at..at + len)?.copy_from_slice(bytes);
        at += len;
    }
    Some(())
}

/// Pages that are remembered together: those of neighbours.
const GROUP: usize = 64;

struct Slot {
    /// Where it belongs.
    at: u64,
    /// The round in which it was sent.
    round: u32,
    page: Box<Page>,
}

/// Pages as they were last sent.
///
/// Each page has one place, which it shares with others; who was sent in this
/// round or in the last one keeps it. A guest that writes more pages than there
/// are places has some of them here, rather than all of them in turns.
#[derive(Default)]
pub(crate) struct Cache {
    groups: Vec<Mutex<Vec<Option<Slot>>>>,
}

/// What is known of a page that is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// Nothing.
    No,
    /// It was here, and has changed too much.
    Other,
    /// The change has been told.
    Change,
}

impl Cache {
    /// Of so many bytes of pages at most.
    pub(crate) fn new(bytes: u64) -> Self {
        let groups = bytes / (GROUP * PAGE) as u64;
        Self {
            groups: (0..groups).map(|_| Mutex::default()).collect(),
        }
    }

    /// Whether there is room for any.
    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    fn group(&self, at: u64) -> Option<MutexGuard<'_, Vec<Option<Slot>>>> {
        let group = (at / (GROUP * PAGE) as u64).checked_rem(self.groups.len() as u64)?;
        let group = self.groups.get(group as usize)?;
        Some(group.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Appends what has changed in a page, if that is known and no more than
    /// `most` bytes, and remembers the page. It is sent in any case.
    pub(crate) fn again(
        &self,
        at: u64,
        page: &Page,
        round: u32,
        most: usize,
        out: &mut Vec<u8>,
    ) -> Known {
        let Some(mut slots) = self.group(at) else {
            return Known::No;
        };
        slots.resize_with(GROUP, || None);
        let slot = &mut slots[(at / PAGE as u64) as usize % GROUP];
        let known = match slot {
            Some(slot) if slot.at == at => match encode(&slot.page, page, most, out) {
                true => Known::Change,
                false => Known::Other,
            },
            Some(slot) if round.wrapping_sub(slot.round) <= 1 => return Known::No,
            _ => Known::No,
        };
        match slot {
            Some(slot) => {
                slot.at = at;
                slot.round = round;
                slot.page.copy_from_slice(page);
            }
            None => {
                *slot = Some(Slot {
                    at,
                    round,
                    page: Box::new(*page),
                });
            }
        }
        known
    }

    /// Forgets a page: the destination has another one.
    pub(crate) fn forget(&self, at: u64) {
        let Some(mut slots) = self.group(at) else {
            return;
        };
        let slot = slots.get_mut((at / PAGE as u64) as usize % GROUP);
        if let Some(slot) = slot {
            *slot = slot.take().filter(|slot| slot.at != at);
        }
    }

    /// Forgets all pages, and lets their memory go.
    pub(crate) fn clear(&self) {
        for group in &self.groups {
            *group.lock().unwrap_or_else(PoisonError::into_inner) = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Some bytes of a page, changed.
    fn changed(old: &Page, changes: &[(usize, Vec<u8>)]) -> Page {
        let mut new = *old;
        for (at, bytes) in changes {
            for (place, byte) in new[*at..].iter_mut().zip(bytes) {
                *place ^= byte;
            }
        }
        new
    }

    fn page(seed: u64) -> Page {
        let mut state = seed;
        std::array::from_fn(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
    }

    proptest! {
        #[test]
        fn what_has_changed_makes_the_new_page(
            seed: u64,
            changes in proptest::collection::vec(
                (0..PAGE, proptest::collection::vec(any::<u8>(), 1..300)), 0..20),
            most in 0..2 * PAGE,
        ) {
            let old = page(seed);
            let new = changed(&old, &changes);
            let mut out = vec![1, 2, 3];
            if encode(&old, &new, most, &mut out) {
                prop_assert!(out.len() <= most + 3);
                let mut made = old;
                prop_assert!(apply(&out[3..], &mut made).is_some());
                prop_assert!(made == new);
            } else {
                prop_assert_eq!(&out, &[1, 2, 3]);
                prop_assert!(encode(&old, &new, 2 * PAGE, &mut out) && out.len() > most + 3);
            }
        }

        #[test]
        fn garbage_changes_something_or_is_refused_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let _ = apply(&bytes, &mut [7; PAGE]);
        }
    }

    #[test]
    fn little_is_told_of_what_has_changed_little() {
        let old = page(1);
        let mut out = Vec::new();
        assert!(encode(&old, &old, 0, &mut out) && out.is_empty());
        let mut new = old;
        new[PAGE - 1] ^= 1;
        new[0] ^= 1;
        new[3] ^= 1;
        assert!(encode(&old, &new, PAGE, &mut out));
        // 0, 4, four bytes; 4091 (two bytes), 1, a byte.
        assert_eq!(out.len(), 6 + 4);
    }

    #[test]
    fn numbers_and_changes_beyond_a_page_are_refused() {
        for bytes in [
            &[0x80, 0x80, 0x80, 0][..],
            &[0x80],
            &[0, 5, 1],
            &[0xff, 0x7f, 1, 1],
            &[0xff, 0x1f, 2, 1, 1],
        ] {
            assert_eq!(apply(bytes, &mut [0; PAGE]), None, "{bytes:?}");
        }
        assert_eq!(apply(&[0xff, 0x1f, 1, 1], &mut [0; PAGE]), Some(()));
    }

    #[test]
    fn a_page_is_known_until_it_is_forgotten_and_has_its_place_while_it_is_used() {
        let most = PAGE / 2;
        let cache = Cache::new((GROUP * PAGE) as u64);
        // Of the same place.
        let (here, there) = (5 * PAGE as u64, ((GROUP + 5) * PAGE) as u64);
        let mut out = Vec::new();
        let mut again = |at, page: &Page, round| cache.again(at, page, round, most, &mut out);
        assert_eq!(again(here, &page(1), 1), Known::No);
        assert_eq!(again(there, &page(2), 2), Known::No);
        assert_eq!(again(here, &page(1), 2), Known::Change);
        assert_eq!(again(here, &page(3), 3), Known::Other);
        assert_eq!(again(here, &page(3), 3), Known::Change);
        // Nobody has sent it for a while.
        assert_eq!(again(there, &page(2), 5), Known::No);
        assert_eq!(again(there, &page(2), 6), Known::Change);
        cache.forget(here);
        assert_eq!(again(there, &page(2), 7), Known::Change);
        cache.forget(there);
        assert_eq!(again(there, &page(2), 8), Known::No);
        cache.clear();
        assert_eq!(again(there, &page(2), 8), Known::No);
        assert!(out.is_empty());
        // A cache without room knows nothing.
        let none = Cache::new(4096);
        assert!(none.is_empty());
        assert_eq!(none.again(0, &page(1), 1, most, &mut out), Known::No);
        none.forget(0);
    }
}
