//! `blanketd`: what runs on each node and talks to the others.
//!
//! VMs do not need it: each has a monitor and a supervisor of its own
//! (`blanket supervise`), which do not notice when this daemon ends. For one
//! that comes from another node, it starts `blanket receive`. What it remembers
//! is on disk before it is told to anybody.

mod cluster;
pub(crate) mod http;
mod joining;
mod lend;
mod limit;
mod listen;
pub(crate) mod local;
mod migration;
mod peer;
mod stream;
#[cfg(test)]
mod tests;

pub(crate) use cluster::{own_address, random_text};
pub(crate) use peer::Report;
pub(crate) use stream::Carriage;

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::SystemTime;

use anyhow::{Context, Result};
use blanket_drivers::provider::{self, Machine};
use clap::Parser;
use rustls::{ClientConfig, ServerConfig};
use tokio::sync::{Semaphore, watch};

use crate::cluster::ca::Authority;
use crate::cluster::identity::{Files, Identity, unix_seconds};
use crate::cluster::members::Membership;
use crate::cluster::names::{NodeName, PORT, ServiceName};
use crate::cluster::store::{self, Redb, Store};
use crate::cluster::tls::{self, Protocol};
use crate::failure::failure;
use crate::home::Home;

/// The key under which the store has the [`Membership`].
const MEMBERSHIP: &str = "membership";

/// The daemon of each node: it talks to the other nodes of the cluster.
#[derive(Parser)]
#[command(
    name = "blanketd",
    version,
    after_help = "It listens once this node is in a cluster: see blanket ca init, blanket node join."
)]
pub(crate) struct Args {
    /// Keep VMs in this directory instead of the system's or user's own.
    #[arg(long, value_name = "DIR", env = "BLANKET_HOME")]
    home: Option<PathBuf>,

    /// Listen for other nodes here.
    #[arg(long, value_name = "ADDRESS:PORT", default_value_t = SocketAddr::from(([0; 8], PORT)))]
    listen: SocketAddr,

    /// Let VMs come here whose disks are files in this directory, which is on storage that other
    /// nodes have, too (blanket migrate --shared-disks). Several times for several.
    #[arg(
        long,
        value_name = "DIR",
        env = "BLANKET_SHARED",
        value_delimiter = ':'
    )]
    shared: Vec<PathBuf>,
}

/// Who this node is, and how it therefore talks.
pub(crate) struct Trust {
    identity: Identity,
    server: Arc<ServerConfig>,
    node: Arc<ClientConfig>,
    stream: Arc<ClientConfig>,
    /// The CA, on one node.
    authority: Option<Authority>,
}

impl Trust {
    fn new(identity: Identity, authority: Option<Authority>) -> Result<Self> {
        Ok(Self {
            server: tls::server(&identity)?,
            node: tls::client(&identity, Protocol::Node)?,
            stream: tls::client(&identity, Protocol::Stream)?,
            identity,
            authority,
        })
    }

    fn name(&self) -> &NodeName {
        &self.identity.own.name
    }
}

