//! `blanket ca`.

use std::process::ExitCode;

use anyhow::Result;
use hyper::Method;

use super::{print, print_json};
use crate::cluster::names::{Address, NodeName};
use crate::daemon::local::{self, Create, Joined};
use crate::home::Home;

#[derive(clap::Subcommand)]
pub(crate) enum Args {
    /// Make a CA here: this node is the first of a new cluster.
    Init(InitArgs),
}

#[derive(clap::Args)]
#[command(
    after_help = "The CA's key stays on this node, which lets others join (blanket node token) and \
    renews their certificates. The others work on without it for as long as their certificates are \
    good: 10 days at least."
)]
pub(crate) struct InitArgs {
    /// The node's name [default: the machine's].
    #[arg(long)]
    name: Option<NodeName>,
    /// Where other nodes reach this one [default: the address of its default route].
    #[arg(long, value_name = "HOST[:PORT]")]
    address: Option<Address>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn ca(home: &Home, args: &Args) -> Result<ExitCode> {
    let Args::Init(args) = args;
    let create = Create {
        name: args.name.clone(),
        address: args.address.clone(),
    };
    let joined: Joined = local::ask(home, Method::POST, "/cluster", Some(&create))?;
    if args.json {
        print_json(&joined)?;
    } else {
        print(&format!(
            "node {} at {} is the first of a cluster\nCA: {}\nblanket node token lets another \
             node join\n",
            joined.name, joined.address, joined.ca
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
