//! Captures: copies of frames for whoever asked for them.
//!
//! A frame is written to a capture's buffer, and the buffer handed over once
//! for a burst. What does not fit into the queue, because whoever asked does
//! not keep up, is counted and left out: the switch waits for nobody.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;

use super::Switch;
use crate::api::observe::CaptureSpec;
use crate::bridge::Place;
use crate::capture::{Direction, Interface, Writer};
use crate::drops::Reason;
use crate::flow::text;
use crate::flow::{Flat, Match};
use crate::frame::{Frame, PortId, Vni, parse};
use crate::switch::Error;
use crate::switch::flows::FlowError;

/// Captures at the same time, at most.
const MOST: usize = 16;

/// Bytes of a capture that may wait to be taken.
const QUEUE: usize = if cfg!(test) { 64 << 10 } else { 8 << 20 };

/// A buffer is handed over when it has so many bytes, even within a burst.
const CHUNK: usize = 256 << 10;

/// What a capture has written, to be taken as it comes.
pub struct Stream {
    /// What the capture is ended by.
    pub id: u64,
    receiver: mpsc::UnboundedReceiver<Vec<u8>>,
    queued: Arc<AtomicUsize>,
}

impl Stream {
    /// More of it; none: it has ended.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        let next = self.receiver.poll_recv(context);
        if let Poll::Ready(Some(bytes)) = &next {
            self.queued.fetch_sub(bytes.len(), Ordering::Relaxed);
        }
        next
    }
}

/// Whose frames.
enum Scope {
    All,
    Network(Vni),
    At(Place),
}

/// What became of the frames of one place.
struct Seen {
    interface: Interface,
    received: u64,
    dropped: u64,
}

struct Capture {
    id: u64,
    scope: Scope,
    matches: Match,
    direction: Option<Direction>,
    /// Only frames that the switch drops.
    drops: bool,
    /// So many frames more.
    left: Option<u64>,
    writer: Writer<Vec<u8>>,
    seen: HashMap<Place, Seen>,
    to: mpsc::UnboundedSender<Vec<u8>>,
    queued: Arc<AtomicUsize>,
}

/// All captures that go on.
#[derive(Default)]
pub(super) struct Captures {
    list: Vec<Capture>,
    last: u64,
}

/// A frame as it is captured.
pub(super) struct Shot<'f, 'b> {
    pub(super) at: Place,
    pub(super) vni: Vni,
    pub(super) direction: Direction,
    /// Why it was dropped, if it was.
    pub(super) dropped: Option<Reason>,
    pub(super) frame: &'f Frame<'b>,
}

fn now() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default()
}

impl Captures {
    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Hands over what was written.
    pub(super) fn flush(&mut self) {
        self.list.retain_mut(|capture| {
            capture.flush();
            capture.goes_on()
        });
    }
}

impl Capture {
    fn wants(&self, shot: &Shot<'_, '_>, flat: &Flat) -> bool {
        let scope = match self.scope {
            Scope::All => true,
            Scope::Network(vni) => shot.vni == vni,
            Scope::At(place) => shot.at == place,
        };
        scope
            && self.drops == shot.dropped.is_some()
            && self.direction.is_none_or(|only| only == shot.direction)
            && self.matches.matches(flat)
    }

    fn interface(&mut self, place: Place, name: &str) -> &mut Seen {
        let writer = &mut self.writer;
        self.seen.entry(place).or_insert_with(|| Seen {
            interface: write(writer.interface(name)),
            received: 0,
            dropped: 0,
        })
    }

    fn take(&mut self, shot: &Shot<'_, '_>, name: &str) {
        let waiting = self.queued.load(Ordering::Relaxed) + self.writer.get_mut().len();
        let full = waiting + shot.frame.len() > QUEUE;
        let seen = self.interface(shot.at, name);
        seen.received += 1;
        if full {
            seen.dropped += 1;
            return;
        }
        let interface = seen.interface;
        let comment = shot.dropped.map(|reason| format!("dropped: {reason}"));
        let comment = comment.as_deref().unwrap_or_default();
        let written = self
            .writer
            .frame_with(interface, shot.direction, now(), shot.frame, comment);
        write(written);
        if let Some(left) = &mut self.left {
            *left -= 1;
        }
        if self.writer.get_mut().len() >= CHUNK {
            self.flush();
        }
    }

    /// Says what became of the frames.
    fn end(&mut self) {
        for seen in self.seen.values() {
            let (received, dropped) = (seen.received, seen.dropped);
            write(
                self.writer
                    .statistics(seen.interface, now(), received, dropped),
            );
        }
        self.flush();
    }

    fn flush(&mut self) {
        if self.writer.get_mut().is_empty() {
            return;
        }
        let bytes = std::mem::take(self.writer.get_mut());
        self.queued.fetch_add(bytes.len(), Ordering::Relaxed);
        // Nobody takes it any more: it ends with the next look.
        let _ = self.to.send(bytes);
    }

    fn goes_on(&mut self) -> bool {
        let over = self.left == Some(0);
        if over {
            self.end();
        }
        !over && !self.to.is_closed()
    }
}

