//! `blanket pause`, `resume` and `reset`.

use std::process::ExitCode;

use anyhow::Result;
use blanket_vmm::api::types::Action;

use super::for_each;
use crate::home::Home;
use crate::name::VmName;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// VMs.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<VmName>,
}

pub(crate) fn act(home: &Home, args: &Args, action: Action) -> Result<ExitCode> {
    Ok(for_each(home, &args.names, |vm| {
        vm.live_client()?.act(action)?;
        Ok(())
    }))
}
