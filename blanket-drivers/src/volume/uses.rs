//! What devices are used for.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::sysfs::Folder;
use crate::provider::clean;

/// A table of the kernel's is read up to here, in bytes.
const TABLE: u64 = 4 << 20;

/// So many uses of one device are told.
const USES: usize = 32;

/// What is mounted, and what is swapped to.
#[derive(Default)]
pub(super) struct Table {
    /// Device numbers, like `8:1`, and where they are mounted.
    mounts: Vec<(String, String)>,
    /// Paths.
    swaps: Vec<String>,
}

impl Table {
    /// Reads `proc` in `root`.
    pub(super) fn read(root: &Path) -> Self {
        let lines = |file: &str| {
            let mut bytes = Vec::new();
            let opened = File::open(root.join("proc").join(file));
            // What cannot be read has nothing in it.
            let _ = opened.and_then(|file| file.take(TABLE).read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Self::parse(&lines("self/mountinfo"), &lines("swaps"))
    }

    /// Understands `mountinfo` and `swaps` of proc(5).
    pub(super) fn parse(mounts: &str, swaps: &str) -> Self {
        let mount = |line: &str| {
            let mut fields = line.split_ascii_whitespace().skip(2);
            let number = fields.next()?.to_owned();
            Some((number, clean(fields.nth(1)?.as_bytes())?))
        };
        let swap = |line: &str| line.split_ascii_whitespace().next().map(str::to_owned);
        Self {
            mounts: mounts.lines().filter_map(mount).collect(),
            swaps: swaps.lines().skip(1).filter_map(swap).collect(),
        }
    }

    fn of(&self, folder: &Folder, name: &str) -> Vec<String> {
        let number = folder.text("dev").unwrap_or_default();
        let mounts = self.mounts.iter().filter(|(device, _)| *device == number);
        let mounts = mounts.map(|(_, at)| format!("mounted at {at}"));
        let swap = self
            .swaps
            .iter()
            .any(|path| *path == format!("/dev/{name}"));
        let swap = swap.then(|| "swap".to_owned());
        let holders = folder.children("holders").into_iter();
        let holders = holders.map(|holder| format!("held by {holder}"));
        mounts.chain(swap).chain(holders).collect()
    }
}

/// Uses of a disk and of its partitions.
pub(super) fn of(folder: &Folder, name: &str, table: &Table) -> Vec<String> {
    let mut uses = table.of(folder, name);
    let mut partitions = folder.children(".");
    partitions.retain(|part| part.starts_with(name) && folder.has(&format!("{part}/partition")));
    partitions.sort_by_key(|part| (part.len(), part.clone()));
    for part in partitions {
        let of_part = table.of(&folder.child(&part), &part);
        match of_part.is_empty() {
            true => uses.push(format!("partition {part}")),
            false => uses.extend(of_part.into_iter().map(|it| format!("{part} {it}"))),
        }
    }
    uses.truncate(USES);
    uses
}
