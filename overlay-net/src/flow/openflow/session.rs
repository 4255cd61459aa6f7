//! One controller's connection, without its transport.

use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use super::error::{Code, Wrong};
use super::oxm;
use super::wire::{Put, Reader};
use super::{Datapath, Event, HEADER, LONGEST, PacketIn, VERSION, kind, multipart, requests};
use crate::flow::control::Gone;
use crate::flow::fields::Field;
use crate::flow::matches::Match;
use crate::flow::tables::Entry;

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Fatal {
    /// The controller speaks no version that is spoken here.
    #[error("the controller does not speak OpenFlow 1.3")]
    Version,
    /// What it sends is no OpenFlow.
    #[error("what the controller sends is no OpenFlow")]
    Garbage,
}

/// Bytes that wait for a controller, above which it is not answered.
pub(super) const BACKLOG: usize = 1 << 20;

/// Who is master: one state for all sessions of a datapath.
#[derive(Clone, Debug, Default)]
pub(super) struct Roles(Arc<Mutex<Masters>>);

#[derive(Debug, Default)]
struct Masters {
    next: u64,
    master: Option<u64>,
    generation: Option<u64>,
}

/// What a controller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Equal = 1,
    Master = 2,
    Slave = 3,
}

/// A session. Its output is to be sent even when it ends.
#[derive(Debug)]
pub struct Session {
    id: u64,
    roles: Roles,
    role: Role,
    greeted: bool,
    rx: Vec<u8>,
    pub(super) tx: Vec<u8>,
    /// What others are to be told, too.
    pub(super) events: Vec<Event>,
    miss_len: u16,
    /// Requests wait until answers have been sent.
    behind: bool,
    /// Which events it wants as master, and as slave: frames, ports, entries.
    wants: [[u32; 3]; 2],
}

impl Session {
    /// A session that is alone, or the first.
    #[must_use]
    pub fn new() -> Self {
        Self::among(&Roles::default())
    }

    /// A session of a datapath that has others.
    #[must_use]
    pub(super) fn among(roles: &Roles) -> Self {
        let id = {
            let mut masters = roles.0.lock().unwrap_or_else(PoisonError::into_inner);
            masters.next += 1;
            masters.next
        };
        let mut session = Self {
            id,
            roles: roles.clone(),
            role: Role::Equal,
            greeted: false,
            rx: Vec::new(),
            tx: Vec::new(),
            events: Vec::new(),
            miss_len: 128,
            behind: false,
            wants: [[7, 7, 15], [0, 7, 0]],
        };
        // Versions: a bitmap with 1.3 in it.
        session.reply(kind::HELLO, 0, |to| {
            to.u16(1).u16(8).u32(1 << VERSION);
        });
        session
    }

    /// Takes bytes from the controller and answers. What is to be done in
    /// `datapath` is done and published.
    ///
    /// # Errors
    ///
    /// The session is over, once its output has been sent.
    pub fn on_bytes(&mut self, bytes: &[u8], datapath: &mut dyn Datapath) -> Result<(), Fatal> {
        self.rx.extend_from_slice(bytes);
        let mut done = 0;
        self.behind = false;
        let result = loop {
            if self.tx.len() >= BACKLOG {
                self.behind = true;
                break Ok(());
            }
            let rest = &self.rx[done..];
            let Some((header, _)) = rest.split_first_chunk::<HEADER>() else {
                break Ok(());
            };
            let [version, _, high, low, ..] = *header;
            let len = usize::from(u16::from_be_bytes([high, low]));
            if len < HEADER {
                break Err(Fatal::Garbage);
            }
            let Some(message) = rest.get(..len) else {
                break Ok(());
            };
            let message = message.to_vec();
            done += len;
            if let Err(fatal) = self.message(version, &message, datapath) {
                break Err(fatal);
            }
        };
        self.rx.drain(..done);
        datapath.control().publish();
        result
    }

