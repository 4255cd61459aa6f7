//! The guest's end of the store's connection, for tests.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

const RING: u32 = 1024;
const REQ_CONS: u64 = 2048;
const REQ_PROD: u64 = 2052;
const RSP_CONS: u64 = 2056;
const RSP_PROD: u64 = 2060;

/// A message: type, request, transaction, payload.
type Message = (u32, u32, u32, Vec<u8>);

/// A guest that speaks to the store over a page in its memory.
pub(crate) struct StoreClient {
    memory: GuestRam,
    page: GuestAddress,
    next: u32,
    outgoing: VecDeque<u8>,
    incoming: Vec<u8>,
    answers: Vec<Message>,
    events: Vec<(String, String)>,
}

impl StoreClient {
    pub(crate) fn new(memory: GuestRam, page: GuestAddress) -> Self {
        Self {
            memory,
            page,
            next: 1,
            outgoing: VecDeque::new(),
            incoming: Vec::new(),
            answers: Vec::new(),
            events: Vec::new(),
        }
    }

    /// The word at an offset in the page.
    pub(crate) fn peek(&self, offset: u64) -> u32 {
        let at = GuestAddress(self.page.0 + offset);
        self.memory.load(at, Ordering::SeqCst).unwrap()
    }

    /// Sets the word at an offset in the page.
    pub(crate) fn poke(&self, offset: u64, value: u32) {
        let at = GuestAddress(self.page.0 + offset);
        self.memory.store(value, at, Ordering::SeqCst).unwrap();
    }

    /// Has a request sent; returns its number.
    pub(crate) fn request(&mut self, kind: u32, transaction: u32, payload: &[u8]) -> u32 {
        let request = self.next;
        self.next += 1;
        for word in [kind, request, transaction, payload.len() as u32] {
            self.raw(&word.to_le_bytes());
        }
        self.raw(payload);
        request
    }

    /// Has just a header sent that announces `len` bytes.
    pub(crate) fn request_of_len(&mut self, kind: u32, len: u32) {
        for word in [kind, 0, 0, len] {
            self.raw(&word.to_le_bytes());
        }
    }

    /// Has bytes sent as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.outgoing.extend(bytes);
    }

    /// Sends what fits into the ring; false if nothing does.
    pub(crate) fn send(&mut self) -> bool {
        let mut producer = self.peek(REQ_PROD);
        let mut sent = false;
        while producer.wrapping_sub(self.peek(REQ_CONS)) < RING {
            let Some(byte) = self.outgoing.pop_front() else {
                break;
            };
            let at = GuestAddress(self.page.0 + u64::from(producer % RING));
            self.memory.write_obj(byte, at).unwrap();
            producer = producer.wrapping_add(1);
            sent = true;
        }
        self.poke(REQ_PROD, producer);
        sent
    }

    /// Takes what has arrived; false if nothing has.
    pub(crate) fn receive(&mut self) -> bool {
        let (mut consumer, producer) = (self.peek(RSP_CONS), self.peek(RSP_PROD));
        let received = consumer != producer;
        while consumer != producer {
            let at = GuestAddress(self.page.0 + 1024 + u64::from(consumer % RING));
            self.incoming.push(self.memory.read_obj(at).unwrap());
            consumer = consumer.wrapping_add(1);
        }
        self.poke(RSP_CONS, consumer);
        while let Some(message) = self.message() {
            if message.0 == 15 {
                let text = String::from_utf8(message.3).unwrap();
                let mut parts = text.split('\0').map(str::to_owned);
                self.events
                    .push((parts.next().unwrap(), parts.next().unwrap()));
            } else {
                self.answers.push(message);
            }
        }
        received
    }

    fn message(&mut self) -> Option<Message> {
        let header: [u8; 16] = *self.incoming.first_chunk()?;
        let word = |i: usize| u32::from_le_bytes(header[4 * i..4 * i + 4].try_into().unwrap());
        let len = word(3) as usize;
        if self.incoming.len() < 16 + len {
            return None;
        }
        let rest = self.incoming.split_off(16 + len);
        let message = std::mem::replace(&mut self.incoming, rest);
        Some((word(0), word(1), word(2), message[16..].to_vec()))
    }

    /// Takes the answer to a request: its type, transaction and payload.
    pub(crate) fn answer(&mut self, request: u32) -> Option<(u32, u32, Vec<u8>)> {
        let at = self.answers.iter().position(|a| a.1 == request)?;
        let (kind, _, transaction, payload) = self.answers.remove(at);
        Some((kind, transaction, payload))
    }

    /// Takes the watch events so far: path and token.
    pub(crate) fn events(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.events)
    }

    /// Forgets everything, like a new kernel.
    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.memory.clone(), self.page);
    }
}
