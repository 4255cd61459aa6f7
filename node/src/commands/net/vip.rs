//! `blanket net vip`.

use std::net::SocketAddr;

use anyhow::Result;
use blanket_overlay::api::services::{BackendChange, Protocol, Vip, VipSpec};
use hyper::Method;

use super::{ListArgs, NameArgs, row, show};
use crate::home::Home;
use crate::switch::ask;

#[derive(clap::Subcommand)]
pub(crate) enum VipArgs {
    /// Make a virtual address in a network, on each of its nodes with the same servers.
    Create(CreateArgs),
    /// Remove a virtual address.
    Rm(NameArgs),
    /// List virtual addresses and their servers, with each one's share of new connections.
    Ls(ListArgs),
    /// The servers of a virtual address. Each has the address on its loopback interface.
    #[command(subcommand)]
    Backend(BackendArgs),
}

#[derive(clap::Args)]
pub(crate) struct CreateArgs {
    /// The network.
    network: String,
    /// Its name.
    name: String,
    /// The address and port, like 10.0.0.100:80
    address: SocketAddr,
    /// UDP, not TCP.
    #[arg(long, conflicts_with = "sctp")]
    udp: bool,
    /// SCTP, not TCP.
    #[arg(long)]
    sctp: bool,
    /// All connections of a client go to one server.
    #[arg(long)]
    sticky: bool,
    /// How long connections stay with servers that drain or are gone.
    #[arg(long, value_name = "SECONDS", default_value_t = VipSpec::usual_drain())]
    drain: u64,
}

#[derive(clap::Subcommand)]
pub(crate) enum BackendArgs {
    /// Add a server, or have one get new connections again.
    Add {
        #[command(flatten)]
        of: BackendOf,
        /// Its share of connections, compared with others'.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
        weight: Option<u32>,
    },
    /// Let a server keep its connections, and get no new ones.
    Drain(BackendOf),
    /// Remove a server: as drained, when nobody waits for it any more.
    Rm(BackendOf),
}

#[derive(clap::Args)]
pub(crate) struct BackendOf {
    /// The virtual address.
    name: String,
    /// The server: its MAC address, or the port that it is attached to with one.
    backend: String,
}

impl BackendOf {
    fn path(&self) -> String {
        format!("/vips/{}/backends/{}", self.name, self.backend)
    }
}

pub(super) fn vip(home: &Home, args: &VipArgs) -> Result<()> {
    let path = |name: &str| format!("/vips/{name}");
    match args {
        VipArgs::Create(args) => {
            let vips: Vec<Vip> = ask(home, Method::GET, "/vips", None::<&()>)?;
            let known = vips.into_iter().find(|vip| vip.name == args.name);
            let spec = VipSpec {
                network: args.network.clone(),
                address: args.address.ip(),
                port: args.address.port(),
                protocol: match (args.udp, args.sctp) {
                    (true, _) => Protocol::Udp,
                    (false, true) => Protocol::Sctp,
                    (false, false) => Protocol::Tcp,
                },
                sticky: args.sticky,
                drain: args.drain,
                backends: known.map(|vip| vip.spec.backends).unwrap_or_default(),
            };
            let _: Vip = ask(home, Method::PUT, &path(&args.name), Some(&spec))?;
        }
        VipArgs::Rm(args) => {
            let _: Vip = ask(home, Method::DELETE, &path(&args.name), None::<&()>)?;
        }
        VipArgs::Ls(args) => {
            let vips: Vec<Vip> = ask(home, Method::GET, "/vips", None::<&()>)?;
            show(args, &vips, |vips| rows(vips))?;
        }
        VipArgs::Backend(args) => backend(home, args)?,
    }
    Ok(())
}

fn backend(home: &Home, args: &BackendArgs) -> Result<()> {
    let change = |of: &BackendOf, change: BackendChange| -> Result<()> {
        let _: Vip = ask(home, Method::PUT, &of.path(), Some(&change))?;
        Ok(())
    };
    match args {
        BackendArgs::Add { of, weight } => change(
            of,
            BackendChange {
                weight: *weight,
                drain: false,
            },
        ),
        BackendArgs::Drain(of) => change(
            of,
            BackendChange {
                weight: None,
                drain: true,
            },
        ),
        BackendArgs::Rm(of) => {
            let _: Vip = ask(home, Method::DELETE, &of.path(), None::<&()>)?;
            Ok(())
        }
    }
}

fn rows(vips: &[Vip]) -> Vec<Vec<String>> {
    let mut rows = vec![row([
        "VIP", "NETWORK", "ADDRESS", "MAC", "SERVER", "WEIGHT", "SHARE", "STATE",
    ])];
    for vip in vips {
        let spec = &vip.spec;
        let protocol = format!("{:?}", spec.protocol).to_lowercase();
        let address = SocketAddr::new(spec.address, spec.port);
        let mut cells = vec![
            vip.name.clone(),
            spec.network.clone(),
            format!("{protocol} {address}"),
            vip.mac.to_string(),
        ];
        if spec.backends.is_empty() {
            cells.extend(["-", "-", "-", "no server"].map(str::to_owned));
            rows.push(cells);
            continue;
        }
        for (backend, share) in spec.backends.iter().zip(&vip.shares) {
            cells.resize(4, String::new());
            cells.push(backend.mac.to_string());
            cells.push(backend.weight.to_string());
            cells.push(format!("{:.1} %", f64::from(*share) / 10.0));
            let state = backend.draining.map_or("in use", |_| "draining");
            cells.push(state.to_owned());
            rows.push(std::mem::take(&mut cells));
        }
    }
    rows
}
