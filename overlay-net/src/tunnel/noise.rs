//! The handshake's messages: Noise `IKpsk2` by `snow`.

use snow::params::DHChoice;
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::{Builder, HandshakeState};

use super::aead::{Cipher, Costs, Key};
use super::cookie::MACS;
use super::wire::{Datagram, HEADER, INITIATION, RESPONSE, u64_at};
use super::{PrivateKey, PublicKey, random};
use crate::drops::Reason;

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_SHA256";
const PROLOGUE: &[u8] = b"blanket tunnel 1";
const PAYLOAD: usize = 24;
const ANSWER: usize = 8;

/// A new private key.
#[must_use]
pub fn generate() -> PrivateKey {
    random()
}

/// Has what handshakes' random numbers come from be opened: in a program that is
/// linked statically that is a file, which a confined thread cannot open.
/// Whether there are some.
#[must_use]
pub fn prepare() -> bool {
    let source = DefaultResolver.resolve_rng();
    source.is_some_and(|mut source| source.try_fill_bytes(&mut [0]).is_ok())
}

/// The public key of a private one.
#[must_use]
pub fn public(private: &PrivateKey) -> PublicKey {
    let mut public = [0; 32];
    if let Some(mut dh) = DefaultResolver.resolve_dh(&DHChoice::Curve25519) {
        dh.set(private);
        public.copy_from_slice(&dh.pubkey()[..32]);
    }
    public
}

/// The keys of a new session.
pub(super) struct Keys {
    pub(super) cipher: Cipher,
    pub(super) out: Key,
    pub(super) into: Key,
}

fn builder(private: &PrivateKey) -> Option<Builder<'_>> {
    Builder::new(PATTERN.parse().ok()?)
        .local_private_key(private)
        .ok()?
        .prologue(PROLOGUE)
        .ok()
}

fn keys(state: &mut HandshakeState, cipher: Cipher) -> Keys {
    let (one, two) = state.dangerously_get_raw_split();
    let (out, into) = if state.is_initiator() {
        (one, two)
    } else {
        (two, one)
    };
    Keys {
        cipher,
        out: Key::new(cipher, &out),
        into: Key::new(cipher, &into),
    }
}

/// Who we are in handshakes.
pub(super) struct Identity {
    pub(super) private: PrivateKey,
    pub(super) costs: Costs,
}

/// A handshake that waits for its response.
pub(super) struct Started(HandshakeState);

impl Identity {
    /// The first message, without its MACs.
    pub(super) fn start(
        &self,
        peer: &PublicKey,
        psk: &[u8; 32],
        sender: u32,
        stamp: u64,
    ) -> Option<(Started, [u8; INITIATION])> {
        let mut state = builder(&self.private)?
            .remote_public_key(peer)
            .ok()?
            .psk(2, psk)
            .ok()?
            .build_initiator()
            .ok()?;
        let mut payload = [0; PAYLOAD];
        payload[..2].copy_from_slice(&self.costs.aes.to_be_bytes());
        payload[2..4].copy_from_slice(&self.costs.chacha.to_be_bytes());
        payload[8..16].copy_from_slice(&stamp.to_be_bytes());
        let mut message = [0; INITIATION];
        let at = write(Datagram::Initiation { sender }, &mut message);
        let end = INITIATION - MACS;
        state.write_message(&payload, &mut message[at..end]).ok()?;
        Some((Started(state), message))
    }

    /// Reads a first message.
    pub(super) fn read(&self, message: &[u8; INITIATION]) -> Result<Asked, Reason> {
        let state = builder(&self.private).and_then(|builder| builder.build_responder().ok());
        let mut state = state.ok_or(Reason::Handshake)?;
        let mut payload = [0; INITIATION];
        let len = state
            .read_message(&message[8..INITIATION - MACS], &mut payload)
            .map_err(|_| Reason::Forged)?;
        let public = state
            .get_remote_static()
            .and_then(|key| key.try_into().ok());
        let stamp = u64_at(&payload, 8).filter(|_| len == PAYLOAD);
        Ok(Asked {
            public: public.ok_or(Reason::Malformed)?,
            stamp: stamp.ok_or(Reason::Malformed)?,
            costs: Costs {
                aes: u16::from_be_bytes([payload[0], payload[1]]),
                chacha: u16::from_be_bytes([payload[2], payload[3]]),
            },
            state,
        })
    }
}

/// A first message that was read.
pub(super) struct Asked {
    pub(super) public: PublicKey,
    pub(super) stamp: u64,
    costs: Costs,
    state: HandshakeState,
}

impl Asked {
    /// The second message, without its MACs.
    pub(super) fn answer(
        mut self,
        ours: Costs,
        psk: &[u8; 32],
        sender: u32,
        receiver: u32,
    ) -> Option<(Keys, [u8; RESPONSE])> {
        let cipher = ours.cheaper(self.costs);
        self.state.set_psk(2, psk).ok()?;
        let mut message = [0; RESPONSE];
        let at = write(Datagram::Response { sender, receiver }, &mut message);
        let mut payload = [0; ANSWER];
        payload[0] = cipher.number();
        let end = RESPONSE - MACS;
        self.state
            .write_message(&payload, &mut message[at..end])
            .ok()?;
        Some((keys(&mut self.state, cipher), message))
    }
}

impl Started {
    /// Reads the second message. One that is not genuine changes nothing.
    pub(super) fn finish(&mut self, message: &[u8; RESPONSE]) -> Result<Keys, Reason> {
        let mut payload = [0; RESPONSE];
        let len = self
            .0
            .read_message(&message[12..RESPONSE - MACS], &mut payload)
            .map_err(|_| Reason::Forged)?;
        let cipher = Cipher::from_number(payload[0]).filter(|_| len == ANSWER);
        Ok(keys(&mut self.0, cipher.ok_or(Reason::Malformed)?))
    }
}

fn write(datagram: Datagram, message: &mut [u8]) -> usize {
    let mut header = [0; HEADER];
    let len = datagram.write(&mut header);
    message[..len].copy_from_slice(&header[..len]);
    len
}