    /// Whether there are requests that wait until answers have been sent: no
    /// more bytes are to be taken before, but none ([`Self::on_bytes`]) after.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.behind
    }

    /// Whether its controller has said hello.
    #[must_use]
    pub fn is_greeted(&self) -> bool {
        self.greeted
    }

    /// What is to be sent to the controller.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        &self.tx
    }

    /// So many bytes of it have been sent.
    pub fn sent(&mut self, bytes: usize) {
        self.tx.drain(..bytes.min(self.tx.len()));
        if self.tx.is_empty() {
            // What a long answer took.
            self.tx.shrink_to(BACKLOG);
        }
    }

    /// What its controller has done that all sessions are to be told, this one
    /// among them.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Asks whether the controller is there: it answers with something.
    pub fn echo(&mut self) {
        self.reply(kind::ECHO, 0, |_| ());
    }

    fn message(
        &mut self,
        version: u8,
        message: &[u8],
        datapath: &mut dyn Datapath,
    ) -> Result<(), Fatal> {
        // The caller has seen a header.
        let (Some(header), Some(body)) = (message.first_chunk::<HEADER>(), message.get(HEADER..))
        else {
            return Err(Fatal::Garbage);
        };
        let [_, kind, _, _, xid @ ..] = *header;
        let xid = u32::from_be_bytes(xid);
        if !self.greeted {
            return self.greet(version, kind, xid, body, message);
        }
        if version != VERSION {
            self.error(xid, Code::VERSION, message);
            return Ok(());
        }
        if let Err(wrong) = self.dispatch(kind, xid, Reader(body), datapath) {
            self.error(xid, wrong, message);
        }
        Ok(())
    }

    fn greet(
        &mut self,
        version: u8,
        kind: u8,
        xid: u32,
        body: &[u8],
        message: &[u8],
    ) -> Result<(), Fatal> {
        if kind == kind::ERROR {
            return Err(Fatal::Version);
        }
        if kind != kind::HELLO {
            return Err(Fatal::Garbage);
        }
        let spoken = match versions(body) {
            Some(bitmap) => bitmap & 1 << VERSION != 0,
            None => version >= VERSION,
        };
        if !spoken {
            self.error(xid, Code::INCOMPATIBLE, message);
            return Err(Fatal::Version);
        }
        self.greeted = true;
        Ok(())
    }

    fn dispatch(
        &mut self,
        kind: u8,
        xid: u32,
        mut body: Reader<'_>,
        datapath: &mut dyn Datapath,
    ) -> Result<(), Wrong> {
        let changes = matches!(
            kind,
            kind::PACKET_OUT
                | kind::FLOW_MOD
                | kind::GROUP_MOD
                | kind::PORT_MOD
                | kind::TABLE_MOD
                | kind::METER_MOD
        );
        if changes && self.role() == Role::Slave {
            return Err(Code::IS_SLAVE);
        }
        match kind {
            kind::HELLO | kind::ERROR | kind::ECHO_REPLY => {}
            kind::ECHO => self.reply(kind::ECHO_REPLY, xid, |to| {
                to.bytes(body.0);
            }),
            kind::EXPERIMENTER => return Err(Code::EXPERIMENTER),
            kind::FEATURES => {
                let id = datapath.id();
                self.reply(kind::FEATURES_REPLY, xid, |to| {
                    // No buffers; all tables; statistics of flows, tables, ports.
                    to.u64(id).u32(0).u8(254).u8(0).zeros(2).u32(7).u32(0);
                });
            }
            kind::GET_CONFIG => {
                let len = self.miss_len;
                self.reply(kind::GET_CONFIG_REPLY, xid, |to| {
                    to.u16(0).u16(len);
                });
            }
            kind::SET_CONFIG => {
                let (flags, len) = (body.u16()?, body.u16()?);
                if flags & 3 != 0 {
                    return Err(Code::CONFIG);
                }
                self.miss_len = len;
            }
            kind::PACKET_OUT => requests::packet_out(body, datapath)?,
            kind::FLOW_MOD => requests::flow_mod(self, body, datapath)?,
            kind::METER_MOD => requests::meter_mod(self, body, datapath)?,
            kind::PORT_MOD => requests::port_mod(self, body, datapath)?,
            kind::GROUP_MOD => return Err(Code::NO_GROUPS),
            kind::TABLE_MOD => return Err(Code::TABLE_CONFIG),
            kind::QUEUES => return Err(Code::QUEUE),
            kind::MULTIPART => multipart::answer(self, xid, body, datapath)?,
            kind::BARRIER => {
                datapath.control().publish();
                self.reply(kind::BARRIER_REPLY, xid, |_| ());
            }
            kind::ROLE => self.set_role(xid, body)?,
            kind::GET_ASYNC => {
                let wants = self.wants;
                self.reply(kind::GET_ASYNC_REPLY, xid, |to| {
                    for (master, slave) in wants[0].into_iter().zip(wants[1]) {
                        to.u32(master).u32(slave);
                    }
                });
            }
            kind::SET_ASYNC => {
                let [mut master, mut slave] = self.wants;
                for (master, slave) in master.iter_mut().zip(&mut slave) {
                    (*master, *slave) = (body.u32()?, body.u32()?);
                }
                self.wants = [master, slave];
            }
            _ => return Err(Code::TYPE),
        }
        Ok(())
    }

    fn role(&self) -> Role {
        let masters = self.roles.0.lock().unwrap_or_else(PoisonError::into_inner);
        match self.role {
            Role::Master if masters.master != Some(self.id) => Role::Slave,
            role => role,
        }
    }

    fn set_role(&mut self, xid: u32, mut body: Reader<'_>) -> Result<(), Wrong> {
        let wanted = body.u32()?;
        body.skip(4)?;
        let generation = body.u64()?;
        let current = self.role();
        let role = match wanted {
            0 => current,
            1 => Role::Equal,
            2 => Role::Master,
            3 => Role::Slave,
            _ => return Err(Code::ROLE),
        };
        let told = {
            let masters = &self.roles.0;
            let mut masters = masters.lock().unwrap_or_else(PoisonError::into_inner);
            if wanted >= 2 {
                let old = masters.generation;
                // Serial numbers go round.
                if old.is_some_and(|old| generation.wrapping_sub(old) > u64::MAX / 2) {
                    return Err(Code::STALE);
                }
                masters.generation = Some(generation);
            }
            if role == Role::Master {
                masters.master = Some(self.id);
            } else if masters.master == Some(self.id) {
                masters.master = None;
            }
            masters.generation.unwrap_or(u64::MAX)
        };
        self.role = role;
        self.reply(kind::ROLE_REPLY, xid, |to| {
            to.u32(role as u32).zeros(4).u64(told);
        });
        Ok(())
    }

    /// Tells the controller of something, if it wants to know.
    pub fn on_event(&mut self, event: &Event) {
        let wants = self.wants[usize::from(self.role() == Role::Slave)];
        let wanted = |index: usize, reason: u8| wants[index] >> reason & 1 == 1;
        match event {
            Event::Packet(packet) if wanted(0, u8::from(!packet.what.miss)) => {
                self.packet_in(packet);
            }
            Event::Port(reason, port) if wanted(1, *reason) => {
                self.reply(kind::PORT_STATUS, 0, |to| {
                    to.u8(*reason).zeros(7);
                    multipart::port(to, port);
                });
            }
            Event::Removed { entry, why, at } if wanted(2, reason(*why)) => {
                let age = at.saturating_sub(entry.created);
                self.reply(kind::FLOW_REMOVED, 0, |to| {
                    removed(to, entry, reason(*why), age);
                });
            }
            _ => {}
        }
    }

    fn packet_in(&mut self, packet: &PacketIn) {
        let what = &packet.what;
        self.reply(kind::PACKET_IN, 0, |to| {
            // A frame that does not fit into a message is cut off.
            let len = packet.frame.len().min(LONGEST - 128);
            to.u32(u32::MAX).u16(packet.frame.len().min(LONGEST) as u16);
            to.u8(u8::from(!what.miss)).u8(what.table).u64(what.cookie);
            let mut matches = Match::any();
            // These need nothing, and are given once.
            let _ = matches.exactly(Field::InPort, packet.port.0.into());
            if packet.vni != 0 {
                let _ = matches.exactly(Field::Vni, packet.vni.into());
            }
            if what.metadata != 0 {
                let _ = matches.exactly(Field::Metadata, what.metadata.into());
            }
            oxm::write_match(to, &matches);
            to.zeros(2).bytes(&packet.frame[..len]);
        });
    }

    /// Writes a message.
    pub(super) fn reply(&mut self, kind: u8, xid: u32, body: impl FnOnce(&mut Vec<u8>)) {
        let start = self.tx.len();
        self.tx.u8(VERSION).u8(kind).u16(0).u32(xid);
        body(&mut self.tx);
        self.tx.length(start, 2);
    }

    fn error(&mut self, xid: u32, Wrong(kind, code): Wrong, about: &[u8]) {
        self.reply(kind::ERROR, xid, |to| {
            to.u16(kind).u16(code);
            to.bytes(&about[..about.len().min(64)]);
        });
    }
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut masters = self.roles.0.lock().unwrap_or_else(PoisonError::into_inner);
        if masters.master == Some(self.id) {
            masters.master = None;
        }
    }
}

