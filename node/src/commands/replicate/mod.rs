//! `blanket replicate`: a VM's disks are kept on another node, too, point after
//! point, so that it can be started there when this node is gone.

mod image;
mod promote;
pub(crate) mod standby;
mod store;

pub(crate) use promote::{Args as PromoteArgs, ListArgs, promote, replicas};

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_migration::{Options, Phase, Status};
use blanket_vmm::client::Client;
use blanket_vmm::config::ByteSize;
use blanket_vmm::migrate::Request;
use serde_json::json;

use super::migrate::Shown;
use super::migrate::remote::{call, pack, running, send_files, step, with_serials};
use super::print;
use crate::cluster::names::NodeName;
use crate::cluster::parcel::{Go, Wish};
use crate::daemon::Carriage;
use crate::home::{Home, VmDir};
use crate::name::VmName;

/// How often one looks how far it is.
const LOOK: Duration = Duration::from_millis(50);
/// How long it takes to try again after a break.
const AGAIN: Duration = Duration::from_secs(5);
/// How long a monitor may take to give up.
const END: Duration = Duration::from_secs(20);
/// How long the other node may copy what it has of the disks.
const COPY: Duration = Duration::from_secs(3600);

#[derive(clap::Args)]
#[command(
    after_help = "It goes on until it is ended (Ctrl-C), and after a break by itself: only what differs is \
    sent then. The VM runs on, and stands still for milliseconds at each point. On the other node, \
    blanket replicas lists replicas, and blanket promote starts one."
)]
pub(crate) struct Args {
    /// The VM.
    name: VmName,

    /// The node that keeps the replica; see blanket node ls.
    node: NodeName,

    /// Seconds from one point to the next: so much may be lost.
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    interval: u64,

    /// End when the replica has one more point.
    #[arg(long)]
    once: bool,

    /// Most bytes per second [default: no limit].
    #[arg(long, value_name = "BYTES")]
    bandwidth: Option<ByteSize>,

    /// Connections that carry it, 1 to 16 [default: one per processor].
    #[arg(long, value_name = "N")]
    streams: Option<u32>,

    /// Do not encrypt what goes to the other node: for links that are trusted.
    #[arg(long)]
    plain: bool,

    /// Print a line of JSON for each point.
    #[arg(long)]
    json: bool,
}

/// Why points end.
enum Broken {
    /// The other node does not want them.
    Refused(anyhow::Error),
    /// It is not there, or something has failed: perhaps not the next time.
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Broken {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

pub(crate) fn replicate(home: &Home, args: &Args) -> Result<ExitCode> {
    let vm = home.existing(&args.name)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .context("cannot watch for Ctrl-C")?;
    }
    let mut replication = Replication {
        home,
        vm: &vm,
        args,
        shown: Shown::new(!args.json),
        interrupted,
        met: false,
    };
    let ended = replication.run();
    replication.shown.end();
    ended.map(|()| ExitCode::SUCCESS)
}

struct Replication<'a> {
    home: &'a Home,
    vm: &'a VmDir,
    args: &'a Args,
    shown: Shown,
    interrupted: Arc<AtomicBool>,
    /// The other node has begun to keep a replica.
    met: bool,
}

impl Replication<'_> {
    fn run(&mut self) -> Result<()> {
        loop {
            let client = self.vm.live_client()?;
            let ended = self.connection(&client);
            // Whatever has become of it: it is over there, too.
            let over = ends(self.vm, &client);
            let error = match ended {
                Ok(()) => return over,
                Err(Broken::Refused(error)) => return Err(error),
                Err(Broken::Failed(error)) => error,
            };
            over?;
            if !self.met {
                return Err(error);
            }
            eprintln!(
                "[no points of '{}' reach {}: {error:#}; trying again]",
                self.vm.name, self.args.node
            );
            let end = Instant::now() + AGAIN;
            while Instant::now() < end {
                if self.is_interrupted() {
                    return Ok(());
                }
                std::thread::sleep(LOOK);
            }
        }
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Sends points until it is to end.
    fn connection(&mut self, client: &Client) -> Result<(), Broken> {
        let info = running(self.vm, client, "replicated")?;
        let (mut parcel, files) = pack(self.vm, &self.vm.name, &info, &info.config)?;
        parcel.wish = Wish::StandBy;
        let carriage = match self.args.plain {
            true => Carriage::Plain,
            false => Carriage::Tls,
        };
        let (_way, mut stream) = call(self.home, self.vm, &self.args.node, carriage)?;
        stream.set_read_timeout(Some(COPY))?;
        step(&mut stream, &parcel).map_err(Broken::Refused)?;
        send_files(&mut stream, &files)?;
        let settled = client.migrate(&Request {
            options: Options {
                streams: self.args.streams.unwrap_or(0),
                bandwidth: self.args.bandwidth.map_or(0, |bytes| bytes.0),
                ..Options::default()
            },
            replicate_ms: Some(self.args.interval.saturating_mul(1000)),
            ..Request::default()
        })?;
        let go = Go {
            config: with_serials(settled),
            user: None,
        };
        step(&mut stream, &go).map_err(Broken::Refused)?;
        self.met = true;
        self.watch(client)
    }

    /// Tells of points, until there are no more, or enough.
    fn watch(&mut self, client: &Client) -> Result<(), Broken> {
        let mut last = 0;
        loop {
            let status = client.migration()?;
            self.shown.show(&status);
            let points = status.replication.as_ref().map_or(0, |it| it.points);
            if points > last {
                self.tell(&status, last == 0)?;
                last = points;
                if self.args.once {
                    return Ok(());
                }
            }
            if self.is_interrupted() {
                return Ok(());
            }
            if status.phase == Phase::Failed {
                let reason = status.error.unwrap_or_default();
                return Err(Broken::Failed(anyhow::anyhow!(reason)));
            }
            std::thread::sleep(LOOK);
        }
    }

    fn tell(&self, status: &Status, first: bool) -> Result<()> {
        let replication = status.replication.clone().unwrap_or_default();
        if self.args.json {
            let mut line = serde_json::to_value(&replication)?;
            line["disks_same"] = json!(status.disks_same);
            line["disks_sent"] = json!(status.disks_sent);
            return print(&format!("{line}\n"));
        }
        // Later ones are on the progress line only.
        if first {
            return print(&format!(
                "'{}' has a replica on {}\n",
                self.vm.name, self.args.node
            ));
        }
        Ok(())
    }
}

/// Has a monitor give up what it does for a replica, and waits until it has.
fn ends(vm: &VmDir, client: &Client) -> Result<()> {
    let end = Instant::now() + END;
    while Instant::now() < end && vm.process()?.is_some() {
        match client.cancel_migration() {
            Ok(status) if matches!(status.phase, Phase::Failed | Phase::Moved) => return Ok(()),
            // It has never done anything of the kind.
            Ok(status) if status.phase == Phase::Waiting && status.streams == 0 => return Ok(()),
            _ => std::thread::sleep(LOOK),
        }
    }
    Ok(())
}
