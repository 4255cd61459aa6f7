//! What a machine shows of its provider by itself.

use std::arch::x86_64::__cpuid;
use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::text::clean;

/// A file of SMBIOS, Xen or PCI is read up to here, in bytes. Those that the
/// kernel makes have at most one page.
const FILE: u64 = 4096;

/// So many facts are kept.
const FACTS: usize = 256;

/// So many PCI devices are looked at.
const DEVICES: usize = 4096;

/// "Running under a hypervisor": bit 31 of ECX of CPUID leaf 1.
const HYPERVISOR_BIT: u32 = 1 << 31;

/// Where a hypervisor's leaves can start. One that shows another's interface
/// has that first and its own behind it, 0x100 leaves further each.
const HYPERVISOR_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_0f00;

/// The fields of `/sys/class/dmi/id` that tell a provider or an instance. Root
/// alone can read the serial numbers and the UUID.
pub const SMBIOS_FIELDS: &[&str] = &[
    "sys_vendor",
    "product_name",
    "product_version",
    "product_serial",
    "product_uuid",
    "bios_vendor",
    "bios_version",
    "board_vendor",
    "board_name",
    "board_asset_tag",
    "chassis_vendor",
    "chassis_asset_tag",
];

/// Files below `/sys/hypervisor`, and the fact that each of them is.
const XEN_FILES: [(&str, &str); 5] = [
    ("type", "type"),
    ("uuid", "uuid"),
    ("guest_type", "guest_type"),
    ("version_extra", "version/extra"),
    ("features", "properties/features"),
];

/// Where something was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The firmware's tables, as `/sys/class/dmi/id` has them.
    Smbios,
    /// The processor: leaf 1, and leaves from 0x4000_0000 on.
    Cpuid,
    /// `/sys/hypervisor` and `/proc/xen`.
    Xen,
    /// `/sys/bus/pci/devices`.
    Pci,
    /// The provider's metadata service.
    Metadata,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Smbios => "SMBIOS",
            Self::Cpuid => "CPUID",
            Self::Xen => "Xen",
            Self::Pci => "PCI",
            Self::Metadata => "metadata",
        })
    }
}

/// Something that was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fact {
    /// Where.
    pub source: Source,
    /// Name of the field.
    pub name: &'static str,
    /// What it says: one line without control characters.
    pub value: String,
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.source, self.name, self.value)
    }
}

/// Where to look.
pub struct Machine {
    /// The folder that holds `sys` and `proc`.
    pub root: PathBuf,
    /// EAX, EBX, ECX and EDX of a CPUID leaf.
    pub cpuid: Box<dyn Fn(u32) -> [u32; 4]>,
}

impl Machine {
    /// The machine that this runs on.
    #[must_use]
    pub fn this() -> Self {
        Self {
            root: "/".into(),
            cpuid: Box::new(|leaf| {
                let found = __cpuid(leaf);
                [found.eax, found.ebx, found.ecx, found.edx]
            }),
        }
    }
}

/// All that was seen, each once, in the order in which it was looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts(Vec<Fact>);

impl Facts {
    /// Looks. What cannot be read is left out.
    #[must_use]
    pub fn read(machine: &Machine) -> Self {
        let mut facts = Self::default();
        facts.add_smbios(&machine.root.join("sys/class/dmi/id"));
        facts.add_cpuid(&machine.cpuid);
        facts.add_xen(&machine.root);
        facts.add_pci(&machine.root.join("sys/bus/pci/devices"));
        facts
    }

    /// Adds what a field says. Bytes that are no text are replaced; what says
    /// nothing is left out.
    pub fn add(&mut self, source: Source, name: &'static str, raw: &[u8]) {
        let Some(value) = clean(raw) else { return };
        let fact = Fact {
            source,
            name,
            value,
        };
        if self.0.len() < FACTS && !self.0.contains(&fact) {
            self.0.push(fact);
        }
    }

