//! The guest's directories in the xenstore, as Xen's own toolstack (`xl`)
//! writes them.

use serde::{Deserialize, Serialize};

use super::device::read;
use crate::xen::console::SharedPage;
use crate::xen::store::{Errno, HOME, Op, Path, Permissions, Store};
use crate::xen::{BACKEND, GUEST};

/// What the guest is told about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID, like `7f0c...-....`.
    pub uuid: String,
    /// Memory in bytes: what it starts with, and the most it can have.
    pub memory: u64,
    /// vCPUs: what it starts with, and the most it can have.
    pub cpus: u32,
}

/// Writes another name of the guest's, where that is.
pub(super) fn rename(store: &mut Store, name: &str) -> Result<(), Errno> {
    write(store, "name", name)?;
    match read(store, HOME, "vm") {
        Some(vm) => write(store, &format!("{vm}/name"), name),
        None => Ok(()),
    }
}

/// The pages that a guest shares with its monitor from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedPages {
    /// The xenstore's.
    pub store: SharedPage,
    /// The console's.
    pub console: SharedPage,
}

/// Sets a node.
pub(in crate::xen) fn write(store: &mut Store, path: &str, value: &str) -> Result<(), Errno> {
    store.set(&Op::Write(Path::new(path)?, value.into()))
}

/// Makes a directory whose future nodes have these permissions.
pub(in crate::xen) fn directory(
    store: &mut Store,
    path: &str,
    permissions: Permissions,
) -> Result<(), Errno> {
    let path = Path::new(path)?;
    store.set(&Op::Mkdir(path.clone()))?;
    store.set(&Op::SetPermissions(path, permissions))
}

/// Nodes of `control` that the guest writes: its acknowledgements and what it
/// can do.
const CONTROL: [&str; 7] = [
    "shutdown",
    "sysrq",
    "feature-poweroff",
    "feature-reboot",
    "feature-halt",
    "feature-suspend",
    "feature-sysrq",
];

/// The store of a guest that has not started.
pub(super) fn store(domain: &Domain) -> Result<Store, Errno> {
    let mut store = Store::default();
    let to = &mut store;
    write(to, &format!("/local/domain/{BACKEND}/name"), "Domain-0")?;
    write(
        to,
        &format!("/local/domain/{BACKEND}/domid"),
        &BACKEND.to_string(),
    )?;
    let vm = format!("/vm/{}", domain.uuid);
    directory(to, &vm, Permissions::guest_reads())?;
    write(to, &format!("{vm}/uuid"), &domain.uuid)?;
    write(to, &format!("{vm}/name"), &domain.name)?;

    directory(to, HOME, Permissions::guest_reads())?;
    for (node, value) in [
        ("vm", vm.as_str()),
        ("name", &domain.name),
        ("domid", &GUEST.to_string()),
        ("control/platform-feature-multiprocessor-suspend", "1"),
        ("control/platform-feature-xs_reset_watches", "1"),
    ] {
        write(to, node, value)?;
    }
    let kib = (domain.memory >> 10).to_string();
    write(to, "memory/static-max", &kib)?;
    write(to, "memory/target", &kib)?;
    for cpu in 0..domain.cpus {
        write(to, &format!("cpu/{cpu}/availability"), "online")?;
    }
    store.set(&Op::Mkdir(Path::new("device")?))?;
    for own in ["data", "drivers", "feature", "attr", "error"] {
        directory(&mut store, own, Permissions::guest_owns())?;
    }
    for node in CONTROL {
        let path = format!("control/{node}");
        directory(&mut store, &path, Permissions::guest_owns())?;
    }
    Ok(store)
}

/// Tells where the shared pages are, as the guest also knows from its start.
pub(super) fn announce(store: &mut Store, pages: &SharedPages) -> Result<(), Errno> {
    for (name, page) in [("store", pages.store), ("console", pages.console)] {
        let frame = page.address >> 12;
        write(store, &format!("{name}/ring-ref"), &frame.to_string())?;
        write(store, &format!("{name}/port"), &page.port.to_string())?;
    }
    for (node, value) in [("type", "xenconsoled"), ("limit", "1048576")] {
        write(store, &format!("console/{node}"), value)?;
    }
    Ok(())
}
