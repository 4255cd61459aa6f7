//! Which datagrams of a session have come (RFC 6479).

const WORDS: usize = 128;
/// How far back a datagram may come late.
pub(super) const WINDOW: u64 = (WORDS as u64 - 1) * 64;

/// A bitmap that moves with the highest counter. Trains overtake each other,
/// so it is wide.
pub(super) struct Window {
    next: u64,
    bits: Box<[u64; WORDS]>,
}

impl Window {
    pub(super) fn new() -> Self {
        Self {
            next: 0,
            bits: Box::new([0; WORDS]),
        }
    }

    fn place(counter: u64) -> (usize, u64) {
        ((counter / 64) as usize % WORDS, 1 << (counter % 64))
    }

    /// Whether it has not come yet, as far as one can tell.
    pub(super) fn is_new(&self, counter: u64) -> bool {
        if counter >= self.next {
            return counter < u64::MAX;
        }
        let (word, bit) = Self::place(counter);
        self.next - counter <= WINDOW && self.bits[word] & bit == 0
    }

    /// It has come, and is genuine. True: none after it has come.
    pub(super) fn mark(&mut self, counter: u64) -> bool {
        let newest = counter >= self.next;
        if newest {
            let (from, to) = (self.next.div_ceil(64), counter / 64);
            // The words that are entered for the first time, or again.
            for word in from..=to.min(from.saturating_add(WORDS as u64 - 1)) {
                self.bits[(word as usize) % WORDS] = 0;
            }
            self.next = counter + 1;
        }
        let (word, bit) = Self::place(counter);
        self.bits[word] |= bit;
        newest
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_comes_once(steps in proptest::collection::vec((0_u64..3, 0_u64..20_000), 1..400)) {
            let mut window = Window::new();
            let (mut seen, mut highest) = (HashSet::new(), 0);
            for (kind, by) in steps {
                let counter = match kind {
                    0 => highest + by % 100,
                    1 => highest + by,
                    _ => highest.saturating_sub(by),
                };
                let new = window.is_new(counter);
                let late = highest.saturating_sub(counter) >= WINDOW;
                prop_assert_eq!(new, !seen.contains(&counter) && !late, "{}", counter);
                if new {
                    prop_assert_eq!(window.mark(counter), seen.is_empty() || counter > highest);
                    seen.insert(counter);
                    highest = highest.max(counter);
                }
            }
        }
    }
}
