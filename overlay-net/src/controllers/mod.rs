//! The OpenFlow controllers of networks: who connects to whom, and how it is.
//!
//! Each network is a datapath of its own. Controllers that are connected to
//! are tried again and again, at growing intervals; who connects by itself is
//! served while it is there.

mod target;
mod tls;

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::flow::openflow::Datapath;
use crate::flow::openflow::server::{Endpoint, MOST, Reach};
use crate::switch::worker::{Handle, Stopped};
use crate::switch::{self, FailMode, Switch};

pub use target::{NoTarget, Target};
pub use tls::{Error as TlsError, Tls};

/// Targets of a network at most.
const MOST_TARGETS: usize = 8;

/// How long it takes at most to connect, and to agree on keys.
const CONNECT: Duration = Duration::from_secs(5);

/// The shortest and the longest time between two tries.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(8));

/// How a network is controlled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerSpec {
    /// Controllers, and where they are waited for.
    pub targets: Vec<Target>,
    /// What happens without one that is connected to.
    #[serde(default)]
    pub fail_mode: FailMode,
    /// For targets with TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
}

impl ControllerSpec {
    /// What the network does without a controller; none: it needs none.
    #[must_use]
    pub fn mode(&self) -> Option<FailMode> {
        let active = self.targets.iter().any(Target::is_active);
        active.then_some(self.fail_mode)
    }
}

/// How a target is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllerStatus {
    /// Which.
    pub target: Target,
    /// Controllers that are connected: of one that is connected to, 0 or 1.
    pub connected: usize,
    /// Seconds since it is as it is.
    pub since: u64,
    /// What went wrong last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How a network's controllers are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Controllers {
    /// What was asked for.
    pub spec: ControllerSpec,
    /// The datapath's number.
    pub datapath: u64,
    /// Its targets.
    pub targets: Vec<ControllerStatus>,
    /// There is none, and all frames go through the bridge.
    pub standalone: bool,
}

/// Why controllers are not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Keys or certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// There are none.
    #[error("`{0}` takes TLS: name --tls-key, --tls-certificate and --tls-ca")]
    NoTls(Target),
    /// Nobody can be waited for there.
    #[error("cannot listen for controllers at {target}: {why}; take another address or port")]
    Listen {
        /// Where.
        target: Target,
        /// Why not.
        why: io::Error,
    },
    /// A network without controllers.
    #[error("the network `{0}` has no controllers; blanket net controller set gives it some")]
    None(String),
    /// None, or very many.
    #[error("a network has 1 to {MOST_TARGETS} controllers")]
    Count,
    /// The switch refused it.
    #[error(transparent)]
    Switch(#[from] switch::Error),
    /// There is no switch any more.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// The way to a network's datapath.
#[derive(Clone)]
struct Way {
    handle: Handle,
    network: Arc<str>,
}

impl Reach for Way {
    async fn with<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut dyn Datapath) -> R + Send + 'static,
    ) -> io::Result<R> {
        let network = Arc::clone(&self.network);
        let done = self
            .handle
            .with(move |switch| switch.with_datapath(&network, act));
        match done.await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(io::Error::new(ErrorKind::NotFound, error)),
            Err(stopped) => Err(io::Error::other(stopped)),
        }
    }
}

/// What is known of a target.
struct Known {
    connected: usize,
    since: Instant,
    error: Option<String>,
}

/// One target, while it is served.
struct Served {
    target: Target,
    tls: Option<Tls>,
    endpoint: Endpoint<Way>,
    way: Way,
    known: Mutex<Known>,
    /// Controllers of the network that there should be.
    count: Arc<AtomicUsize>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(
        UnixListener,
        #[expect(dead_code, reason = "it is there to be dropped")] SocketFile,
    ),
}

