//! `blanket net controller`.

use std::path::{self, PathBuf};

use anyhow::{Context, Result};
use blanket_overlay::api::types::{ControllerSpec, Controllers, FailMode, Target, Tls};
use hyper::Method;

use super::{ListArgs, row, show};
use crate::commands::print;
use crate::home::Home;
use crate::switch::ask;
use crate::table;

#[derive(clap::Subcommand)]
pub(crate) enum ControllerArgs {
    /// Give a network these controllers, and no others.
    Set(SetArgs),
    /// Show a network's controllers, and how they are.
    Get {
        /// The network.
        network: String,
        #[command(flatten)]
        list: ListArgs,
    },
    /// Leave a network's controllers; what they have put into its tables goes, too.
    Del {
        /// The network.
        network: String,
    },
}

#[derive(clap::Args)]
pub(crate) struct SetArgs {
    /// The network.
    network: String,
    /// tcp:HOST:PORT, ssl:HOST:PORT or unix:PATH to connect to; ptcp:PORT[:ADDRESS],
    /// pssl:PORT[:ADDRESS] or punix:PATH to wait for controllers, and for ovs-ofctl. Without an
    /// address, they are waited for on this machine only.
    #[arg(required = true, value_name = "TARGET")]
    targets: Vec<Target>,
    /// What happens when none that is connected to is there.
    #[arg(long, value_enum, default_value_t = Mode::Standalone)]
    fail_mode: Mode,
    #[command(flatten)]
    tls: Option<TlsArgs>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Mode {
    /// After 15 seconds, all frames go through the bridge, whatever flows say.
    Standalone,
    /// What flows say holds, and the network begins without any.
    Secure,
}

#[derive(clap::Args)]
#[group(requires_all = ["tls_key", "tls_certificate", "tls_ca"])]
struct TlsArgs {
    /// The switch's private key, for ssl: and pssl: (PEM).
    #[arg(long, value_name = "FILE", required = false)]
    tls_key: PathBuf,
    /// Its certificate (PEM).
    #[arg(long, value_name = "FILE", required = false)]
    tls_certificate: PathBuf,
    /// The certificate of the authority that controllers have theirs from (PEM).
    #[arg(long, value_name = "FILE", required = false)]
    tls_ca: PathBuf,
    /// What the controller is called in its certificate, if it is not its HOST.
    #[arg(long, value_name = "NAME")]
    tls_name: Option<String>,
}

impl TlsArgs {
    fn spec(&self) -> Result<Tls> {
        let file = |file: &PathBuf| {
            path::absolute(file).with_context(|| format!("{} is no file", file.display()))
        };
        Ok(Tls {
            key: file(&self.tls_key)?,
            certificate: file(&self.tls_certificate)?,
            ca: file(&self.tls_ca)?,
            name: self.tls_name.clone(),
        })
    }
}

pub(super) fn controller(home: &Home, args: &ControllerArgs) -> Result<()> {
    let path = |network: &str| format!("/networks/{network}/controllers");
    match args {
        ControllerArgs::Set(args) => {
            let spec = ControllerSpec {
                targets: args.targets.clone(),
                fail_mode: match args.fail_mode {
                    Mode::Standalone => FailMode::Standalone,
                    Mode::Secure => FailMode::Secure,
                },
                tls: args.tls.as_ref().map(TlsArgs::spec).transpose()?,
            };
            let set: Controllers = ask(home, Method::PUT, &path(&args.network), Some(&spec))?;
            print(&format!(
                "{} is datapath {:016x}\n",
                args.network, set.datapath
            ))
        }
        ControllerArgs::Get { network, list } => {
            let found: Controllers = ask(home, Method::GET, &path(network), None::<&()>)?;
            show(list, &found, rows)
        }
        ControllerArgs::Del { network } => {
            let _: ControllerSpec = ask(home, Method::DELETE, &path(network), None::<&()>)?;
            Ok(())
        }
    }
}

fn rows(found: &Controllers) -> Vec<Vec<String>> {
    let mut rows = vec![row(["TARGET", "STATE", "SINCE", "LAST ERROR"])];
    rows.extend(found.targets.iter().map(|target| {
        let state = match (target.target.is_active(), target.connected) {
            (true, 0) => "not connected".to_owned(),
            (true, _) => "connected".to_owned(),
            (false, count) => format!("{count} connected"),
        };
        vec![
            target.target.to_string(),
            state,
            table::duration(target.since * 1000),
            target.error.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    }));
    if found.standalone {
        rows.push(row(["no controller: all goes through the bridge"]));
    }
    rows
}
