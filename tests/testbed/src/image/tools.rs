//! Programs for nodes that most tests do not need.

use super::add_packages;
use crate::cache::{self, Key};
use crate::error::{Context, Result};
use crate::packages::Set;
use crate::payload::{self, Payload};
use crate::tree::Tree;

/// What the payload consists of: the peers that benchmarks compare with.
const PACKAGES: [&str; 3] = ["qemu-system-x86", "seabios", "libc6"];

/// Run by the node: puts the programs, libraries and data files where they are looked for.
const ACTIVATE: &str = r#"#!/usr/bin/busybox sh
cd "${0%/*}/usr" || exit
link() { [ -e "$2" ] || ln -s "$1" "$2"; }
for file in "$PWD"/bin/*; do link "$file" "/usr/local/bin/${file##*/}"; done
for file in "$PWD"/lib/x86_64-linux-gnu/*; do
    link "$file" "/usr/lib/x86_64-linux-gnu/${file##*/}"
done
for file in "$PWD"/share/*; do link "$file" "/usr/share/${file##*/}"; done
"#;

/// QEMU with its firmware, for nodes: `qemu-system-x86_64` is then in their `PATH`.
///
/// # Errors
/// When the packages cannot be downloaded or unpacked.
pub fn tools() -> Result<Payload> {
    let packages = Set::closure(&PACKAGES)?;
    let key = Key::default()
        .with(packages.identity())
        .with(include_bytes!("tools.rs"))
        .with(include_bytes!("mod.rs"))
        .with(include_bytes!("../payload.rs"));
    let folder = cache::entry("tools", key, |folder| {
        let mut tree = Tree::default();
        add_packages(&mut tree, &packages)?;
        for deb in packages.download()? {
            tree.package(&deb, |path| {
                path.starts_with("usr/share/qemu/") || path.starts_with("usr/share/seabios/")
            })?;
        }
        tree.file("activate", 0o755, ACTIVATE);
        let files = payload::subfolder(folder, "files")?;
        tree.write_folder(&files)?;
        payload::make(&files, &folder.join("tools.ext4"))?;
        std::fs::remove_dir_all(&files).context(|| format!("cannot remove {}", files.display()))
    })?;
    Ok(Payload::new("tools", folder.join("tools.ext4")))
}