/// The bitmap of versions in a hello, if there is one.
fn versions(body: &[u8]) -> Option<u32> {
    let mut reader = Reader(body);
    while !reader.is_empty() {
        let kind = reader.u16().ok()?;
        let len = usize::from(reader.u16().ok()?);
        let mut element = Reader(reader.take(len.checked_sub(4)?).ok()?);
        if kind == 1 {
            return element.u32().ok();
        }
        let padding = len.next_multiple_of(8) - len;
        reader.skip(padding.min(reader.0.len())).ok()?;
    }
    None
}

fn reason(why: Gone) -> u8 {
    match why {
        Gone::Idle => 0,
        Gone::Hard => 1,
        Gone::Deleted | Gone::Meter => 2,
    }
}

fn removed(to: &mut Vec<u8>, entry: &Entry, reason: u8, age: std::time::Duration) {
    let flow = &entry.flow;
    to.u64(flow.cookie).u16(flow.priority).u8(reason);
    to.u8(flow.table);
    to.u32(u32::try_from(age.as_secs()).unwrap_or(u32::MAX));
    to.u32(age.subsec_nanos());
    to.u16(flow.idle_timeout).u16(flow.hard_timeout);
    to.u64(entry.stats.packets()).u64(entry.stats.bytes());
    oxm::write_match(to, &flow.matches);
}
