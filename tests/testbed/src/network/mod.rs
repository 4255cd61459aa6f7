//! Networks between nodes, without any privilege on the host: QEMU's network cards are plugged
//! into a switch in this process, which shapes what passes between each two nodes.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

mod shaper;
mod switch;
mod translate;

pub use shaper::{Counters, Link};

use crate::error::{Context, Result};
use translate::Translation;

/// An Ethernet segment that nodes can be plugged into. Clones are the same network.
///
/// All links are perfect at first. They may be changed at any time, also while nodes use them.
#[derive(Clone)]
pub struct Network {
    shared: Arc<Shared>,
    /// Wakes the switch; the switch ends when the last clone is gone.
    bell: Arc<UnixStream>,
}

/// What the switch and the network's users share.
struct Shared {
    seed: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the two nodes' names, the lesser first.
    links: BTreeMap<(String, String), Link>,
    /// By sender and receiver.
    counters: BTreeMap<(String, String), Counters>,
    /// By node.
    translations: BTreeMap<String, Translation>,
    /// New ports, for the switch.
    plugged: Vec<Plug>,
}

/// A port that the switch does not have yet.
struct Plug {
    node: String,
    listener: UnixListener,
    service: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self, a: &str, b: &str) -> Link {
        self.lock()
            .links
            .get(&ends(a, b))
            .copied()
            .unwrap_or_default()
    }

    fn translation(&self, node: &str) -> Option<Translation> {
        self.lock().translations.get(node).copied()
    }
}

impl Network {
    /// A network without nodes. `seed` decides which frames are lost on links that lose some.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when there are no file descriptors left.
    pub fn new(seed: u64) -> Result<Self> {
        let (bell, clapper) = UnixStream::pair().context(|| "cannot make sockets".to_owned())?;
        let shared = Arc::new(Shared {
            seed,
            state: Mutex::default(),
        });
        let switch = switch::Switch::new(Arc::clone(&shared));
        thread::spawn(move || {
            if let Err(error) = switch.run(&clapper) {
                eprintln!("testbed: a network has failed: {error}");
            }
        });
        Ok(Self {
            shared,
            bell: Arc::new(bell),
        })
    }

    /// Sets the link between two nodes, by their names.
    pub fn set_link(&self, a: &str, b: &str, link: Link) {
        self.shared.lock().links.insert(ends(a, b), link);
    }

    /// The link between two nodes.
    pub fn link(&self, a: &str, b: &str) -> Link {
        self.shared.link(a, b)
    }

    /// Sets the one-way latency between two nodes, and leaves the rest as it is.
    pub fn set_latency(&self, a: &str, b: &str, latency: Duration) {
        self.change(a, b, |link| link.latency = latency);
    }

    /// Cuts two nodes off from each other.
    pub fn partition(&self, a: &str, b: &str) {
        self.change(a, b, |link| link.up = false);
    }

    /// Ends what [`Network::partition`] has begun.
    pub fn heal(&self, a: &str, b: &str) {
        self.change(a, b, |link| link.up = true);
    }

    /// Puts a gateway before a node that translates its address `inside`: from now on others see it
    /// at `outside`, and at no other address.
    pub fn translate(&self, node: &str, inside: Ipv4Addr, outside: Ipv4Addr) {
        let translation = Translation { inside, outside };
        let translations = &mut self.shared.lock().translations;
        translations.insert(node.to_owned(), translation);
    }

    /// Takes the gateway away again that [`Network::translate`] has put there.
    pub fn translate_no_more(&self, node: &str) {
        self.shared.lock().translations.remove(node);
    }

    fn change(&self, a: &str, b: &str, change: impl FnOnce(&mut Link)) {
        change(self.shared.lock().links.entry(ends(a, b)).or_default());
    }

    /// What became of the frames from one node to another.
    pub fn counters(&self, from: &str, to: &str) -> Counters {
        let ends = (from.to_owned(), to.to_owned());
        self.shared
            .lock()
            .counters
            .get(&ends)
            .copied()
            .unwrap_or_default()
    }

    /// Serves a port for the node at the Unix socket `path`, which is made.
    pub(crate) fn plug_in(&self, node: &str, path: &Path) -> Result<()> {
        self.plug(node, path, false)
    }

    /// Serves a port, like [`Network::plug_in`], for a service that only this node sees.
    pub(crate) fn plug_in_service(&self, node: &str, path: &Path) -> Result<()> {
        self.plug(node, path, true)
    }

    fn plug(&self, node: &str, path: &Path, service: bool) -> Result<()> {
        let listener =
            UnixListener::bind(path).context(|| format!("cannot listen on {}", path.display()))?;
        self.shared.lock().plugged.push(Plug {
            node: node.to_owned(),
            listener,
            service,
        });
        (&*self.bell)
            .write_all(&[1])
            .context(|| "the network has failed".to_owned())
    }
}

fn ends(a: &str, b: &str) -> (String, String) {
    let (low, high) = if a <= b { (a, b) } else { (b, a) };
    (low.to_owned(), high.to_owned())
}

#[cfg(test)]
mod tests;
