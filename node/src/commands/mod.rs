//! One file per command.

pub(crate) mod ca;
pub(crate) mod clone;
pub(crate) mod console;
pub(crate) mod doctor;
pub(crate) mod evacuate;
pub(crate) mod info;
pub(crate) mod life;
pub(crate) mod logs;
pub(crate) mod migrate;
pub(crate) mod net;
pub(crate) mod node;
pub(crate) mod provider;
pub(crate) mod ps;
pub(crate) mod replicate;
pub(crate) mod restore;
pub(crate) mod run;
pub(crate) mod set;
pub(crate) mod snapshot;
pub(crate) mod stop;
pub(crate) mod store;
pub(crate) mod supervise;
pub(crate) mod up;
pub(crate) mod uplink;

use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

use crate::failure::describe;
use crate::home::{Home, VmDir};
use crate::name::VmName;

/// Prints a value for programs.
fn print_json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Prints text; unlike `print!` an output that was closed is an error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Does `one` to each VM. All are tried; each failure is reported.
fn for_each(
    home: &Home,
    names: &[VmName],
    mut one: impl FnMut(&VmDir) -> anyhow::Result<()>,
) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        if let Err(error) = home.existing(name).and_then(|vm| one(&vm)) {
            eprintln!("{}", describe(&error));
            code = ExitCode::FAILURE;
        }
    }
    code
}
