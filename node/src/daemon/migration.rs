//! VMs on their way from node to node: what `blanketd` does for `blanket
//! migrate` and `blanket receive`, which do the rest.
//!
//! The node that has the VM offers two services to the other one alone, and
//! calls it. That one makes sockets that lead to them, and starts `blanket
//! receive`, which connects.

use std::env;
use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper::Method;
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::sync::OwnedSemaphorePermit;

use super::Node;
use super::cluster::random_text;
use super::local::Migrate;
use super::stream::{self, Carriage, Forward, Offer, Opened};
use crate::cluster::identity::Peer;
use crate::cluster::names::{NodeName, ServiceName};
use crate::commands::migrate::folder;
use crate::commands::migrate::receive::{CONTROL, MEMORY};
use crate::failure::failure;
use crate::home::Home;
use crate::up::{DAEMON, System, has_program};

/// So many VMs can come at a time.
pub(super) const MAX_ARRIVALS: usize = 16;

/// How often it is looked for what is kept of VMs that have not come.
const PRUNE: Duration = Duration::from_secs(3600);

/// `POST /migrations`: come for a VM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Call {
    /// Names this one; random.
    id: String,
    carriage: Carriage,
}

impl Call {
    /// The services that belong to it.
    fn services(&self) -> Result<[ServiceName; 2]> {
        let name = |what: &str| -> Result<ServiceName> {
            Ok(format!("migrate/{}/{what}", self.id).parse()?)
        };
        Ok([name("control")?, name("memory")?])
    }
}

impl Node {
    /// Offers a VM of this node to another one, and calls it. It can come for as
    /// long as what is returned is held.
    pub(super) async fn send_for(self: &Arc<Self>, wanted: Migrate) -> Result<[Offer; 2]> {
        let (trust, membership) = self.joined()?;
        if *trust.name() == wanted.node {
            return Err(failure(
                format!("{} is this node", wanted.node),
                "name another one; for a fresh monitor here, only a name with --as",
            ));
        }
        let member = stream::known(&membership, &wanted.node)?;
        let call = Call {
            id: random_text()?,
            carriage: wanted.carriage,
        };
        let [control, memory] = call.services()?;
        let only = Some(&wanted.node);
        let offers = [
            self.offer(control, wanted.control, only)?,
            self.offer(memory, wanted.memory, only)?.with_sockets(),
        ];
        let () = self
            .ask(member, Method::POST, "/migrations", Some(&call))
            .await?;
        Ok(offers)
    }

    /// Comes for a VM of `peer`'s.
    pub(super) fn fetch(self: &Arc<Self>, peer: &Peer, call: &Call) -> Result<()> {
        let permit = Arc::clone(&self.arrivals).try_acquire_owned();
        let permit = permit.map_err(|_| {
            failure(
                format!("{MAX_ARRIVALS} VMs come to that node already"),
                "try again when some have arrived",
            )
        })?;
        let stage = Stage::make(&self.home.receiving())?;
        let services = call.services()?;
        let forwards = self.lead(&peer.name, services, &stage.path, call.carriage)?;
        let program = program()?;
        let mut command = started_by_systemd(&program);
        if let Some(home) = self.home.flag() {
            command.arg("--home").arg(home);
        }
        let from = peer.name.clone();
        command.arg("receive").arg(&stage.path).stdin(Stdio::null());
        command.arg("--from").arg(from.to_string());
        for folder in &self.shared {
            command.arg("--shared").arg(folder);
        }
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        self.audit("vm comes", serde_json::json!({ "from": from.to_string() }));
        tokio::spawn(async move {
            let ended = child.wait().await;
            drop::<(OwnedSemaphorePermit, [Forward; 2], Stage)>((permit, forwards, stage));
            match ended {
                Ok(status) if status.success() => tracing::info!("a VM from {from} is settled"),
                Ok(status) => tracing::warn!("a VM from {from} has not come: {status}"),
                Err(error) => tracing::warn!("blanket receive: {error}"),
            }
        });
        Ok(())
    }

    fn lead(
        self: &Arc<Self>,
        name: &NodeName,
        services: [ServiceName; 2],
        stage: &Path,
        carriage: Carriage,
    ) -> Result<[Forward; 2]> {
        let [control, memory] = services;
        let lead = |file, service, opened| {
            self.forward_when(opened, &stage.join(file), name.clone(), service, carriage)
        };
        Ok([
            lead(CONTROL, control, Opened::AtOnce)?,
            lead(MEMORY, memory, Opened::WhenUsed)?,
        ])
    }
}

/// Removes what is kept of VMs that have not come, when its time is over; for ever.
pub(super) async fn prune(home: &Home) {
    loop {
        let home = home.clone();
        let _ = tokio::task::spawn_blocking(move || folder::prune(&home)).await;
        tokio::time::sleep(PRUNE).await;
    }
}

/// A directory for what is needed until a VM is here.
struct Stage {
    path: PathBuf,
}

impl Stage {
    fn make(folder: &Path) -> Result<Self> {
        let name = random_text()?;
        // Short, as sockets' paths have to be.
        let path = folder.join(name.get(..12).unwrap_or(&name));
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&path);
        made.with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// The program `blanket`: beside this one, or in `PATH`.
fn program() -> Result<PathBuf> {
    const PROGRAM: &str = "blanket";
    let own = env::current_exe().ok();
    let beside = own
        .as_deref()
        .and_then(Path::parent)
        .map(|dir| dir.join(PROGRAM));
    let search = env::var_os("PATH").unwrap_or_default();
    let mut all = beside
        .into_iter()
        .chain(env::split_paths(&search).map(|dir| dir.join(PROGRAM)));
    all.find(|path| path.is_file()).ok_or_else(|| {
        failure(
            "the program blanket was not found there",
            "install it beside blanketd",
        )
    })
}

/// `program`, started by systemd where that has started this daemon: a VM needs
/// more than the daemon may do.
fn started_by_systemd(program: &Path) -> Command {
    let system = System::this();
    let unit = Path::new("/etc/systemd/system").join(DAEMON);
    let service = env::var_os("INVOCATION_ID").is_some();
    if !(service && system.has_systemd() && system.has(unit) && has_program("systemd-run")) {
        return Command::new(program);
    }
    let mut command = Command::new("systemd-run");
    command.args(["--quiet", "--collect", "--wait", "--slice=machine.slice"]);
    command.arg("--description=A guest of Blanket that comes from another node");
    command.arg(OsStr::new("--")).arg(program);
    command
}