/// What is written to memory is always written.
fn write<T: Default>(result: std::io::Result<T>) -> T {
    result.unwrap_or_default()
}

impl Switch {
    /// Begins a capture.
    ///
    /// # Errors
    ///
    /// There is nothing of that name, that is no filter, or there are too many
    /// captures.
    pub fn capture(&mut self, spec: &CaptureSpec) -> Result<Stream, Error> {
        let (scope, network) = self.scope(&spec.of)?;
        let ports: HashMap<String, PortId> = self
            .all()
            .filter(|(_, slot)| network.is_none_or(|vni| vni == slot.vni))
            .map(|(id, slot)| (slot.name.clone(), id))
            .collect();
        let filter = &spec.filter;
        let matches = text::parse_match(filter, &|name| ports.get(name).copied());
        let matches = matches.map_err(|error| FlowError::Text(error, filter.clone()))?;
        if self.captures.list.len() == MOST {
            return Err(Error::TooMany(MOST, "captures"));
        }
        let (to, receiver) = mpsc::unbounded_channel();
        let queued = Arc::new(AtomicUsize::new(0));
        self.captures.last += 1;
        let id = self.captures.last;
        let mut capture = Capture {
            id,
            matches,
            direction: spec.direction,
            drops: spec.drops,
            left: spec.count,
            writer: write_new(spec.snaplen),
            seen: HashMap::new(),
            to,
            queued: Arc::clone(&queued),
            scope,
        };
        // A file without interfaces is none.
        let places: Vec<Place> = match capture.scope {
            Scope::At(place) => vec![place],
            Scope::Network(vni) => {
                let ports = self.all().filter(|(_, slot)| slot.vni == vni);
                ports.map(|(id, _)| Place::Port(id)).collect()
            }
            Scope::All => self.all().map(|(id, _)| Place::Port(id)).collect(),
        };
        for place in places {
            let name = self.place_name(place);
            capture.interface(place, &name);
        }
        if capture.seen.is_empty() {
            capture.interface(Place::Port(PortId::default()), "switch");
        }
        capture.flush();
        if capture.goes_on() {
            self.captures.list.push(capture);
        }
        Ok(Stream {
            id,
            receiver,
            queued,
        })
    }

    /// Ends a capture, which says then what became of the frames. False: there
    /// is none, or not any more.
    pub fn end_capture(&mut self, id: u64) -> bool {
        let list = &mut self.captures.list;
        let Some(at) = list.iter().position(|capture| capture.id == id) else {
            return false;
        };
        list.remove(at).end();
        true
    }

    /// What a name means: `all`, or a port, a network or a peer, in this
    /// order; with `port:`, `network:` or `peer:` only that.
    fn scope(&self, of: &str) -> Result<(Scope, Option<Vni>), Error> {
        let (kind, name) = of.split_once(':').unwrap_or(("", of));
        let port = || {
            let id = *self.names.get(name)?;
            Some((Scope::At(Place::Port(id)), Some(self.slot(id)?.vni)))
        };
        let network = || {
            let vni = self.networks.get(name)?.vni;
            Some((Scope::Network(vni), Some(vni)))
        };
        let peer = || Some((Scope::At(Place::Node(*self.peers.get(name)?)), None));
        let found = match kind {
            "" if matches!(of, "" | "all") => Some((Scope::All, None)),
            "" => port().or_else(network).or_else(peer),
            "port" => port(),
            "network" => network(),
            "peer" => peer(),
            _ => None,
        };
        found.ok_or_else(|| Error::Nothing(of.to_owned()))
    }

    /// What people call a place.
    pub(super) fn place_name(&self, place: Place) -> String {
        match place {
            Place::Port(id) => match self.slot(id) {
                Some(slot) => slot.name.clone(),
                None => "switch".to_owned(),
            },
            Place::Node(node) => format!("peer:{}", self.peer_name(node)),
        }
    }

    /// A frame is shown to those who capture it.
    #[cold]
    pub(super) fn shoot(&mut self, shot: &Shot<'_, '_>) {
        let port = match (shot.direction, shot.at) {
            (Direction::In, Place::Port(id)) => id,
            _ => PortId::default(),
        };
        let bytes = shot.frame.head.bytes();
        // What is malformed matches what matches everything.
        let flat = match parse(bytes, shot.frame.len(), port, shot.vni) {
            Ok((key, _)) => Flat::of(&key),
            Err(_) => Flat::default(),
        };
        let mut captures = std::mem::take(&mut self.captures);
        let mut name = None;
        captures.list.retain_mut(|capture| {
            if !capture.wants(shot, &flat) {
                return true;
            }
            let name = name.get_or_insert_with(|| self.place_name(shot.at));
            capture.take(shot, name);
            capture.goes_on()
        });
        self.captures = captures;
    }
}

fn write_new(snaplen: u32) -> Writer<Vec<u8>> {
    match Writer::new(Vec::new(), snaplen) {
        Ok(writer) => writer,
        // Memory takes what is written.
        Err(_) => unreachable!("a vector refuses nothing"),
    }
}
