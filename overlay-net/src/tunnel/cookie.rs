//! What keeps strangers from making a node compute: a MAC that only who knows
//! the node's public key can make, and, when there are many handshakes, a
//! cookie that only who receives at the address it sends from can have.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::{digest, hmac};

use super::wire::{COOKIE, Datagram, HEADER, TAG};
use super::{PublicKey, Time, random};
use crate::drops::Reason;

/// Bytes of both MACs.
pub(super) const MACS: usize = 32;
const MAC: usize = 16;

/// How long a cookie is good for; twice that for one that was just made.
const COOKIE_AGE: Duration = Duration::from_secs(120);
/// Handshakes in a second, before cookies are asked for.
const CALM: u32 = 100;
/// Handshakes in a second, with cookies.
const BUSY: u32 = 1000;
/// Handshakes in a second from one address that has shown a cookie.
const EACH: u32 = 20;
/// Addresses that are told apart in a second.
const ADDRESSES: usize = 1000;

fn mac(key: &hmac::Key, bytes: &[u8]) -> [u8; MAC] {
    let mut mac = [0; MAC];
    mac.copy_from_slice(&hmac::sign(key, bytes).as_ref()[..MAC]);
    mac
}

fn is_mac(key: &hmac::Key, bytes: &[u8], is: &[u8]) -> bool {
    let mut differ = u8::from(is.len() != MAC);
    for (one, two) in mac(key, bytes).iter().zip(is) {
        differ |= one ^ two;
    }
    std::hint::black_box(differ) == 0
}

fn key(label: &[u8], public: &PublicKey) -> hmac::Key {
    let mut hash = digest::Context::new(&digest::SHA256);
    hash.update(label);
    hash.update(public);
    hmac::Key::new(hmac::HMAC_SHA256, hash.finish().as_ref())
}

/// The keys that messages to one node are marked with.
pub(super) struct To {
    mac: hmac::Key,
    cookie: hmac::Key,
    /// The cookie that it gave, and until when it is good.
    given: Option<([u8; MAC], Time)>,
    /// MAC 1 of the last message to it.
    last: [u8; MAC],
}

impl To {
    pub(super) fn new(public: &PublicKey) -> Self {
        Self {
            mac: key(b"blanket mac 1", public),
            cookie: key(b"blanket cookie", public),
            given: None,
            last: [0; MAC],
        }
    }

    /// Writes the last bytes of a message.
    pub(super) fn mark(&mut self, now: Time, message: &mut [u8]) {
        let Some(at) = message.len().checked_sub(MACS) else {
            return;
        };
        self.last = mac(&self.mac, &message[..at]);
        message[at..at + MAC].copy_from_slice(&self.last);
        let second = match self.given {
            Some((cookie, until)) if now < until => {
                let key = hmac::Key::new(hmac::HMAC_SHA256, &cookie);
                mac(&key, &message[..at + MAC])
            }
            _ => [0; MAC],
        };
        message[at + MAC..].copy_from_slice(&second);
    }

    /// Takes a cookie that answers the last message. False: it does not.
    pub(super) fn take(&mut self, now: Time, datagram: &mut [u8]) -> bool {
        let Some((header, sealed)) = datagram.split_at_mut_checked(24) else {
            return false;
        };
        let opened = sealing(&self.cookie, &self.last, &header[8..]).and_then(|key| {
            let nonce = Nonce::assume_unique_for_key([0; 12]);
            let cookie = key
                .open_in_place(nonce, Aad::from(self.last), sealed)
                .ok()?;
            <[u8; MAC]>::try_from(&*cookie).ok()
        });
        if let Some(cookie) = opened {
            self.given = Some((cookie, now + COOKIE_AGE));
        }
        opened.is_some()
    }
}

/// The key that one cookie is sealed with: it is used once.
fn sealing(key: &hmac::Key, last: &[u8], random: &[u8]) -> Option<LessSafeKey> {
    let mut context = hmac::Context::with_key(key);
    context.update(last);
    context.update(random);
    let key = UnboundKey::new(&CHACHA20_POLY1305, context.sign().as_ref());
    key.ok().map(LessSafeKey::new)
}

/// What a node does with an initiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is worth computing.
    Take,
    /// Its sender is to come again with this.
    Answer([u8; COOKIE]),
}

/// A node's door.
pub(super) struct Gate {
    mac: hmac::Key,
    cookie: hmac::Key,
    secrets: [hmac::Key; 2],
    renewed: Time,
    second: u64,
    taken: u32,
    shown: u32,
    from: HashMap<IpAddr, u32>,
}

impl Gate {
    pub(super) fn new(public: &PublicKey) -> Self {
        let secret = || hmac::Key::new(hmac::HMAC_SHA256, &random::<32>());
        Self {
            mac: key(b"blanket mac 1", public),
            cookie: key(b"blanket cookie", public),
            secrets: [secret(), secret()],
            renewed: Time::ZERO,
            second: 0,
            taken: 0,
            shown: 0,
            from: HashMap::new(),
        }
    }

