//! `blanket promote` and `blanket replicas`: what is done with replicas here.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use blanket_vmm::config::VmConfig;
use hyper::Method;
use serde_json::json;

use super::image::Image;
use super::store::{Record, Store};
use crate::commands::migrate::receive::localized;
use crate::commands::run::{Start, settle};
use crate::commands::{print, print_json};
use crate::daemon::local::{self, NodeVms};
use crate::failure::{describe, failure};
use crate::home::{Home, VmDir};
use crate::name::VmName;
use crate::table::render;

#[derive(clap::Args)]
#[command(
    after_help = "The guest starts as after a power cut at its last point: what it wrote later is lost. \
    The replica becomes the VM's disks."
)]
pub(crate) struct Args {
    /// The replica; see blanket replicas.
    name: VmName,

    /// What the VM is called here [default: the same].
    #[arg(long = "as", value_name = "NAME")]
    new: Option<VmName>,

    /// Start it even if it runs where it is replicated from, or if that cannot be told. Two of
    /// them have the same addresses.
    #[arg(long)]
    force: bool,

    /// User that the monitor becomes when started by root.
    #[arg(long, value_name = "UID[:GID]")]
    user: Option<String>,

    #[command(flatten)]
    vm: VmConfig,
}

pub(crate) fn promote(home: &Home, args: Args, home_flag: Option<&Path>) -> Result<ExitCode> {
    let store = Store::of(home, &args.name);
    let Some(record) = store.read()? else {
        return Err(unknown(home, &args.name));
    };
    if !args.force {
        is_gone(home, &record)?;
    }
    let new = args.new.as_ref().unwrap_or(&args.name);
    let vm = home.vm(new);
    let folder = home.disks().join(new.as_str());
    if home.existing(new).is_ok() || folder.exists() {
        return Err(failure(
            format!("the name '{new}' is in use, or there are disks of such a VM"),
            format!(
                "take another with --as; or remove that VM (blanket rm {new}) and its disks ({})",
                folder.display()
            ),
        ));
    }
    let lock = store.lock()?;
    // As it is now that nobody else changes it.
    let mut record = store.read()?.ok_or_else(|| unknown(home, &args.name))?;
    let disks = store.images(&record.disks)?;
    let disks: Vec<_> = disks.iter().map(Image::content).collect();
    store.settle(&mut record, &disks)?;
    let (Some(_), Some(config)) = (record.point, record.config.clone()) else {
        return Err(failure(
            format!(
                "the replica of '{}' has no point yet: not all of it is there",
                args.name
            ),
            "it is of no use without its primary",
        ));
    };
    drop(disks);
    // From here on no connection finds it any more.
    fs::rename(&store.path, &folder)
        .with_context(|| format!("cannot rename {}", store.path.display()))?;
    let promoted = Promoted {
        home,
        vm: &vm,
        folder: &folder,
        record: &record,
    };
    let started = promoted.start(config.overlaid(args.vm), args.user.as_deref(), home_flag);
    if let Err(error) = started {
        fs::rename(&folder, &store.path)
            .with_context(|| format!("cannot rename {}", folder.display()))?;
        return Err(error);
    }
    drop(lock);
    promoted.tidy();
    print(&format!(
        "'{new}' runs here, from its point {}\n",
        age(&record)
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn unknown(home: &Home, name: &VmName) -> anyhow::Error {
    let all = Store::all(home);
    let names: Vec<_> = all.iter().map(|(name, _)| name.to_string()).collect();
    failure(
        format!("there is no replica of a VM '{name}' here"),
        match names.is_empty() {
            true => "there are none at all; blanket replicate makes one".to_owned(),
            false => format!("use one of: {}", names.join(", ")),
        },
    )
}

/// Whether the VM does not run where it is replicated from, as far as that can be
/// told.
fn is_gone(home: &Home, record: &Record) -> Result<()> {
    let from = &record.owner.from;
    let asked = local::ask::<Vec<NodeVms>>(home, Method::GET, "/cluster/vms", None::<&()>);
    let nodes = asked.map_err(|error| {
        failure(
            format!(
                "it cannot be told whether '{}' runs on {from}: {}",
                record.name,
                describe(&error)
            ),
            "if it certainly does not, use --force",
        )
    })?;
    let node = nodes.iter().find(|node| node.node == *from);
    let Some(vms) = node.and_then(|node| node.vms.as_ref()) else {
        let reason = node.and_then(|node| node.reason.clone());
        eprintln!(
            "[{from} does not answer ({}): taken for dead]",
            reason.unwrap_or_else(|| "it is no member any more".to_owned())
        );
        return Ok(());
    };
    let runs = vms
        .iter()
        .any(|vm| vm.name == record.name && vm.pid.is_some());
    if runs {
        return Err(failure(
            format!("'{}' runs on {from}", record.name),
            format!(
                "stop it there first, or move it (blanket migrate {} on {from}); --force starts a second one",
                record.name
            ),
        ));
    }
    Ok(())
}

/// A replica that becomes a VM.
struct Promoted<'a> {
    home: &'a Home,
    vm: &'a VmDir,
    folder: &'a Path,
    record: &'a Record,
}

impl Promoted<'_> {
    fn start(&self, config: VmConfig, user: Option<&str>, flag: Option<&Path>) -> Result<()> {
        let boot = ["kernel", "initrd"].map(|name| self.folder.join(name));
        let [kernel, initrd] = boot.map(|path| path.exists().then_some(path));
        let config = localized(self.home, config, [&kernel, &initrd], |index| {
            self.folder.join(format!("{index}.img"))
        });
        let mut config = settle(config, self.vm)?;
        config.kernel = kernel.as_ref().map(|_| self.vm.kernel());
        config.initrd = initrd.as_ref().map(|_| self.vm.initrd());
        let prepare = |vm: &VmDir| {
            vm.set_identity(&self.record.owner.id)?;
            for (from, to) in [(&kernel, vm.kernel()), (&initrd, vm.initrd())] {
                if let Some(from) = from {
                    fs::copy(from, &to).with_context(|| format!("cannot make {}", to.display()))?;
                }
            }
            Ok(())
        };
        let start = Start {
            config: &config,
            user,
            home: flag,
            attach: false,
            snapshot: None,
            eager: false,
            prepare: Some(&prepare),
            receive: None,
            shared_disks: false,
            origins: None,
        };
        start.claim_and_start(self.home, &self.vm.name).map(drop)
    }

    /// Leaves nothing but the disks.
    fn tidy(&self) {
        for entry in fs::read_dir(self.folder).into_iter().flatten().flatten() {
            if entry.path().extension().is_none_or(|it| it != "img") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn age(record: &Record) -> String {
    match record.age_ms() {
        Some(ms) => format!("of {:.1} s ago", ms as f64 / 1e3),
        None => "-".to_owned(),
    }
}

#[derive(clap::Args)]
pub(crate) struct ListArgs {
    /// Remove this one, with its disks.
    #[arg(long, value_name = "NAME")]
    remove: Option<VmName>,

    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn replicas(home: &Home, args: &ListArgs) -> Result<ExitCode> {
    if let Some(name) = &args.remove {
        let store = Store::of(home, name);
        if store.read()?.is_none() {
            return Err(unknown(home, name));
        }
        let _lock = store.lock()?;
        fs::remove_dir_all(&store.path)
            .with_context(|| format!("cannot remove {}", store.path.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![["NAME", "FROM", "LAST POINT"].map(str::to_owned).to_vec()];
    let mut values = Vec::new();
    for (name, store) in Store::all(home) {
        let Some(record) = store.read()? else {
            continue;
        };
        values.push(json!({
            "name": name,
            "from": record.owner.from,
            "point_ms": record.point.map(|point| point.at_ms),
            "age_ms": record.age_ms(),
        }));
        let age = match record.point {
            Some(_) => age(&record),
            None => "none yet".to_owned(),
        };
        rows.push(vec![name.to_string(), record.owner.from.to_string(), age]);
    }
    if args.json {
        print_json(&values)?;
    } else {
        print(&render(&rows))?;
    }
    Ok(ExitCode::SUCCESS)
}
