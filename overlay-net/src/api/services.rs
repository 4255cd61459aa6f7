//! Virtual addresses, as the API has them.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /vips` | | all [`Vip`]s |
//! | `PUT /vips/NAME` | [`VipSpec`] | [`Vip`] |
//! | `DELETE /vips/NAME` | | [`Vip`] as it was |
//! | `PUT /vips/NAME/backends/BACKEND` | [`BackendChange`] | [`Vip`] |
//! | `DELETE /vips/NAME/backends/BACKEND` | | [`Vip`] |
//!
//! `BACKEND` is a MAC address, or the name of a port with an attached one.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::frame::Mac;
use crate::frame::key::protocol;

/// What a service's packets are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Its number in IP's header.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => protocol::TCP,
            Self::Udp => protocol::UDP,
            Self::Sctp => protocol::SCTP,
        }
    }
}

/// One address for many servers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VipSpec {
    /// The network's name.
    pub network: String,
    /// The address, which the servers have on their loopback interfaces.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// All connections of a client go to one server.
    #[serde(default)]
    pub sticky: bool,
    /// Seconds that connections stay with servers that get no new ones.
    #[serde(default = "VipSpec::usual_drain")]
    pub drain: u64,
    /// The servers.
    #[serde(default)]
    pub backends: Vec<VipBackend>,
}

impl VipSpec {
    /// Seconds for draining if nothing is said.
    #[must_use]
    pub fn usual_drain() -> u64 {
        300
    }
}

/// A server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VipBackend {
    /// Its address in the network.
    pub mac: Mac,
    /// Its share of connections, compared with others'.
    #[serde(default = "VipBackend::usual_weight")]
    pub weight: u32,
    /// It gets no new connections since then (seconds since 1970).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining: Option<u64>,
}

impl VipBackend {
    /// The weight if nothing is said.
    #[must_use]
    pub fn usual_weight() -> u32 {
        1
    }
}

/// What is to be so of a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BackendChange {
    /// Its weight.
    pub weight: Option<u32>,
    /// It gets no new connections; else it does.
    pub drain: bool,
}

/// One address for many servers, and who has how much of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vip {
    /// Its name.
    pub name: String,
    /// What it is.
    pub spec: VipSpec,
    /// The address that packets to it are sent to.
    pub mac: Mac,
    /// Parts of 1000 of new connections that each server gets, in their order.
    pub shares: Vec<u32>,
}
