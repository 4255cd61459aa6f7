//! Metadata services: what a provider tells a machine about itself, at 169.254.169.254.
//!
//! The service is a thread of the test's process. QEMU's user-mode network hands it each
//! connection to the address through a Unix socket (`guestfwd`, by way of `blanket-agent relay`).

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

mod azure;
mod ec2;
mod gce;
mod http;
mod openstack;

use crate::error::{Context, Result};
use http::{Request, Response};

/// Which provider's service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    Ec2,
    Gce,
    Azure,
    OpenStack,
}

impl Api {
    fn answer(self, request: &Request, state: &mut State) -> Response {
        match self {
            Self::Ec2 => ec2::answer(request, state),
            Self::Gce => gce::answer(request, state),
            Self::Azure => azure::answer(request, state),
            Self::OpenStack => openstack::answer(request, state),
        }
    }
}

/// What the service tells of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Instance {
    /// In the provider's own form.
    pub(crate) id: String,
    pub(crate) name: String,
    /// The instance type.
    pub(crate) kind: String,
    pub(crate) region: String,
    pub(crate) zone: String,
    /// Without the length of the prefix.
    pub(crate) address: String,
    pub(crate) mac: String,
    /// In bytes.
    pub(crate) mtu: u16,
}

/// How a service treats its clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Behavior {
    /// It answers as the provider's does.
    #[default]
    Answers,
    /// It takes requests and never answers.
    Hangs,
    /// It sends one byte of an endless answer a second.
    Trickles,
    /// It closes each connection at once.
    Refuses,
    /// It sends 64 KiB that are not HTTP.
    Garbage,
    /// It answers every request with success and the same page, as captive portals do.
    Lies,
}

/// What a provider announces to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The machine is taken away soon, as spot instances are.
    Preemption,
    /// The machine's host is going to be maintained.
    Maintenance,
}

/// What all connections share.
#[derive(Debug, Default)]
struct State {
    instance: Instance,
    behavior: Behavior,
    event: Option<Event>,
    /// When it takes place, as RFC 3339 writes it; years ahead otherwise.
    at: Option<String>,
    /// EC2's tokens, and until when they are valid.
    tokens: Vec<(String, Instant)>,
    requests: Vec<String>,
    ended: bool,
}

/// A node's metadata service. Clones are the same service.
#[derive(Clone, Debug)]
pub struct Metadata(Arc<Mutex<State>>);

impl Metadata {
    /// Serves the socket `path`, which is made, until [`Metadata::end`].
    pub(crate) fn serve(api: Api, instance: Instance, path: &Path) -> Result<Self> {
        let listener =
            UnixListener::bind(path).context(|| format!("cannot listen on {}", path.display()))?;
        let metadata = Self(Arc::new(Mutex::new(State {
            instance,
            ..State::default()
        })));
        let served = metadata.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(io::Result::ok) {
                if served.state().ended {
                    return;
                }
                let served = served.clone();
                // An error ends this connection: the client has gone, or sends no HTTP.
                thread::spawn(move || served.connection(api, &stream));
            }
        });
        Ok(metadata)
    }

    /// Takes no more connections at the socket `path`. Those that are there end with the node.
    pub(crate) fn end(&self, path: &Path) {
        self.state().ended = true;
        // The thread wakes up; it has ended already if there is none.
        let _ = UnixStream::connect(path);
    }

    /// Changes how the service treats connections that are made from now on.
    pub fn behave(&self, behavior: Behavior) {
        self.state().behavior = behavior;
    }

    /// Announces an event, or takes it back.
    pub fn announce(&self, event: Option<Event>) {
        let mut state = self.state();
        (state.event, state.at) = (event, None);
    }

    /// Announces an event for a time such as `2030-01-21T09:00:43Z` (EC2).
    pub fn announce_at(&self, event: Event, at: impl Into<String>) {
        let mut state = self.state();
        (state.event, state.at) = (Some(event), Some(at.into()));
    }

    /// The requests so far, such as `GET /latest/meta-data/instance-id`.
    pub fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connection(&self, api: Api, mut stream: &UnixStream) -> io::Result<()> {
        let behavior = self.state().behavior;
        if behavior == Behavior::Refuses {
            return Ok(());
        }
        while let Some(request) = Request::read(stream)? {
            let response = {
                let mut state = self.state();
                state
                    .requests
                    .push(format!("{} {}", request.method, request.path));
                match behavior {
                    Behavior::Lies => Response::text("<html>Please log in</html>"),
                    _ => api.answer(&request, &mut state),
                }
            };
            match behavior {
                Behavior::Answers | Behavior::Lies => {
                    stream.write_all(&response.encode(request.keep_alive))?;
                }
                // Until the client has had enough.
                Behavior::Hangs => {
                    io::copy(&mut stream.take(u64::MAX), &mut io::sink())?;
                }
                Behavior::Trickles => loop {
                    stream.write_all(b"x")?;
                    thread::sleep(Duration::from_secs(1));
                },
                Behavior::Garbage => {
                    let mut random = fastrand::Rng::with_seed(1);
                    let bytes: Vec<u8> = (0..64 * 1024).map(|_| random.u8(..)).collect();
                    return stream.write_all(&bytes);
                }
                Behavior::Refuses => return Ok(()),
            }
            if !request.keep_alive {
                break;
            }
        }
        Ok(())
    }
}

/// What is at a path such as `/a/0/b` of a document.
fn at(tree: &Value, path: &str) -> Option<Value> {
    path.split('/')
        .filter(|name| !name.is_empty())
        .try_fold(tree, |value, name| match value {
            Value::Array(items) => items.get(name.parse::<usize>().ok()?),
            other => other.get(name),
        })
        .cloned()
}

#[cfg(test)]
mod tests;