    /// Adds whether there is a hypervisor, and whose signatures it has.
    pub fn add_cpuid(&mut self, cpuid: &dyn Fn(u32) -> [u32; 4]) {
        let hypervisor = cpuid(1)[2] & HYPERVISOR_BIT != 0;
        let answer: &[u8] = if hypervisor { b"yes" } else { b"no" };
        self.add(Source::Cpuid, "hypervisor", answer);
        // Without a hypervisor these leaves hold other leaves' values.
        if !hypervisor {
            return;
        }
        for leaf in HYPERVISOR_LEAVES.step_by(0x100) {
            if let Some(signature) = signature(leaf, cpuid(leaf)) {
                self.add(Source::Cpuid, "signature", &signature);
            }
        }
    }

    fn add_smbios(&mut self, folder: &Path) {
        for field in SMBIOS_FIELDS {
            if let Some(raw) = read(&folder.join(field)) {
                self.add(Source::Smbios, field, &raw);
            }
        }
    }

    fn add_xen(&mut self, root: &Path) {
        for (name, file) in XEN_FILES {
            if let Some(raw) = read(&root.join("sys/hypervisor").join(file)) {
                self.add(Source::Xen, name, &raw);
            }
        }
        let proc = root.join("proc/xen");
        if proc.is_dir() {
            self.add(Source::Xen, "proc", b"yes");
        }
        if let Some(raw) = read(&proc.join("capabilities")) {
            self.add(Source::Xen, "capabilities", &raw);
        }
    }

    fn add_pci(&mut self, folder: &Path) {
        let Ok(devices) = fs::read_dir(folder) else {
            return;
        };
        let devices = devices.flatten().take(DEVICES);
        let ids: BTreeSet<_> = devices
            .filter_map(|device| {
                let id = |file| pci_id(&read(&device.path().join(file))?);
                Some(format!("{}:{}", id("vendor")?, id("device")?))
            })
            .collect();
        for id in ids {
            self.add(Source::Pci, "device", id.as_bytes());
        }
    }

    /// What a field says; the first, where there are several.
    #[must_use]
    pub fn get<'a>(&'a self, source: Source, name: &'a str) -> Option<&'a str> {
        self.all(source, name).next()
    }

    /// All that fields of this name say.
    pub fn all<'a>(&'a self, source: Source, name: &'a str) -> impl Iterator<Item = &'a str> {
        let same = move |fact: &&Fact| fact.source == source && fact.name == name;
        self.0.iter().filter(same).map(|fact| fact.value.as_str())
    }

    /// Every fact.
    pub fn iter(&self) -> std::slice::Iter<'_, Fact> {
        self.0.iter()
    }

    /// The facts themselves.
    #[must_use]
    pub fn into_vec(self) -> Vec<Fact> {
        self.0
    }
}

/// The start of a file; `None` if there is none.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut raw = Vec::new();
    let file = File::open(path).ok()?;
    file.take(FILE).read_to_end(&mut raw).ok()?;
    Some(raw)
}

/// A PCI vendor's or device's number, `0x` and four digits.
fn pci_id(raw: &[u8]) -> Option<String> {
    let digits = std::str::from_utf8(raw).ok()?.trim().strip_prefix("0x")?;
    let sound = digits.len() == 4 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    sound.then(|| digits.to_ascii_lowercase())
}

