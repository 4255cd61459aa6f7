//! Virtual addresses: frames to a service go to one of its servers.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use super::Switch;
use crate::api::services::{Vip, VipBackend, VipSpec};
use crate::bridge::{Place, Station, Vlan};
use crate::drops::Reason;
use crate::frame::{Frame, Key, Mac, Vni};
use crate::switch::Error;
use crate::tunnel::flow_hash;
use crate::vip::{Address, Agent, Backend, ServiceConfig, Services, Verdict, rewrite};

/// Connections that the agent knows, about.
const CONNECTIONS: usize = 1 << 16;

/// Tokens of a service.
const TOKENS: u32 = 16_384;

/// All services.
#[derive(Default)]
pub(super) struct Vips {
    services: Services,
    /// There is one as soon as there was a service.
    agent: Option<Box<Agent>>,
    specs: BTreeMap<String, VipSpec>,
    /// The services' own addresses.
    macs: HashSet<(Vni, Mac), foldhash::fast::RandomState>,
}

impl Vips {
    pub(super) fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    /// The services are others now.
    fn renew(&mut self) {
        let macs = self.services.iter();
        let macs = macs.map(|(address, service)| (address.vni, service.config().mac));
        self.macs = macs.collect();
    }
}

/// The address of a service's IP address: the same on all nodes, and no
/// station's.
fn mac_of(vni: Vni, ip: IpAddr) -> Mac {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&vni.number().to_be_bytes());
    match ip {
        IpAddr::V4(ip) => hasher.update(&ip.octets()),
        IpAddr::V6(ip) => hasher.update(&ip.octets()),
    };
    let [a, b, c, d, e, ..] = *hasher.finalize().as_bytes();
    Mac([0x0a, a, b, c, d, e])
}

/// A service as it is for packets. `whole`: as if nobody drained.
fn config(vni: Vni, spec: &VipSpec, whole: bool) -> ServiceConfig {
    let backend = |backend: &VipBackend| Backend {
        mac: backend.mac,
        weight: match backend.draining {
            Some(_) if !whole => 0,
            _ => backend.weight,
        },
    };
    ServiceConfig {
        mac: mac_of(vni, spec.address),
        backends: spec.backends.iter().map(backend).collect(),
        tokens: TOKENS,
        sticky: spec.sticky,
        drain: Duration::from_secs(spec.drain),
    }
}

impl Switch {
    fn vip_address(&self, spec: &VipSpec) -> Result<Address, Error> {
        Ok(Address {
            vni: self.vni(&spec.network)?,
            ip: spec.address,
            protocol: spec.protocol.number(),
            port: spec.port,
        })
    }

    fn vip(&mut self, name: &str, spec: VipSpec) -> Result<Vip, Error> {
        let address = self.vip_address(&spec)?;
        let service = self.vips.services.get_mut(&address);
        let shares = service.map(|service| service.shares()).unwrap_or_default();
        let share = |backend: &VipBackend| {
            let mut tokens = shares.iter().filter(|(mac, _)| *mac == backend.mac);
            let tokens = tokens.next().map_or(0, |(_, tokens)| *tokens as u64);
            (tokens * 1000 / u64::from(TOKENS)) as u32
        };
        let shares = spec.backends.iter().map(share).collect();
        Ok(Vip {
            name: name.to_owned(),
            mac: mac_of(address.vni, spec.address),
            shares,
            spec,
        })
    }

    /// All services, by name.
    pub fn vips(&mut self) -> Vec<Vip> {
        let specs = self.vips.specs.clone().into_iter();
        specs
            .filter_map(|(name, spec)| self.vip(&name, spec).ok())
            .collect()
    }

    /// Sets a service up, or changes its servers: connections stay with those
    /// that they are with. `draining`: what is said to drain has begun to
    /// before this switch did, and still does.
    ///
    /// # Errors
    ///
    /// There is no such network, another service has the address, its address
    /// changed, or it cannot be.
    pub fn add_vip(&mut self, name: &str, spec: VipSpec, draining: bool) -> Result<Vip, Error> {
        let address = self.vip_address(&spec)?;
        let addresses: Vec<(String, Address)> = self
            .vips
            .specs
            .iter()
            .filter_map(|(name, spec)| Some((name.clone(), self.vip_address(spec).ok()?)))
            .collect();
        for (other, its) in addresses {
            if (other == name) != (its == address) {
                return Err(Error::VipAddress(other));
            }
        }
        let (now, vni) = (self.now, address.vni);
        let services = &mut self.vips.services;
        if draining {
            services.set(now, address, config(vni, &spec, true))?;
        }
        services.set(now, address, config(vni, &spec, false))?;
        if self.vips.agent.is_none() {
            self.vips.agent = Some(Box::new(Agent::new(CONNECTIONS)));
        }
        self.vips.renew();
        let mac = Some(mac_of(vni, spec.address));
        self.bridge
            .set_neighbour(vni, Vlan::NONE, spec.address, mac);
        self.vips.specs.insert(name.to_owned(), spec.clone());
        self.vip(name, spec)
    }

