//! Watches: what the guest wants to be told of.

use std::collections::{HashSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::tree::Change;
use super::{Errno, HOME, Path};

/// Watches that a guest may have.
pub(super) const MAX_WATCHES: usize = 128;
/// Bytes of a watch's token: an event, with any path, fits into a message.
pub(super) const MAX_TOKEN: usize = 1022;
/// Events that wait for the guest to take them. When there are more, a watch
/// gets one for its own node instead of one for each that changed.
pub(super) const MAX_EVENTS: usize = 1024;

/// What is watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Target {
    /// A node and all below it.
    Node(Path),
    /// Something that does not happen to a node, like `@releaseDomain`. With
    /// one guest, there is nothing to tell of after the first event.
    Special(String),
}

impl Target {
    fn parse(text: &str) -> Result<Self, Errno> {
        match text {
            "@introduceDomain" | "@releaseDomain" => Ok(Self::Special(text.to_owned())),
            _ => Ok(Self::Node(Path::new(text)?)),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Watch {
    id: u64,
    target: Target,
    token: Vec<u8>,
    /// The guest named the node relative to its home, and is told so.
    relative: bool,
}

impl Watch {
    fn matches(&self, change: &Change) -> bool {
        match &self.target {
            Target::Node(node) if change.exact => change.path == *node,
            Target::Node(node) => change.path.is_within(node),
            Target::Special(_) => false,
        }
    }

    fn own_path(&self) -> String {
        match &self.target {
            Target::Node(node) => self.tell(node),
            Target::Special(name) => name.clone(),
        }
    }

    /// The path as the guest expects it.
    fn tell(&self, path: &Path) -> String {
        let shown = if self.relative {
            path.below(HOME)
        } else {
            None
        };
        shown.unwrap_or(path.as_str()).to_owned()
    }
}

/// An event on its way to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Event {
    watch: u64,
    path: String,
}

/// The guest's watches and the events that wait.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Watches {
    watches: Vec<Watch>,
    next: u64,
    events: VecDeque<Event>,
    /// The same events: none waits twice.
    #[serde(skip)]
    waiting: HashSet<Event>,
    /// Events that were replaced by one for the watched node.
    merged: u64,
}

impl Watches {
    /// Watches a node; the first event comes at once.
    ///
    /// # Errors
    /// The same watch exists, or there are too many.
    pub(super) fn add(&mut self, node: &str, token: &[u8]) -> Result<(), Errno> {
        let target = Target::parse(node)?;
        if token.len() > MAX_TOKEN {
            return Err(Errno::Invalid);
        }
        if self.find(&target, token).is_some() {
            return Err(Errno::Exists);
        }
        if self.watches.len() >= MAX_WATCHES {
            return Err(Errno::NoSpace);
        }
        let watch = Watch {
            id: self.next,
            target,
            token: token.to_vec(),
            relative: !node.starts_with('/'),
        };
        self.next = self.next.wrapping_add(1);
        let first = Event {
            watch: watch.id,
            path: watch.own_path(),
        };
        self.watches.push(watch);
        self.queue(first);
        Ok(())
    }

    fn find(&self, target: &Target, token: &[u8]) -> Option<usize> {
        self.watches
            .iter()
            .position(|watch| watch.target == *target && watch.token == token)
    }

    /// Forgets a watch and its events.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn remove(&mut self, node: &str, token: &[u8]) -> Result<(), Errno> {
        let at = self
            .find(&Target::parse(node)?, token)
            .ok_or(Errno::NoEntry)?;
        let id = self.watches.remove(at).id;
        self.events.retain(|event| event.watch != id);
        self.waiting.retain(|event| event.watch != id);
        Ok(())
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.watches.clear();
        self.events.clear();
        self.waiting.clear();
    }

    /// Tells all whom it concerns of a change.
    pub(super) fn fire(&mut self, change: &Change) {
        if !change.visible {
            return;
        }
        let events: Vec<_> = self
            .watches
            .iter()
            .filter(|watch| watch.matches(change))
            .map(|watch| {
                let full = self.events.len() >= MAX_EVENTS;
                let path = if full {
                    watch.own_path()
                } else {
                    watch.tell(&change.path)
                };
                (
                    full,
                    Event {
                        watch: watch.id,
                        path,
                    },
                )
            })
            .collect();
        for (merged, event) in events {
            self.merged = self.merged.wrapping_add(u64::from(merged));
            self.queue(event);
        }
    }