/// A node and what it knows.
pub(crate) struct Node {
    home: Home,
    files: Files,
    store: Box<dyn Store>,
    listen: SocketAddr,
    /// Where disks may be that other nodes have, too.
    shared: Vec<PathBuf>,
    /// Where it listens, once it does.
    bound: tokio::sync::Mutex<Option<listen::Bound>>,
    trust: RwLock<Option<Arc<Trust>>>,
    membership: watch::Sender<Option<Arc<Membership>>>,
    /// Held while who is in the cluster changes.
    changing: tokio::sync::Mutex<()>,
    provider: &'static str,
    limiter: Mutex<limit::Limiter>,
    /// Where the services of this node are.
    services: Mutex<HashMap<ServiceName, stream::Service>>,
    tickets: stream::Tickets,
    /// VMs that come from other nodes now.
    arrivals: Arc<Semaphore>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    /// Takes up what was left.
    pub(crate) fn open(home: Home, listen: SocketAddr, shared: &[PathBuf]) -> Result<Arc<Self>> {
        let files = Files::make(home.node())?;
        // What an earlier daemon led to other nodes leads nowhere any more.
        let _ = std::fs::remove_dir_all(home.receiving());
        let store = Redb::open(&files.path("store.redb"))?;
        let identity = files.identity()?;
        let trust = match identity {
            Some(identity) => Some(Arc::new(Trust::new(identity, files.authority()?)?)),
            None => None,
        };
        let membership: Option<Membership> = store::read(&store, MEMBERSHIP)?;
        Ok(Arc::new(Self {
            home,
            files,
            store: Box::new(store),
            listen,
            shared: shared.to_vec(),
            bound: tokio::sync::Mutex::new(None),
            trust: RwLock::new(trust),
            membership: watch::Sender::new(membership.map(Arc::new)),
            changing: tokio::sync::Mutex::new(()),
            provider: provider::report(&Machine::this(), None).provider,
            limiter: Mutex::default(),
            services: Mutex::default(),
            tickets: stream::Tickets::default(),
            arrivals: Arc::new(Semaphore::new(migration::MAX_ARRIVALS)),
        }))
    }

    fn trust(&self) -> Option<Arc<Trust>> {
        let trust = self.trust.read().unwrap_or_else(PoisonError::into_inner);
        trust.clone()
    }

    fn set_trust(&self, trust: Option<Trust>) {
        let mut held = self.trust.write().unwrap_or_else(PoisonError::into_inner);
        *held = trust.map(Arc::new);
    }

    /// Who this node is and who else is in the cluster, or the error that it is
    /// in none.
    fn joined(&self) -> Result<(Arc<Trust>, Arc<Membership>)> {
        let both = self.trust().zip(self.membership.borrow().clone());
        both.ok_or_else(|| {
            failure(
                "this node is in no cluster",
                "blanket ca init makes one, blanket node join joins one",
            )
        })
    }

    /// Remembers who is in the cluster.
    fn set_membership(&self, membership: Membership) -> Result<Arc<Membership>> {
        store::write(self.store.as_ref(), MEMBERSHIP, &membership)?;
        let membership = Arc::new(membership);
        self.membership.send_replace(Some(Arc::clone(&membership)));
        Ok(membership)
    }

    /// Writes down, for good, what was done about who is in the cluster.
    fn audit(&self, event: &str, mut details: serde_json::Value) {
        let now = chrono::DateTime::<chrono::Utc>::from(SystemTime::now());
        details["event"] = event.into();
        details["time"] = now
            .to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
            .into();
        tracing::info!("{details}");
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        let written = options
            .open(self.files.path("audit.log"))
            .and_then(|mut file| {
                file.write_all(format!("{details}\n").as_bytes())?;
                file.sync_all()
            });
        if let Err(error) = written {
            tracing::error!("cannot write the audit log: {error}");
        }
    }
}

/// Seconds of Unix time, now.
fn now() -> u64 {
    unix_seconds(SystemTime::now())
}

/// Runs until it is asked to end.
pub(crate) fn run(args: &Args) -> Result<()> {
    let home = Home::locate(args.home.as_deref())?;
    if let Some(above) = home.node().parent() {
        let made = std::fs::create_dir_all(above);
        made.with_context(|| format!("cannot make {}", above.display()))?;
    }
    // What is made from here on is for its owner only, sockets among it.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    let node = Node::open(home, args.listen, &args.shared)?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let local = local::Listener::bind(&node)?;
        if node.trust().is_some() {
            node.start_listening().await?;
        }
        tracing::info!("ready");
        tokio::select! {
            () = local.serve(&node) => (),
            () = cluster::keep_up(&node) => (),
            () = joining::keep_joined(&node) => (),
            () = migration::prune(&node.home) => (),
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
        Ok(())
    })
}
