//! What switches tell each other of who is where.

use std::time::SystemTime;

use super::moving::WAY_HEAD;
use super::{CONTROL_HEAD, Switch};
use crate::bridge::{Event, Place, Station};
use crate::directory::{Key as Record, NodeId, Value};
use crate::drops::Reason;
use crate::frame::{Frame, Offload, Vni};
impl Switch {
    /// This node has something, whoever had it before, and all others are to
    /// know.
    pub(super) fn claim(&mut self, key: Record, value: Value) {
        // A switch that was started again does not know what it said before.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let after = since.map_or(0, |since| since.as_millis() as u64);
        if let Err(refused) = self.directory.claim(self.now, key, value, after) {
            tracing::warn!("others are not told of {key:?}: {refused}");
        }
        self.tell();
    }

    /// Does what follows from the directory's changes, and tells others of
    /// what is new here.
    pub(super) fn tell(&mut self) {
        for key in self.directory.changes() {
            self.regrouped(&key);
            match key {
                Record::Station(vni, vlan, mac) => {
                    let located = self.directory.located(&key);
                    let station = Station { vni, vlan, mac };
                    let before = self.bridge.find(self.now, &station);
                    self.bridge.locate(self.now, station, located.as_ref());
                    self.moved_away(&key, before.map(|(place, _)| place));
                }
                Record::Member(vni, _) => {
                    self.renew_members(vni);
                }
                Record::Node(_) => {}
            }
        }
        for (node, message) in self.gossip.poll(self.now, &mut self.directory) {
            let bytes = [&CONTROL_HEAD, &message[..]].concat();
            let (to, vni) = (Place::Node(node), Vni::default());
            self.put_off(to, vni, 0, bytes, Offload::default());
        }
        if self.remote.is_some() {
            self.catch_up();
        }
    }

    /// A message from another switch.
    pub(super) fn hear(&mut self, node: NodeId, frame: &Frame<'_>) {
        let bytes = frame.to_vec();
        if self.echo(node, &bytes) {
            return;
        }
        if let Some(message) = bytes.strip_prefix(&WAY_HEAD) {
            if !self.hear_way(node, message) {
                self.drop(Place::Node(node), Reason::Malformed);
            }
            return;
        }
        let message = bytes.strip_prefix(&CONTROL_HEAD);
        let heard = message.is_some_and(|message| {
            let heard = self
                .gossip
                .on_message(self.now, &mut self.directory, node, message);
            heard.is_ok()
        });
        if heard {
            self.tell();
        } else {
            self.drop(Place::Node(node), Reason::Malformed);
        }
    }

    /// Tells others of the addresses that were learned and forgotten here.
    pub(super) fn notice(&mut self) {
        let events: Vec<Event> = self.bridge.events().collect();
        for event in &events {
            let (Event::Learned(station, _) | Event::Forgotten(station, _)) = event;
            let key = Record::Station(station.vni, station.vlan, station.mac);
            match event {
                Event::Learned(_, port) => {
                    let value = Value::Station {
                        ips: Vec::new(),
                        attached: false,
                        groups: Vec::new(),
                        isolated: self.bridge.port(*port).is_some_and(|port| port.isolated),
                    };
                    // A full directory only means that frames to it go to all.
                    let _ = self.directory.claim(self.now, key, value, 0);
                }
                Event::Forgotten(..) => self.directory.withdraw(self.now, &key),
            }
        }
        if !events.is_empty() {
            self.tell();
        }
    }
}
