//! `blanket evacuate`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::print_json;
use crate::evacuate::{Outcome, save_all, watch};
use crate::home::Home;
use crate::table;

#[derive(clap::Args)]
#[command(
    after_help = "A guest of a pv machine suspends itself; another one, or one that does not, is saved \
    where it is. With --within and --watch, guests that cannot be saved in time are asked to shut \
    down instead. blanket restore --evacuated [DIR] brings guests back."
)]
pub(crate) struct Args {
    /// The directory, best on a volume that outlives this machine [default: `evacuated` beside the
    /// VMs].
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,

    /// Stay, and save the guests when the provider tells that it takes this machine away or works
    /// on it.
    #[arg(long, conflicts_with_all = ["within", "json"])]
    watch: bool,

    /// The machine ends after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    within: Option<u64>,

    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn evacuate(home: &Home, args: &Args) -> Result<ExitCode> {
    let to = args.to.clone().unwrap_or_else(|| home.evacuated());
    if args.watch {
        watch(home, &to)?;
        return Ok(ExitCode::SUCCESS);
    }
    let within = args.within.map(Duration::from_secs);
    let deadline = within.and_then(|within| Instant::now().checked_add(within));
    let outcomes = save_all(home, &to, deadline)?;
    if args.json {
        print_json(&outcomes)?;
    } else {
        tell(&outcomes, &to);
    }
    if outcomes.iter().any(|one| one.problem.is_some()) {
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what became of each guest, on standard error: what was not saved is an
/// error, and what was is for the log.
pub(crate) fn tell(outcomes: &[Outcome], to: &Path) {
    if outcomes.is_empty() {
        eprintln!("no guest runs: nothing to save");
    }
    for one in outcomes {
        match &one.problem {
            None => eprintln!(
                "{}: saved to {}, {} in {}",
                one.name,
                to.display(),
                table::bytes(one.bytes),
                table::duration(one.took_ms)
            ),
            Some(problem) => eprintln!("{}: not saved: {problem}", one.name),
        }
    }
}
