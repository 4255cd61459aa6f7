//! Options of ports that are changed while they are used, and turns by weight.

use super::{Slot, Switch};
use crate::api::types::PortStatus;
use crate::bridge::{Place, PortConfig};
use crate::frame::PortId;
use crate::port::Port;
use crate::switch::Error;

/// Bytes that a port of weight 1 may send in a turn, where weights count.
const QUANTUM: i64 = 64 << 10;

/// Frames that are taken from a port between two looks at what they cost.
const FEW: usize = 8;

impl Switch {
    /// A port's configuration for the bridge: what its network says counts,
    /// too.
    pub(super) fn bridge_config(&self, network: &str, config: &PortConfig) -> Option<PortConfig> {
        let network = self.networks.get(network)?;
        Some(PortConfig {
            vni: network.vni,
            mtu: config.mtu.min(usize::from(network.mtu)),
            ..config.clone()
        })
    }

    /// Changes how the bridge sees a port.
    ///
    /// # Errors
    ///
    /// There is no such port, or the bridge does not take it.
    pub fn set_port(&mut self, name: &str, config: PortConfig) -> Result<PortStatus, Error> {
        let missing = || Error::NoPort(name.to_owned());
        let id = *self.names.get(name).ok_or_else(missing)?;
        let slot = self.slot(id).ok_or_else(missing)?;
        let network = slot.spec.network.clone();
        let its = self.bridge_config(&network, &config);
        let its = its.ok_or(Error::NoNetwork(network))?;
        let before = self.attached(id);
        self.bridge.set_port(self.now, id, its)?;
        let after = self.attached(id);
        for (key, _) in &before {
            if after.iter().all(|(other, _)| other != key) {
                self.directory.withdraw(self.now, key);
            }
        }
        for (key, value) in after {
            if !before.contains(&(key, value.clone())) {
                self.claim(key, value);
            }
        }
        self.tell();
        if let Some(slot) = self.slot_mut(id) {
            slot.spec.bridge = config;
        }
        self.weigh();
        let slot = self.slot(id).ok_or_else(missing)?;
        Ok(self.status(id, slot))
    }

    /// Whether ports differ in their weights.
    pub(super) fn weigh(&mut self) {
        let heavy = |slot: &Slot| slot.spec.bridge.weight > 1;
        let weighted = self.all().any(|(_, slot)| heavy(slot));
        self.weighted = weighted;
    }

    /// A port's turn where weights count (deficit round robin): what it has
    /// sent too much in one turn, it has less in the next. How many frames
    /// there were; 1 if it may not send now, but has perhaps something.
    pub(super) fn weighted_turn(
        &mut self,
        id: PortId,
        port: &mut dyn Port,
    ) -> std::io::Result<usize> {
        let Some(slot) = self.slot_mut(id) else {
            return Ok(0);
        };
        let share = QUANTUM * i64::from(slot.spec.bridge.weight.clamp(1, 1000));
        slot.credit = (slot.credit + share).min(share);
        let vni = slot.vni;
        let (mut credit, mut count) = (slot.credit, 0);
        if credit <= 0 {
            return Ok(1);
        }
        let mut more = true;
        let mut outcome = Ok(());
        while more && credit > 0 {
            let mut bytes = 0;
            let received = port.receive(FEW, &mut |frame| {
                bytes += frame.len();
                self.forward(Place::Port(id), vni, frame);
            });
            match received {
                Ok(received) => {
                    more = received == FEW;
                    count += received;
                }
                Err(error) => {
                    outcome = Err(error);
                    more = false;
                }
            }
            credit -= i64::try_from(bytes).unwrap_or(i64::MAX);
        }
        if let Some(slot) = self.slot_mut(id) {
            // Who has nothing to send saves nothing up.
            slot.credit = if more { credit } else { credit.min(0) };
        }
        outcome.map(|()| count)
    }
}
