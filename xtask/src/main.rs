//! `cargo xtask`: test, build, measure.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::progress::Progress;
use xtask::workspace::Workspace;
use xtask::{bench, build, demo, fuzz, setup, test};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Show the main job: a stock Debian guest on a cloud machine, and on this one.
    Demo,
    /// Check format and lints, run unit and whole-system tests.
    Test(test::Options),
    /// Build the programs that run on nodes, and the guest payloads.
    Build(build::Options),
    /// Measure; without a NAME, list what can be measured.
    Bench(bench::Options),
    /// Run the fuzz targets for a while each.
    Fuzz(fuzz::Options),
    /// Install what the other commands need, and nothing else.
    Setup,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let progress = Progress::new();
    let workspace = Workspace::find()?;
    match &cli.command {
        Task::Demo => demo::run(&workspace, &progress),
        Task::Test(options) => test::run(&workspace, &progress, options),
        Task::Build(options) => build::run(&workspace, &progress, options),
        Task::Bench(options) => bench::run(&workspace, &progress, options),
        Task::Fuzz(options) => fuzz::run(&workspace, &progress, options),
        Task::Setup => setup::run(&progress).map(|()| ExitCode::SUCCESS),
    }
}