/// A socket's file, which goes with it.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may have been removed already.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Anything that bytes can be sent over.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Binds a Unix socket in the place of one that nobody listens at any more.
async fn bind_unix(path: &Path) -> io::Result<Listener> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::symlink_metadata(path) {
        Ok(old) if old.file_type().is_socket() => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(ErrorKind::AddrInUse.into());
            }
            std::fs::remove_file(path)?;
        }
        Ok(_) => return Err(io::Error::other("there is a file that is no socket")),
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    Ok(Listener::Unix(listener, SocketFile(path.to_owned())))
}

async fn bind(target: &Target) -> io::Result<Option<Listener>> {
    match target {
        Target::Ptcp(at) | Target::Pssl(at) => {
            Ok(Some(Listener::Tcp(TcpListener::bind(at).await?)))
        }
        Target::Punix(path) => bind_unix(path).await.map(Some),
        _ => Ok(None),
    }
}

impl Served {
    fn know(&self, change: impl FnOnce(&mut Known)) {
        change(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn failed(&self, error: &dyn std::fmt::Display) {
        let error = error.to_string();
        self.know(|known| {
            if known.error.as_ref() != Some(&error) {
                tracing::info!(
                    "controller {} of {}: {error}",
                    self.target,
                    self.way.network
                );
            }
            known.error = Some(error);
        });
    }

    fn status(&self) -> ControllerStatus {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        ControllerStatus {
            target: self.target.clone(),
            connected: known.connected,
            since: known.since.elapsed().as_secs(),
            error: known.error.clone(),
        }
    }

    /// A controller has come, or gone.
    fn turned(self: &Arc<Self>, came: bool) {
        self.know(|known| {
            if came {
                known.connected += 1;
                known.error = None;
            } else {
                known.connected -= 1;
            }
            known.since = Instant::now();
        });
        if self.target.is_active() {
            if came {
                self.count.fetch_add(1, Ordering::Relaxed);
            } else {
                self.count.fetch_sub(1, Ordering::Relaxed);
            }
            let (network, count) = (Arc::clone(&self.way.network), Arc::clone(&self.count));
            // Read when its turn comes: the last is right. The network, or the
            // switch, may have gone.
            let _ = self.way.handle.tell(move |switch| {
                let _ = switch.set_controllers(&network, count.load(Ordering::Relaxed));
            });
        }
    }

    async fn session(self: &Arc<Self>, stream: impl Stream) -> io::Result<()> {
        /// What has come has gone when this is dropped, by whatever end.
        struct Here(Option<Arc<Served>>);
        impl Drop for Here {
            fn drop(&mut self) {
                if let Some(served) = self.0.take() {
                    served.turned(false);
                }
            }
        }
        let mut here = Here(None);
        let slot = &mut here.0;
        let greeted = || {
            self.turned(true);
            *slot = Some(Arc::clone(self));
        };
        self.endpoint.serve(stream, greeted).await
    }

    /// Connects to the controller.
    async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let tcp = async |host: &str, port| {
            let stream = TcpStream::connect((host, port)).await?;
            stream.set_nodelay(true)?;
            io::Result::Ok(stream)
        };
        match (&self.target, &self.tls) {
            (Target::Unix(path), _) => Ok(Box::new(UnixStream::connect(path).await?)),
            (Target::Tcp(host, port), _) => Ok(Box::new(tcp(host, *port).await?)),
            (Target::Ssl(host, port), Some(tls)) => {
                let connector = tls.connector().map_err(io::Error::other)?;
                let name = tls.name(host).map_err(io::Error::other)?;
                let stream = tcp(host, *port).await?;
                Ok(Box::new(connector.connect(name, stream).await?))
            }
            // What waits for controllers does not connect, and `set` sees to keys.
            _ => Err(ErrorKind::Unsupported.into()),
        }
    }

    /// Keeps a connection to the controller.
    async fn keep(self: Arc<Self>) {
        let (mut wait, longest) = BACKOFF;
        loop {
            let connected = timeout(CONNECT, self.connect()).await;
            match connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
                Ok(stream) => {
                    let began = Instant::now();
                    match self.session(stream).await {
                        Ok(()) => self.failed(&"the controller has closed the connection"),
                        Err(error) => self.failed(&error),
                    }
                    if began.elapsed() > longest {
                        wait = BACKOFF.0;
                    }
                }
                Err(error) => self.failed(&error),
            }
            sleep(wait).await;
            wait = (2 * wait).min(longest);
        }
    }

