//! Mirrors: frames of a port or a network, once more at another port.

use std::collections::BTreeMap;

use super::Switch;
use super::captures::Shot;
use crate::api::observe::{Mirror, MirrorSpec};
use crate::bridge::Place;
use crate::capture::{self, Direction, Mirrors, Source};
use crate::drops::Reason;
use crate::frame::{Frame, PortId, Vni};
use crate::switch::Error;

/// Mirrors by name; those whose ports are there.
#[derive(Default)]
pub(super) struct Mirroring {
    specs: BTreeMap<String, MirrorSpec>,
    active: Mirrors,
}

impl Mirroring {
    pub(super) fn is_empty(&self) -> bool {
        self.active.is_empty()
    }
}

impl Switch {
    fn resolve(&self, spec: &MirrorSpec) -> Result<capture::Mirror, Error> {
        let port = |name: &str| {
            let id = self.names.get(name).copied();
            id.ok_or_else(|| Error::NoPort(name.to_owned()))
        };
        let of = match (&spec.port, &spec.network) {
            (Some(name), None) => Source::Port(port(name)?),
            (None, Some(name)) => Source::Network(self.vni(name)?),
            _ => return Err(Error::Mirror),
        };
        // Of a network, each frame once.
        let once = matches!(of, Source::Network(_)).then_some(Direction::In);
        Ok(capture::Mirror {
            of,
            direction: spec.direction.or(once),
            to: port(&spec.to)?,
        })
    }

    /// Brings mirrors up to date with the ports and networks that there are.
    pub(super) fn renew_mirrors(&mut self) {
        let specs = std::mem::take(&mut self.mirrors.specs);
        let mut active = Mirrors::default();
        for mirror in specs.values().filter_map(|spec| self.resolve(spec).ok()) {
            active.add(mirror);
        }
        self.mirrors = Mirroring { specs, active };
    }

    /// All mirrors, by name.
    #[must_use]
    pub fn mirrors(&self) -> Vec<Mirror> {
        let mirror = |(name, spec): (&String, &MirrorSpec)| Mirror {
            name: name.clone(),
            spec: spec.clone(),
            down: self.resolve(spec).err().map(|error| error.to_string()),
        };
        self.mirrors.specs.iter().map(mirror).collect()
    }

    /// Adds a mirror, or changes it. `lenient`: one whose ports are not there
    /// waits for them.
    ///
    /// # Errors
    ///
    /// It copies nothing, or a port to itself, or there are too many.
    pub fn add_mirror(
        &mut self,
        name: &str,
        spec: MirrorSpec,
        lenient: bool,
    ) -> Result<Mirror, Error> {
        match self.resolve(&spec) {
            Ok(mirror) if mirror.of == Source::Port(mirror.to) => return Err(Error::Mirror),
            Err(error) if !lenient => return Err(error),
            _ => {}
        }
        let specs = &mut self.mirrors.specs;
        if specs.len() == Mirrors::MOST && !specs.contains_key(name) {
            return Err(Error::TooMany(Mirrors::MOST, "mirrors"));
        }
        specs.insert(name.to_owned(), spec.clone());
        self.renew_mirrors();
        let down = self.resolve(&spec).err().map(|error| error.to_string());
        Ok(Mirror {
            name: name.to_owned(),
            spec,
            down,
        })
    }

    /// Removes a mirror; what it was.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn remove_mirror(&mut self, name: &str) -> Result<Mirror, Error> {
        let spec = self.mirrors.specs.remove(name);
        let spec = spec.ok_or_else(|| Error::NoMirror(name.to_owned()))?;
        self.renew_mirrors();
        Ok(Mirror {
            name: name.to_owned(),
            spec,
            down: None,
        })
    }

    /// Whether somebody looks at frames besides those who get them.
    pub(super) fn is_watched(&self) -> bool {
        !self.captures.is_empty() || !self.mirrors.is_empty()
    }

    /// A frame is at a port or a node: those who watch see it.
    #[cold]
    pub(super) fn watch(&mut self, at: Place, vni: Vni, direction: Direction, frame: &Frame<'_>) {
        if !self.captures.is_empty() {
            self.shoot(&Shot {
                at,
                vni,
                direction,
                dropped: None,
                frame,
            });
        }
        if !self.mirrors.is_empty() {
            let port = match at {
                Place::Port(id) => Some(id),
                Place::Node(_) => None,
            };
            let to = self.mirrors.active.of(port, vni, direction);
            for to in to.collect::<Vec<_>>() {
                self.copy(to, vni, frame);
            }
        }
    }

    /// A copy of a frame goes to a port; of itself there are no copies.
    fn copy(&mut self, to: PortId, vni: Vni, frame: &Frame<'_>) {
        let Some(slot) = self.slot(to) else { return };
        if slot.port.is_none() && slot.down.is_none() {
            // It has its turn.
            return self.put_off(Place::Port(to), vni, 0, frame.to_vec(), frame.offload);
        }
        match self.put(to, frame) {
            Ok(()) if !self.captures.is_empty() => self.shoot(&Shot {
                at: Place::Port(to),
                vni,
                direction: Direction::Out,
                dropped: None,
                frame,
            }),
            Ok(()) => {}
            Err(reason) => self.drop(Place::Port(to), reason),
        }
    }

    /// A frame is dropped, and those who want to know why see it.
    pub(super) fn lose(&mut self, at: Place, reason: Reason, vni: Vni, frame: &Frame<'_>) {
        self.drop(at, reason);
        self.lost(at, reason, vni, frame);
    }

    /// The same where it has been counted.
    pub(super) fn lost(&mut self, at: Place, reason: Reason, vni: Vni, frame: &Frame<'_>) {
        if !self.captures.is_empty() {
            self.shoot(&Shot {
                at,
                vni,
                direction: Direction::In,
                dropped: Some(reason),
                frame,
            });
        }
    }
}
