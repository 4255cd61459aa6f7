//! One address for many servers: a load balancer for connections.
//!
//! Every node is a *mux* for the stations on it: a frame to a service's
//! address goes to one of its backends, chosen by a hash of the connection
//! alone. A mux remembers no connection, so it does not matter which one a
//! packet meets, and none can be filled up. The hash picks one of many
//! *tokens* at equal distances on a ring; which backend has a token is written
//! in a table, so a packet costs one look into it.
//!
//! Which backend gets a token is decided by weighted rendezvous hashing: a
//! function of the backends alone, so all nodes come to the same table without
//! talking, and a backend that comes or goes moves its own tokens only.
//!
//! A switch asks [`Services::choose`] before the bridge, for frames to a
//! service's address, and has the bridge answer who asks for it
//! ([`crate::bridge::Bridge::set_neighbour`]): the address is no station's.
//!
//! The frame's destination address is replaced by the backend's; the packet
//! stays as it is. The backend has the service's IP address on its loopback
//! interface, and answers its client directly: answers meet no mux.
//!
//! *Draining.* A connection that began before its token moved must go on with
//! its old backend. The new one's node can tell ([`Agent`]): it has seen each
//! of its own connections begin, so a packet of another one that does not begin
//! one is sent on to where the token was before. When the time for draining is
//! over, the table forgets that.

mod agent;
mod table;
#[cfg(test)]
mod tests;

pub use agent::{Agent, Verdict};
pub use table::{Backend, Choice, Service, ServiceConfig, ServiceError};

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::time::Duration;

use crate::frame::{Head, Key, Mac, Vni};

/// A service's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// Its network.
    pub vni: Vni,
    /// Its IP address.
    pub ip: IpAddr,
    /// Its protocol: TCP, UDP or SCTP.
    pub protocol: u8,
    /// Its port.
    pub port: u16,
}

impl Address {
    /// Where a packet is sent to. A fragment is of no service: only the first
    /// one would say of which.
    #[must_use]
    pub fn of(key: &Key) -> Option<Self> {
        if key.fragment.is_some() || key.arp.is_some() {
            return None;
        }
        Some(Self {
            vni: key.vni,
            ip: key.ip?.1,
            protocol: key.protocol,
            port: key.ports?.1,
        })
    }
}

/// All services, as a mux needs them.
#[derive(Debug, Default)]
pub struct Services {
    services: HashMap<Address, Service, foldhash::fast::RandomState>,
}

impl Services {
    /// Services at most.
    pub const MOST: usize = 4096;

    /// Sets a service up, or changes it: connections that exist stay with
    /// their backends until its time for draining is over.
    ///
    /// # Errors
    ///
    /// See [`ServiceError`]; nothing changed.
    pub fn set(
        &mut self,
        now: Duration,
        address: Address,
        config: ServiceConfig,
    ) -> Result<(), ServiceError> {
        if let Some(service) = self.services.get_mut(&address) {
            return service.set(now, config);
        }
        if self.services.len() >= Self::MOST {
            return Err(ServiceError::TooMany);
        }
        let service = Service::new(config)?;
        self.services.insert(address, service);
        Ok(())
    }

    /// Removes a service. False: there is none.
    pub fn remove(&mut self, address: &Address) -> bool {
        self.services.remove(address).is_some()
    }

    /// One of them.
    pub fn get_mut(&mut self, address: &Address) -> Option<&mut Service> {
        self.services.get_mut(address)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&Address, &Service)> + '_ {
        self.services.iter()
    }

    /// Whether there are none, which is to be asked first.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    /// The backend of a packet to a service; `None`: it is to no service, or
    /// the service has no backend. Frames that were sent to a backend before
    /// are asked about again where they arrive: their destination is its
    /// address then, not the service's.
    #[must_use]
    pub fn choose(&self, now: Duration, key: &Key) -> Option<(&Service, Choice)> {
        let service = self.services.get(&Address::of(key)?)?;
        Some((service, service.choose(now, key)?))
    }

    /// The address that a service's IP address is answered with, when it is
    /// asked for.
    #[must_use]
    pub fn mac_of(&self, vni: Vni, ip: IpAddr) -> Option<Mac> {
        let found = self
            .services
            .iter()
            .find(|(address, _)| address.vni == vni && address.ip == ip);
        found.map(|(_, service)| service.config().mac)
    }
}

/// Makes a frame one to this backend.
pub fn rewrite(head: &mut Head, mac: Mac) {
    if let Some(dst) = head.bytes_mut().first_chunk_mut() {
        *dst = mac.0;
    }
}

/// A table's hash that is not the same elsewhere.
fn local_hash(state: &RandomState, value: impl std::hash::Hash) -> u64 {
    state.hash_one(value)
}