    /// Takes those who connect.
    async fn accept(self: Arc<Self>, mut listener: Option<Listener>) {
        let mut sessions = JoinSet::new();
        loop {
            let Some(bound) = &listener else {
                match bind(&self.target).await {
                    Ok(bound) => listener = bound,
                    Err(error) => {
                        self.failed(&error);
                        sleep(BACKOFF.1).await;
                    }
                }
                continue;
            };
            let accepted = tokio::select! {
                accepted = bound.accept() => accepted,
                Some(_) = sessions.join_next() => continue,
            };
            match accepted {
                // The endpoint counts those that have said hello.
                Ok(_) if sessions.len() >= 2 * MOST => {}
                Ok(stream) => {
                    let this = Arc::clone(&self);
                    sessions.spawn(async move {
                        if let Err(error) = this.welcome(stream).await {
                            this.failed(&error);
                        }
                    });
                }
                Err(error) => {
                    self.failed(&error);
                    sleep(BACKOFF.0).await;
                }
            }
        }
    }

    async fn welcome(self: &Arc<Self>, stream: Accepted) -> io::Result<()> {
        let tls = self.tls.as_ref().filter(|_| self.target.is_tls());
        match (stream, tls) {
            (Accepted::Tcp(stream), Some(tls)) => {
                let acceptor = tls.acceptor().map_err(io::Error::other)?;
                let agreed = timeout(CONNECT, acceptor.accept(stream)).await;
                let stream = agreed.map_err(|_| io::Error::from(ErrorKind::TimedOut))?;
                self.session(stream?).await
            }
            (Accepted::Tcp(stream), None) => self.session(stream).await,
            (Accepted::Unix(stream), _) => self.session(stream).await,
        }
    }
}

enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Accepted::Tcp(stream))
            }
            Self::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0)),
        }
    }
}

/// A network's controllers; they are left when this is dropped.
struct Running {
    spec: ControllerSpec,
    served: Vec<Arc<Served>>,
    tasks: JoinSet<()>,
}

/// The controllers of all networks.
pub struct Set {
    handle: Handle,
    running: BTreeMap<String, Running>,
    /// Controllers that there should be and are, of each network that ever had
    /// some: what is left from before is counted in the same place.
    counts: BTreeMap<String, Arc<AtomicUsize>>,
}

impl Set {
    /// None yet.
    #[must_use]
    pub fn new(handle: Handle) -> Self {
        Self {
            handle,
            running: BTreeMap::new(),
            counts: BTreeMap::new(),
        }
    }

    /// Gives a network these controllers, and no others. With `strict`, nothing
    /// is changed if there is something wrong with one of them; else it is
    /// tried again.
    ///
    /// # Errors
    ///
    /// There is no such network, no TLS, or nobody can be waited for at one of
    /// the addresses.
    pub async fn set(
        &mut self,
        network: &str,
        spec: ControllerSpec,
        strict: bool,
    ) -> Result<(), Error> {
        if !(1..=MOST_TARGETS).contains(&spec.targets.len()) {
            return Err(Error::Count);
        }
        if strict {
            check(&spec)?;
        }
        let name = network.to_owned();
        self.handle.with(move |switch| switch.hub(&name)).await??;
        // What there was holds the addresses that may be asked for again.
        let old = self.end(network).await;
        let started = self.start(network, spec, strict).await;
        if let (Err(_), Some(old)) = (&started, old) {
            self.start(network, old, false).await?;
        }
        started
    }

