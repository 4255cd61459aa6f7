//! Figures for who keeps an eye on the switch.

use super::Switch;
use crate::api::metrics::Figures;
use crate::bridge::Place;

impl Switch {
    /// All figures, as they are now.
    pub fn figures(&mut self) -> Figures {
        let now = self.now;
        let networks = self.networks().into_iter();
        let networks = networks.map(|network| {
            let flows = self.flows.get_mut(&network.spec.vni);
            let flows = flows.map(|flows| flows.figures(now));
            (network, flows.unwrap_or_default())
        });
        let networks = networks.collect();
        let ports = self.ports().into_iter();
        let ports = ports.map(|port| {
            let learned = self.bridge.learned(Place::Port(port.id));
            (port, learned)
        });
        let ports = ports.collect();
        Figures {
            info: self.info(),
            networks,
            ports,
            // Without tunnels, there are none.
            peers: self.peers().unwrap_or_default(),
            counts: self.bridge.counts(),
            answered: self.bridge.answered(),
            captures: self.captures.len(),
        }
    }
}