    fn queue(&mut self, event: Event) {
        if self.waiting.insert(event.clone()) {
            self.events.push_back(event);
        }
    }

    /// Takes the next event: the path that changed and the watch's token.
    pub(super) fn take(&mut self) -> Option<(String, Vec<u8>)> {
        let event = self.events.pop_front()?;
        self.waiting.remove(&event);
        // A watch takes its events with it.
        let watch = self.watches.iter().find(|watch| watch.id == event.watch)?;
        Some((event.path, watch.token.clone()))
    }

    /// Watches, events that wait, and events that were merged so far.
    #[must_use]
    pub(super) fn counts(&self) -> (usize, usize, u64) {
        (self.watches.len(), self.events.len(), self.merged)
    }

    /// What was not saved is made anew from what was.
    pub(super) fn restored(&mut self) {
        self.waiting = self.events.iter().cloned().collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(path: &str, exact: bool) -> Change {
        Change {
            path: Path::new(path).unwrap(),
            exact,
            visible: true,
        }
    }

    fn taken(watches: &mut Watches) -> Vec<String> {
        std::iter::from_fn(|| watches.take())
            .map(|(path, token)| format!("{path} {}", String::from_utf8(token).unwrap()))
            .collect()
    }

    #[test]
    fn a_watch_tells_at_once_and_then_of_its_node_and_all_below() {
        let mut watches = Watches::default();
        watches.add("device", b"one").unwrap();
        watches.add("/local/domain/1/device", b"two").unwrap();
        watches.add("@releaseDomain", b"three").unwrap();
        assert_eq!(
            taken(&mut watches),
            [
                "device one",
                "/local/domain/1/device two",
                "@releaseDomain three"
            ]
        );
        watches.fire(&change("device/vif/0/state", false));
        watches.fire(&change("devices", false));
        watches.fire(&change("device/vbd", true));
        assert_eq!(
            taken(&mut watches),
            [
                "device/vif/0/state one",
                "/local/domain/1/device/vif/0/state two"
            ]
        );
        watches.fire(&change("device", true));
        watches.remove("device", b"one").unwrap();
        assert_eq!(taken(&mut watches), ["/local/domain/1/device two"]);
        assert_eq!(watches.remove("device", b"one"), Err(Errno::NoEntry));
    }

    #[test]
    fn an_event_waits_once_and_what_the_guest_may_not_see_stays_secret() {
        let mut watches = Watches::default();
        watches.add("/", b"").unwrap();
        watches.fire(&change("/a", false));
        watches.fire(&change("/b", false));
        watches.fire(&change("/a", false));
        watches.fire(&Change {
            visible: false,
            ..change("/secret", false)
        });
        assert_eq!(taken(&mut watches), ["/ ", "/a ", "/b "]);
        watches.fire(&change("/a", false));
        assert_eq!(taken(&mut watches), ["/a "]);
    }

    #[test]
    fn watches_and_events_are_bounded_and_no_watch_is_left_uninformed() {
        let mut watches = Watches::default();
        for i in 0..MAX_WATCHES {
            watches.add("/a", i.to_string().as_bytes()).unwrap();
        }
        assert_eq!(watches.add("/a", b"more"), Err(Errno::NoSpace));
        assert_eq!(watches.add("/a", b"0"), Err(Errno::Exists));
        assert_eq!(taken(&mut watches).len(), MAX_WATCHES);
        for i in 0..10_000 {
            watches.fire(&change(&format!("/a/{i}"), false));
        }
        let (_, waiting, merged) = watches.counts();
        assert!(waiting <= MAX_EVENTS + MAX_WATCHES, "{waiting}");
        assert!(merged > 0);
        let told = taken(&mut watches);
        for i in 0..MAX_WATCHES {
            assert!(told.contains(&format!("/a {i}")), "{i}");
        }
        let long = vec![b'x'; MAX_TOKEN + 1];
        assert_eq!(watches.add("/b", &long), Err(Errno::Invalid));
        watches.clear();
        assert_eq!(watches.counts().0, 0);
    }
}