    fn cookie(&self, which: usize, from: SocketAddr) -> [u8; MAC] {
        let mut context = hmac::Context::with_key(&self.secrets[which]);
        match from.ip() {
            IpAddr::V4(ip) => context.update(&ip.octets()),
            IpAddr::V6(ip) => context.update(&ip.octets()),
        }
        context.update(&from.port().to_be_bytes());
        let mut cookie = [0; MAC];
        cookie.copy_from_slice(&context.sign().as_ref()[..MAC]);
        cookie
    }

    /// Whether a message's sender knows our public key. It is enough for
    /// responses: only who saw an initiation can make another one worth a look.
    pub(super) fn is_for_us(&self, message: &[u8]) -> bool {
        let at = message.len().saturating_sub(MACS);
        let first = message.get(at..at + MAC);
        first.is_some_and(|first| is_mac(&self.mac, &message[..at], first))
    }

    /// Looks at an initiation (with its MACs) of `session`.
    pub(super) fn judge(
        &mut self,
        now: Time,
        from: SocketAddr,
        session: u32,
        message: &[u8],
    ) -> Result<Verdict, Reason> {
        let at = message.len().checked_sub(MACS).ok_or(Reason::Malformed)?;
        let (first, second) = message[at..].split_at(MAC);
        if !self.is_for_us(message) {
            return Err(Reason::Forged);
        }
        if now.as_secs() != self.second {
            (self.second, self.taken, self.shown) = (now.as_secs(), 0, 0);
            self.from.clear();
        }
        self.taken = self.taken.saturating_add(1);
        if self.taken <= CALM {
            return Ok(Verdict::Take);
        }
        if now >= self.renewed + COOKIE_AGE {
            self.secrets.swap(0, 1);
            self.secrets[0] = hmac::Key::new(hmac::HMAC_SHA256, &random::<32>());
            self.renewed = now;
        }
        let shown = (0..2).any(|which| {
            let key = hmac::Key::new(hmac::HMAC_SHA256, &self.cookie(which, from));
            is_mac(&key, &message[..at + MAC], second)
        });
        if !shown {
            let answer = self.answer(from, session, first);
            return answer.map(Verdict::Answer).ok_or(Reason::HandshakeFlood);
        }
        if self.from.len() >= ADDRESSES && !self.from.contains_key(&from.ip()) {
            return Err(Reason::HandshakeFlood);
        }
        let count = self.from.entry(from.ip()).or_insert(0);
        *count += 1;
        if *count > EACH || self.shown >= BUSY {
            return Err(Reason::HandshakeFlood);
        }
        self.shown += 1;
        Ok(Verdict::Take)
    }

    fn answer(&self, from: SocketAddr, session: u32, first: &[u8]) -> Option<[u8; COOKIE]> {
        let mut header = [0; HEADER];
        Datagram::Cookie { receiver: session }.write(&mut header);
        let mut answer = [0; COOKIE];
        answer[..8].copy_from_slice(&header[..8]);
        answer[8..24].copy_from_slice(&random::<16>());
        let key = sealing(&self.cookie, first, &answer[8..24])?;
        answer[24..24 + MAC].copy_from_slice(&self.cookie(0, from));
        let nonce = Nonce::assume_unique_for_key([0; 12]);
        let tag = key
            .seal_in_place_separate_tag(nonce, Aad::from(first), &mut answer[24..24 + MAC])
            .ok()?;
        answer[COOKIE - TAG..].copy_from_slice(tag.as_ref());
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busy_ask_for_cookies() {
        let public = [9; 32];
        let (mut gate, mut to) = (Gate::new(&public), To::new(&public));
        let from: SocketAddr = "192.0.2.1:7".parse().expect("an address");
        let now = Time::from_secs(5);
        let mut message = [3; 100];
        assert_eq!(gate.judge(now, from, 1, &message), Err(Reason::Forged));
        to.mark(now, &mut message);
        for _ in 0..CALM {
            assert_eq!(gate.judge(now, from, 1, &message), Ok(Verdict::Take));
        }
        let Ok(Verdict::Answer(mut answer)) = gate.judge(now, from, 1, &message) else {
            panic!("no cookie");
        };
        let receiver = 1;
        assert_eq!(
            Datagram::parse(&answer),
            Some(Datagram::Cookie { receiver })
        );
        let mut wrong = answer;
        wrong[30] ^= 1;
        assert!(!to.take(now, &mut wrong));
        assert!(to.take(now, &mut answer));
        to.mark(now, &mut message);
        for _ in 0..EACH {
            assert_eq!(gate.judge(now, from, 1, &message), Ok(Verdict::Take));
        }
        let flood = Err(Reason::HandshakeFlood);
        assert_eq!(gate.judge(now, from, 1, &message), flood);
        let other = "192.0.2.2:7".parse().expect("an address");
        let verdict = gate.judge(now, other, 1, &message);
        assert!(matches!(verdict, Ok(Verdict::Answer(_))), "not his cookie");
        let later = now + Duration::from_secs(1);
        assert_eq!(gate.judge(later, other, 1, &message), Ok(Verdict::Take));
    }
}
