//! OpenFlow 1.3: external controllers.
//!
//! A [`Session`] is one controller's connection without its transport: bytes
//! in, bytes out, and what happened meanwhile. It works on a [`Datapath`].
//! [`server`] moves the bytes, over any stream.
//!
//! Groups, queues and table features are refused with the errors that OpenFlow
//! has for them. Of Open vSwitch's extensions, those that `ovs-ofctl` writes for
//! `resubmit`, `ct`, set_field with a mask, `nw_frag`, `nw_ttl`, `tcp_flags`
//! and `ct_state` are read. Frames are not buffered: a controller gets them
//! whole.

mod actions;
mod error;
mod events;
mod multipart;
mod oxm;
mod requests;
pub mod server;
mod session;
#[cfg(test)]
mod tests;
mod wire;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use error::Wrong;
pub use events::{Event, Hub, Inbox, PacketIn};
pub use session::{Fatal, Session};

use super::actions::Action;
use super::control::Control;
use crate::frame::{Mac, PortId};

/// What a controller is told of the switch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Who made it.
    pub manufacturer: String,
    /// What it runs on.
    pub hardware: String,
    /// What it is.
    pub software: String,
    /// Its serial number.
    pub serial: String,
    /// Its name.
    pub datapath: String,
}

/// What a controller is told of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortInfo {
    /// Its number; below 0xffffff00.
    pub id: PortId,
    /// Its name; 15 bytes are told.
    pub name: String,
    /// Its address.
    pub mac: Mac,
    /// Taken down by an administrator.
    pub down: bool,
    /// Nobody is at the other side.
    pub unplugged: bool,
    /// What it has counted.
    pub stats: PortStats,
}

/// What a port has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStats {
    /// Packets received.
    pub rx_packets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Received and dropped.
    pub rx_dropped: u64,
    /// Dropped instead of sent.
    pub tx_dropped: u64,
}

/// What a session works on: the switch, or one of its networks.
pub trait Datapath: Send {
    /// Since the start, as for workers.
    fn now(&self) -> Duration;

    /// Its number, unlike those of all others.
    fn id(&self) -> u64;

    /// What it is.
    fn description(&self) -> Description;

    /// Its ports.
    fn ports(&self) -> Vec<PortInfo>;

    /// Its tables. Sessions publish what they change.
    fn control(&mut self) -> &mut Control;

    /// Does `actions` with a frame (see [`super::Pipeline::run_actions`]) that
    /// came in at a port, or at none.
    fn packet_out(&mut self, port: Option<PortId>, actions: &[Action], frame: &[u8]);

    /// Takes a port down, or up. False: that cannot be done.
    fn set_down(&mut self, port: PortId, down: bool) -> bool;
}

/// Bytes of a message's header.
const HEADER: usize = 8;

/// OpenFlow 1.3.
const VERSION: u8 = 4;

/// The longest message.
const LONGEST: usize = u16::MAX as usize;

/// Bits of a message's kind, as requests and answers have them.
mod kind {
    pub(super) const HELLO: u8 = 0;
    pub(super) const ERROR: u8 = 1;
    pub(super) const ECHO: u8 = 2;
    pub(super) const ECHO_REPLY: u8 = 3;
    pub(super) const EXPERIMENTER: u8 = 4;
    pub(super) const FEATURES: u8 = 5;
    pub(super) const FEATURES_REPLY: u8 = 6;
    pub(super) const GET_CONFIG: u8 = 7;
    pub(super) const GET_CONFIG_REPLY: u8 = 8;
    pub(super) const SET_CONFIG: u8 = 9;
    pub(super) const PACKET_IN: u8 = 10;
    pub(super) const FLOW_REMOVED: u8 = 11;
    pub(super) const PORT_STATUS: u8 = 12;
    pub(super) const PACKET_OUT: u8 = 13;
    pub(super) const FLOW_MOD: u8 = 14;
    pub(super) const GROUP_MOD: u8 = 15;
    pub(super) const PORT_MOD: u8 = 16;
    pub(super) const TABLE_MOD: u8 = 17;
    pub(super) const MULTIPART: u8 = 18;
    pub(super) const MULTIPART_REPLY: u8 = 19;
    pub(super) const BARRIER: u8 = 20;
    pub(super) const BARRIER_REPLY: u8 = 21;
    pub(super) const QUEUES: u8 = 22;
    pub(super) const ROLE: u8 = 24;
    pub(super) const ROLE_REPLY: u8 = 25;
    pub(super) const GET_ASYNC: u8 = 26;
    pub(super) const GET_ASYNC_REPLY: u8 = 27;
    pub(super) const SET_ASYNC: u8 = 28;
    pub(super) const METER_MOD: u8 = 29;
}
