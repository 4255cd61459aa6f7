//! The images that machines boot from.

mod guest;
mod node;
mod tools;
mod workloads;
mod xen;

use std::path::Path;
use std::process::Command;

use crate::error::Result;
use crate::kernel::Kernel;
use crate::packages::Set;
use crate::program;
use crate::tree::{Node, Tree};

pub use guest::{BootImages, GUEST_PAGE, GuestImages};
pub(crate) use node::node;
pub use tools::tools;
pub use workloads::{inspection, workloads};
pub(crate) use xen::XenHost;

/// Parts of packages that no machine of the testbed uses.
const UNUSED: [&str; 9] = [
    "usr/share/",
    "usr/lib/x86_64-linux-gnu/gconv/",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/x86_64-linux-gnu/security/",
    "usr/lib/systemd/",
    "usr/lib/udev/",
    "usr/include/",
    "var/",
    "etc/",
];

/// Packages that others name as dependencies only for their installation.
const INSTALL_ONLY: [&str; 12] = [
    "adduser_",
    "debconf_",
    "dpkg_",
    "init-system-helpers_",
    "libfile-find-rule-perl_",
    "libnumber-compare-perl_",
    "libperl",
    "libtext-glob-perl_",
    "passwd_",
    "perl",
    "tar_",
    "usrmerge_",
];

/// Adds the programs and libraries of the packages to the tree.
fn add_packages(tree: &mut Tree, packages: &Set) -> Result<()> {
    for deb in packages.download()? {
        let name = deb.file_name().unwrap_or_default().to_string_lossy();
        if !INSTALL_ONLY.iter().any(|skipped| name.starts_with(skipped)) {
            tree.package(&deb, |path| {
                !UNUSED.iter().any(|unused| path.starts_with(unused))
            })?;
        }
    }
    // The initramfs has no file system below it to be merged with.
    tree.insert("usr/share", 0o755, Node::Folder);
    Ok(())
}

/// Adds links to busybox for those of its commands that no package has. `scratch` is a folder to
/// work in.
fn add_busybox_commands(tree: &mut Tree, scratch: &Path) -> Result<()> {
    let busybox = scratch.join("busybox");
    tree.extract("usr/bin/busybox", &busybox)?;
    let list = program::run(Command::new(&busybox).arg("--list"))?;
    for command in String::from_utf8_lossy(&list).lines() {
        let taken = ["usr/bin", "usr/sbin"]
            .iter()
            .any(|folder| tree.has(&format!("{folder}/{command}")));
        if !taken {
            tree.link(&format!("usr/bin/{command}"), "busybox");
        }
    }
    Ok(())
}

/// Adds these modules, all that they need, and an index of just these. `scratch` is a folder
/// to work in.
fn add_modules(tree: &mut Tree, kernel: &Kernel, names: &[&str], scratch: &Path) -> Result<()> {
    let mut selected = Tree::default();
    let folder = format!("lib/modules/{}", kernel.release());
    for path in kernel.closure(names)? {
        selected.host_file(&format!("{folder}/{path}"), &kernel.modules().join(&path))?;
    }
    for index in [
        "modules.builtin",
        "modules.builtin.modinfo",
        "modules.order",
    ] {
        selected.host_file(&format!("{folder}/{index}"), &kernel.modules().join(index))?;
    }
    selected.write_folder(scratch)?;
    let merged = scratch.join("usr/lib/modules").join(kernel.release());
    program::run(
        Command::new("depmod")
            .arg("-b")
            .arg(scratch.join("usr"))
            .arg(kernel.release()),
    )?;
    tree.host_folder(&format!("usr/{folder}"), &merged)
}
