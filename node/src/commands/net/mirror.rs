//! `blanket net mirror`.

use anyhow::Result;
use blanket_overlay::api::observe::{Mirror, MirrorSpec};
use hyper::Method;

use super::capture::direction;
use super::{ListArgs, NameArgs, row, show};
use crate::home::Home;
use crate::switch::ask;

#[derive(clap::Subcommand)]
pub(crate) enum MirrorArgs {
    /// Copy frames to a port. Whoever is there sees traffic of another network.
    Add(MirrorAddArgs),
    /// Remove a mirror.
    Rm(NameArgs),
    /// List mirrors.
    Ls(ListArgs),
}

#[derive(clap::Args)]
pub(crate) struct MirrorAddArgs {
    /// Its name.
    name: String,
    #[command(flatten)]
    of: Of,
    /// The port that gets the copies: best one of a network of its own.
    #[arg(long, value_name = "PORT")]
    to: String,
    /// Only frames that come into the switch, or that go out of it; of a network, without this,
    /// those that come in, so that each is there once.
    #[arg(short = 'Q', long, value_name = "in|out", value_parser = ["in", "out"])]
    direction: Option<String>,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Of {
    /// The port whose frames are copied.
    #[arg(long)]
    port: Option<String>,
    /// The network whose frames are copied.
    #[arg(long)]
    network: Option<String>,
}

pub(super) fn mirror(home: &Home, args: &MirrorArgs) -> Result<()> {
    let path = |name: &str| format!("/mirrors/{name}");
    match args {
        MirrorArgs::Add(args) => {
            let spec = MirrorSpec {
                port: args.of.port.clone(),
                network: args.of.network.clone(),
                direction: args.direction.as_deref().and_then(direction),
                to: args.to.clone(),
            };
            let _: Mirror = ask(home, Method::PUT, &path(&args.name), Some(&spec))?;
        }
        MirrorArgs::Rm(args) => {
            let _: Mirror = ask(home, Method::DELETE, &path(&args.name), None::<&()>)?;
        }
        MirrorArgs::Ls(args) => {
            let mirrors: Vec<Mirror> = ask(home, Method::GET, "/mirrors", None::<&()>)?;
            show(args, &mirrors, |mirrors| rows(mirrors))?;
        }
    }
    Ok(())
}

fn rows(mirrors: &[Mirror]) -> Vec<Vec<String>> {
    let mut rows = vec![row(["MIRROR", "OF", "WAY", "TO", "STATE"])];
    rows.extend(mirrors.iter().map(|mirror| {
        let spec = &mirror.spec;
        let of = match (&spec.port, &spec.network) {
            (Some(port), _) => format!("port {port}"),
            (None, Some(network)) => format!("network {network}"),
            (None, None) => "-".to_owned(),
        };
        let way = spec.direction.map(|way| format!("{way:?}").to_lowercase());
        let usual = if spec.port.is_some() { "both" } else { "in" };
        vec![
            mirror.name.clone(),
            of,
            way.unwrap_or_else(|| usual.to_owned()),
            spec.to.clone(),
            mirror
                .down
                .as_ref()
                .map_or("up".to_owned(), |why| format!("waits: {why}")),
        ]
    }));
    rows
}
