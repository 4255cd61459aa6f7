//! `blanket logs`.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::failure::failure;
use crate::home::Home;
use crate::machine;
use crate::name::VmName;

/// How often a followed log is looked at.
const PERIOD: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// VM.
    name: VmName,

    /// Go on with what is written from now on, until the VM ends.
    #[arg(long, short)]
    follow: bool,

    /// Show the monitor's own log instead of the guest's console.
    #[arg(long)]
    monitor: bool,
}

pub(crate) fn logs(home: &Home, args: &Args) -> Result<ExitCode> {
    let vm = home.existing(&args.name)?;
    let path = if args.monitor {
        vm.monitor_log()
    } else {
        let config = vm.stored_config().unwrap_or_default();
        let port = machine::console(&config);
        let log = port.log().map(Path::to_owned);
        log.ok_or_else(|| {
            failure(
                format!("the {} of '{}' has no log", port.name, vm.name),
                "start the VM with --serial log=FILE or --console log=FILE, or without both",
            )
        })?
    };
    let mut file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut position = 0;
    loop {
        // Looked at before the copy: what was written until the end is shown.
        let alive = args.follow && vm.process()?.is_some();
        position = copy_from(&mut file, position)?;
        if !alive {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(PERIOD);
    }
}

/// Prints what `file` holds from `position` on. A file that has become
/// shorter was started anew and is printed from its beginning.
fn copy_from(file: &mut File, position: u64) -> Result<u64> {
    let len = file.metadata()?.len();
    let position = if len < position { 0 } else { position };
    file.seek(SeekFrom::Start(position))?;
    let mut out = io::stdout().lock();
    let copied = io::copy(file, &mut out)?;
    out.flush()?;
    Ok(position + copied)
}