/// The signature in a hypervisor's first leaf, if it is one: EAX is the last
/// leaf (0 with old versions of KVM), EBX, ECX and EDX are text.
fn signature(leaf: u32, [last, ebx, ecx, edx]: [u32; 4]) -> Option<Vec<u8>> {
    let bytes = [ebx, ecx, edx].map(u32::to_le_bytes).concat();
    let text: Vec<u8> = bytes.into_iter().take_while(|byte| *byte != 0).collect();
    let printable = text.iter().all(|byte| matches!(byte, b' '..=b'~'));
    let sound = last == 0 || (leaf..leaf + 0x100).contains(&last);
    (sound && printable && text.len() >= 4).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with_leaves(leaves: &'static [(u32, &'static [u8; 12])]) -> Facts {
        let mut facts = Facts::default();
        facts.add_cpuid(&|leaf| match leaves.iter().find(|(at, _)| *at == leaf) {
            Some((at, text)) => {
                let word = |n: usize| u32::from_le_bytes(text[4 * n..][..4].try_into().unwrap());
                [at + 1, word(0), word(1), word(2)]
            }
            // Elsewhere a leaf that is not there repeats another.
            None => [7, u32::from_le_bytes(*b"Genu"), HYPERVISOR_BIT, 0],
        });
        facts
    }

    #[test]
    fn a_hypervisor_behind_anothers_interface_is_seen() {
        let facts = with_leaves(&[
            (0x4000_0000, b"Microsoft Hv"),
            (0x4000_0f00, b"KVMKVMKVM\0\0\0"),
        ]);
        let signatures: Vec<_> = facts.all(Source::Cpuid, "signature").collect();
        assert_eq!(signatures, ["Microsoft Hv", "KVMKVMKVM"]);
        assert_eq!(with_leaves(&[]).0.len(), 1);
    }

    #[test]
    fn without_a_hypervisor_its_leaves_are_not_read() {
        let mut facts = Facts::default();
        facts.add_cpuid(&|leaf| {
            assert_eq!(leaf, 1);
            [0; 4]
        });
        assert_eq!(facts.get(Source::Cpuid, "hypervisor"), Some("no"));
    }

    #[test]
    fn devices_are_told_once_and_odd_ones_left_out() {
        let root = tempfile::tempdir().unwrap();
        for (slot, vendor, device) in [
            ("0000:00:02.0", "0x1AF4\n", "0x1041\n"),
            ("0000:00:01.0", "0x1d0f\n", "0xec20\n"),
            ("0000:00:03.0", "0x1d0f\n", "0xec20\n"),
            ("0000:00:04.0", "1d0f\n", "0xec20\n"),
            ("0000:00:05.0", "0x1d0fff\n", "0xec20\n"),
            ("0000:00:06.0", "\u{ff}\n", ""),
        ] {
            let folder = root.path().join("sys/bus/pci/devices").join(slot);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("vendor"), vendor).unwrap();
            fs::write(folder.join("device"), device).unwrap();
        }
        let machine = Machine {
            root: root.path().into(),
            cpuid: Box::new(|_| [0; 4]),
        };
        let facts = Facts::read(&machine);
        let devices: Vec<_> = facts.all(Source::Pci, "device").collect();
        assert_eq!(devices, ["1af4:1041", "1d0f:ec20"]);
    }

    #[test]
    fn a_machine_without_anything_still_answers() {
        let root = tempfile::tempdir().unwrap();
        let machine = Machine {
            root: root.path().into(),
            cpuid: Box::new(|_| [0; 4]),
        };
        assert_eq!(Facts::read(&machine).0.len(), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_smbios_says_is_one_bounded_line(
            fields in proptest::collection::vec(
                proptest::option::of(proptest::collection::vec(any::<u8>(), 0..9000)),
                SMBIOS_FIELDS.len(),
            )
        ) {
            let root = tempfile::tempdir().unwrap();
            let folder = root.path().join("sys/class/dmi/id");
            fs::create_dir_all(&folder).unwrap();
            for (name, bytes) in SMBIOS_FIELDS.iter().zip(&fields) {
                if let Some(bytes) = bytes {
                    fs::write(folder.join(name), bytes).unwrap();
                }
            }
            let machine = Machine { root: root.path().into(), cpuid: Box::new(|_| [u32::MAX; 4]) };
            let facts = Facts::read(&machine);
            let there = fields.iter().flatten().count();
            prop_assert!(facts.iter().filter(|f| f.source == Source::Smbios).count() <= there);
            for fact in facts.iter() {
                prop_assert!(fact.value.chars().count() <= crate::provider::text::LONGEST);
                prop_assert!(!fact.value.chars().any(char::is_control), "{:?}", fact);
            }
        }

        #[test]
        fn any_leaves_are_read(leaves: [[u32; 4]; 16], one: [u32; 4]) {
            let mut facts = Facts::default();
            facts.add_cpuid(&|leaf| if leaf == 1 { one } else { leaves[leaf as usize >> 8 & 15] });
            prop_assert!(facts.0.len() <= 17);
        }
    }
}
