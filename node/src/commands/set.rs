//! `blanket set`.

use std::process::ExitCode;

use anyhow::Result;
use blanket_vmm::api::types::Target;
use blanket_vmm::config::ByteSize;

use super::for_each;
use crate::home::Home;
use crate::name::VmName;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// VMs.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<VmName>,

    /// Memory that the guest is to use, up to what the VM was made with; the
    /// guest's balloon gives the rest back to the node.
    #[arg(long, value_name = "SIZE", required_unless_present = "cpus")]
    memory: Option<ByteSize>,

    /// vCPUs that the guest is to use, up to what the VM was made with.
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
}

pub(crate) fn set(home: &Home, args: &Args) -> Result<ExitCode> {
    let target = Target {
        memory: args.memory,
        cpus: args.cpus,
    };
    Ok(for_each(home, &args.names, |vm| {
        vm.live_client()?.set_target(&target)?;
        Ok(())
    }))
}