    async fn start(
        &mut self,
        network: &str,
        spec: ControllerSpec,
        strict: bool,
    ) -> Result<(), Error> {
        let name = network.to_owned();
        let hub = self.handle.with(move |switch| switch.hub(&name)).await??;
        let way = Way {
            handle: self.handle.clone(),
            network: network.into(),
        };
        let endpoint = Endpoint::new(way.clone(), hub);
        let count = self.counts.entry(network.to_owned()).or_default();
        let count = Arc::clone(count);
        let mut listeners = Vec::new();
        for target in &spec.targets {
            let bound = match bind(target).await {
                Err(why) if strict => {
                    let target = target.clone();
                    return Err(Error::Listen { target, why });
                }
                bound => bound.ok().flatten(),
            };
            listeners.push(bound);
        }
        let (name, mode) = (network.to_owned(), spec.mode());
        let set = move |switch: &mut Switch| switch.set_fail_mode(&name, mode);
        self.handle.with(set).await??;
        let (mut served, mut tasks) = (Vec::new(), JoinSet::new());
        for (target, listener) in spec.targets.iter().zip(listeners) {
            let one = Arc::new(Served {
                target: target.clone(),
                tls: spec.tls.clone(),
                endpoint: endpoint.clone(),
                way: way.clone(),
                known: Mutex::new(Known {
                    connected: 0,
                    since: Instant::now(),
                    error: None,
                }),
                count: Arc::clone(&count),
            });
            if target.is_active() {
                tasks.spawn(Arc::clone(&one).keep());
            } else {
                tasks.spawn(Arc::clone(&one).accept(listener));
            }
            served.push(one);
        }
        let running = Running {
            spec,
            served,
            tasks,
        };
        self.running.insert(network.to_owned(), running);
        Ok(())
    }

    /// Leaves a network's controllers; which they were.
    async fn end(&mut self, network: &str) -> Option<ControllerSpec> {
        let mut running = self.running.remove(network)?;
        running.tasks.shutdown().await;
        Some(running.spec)
    }

    /// Leaves a network's controllers for good.
    ///
    /// # Errors
    ///
    /// It has none.
    pub async fn remove(&mut self, network: &str) -> Result<ControllerSpec, Error> {
        let spec = self.end(network).await;
        let spec = spec.ok_or_else(|| Error::None(network.to_owned()))?;
        let name = network.to_owned();
        let set = self
            .handle
            .with(move |switch| switch.set_fail_mode(&name, None));
        match set.await? {
            // It has gone, and all of it.
            Ok(()) | Err(switch::Error::NoNetwork(_)) => Ok(spec),
            Err(error) => Err(error.into()),
        }
    }

    /// How a network's controllers are.
    ///
    /// # Errors
    ///
    /// It has none.
    pub async fn get(&self, network: &str) -> Result<Controllers, Error> {
        let running = self.running.get(network);
        let running = running.ok_or_else(|| Error::None(network.to_owned()))?;
        let name = network.to_owned();
        let ask = self.handle.with(move |switch| {
            let id = switch.with_datapath(&name, |datapath| datapath.id())?;
            switch
                .is_standalone(&name)
                .map(|standalone| (id, standalone))
        });
        let (datapath, standalone) = ask.await??;
        Ok(Controllers {
            spec: running.spec.clone(),
            datapath,
            targets: running
                .served
                .iter()
                .map(|served| served.status())
                .collect(),
            standalone,
        })
    }
}

/// Whether there are keys for all targets that take them.
fn check(spec: &ControllerSpec) -> Result<(), Error> {
    for target in spec.targets.iter().filter(|target| target.is_tls()) {
        let tls = spec.tls.as_ref();
        let tls = tls.ok_or_else(|| Error::NoTls(target.clone()))?;
        tls.acceptor()?;
        if let Target::Ssl(host, _) = target {
            tls.connector()?;
            tls.name(host)?;
        }
    }
    Ok(())
}