    /// Removes a service; what it was.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn remove_vip(&mut self, name: &str) -> Result<Vip, Error> {
        let missing = || Error::NoVip(name.to_owned());
        let spec = self.vips.specs.get(name).cloned().ok_or_else(missing)?;
        let address = self.vip_address(&spec)?;
        let vip = self.vip(name, spec)?;
        self.vips.specs.remove(name);
        self.vips.services.remove(&address);
        self.vips.renew();
        // Another port's service may have the same IP address.
        let mac = self.vips.services.mac_of(address.vni, address.ip);
        self.bridge
            .set_neighbour(address.vni, Vlan::NONE, address.ip, mac);
        Ok(vip)
    }

    /// The services of a network.
    pub(super) fn vips_of(&self, network: &str) -> usize {
        let specs = self.vips.specs.values();
        specs.filter(|spec| spec.network == network).count()
    }

    /// The address that is meant by a MAC address or a port's name.
    ///
    /// # Errors
    ///
    /// There is no such port, or it has no attached address.
    pub fn station_of(&self, name: &str) -> Result<Mac, Error> {
        if let Ok(mac) = name.parse() {
            return Ok(mac);
        }
        let id = self.names.get(name);
        let slot = id.and_then(|id| self.slot(*id));
        let slot = slot.ok_or_else(|| Error::NoPort(name.to_owned()))?;
        let mac = slot.spec.bridge.macs.first().copied();
        mac.ok_or_else(|| Error::NoStation(name.to_owned()))
    }

    /// A frame on its way to the bridge: if it is to a service, it is made one
    /// to a server. False: it goes no further.
    pub(super) fn balance(&mut self, from: Place, key: &mut Key, frame: &mut Frame<'_>) -> bool {
        let services = &self.vips.services;
        let Some((service, choice)) = services.choose(self.now, key) else {
            return self.unserved(from, key, frame);
        };
        let server = match key.dst {
            dst if dst == service.config().mac => choice.backend,
            // Chosen by the node that it comes from.
            dst if matches!(from, Place::Node(_)) => dst,
            _ => return true,
        };
        let place = |switch: &Self, mac| {
            let (vni, vlan) = (key.vni, Vlan::NONE);
            let found = switch.bridge.find(switch.now, &Station { vni, vlan, mac });
            found.map(|(place, _)| place)
        };
        let mut to = server;
        if let Some(Place::Port(_)) = place(self, server)
            && let Some(agent) = &mut self.vips.agent
            && let Verdict::SendOn(before) = agent.receive(self.now, key, server, choice)
        {
            to = before;
        }
        rewrite(&mut frame.head, to);
        key.dst = to;
        // What came by a tunnel goes into none again, but for this, which is
        // only ever sent on once.
        if to != server
            && matches!(from, Place::Node(_))
            && let Some(Place::Node(node)) = place(self, to)
        {
            self.seal(node, key.vni, flow_hash(key), frame);
            return false;
        }
        true
    }

    /// A frame that no server gets: to a service without one, or a question
    /// for the service's address that does not go to all.
    fn unserved(&mut self, from: Place, key: &mut Key, frame: &mut Frame<'_>) -> bool {
        if !self.vips.macs.contains(&(key.vni, key.dst)) {
            return true;
        }
        if key.arp.is_some() || key.nd_target.is_some() {
            // The bridge answers what is asked of all.
            let all = match key.nd_target {
                Some(_) => Mac([0x33, 0x33, 0, 0, 0, 1]),
                None => Mac::BROADCAST,
            };
            rewrite(&mut frame.head, all);
            key.dst = all;
            return true;
        }
        self.lose(from, Reason::NoBackend, key.vni, frame);
        false
    }
}
