//! Sessions: keys, counters, windows; found by the number in a datagram.

use std::time::Duration;

use super::noise::Keys;
use super::window::Window;
use super::wire::{Datagram, HEADER, TAG};
use super::{PeerId, Time, random};

/// After this, new keys are made.
pub(super) const REKEY: Duration = Duration::from_secs(120);
/// After this by who has answered, if who has asked does not.
pub(super) const REKEY_LATE: Duration = Duration::from_secs(135);
/// After this, keys are not used any more.
pub(super) const EXPIRED: Duration = Duration::from_secs(180);
/// For a session that nothing was ever received in.
pub(super) const UNHEARD: Duration = Duration::from_secs(15);

/// Datagrams that AES-GCM may seal with one key (RFC 9001, B.1: 2^28 of up to
/// 2^11 bytes, 2^23 of any size).
fn limit(largest: usize) -> u64 {
    if largest <= 1 << 11 { 1 << 28 } else { 1 << 23 }
}

/// Keys, and what was sent and received with them.
pub(super) struct Session {
    pub(super) peer: PeerId,
    /// The peer's number for it.
    pub(super) remote: u32,
    pub(super) keys: Keys,
    pub(super) window: Window,
    pub(super) born: Time,
    /// We have asked for it.
    pub(super) initiator: bool,
    /// The peer has it, too.
    pub(super) heard: bool,
    sent: u64,
    largest: usize,
}

impl Session {
    pub(super) fn new(peer: PeerId, remote: u32, keys: Keys, born: Time, initiator: bool) -> Self {
        Self {
            peer,
            remote,
            keys,
            window: Window::new(),
            born,
            initiator,
            heard: initiator,
            sent: 0,
            largest: 0,
        }
    }

    /// Whether it may seal or open.
    pub(super) fn usable(&self, now: Time) -> bool {
        now < self.born + EXPIRED && self.sent < limit(self.largest)
    }

    /// Whether there should be new keys.
    pub(super) fn is_old(&self, now: Time) -> bool {
        let age = if self.initiator { REKEY } else { REKEY_LATE };
        now >= self.born + age || self.sent >= limit(self.largest) / 2
    }

    /// When it is old, or expired.
    pub(super) fn deadline(&self, now: Time) -> Time {
        let age = match (self.heard, self.initiator) {
            (false, _) => UNHEARD,
            (_, true) => REKEY,
            (_, false) => REKEY_LATE,
        };
        let old = self.born + age;
        if now < old { old } else { self.born + EXPIRED }
    }

    /// Seals a datagram, whose records lie between room for the header and
    /// room for the tag.
    pub(super) fn seal(&mut self, datagram: &mut [u8]) {
        let Some((header, rest)) = datagram.split_first_chunk_mut::<HEADER>() else {
            return;
        };
        let Some((records, tag)) = rest.split_last_chunk_mut::<TAG>() else {
            return;
        };
        let (receiver, counter) = (self.remote, self.sent);
        self.sent += 1;
        self.largest = self.largest.max(records.len());
        Datagram::Data { receiver, counter }.write(header);
        *tag = self.keys.out.seal(counter, records);
    }

    #[cfg(test)]
    pub(super) fn skip_to(&mut self, sent: u64) {
        self.sent = sent;
    }
}

enum Entry {
    Free,
    /// A handshake waits for its response.
    Waiting(PeerId),
    Open(Box<Session>),
}

/// All sessions of a node. A number's lower half is its place, its upper half
/// random.
#[derive(Default)]
pub(super) struct Table {
    entries: Vec<(u32, Entry)>,
    free: Vec<u16>,
}

impl Table {
    /// A number for a handshake that begins. `None`: there are too many.
    pub(super) fn reserve(&mut self, peer: PeerId) -> Option<u32> {
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                let place = u16::try_from(self.entries.len()).ok()?;
                self.entries.push((0, Entry::Free));
                place
            }
        };
        let [high, low] = random::<2>();
        let id = u32::from_be_bytes([high, low, 0, 0]) | u32::from(place);
        self.entries[usize::from(place)] = (id, Entry::Waiting(peer));
        Some(id)
    }

    fn entry(&mut self, id: u32) -> Option<&mut Entry> {
        let (is, entry) = self.entries.get_mut((id & 0xffff) as usize)?;
        (*is == id).then_some(entry)
    }

    /// The handshake has made a session.
    pub(super) fn open(&mut self, id: u32, session: Session) {
        if let Some(entry) = self.entry(id) {
            *entry = Entry::Open(Box::new(session));
        }
    }

    pub(super) fn remove(&mut self, id: u32) {
        if let Some(entry) = self.entry(id)
            && !matches!(entry, Entry::Free)
        {
            *entry = Entry::Free;
            self.free.push(id as u16);
        }
    }

    pub(super) fn get(&mut self, id: u32) -> Option<&mut Session> {
        match self.entry(id)? {
            Entry::Open(session) => Some(session),
            _ => None,
        }
    }

    /// Whose handshake it is that waits.
    pub(super) fn waiting(&mut self, id: u32) -> Option<PeerId> {
        match self.entry(id)? {
            Entry::Waiting(peer) => Some(*peer),
            _ => None,
        }
    }

    /// Sessions and handshakes.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}
