//! To a fresh monitor on this node.

use std::path::Path;

use anyhow::Result;
use blanket_migration::Compress;
use blanket_vmm::config::VmConfig;
use blanket_vmm::migrate::Request;

use super::{Args, Outcome, Receiver, Report, Shown, forecast, relocate, remove, resume_orphan};
use crate::cluster::parcel::State;
use crate::commands::restore::without_own_places;
use crate::commands::run::{Start, settle};
use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::name::VmName;
use crate::ports::{self, Origins};

pub(super) fn migrate(
    home: &Home,
    source: &VmDir,
    args: Args,
    home_flag: Option<&Path>,
    shown: &mut Shown,
) -> Result<Outcome> {
    let mut options = args.options();
    if options.compress == Compress::Auto && options.bandwidth == 0 {
        // The link is the processors, and they are what compressing takes.
        options.compress = Compress::Off;
    }
    let request = Request {
        options,
        hand_over: true,
        dry_run: args.dry_run,
        ..Request::default()
    };
    if args.dry_run {
        return forecast(source, &request, None, 0);
    }
    let Some(new) = args.new else {
        return Err(failure(
            "the VM needs another name in its new monitor",
            "give it one with --as, or name a node",
        ));
    };
    let mut config = source.live_client()?.migrate(&request)?;
    let console = |port| without_own_places(port, args.name.as_str());
    config.serial = config.serial.map(console);
    config.console = config.console.map(console);
    let mut receiver = Here {
        home,
        flag: home_flag,
        source,
        vm: home.vm(&new),
        config: config.overlaid(args.vm),
        user: args.user,
    };
    let status = relocate(source, &mut receiver, &mut |status| shown.show(status))?;
    Ok(Outcome::Moved(Box::new(Report {
        name: new,
        node: None,
        left: Vec::new(),
        status,
    })))
}

/// A monitor on this node.
struct Here<'a> {
    home: &'a Home,
    flag: Option<&'a Path>,
    source: &'a VmDir,
    vm: VmDir,
    config: VmConfig,
    user: Option<String>,
}

impl Receiver for Here<'_> {
    fn start(&mut self) -> Result<()> {
        let config = settle(self.config.clone(), &self.vm)?;
        let start = Start {
            config: &config,
            user: self.user.as_deref(),
            home: self.flag,
            attach: false,
            snapshot: None,
            eager: false,
            prepare: None,
            receive: Some(&self.source.migration_socket()),
            shared_disks: false,
            origins: Some(Origins::Here(&self.source.name)),
        };
        let name: &VmName = &self.vm.name;
        start.claim_and_start(self.home, name).map(drop)
    }

    fn moved(&mut self) -> Result<()> {
        ports::arrived_here(self.home, &self.vm, &self.config);
        Ok(())
    }

    fn stayed(&mut self) -> Result<()> {
        remove(&self.vm)
    }

    fn take_over(&mut self) -> Result<State> {
        let state = resume_orphan(&self.vm)?;
        if state == State::Runs {
            ports::arrived_here(self.home, &self.vm, &self.config);
        }
        Ok(state)
    }

    fn has_ended(&mut self) -> bool {
        matches!(self.vm.process(), Ok(None))
    }

    fn called(&self) -> String {
        format!("'{}'", self.vm.name)
    }
}
