//! `cargo xtask bench`: measurements, against a peer where there is one.

mod boot;
mod drivers;
pub mod floor;
mod load;
mod migrate;
mod overlay;
mod pv;
pub mod row;
mod snapshot;
mod uplink;

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::progress::Progress;
use crate::workspace::Workspace;
use row::Row;

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Which benchmarks.
    names: Vec<String>,
}

/// Something that can be measured.
#[derive(Debug)]
pub struct Benchmark {
    /// What the user calls it; also the name of its JSON file.
    pub name: &'static str,
    /// What it measures, in one line.
    pub about: &'static str,
    /// Measures it.
    pub run: fn(&Workspace, &Progress) -> Result<Vec<Row>>,
}

/// All benchmarks.
const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "boot",
        about: "exec to the guest's init, memory and start of the monitor, against QEMU",
        run: boot::run,
    },
    Benchmark {
        name: "drivers",
        about: "disk and network of a guest, against the node itself; probing; persistent grants",
        run: drivers::run,
    },
    Benchmark {
        name: "migrate",
        about: "live migration: how long a guest stands still, against QEMU; memory and disks against the link",
        run: migrate::run,
    },
    Benchmark {
        name: "overlay",
        about: "the overlay between two nodes, encrypted, against the kernel's VXLAN",
        run: overlay::run,
    },
    Benchmark {
        name: "pv",
        about: "guests in pv machines: boot, system calls, faults, processes, disk, network",
        run: pv::run,
    },
    Benchmark {
        name: "snapshot",
        about: "snapshots of a guest that runs: its pause, bytes, and the time until it goes on",
        run: snapshot::run,
    },
    Benchmark {
        name: "uplink",
        about: "datagrams between two network namespaces by each kind of uplink, against iperf3",
        run: uplink::run,
    },
];

/// Runs the benchmarks that are named; prints a table of each and writes
/// `bench/NAME.json` in the build directory.
///
/// # Errors
/// A name is unknown, a benchmark fails, or its results cannot be written.
pub fn run(workspace: &Workspace, progress: &Progress, options: &Options) -> Result<ExitCode> {
    if options.names.is_empty() {
        print!("{}", list(BENCHMARKS));
        return Ok(ExitCode::SUCCESS);
    }
    for benchmark in select(BENCHMARKS, &options.names)? {
        let rows = (benchmark.run)(workspace, progress)?;
        print!("{}", row::table(&rows));
        let path = row::write(&workspace.target().join("bench"), benchmark.name, &rows)?;
        println!("written to {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn list(benchmarks: &[Benchmark]) -> String {
    if benchmarks.is_empty() {
        return "there are no benchmarks yet\n".into();
    }
    benchmarks
        .iter()
        .map(|benchmark| format!("{:<12} {}\n", benchmark.name, benchmark.about))
        .collect()
}

fn select<'a>(benchmarks: &'a [Benchmark], names: &[String]) -> Result<Vec<&'a Benchmark>> {
    let find = |name: &String| {
        let found = benchmarks.iter().find(|benchmark| benchmark.name == name);
        let Some(found) = found else {
            bail!("no benchmark is called '{name}':\n{}", list(benchmarks));
        };
        Ok(found)
    };
    names.iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: &[Benchmark] = &[
        Benchmark {
            name: "boot",
            about: "time to init",
            run: |_, _| Ok(vec![]),
        },
        Benchmark {
            name: "net",
            about: "packets",
            run: |_, _| Ok(vec![]),
        },
    ];

    #[test]
    fn benchmarks_run_in_the_order_they_are_named() {
        let names = ["net".to_owned(), "boot".to_owned()];
        let chosen = select(SOME, &names).unwrap();
        assert_eq!([chosen[0].name, chosen[1].name], ["net", "boot"]);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = select(SOME, &["disk".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("'disk'"), "{error}");
        assert!(error.contains("boot") && error.contains("net"), "{error}");
    }
}
