//! Ports that are changed while frames go through them.

use std::time::Duration;

use super::{Bridge, Bucket, Place, PortConfig, PortError, State, stations};
use crate::frame::PortId;

impl Bridge {
    /// Changes a port, but for its network. What was learned there is
    /// forgotten if its VLANs change; limits begin anew if they are others.
    ///
    /// # Errors
    ///
    /// See [`PortError`]; nothing changed.
    pub fn set_port(
        &mut self,
        now: Duration,
        id: PortId,
        mut config: PortConfig,
    ) -> Result<(), PortError> {
        let old = self.ports.get(&id).ok_or(PortError::Unknown(id))?;
        let old = old.config.clone();
        config.vni = old.vni;
        self.checked(id, &config, None)?;
        let moved = (&old.vlan, &old.macs, &old.ips) != (&config.vlan, &config.macs, &config.ips);
        if moved {
            for station in stations(&old) {
                self.table.detach(&station, id);
                for ip in &old.ips {
                    let key = (station.vni, station.vlan, *ip);
                    if self.neighbours.get(&key) == old.macs.first() {
                        self.neighbours.remove(&key);
                    }
                }
            }
        }
        if old.vlan != config.vlan {
            self.table.flush(Place::Port(id));
            self.snoop.expire(now, |place| place == Place::Port(id));
        }
        let active = self
            .ports
            .get(&id)
            .is_some_and(|port| matches!(port.state, State::Active));
        if moved {
            for station in stations(&config) {
                self.table.attach(&station, id);
                if active {
                    for ip in &config.ips {
                        let key = (station.vni, station.vlan, *ip);
                        self.neighbours.insert(key, config.macs[0]);
                    }
                }
            }
        }
        let errors = self.config.errors;
        if let Some(port) = self.ports.get_mut(&id) {
            if old.storm != config.storm {
                port.buckets = super::Buckets::new(&config.storm, errors);
            }
            if old.rate != config.rate {
                port.rate = config.rate.map(Bucket::new);
            }
            port.config = config;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Mode, Rate, Station, Vlan};
    use super::*;
    use crate::frame::{Mac, Vni};

    #[test]
    fn a_port_is_changed_or_left_as_it_was() {
        let mut bridge = Bridge::default();
        let (vni, now) = (Vni::new(7).expect("a VNI"), Duration::from_secs(1));
        let mac = Mac([2, 0, 0, 0, 0, 1]);
        let config = PortConfig {
            vni,
            macs: vec![mac],
            ips: vec!["10.0.0.1".parse().expect("an address")],
            ..PortConfig::default()
        };
        bridge.add_port(PortId(1), config.clone()).expect("a port");
        let other = PortConfig {
            vni,
            ..PortConfig::default()
        };
        bridge.add_port(PortId(2), other.clone()).expect("a port");
        // Another port's address, and an address of a trunk.
        let taken = PortConfig {
            macs: vec![mac],
            ..other.clone()
        };
        let refused = bridge.set_port(now, PortId(2), taken);
        assert_eq!(refused, Err(PortError::Taken(mac, PortId(1))));
        assert_eq!(bridge.port(PortId(2)), Some(&other));
        let moved = PortConfig {
            vlan: Mode::Access { vlan: 5 },
            rate: Some(Rate {
                per_second: 1000,
                burst: 2000,
            }),
            ..config
        };
        bridge
            .set_port(now, PortId(1), moved.clone())
            .expect("a change");
        assert_eq!(bridge.port(PortId(1)), Some(&moved));
        let at = |vid| {
            let vlan = Vlan::new(vid).expect("a VLAN");
            bridge.find(now, &Station { vni, vlan, mac }).is_some()
        };
        assert!(at(5) && !at(0));
        let ip = moved.ips[0];
        let known = |vid| bridge.neighbour(vni, Vlan::new(vid).expect("a VLAN"), ip);
        assert_eq!((known(5), known(0)), (Some(mac), None));
    }
}
