//! Machines of every provider: what their `sys`, `proc` and CPUID hold.

use std::fs;

use blanket_drivers::provider::Machine;
use tempfile::TempDir;

/// A machine, in a folder of its own.
pub(crate) struct Fixture {
    root: TempDir,
    hypervisor: bool,
    signatures: Vec<(u32, &'static [u8; 12])>,
}

impl Fixture {
    fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
            hypervisor: true,
            signatures: Vec::new(),
        }
    }

    fn file(self, path: &str, text: &str) -> Self {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
        self
    }

    pub(crate) fn smbios(self, fields: &[(&str, &str)]) -> Self {
        let set = |fixture: Self, (name, value): &(&str, &str)| {
            fixture.file(&format!("sys/class/dmi/id/{name}"), value)
        };
        fields.iter().fold(self, set)
    }

    fn pci(self, slot: u8, vendor: &str, device: &str) -> Self {
        let folder = format!("sys/bus/pci/devices/0000:00:{slot:02x}.0");
        self.file(&format!("{folder}/vendor"), vendor)
            .file(&format!("{folder}/device"), device)
    }

    fn signature(mut self, leaf: u32, text: &'static [u8; 12]) -> Self {
        self.signatures.push((leaf, text));
        self
    }

    fn metal(mut self) -> Self {
        self.hypervisor = false;
        self
    }

    pub(crate) fn machine(&self) -> Machine {
        let (hypervisor, signatures) = (self.hypervisor, self.signatures.clone());
        Machine {
            root: self.root.path().into(),
            cpuid: Box::new(move |leaf| {
                if leaf == 1 {
                    return [0, 0, u32::from(hypervisor) << 31, 0];
                }
                let found = signatures.iter().find(|(at, _)| *at == leaf);
                found.map_or([0; 4], |(at, text)| {
                    let word = |n| u32::from_le_bytes(text[n..n + 4].try_into().unwrap());
                    [at + 1, word(0), word(4), word(8)]
                })
            }),
        }
    }
}

const KVM: &[u8; 12] = b"KVMKVMKVM\0\0\0";
const XEN: &[u8; 12] = b"XenVMMXenVMM";
const HYPER_V: &[u8; 12] = b"Microsoft Hv";

pub(crate) fn ec2_nitro() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "Amazon EC2"),
            ("product_name", "m5.large"),
            ("bios_vendor", "Amazon EC2"),
            ("bios_version", "1.0"),
            ("board_vendor", "Amazon EC2"),
            ("board_asset_tag", "i-0af01c0123456789a"),
            ("chassis_asset_tag", "Amazon EC2"),
            ("product_uuid", "ec2e1916-9099-7caf-fd21-012345abcdef"),
        ])
        .signature(0x4000_0000, KVM)
        .pci(5, "0x1d0f", "0xec20")
}

pub(crate) fn ec2_xen() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "Xen"),
            ("product_name", "HVM domU"),
            ("product_version", "4.11.amazon"),
            ("bios_vendor", "Xen"),
            ("bios_version", "4.11.amazon"),
            ("product_uuid", "45E12AEC-DCD1-B213-94ED-012345ABCDEF"),
        ])
        .signature(0x4000_0000, XEN)
        .file("sys/hypervisor/type", "xen")
        .file(
            "sys/hypervisor/uuid",
            "ec2ae145-d1dc-13b2-94ed-012345abcdef",
        )
}

/// Paravirtual: no firmware, and the bare processor's CPUID.
pub(crate) fn ec2_xen_pv() -> Fixture {
    Fixture::new()
        .metal()
        .file("sys/hypervisor/type", "xen")
        .file(
            "sys/hypervisor/uuid",
            "ec2ae145-d1dc-13b2-94ed-012345abcdef",
        )
}

pub(crate) fn ec2_metal() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "Amazon EC2"),
            ("product_name", "m5.metal"),
            ("bios_vendor", "Amazon EC2"),
        ])
        .metal()
}

pub(crate) fn gce() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "Google"),
            ("product_name", "Google Compute Engine"),
            ("product_serial", "GoogleCloud-0123456789ABCDEF"),
            ("bios_vendor", "Google"),
        ])
        .signature(0x4000_0000, KVM)
        .pci(4, "0x1ae0", "0x0042")
}

pub(crate) fn azure() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "Microsoft Corporation"),
            ("product_name", "Virtual Machine"),
            ("product_version", "7.0"),
            ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),
        ])
        .signature(0x4000_0000, HYPER_V)
}

pub(crate) fn hyper_v() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "Microsoft Corporation"),
            ("product_name", "Virtual Machine"),
        ])
        .signature(0x4000_0000, HYPER_V)
}

pub(crate) fn openstack() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "OpenStack Foundation"),
            ("product_name", "OpenStack Nova"),
            ("product_uuid", "D8E02D56-2648-49A3-BF97-6BE8F1204F38"),
        ])
        .signature(0x4000_0000, HYPER_V)
        .signature(0x4000_0100, KVM)
}

/// A machine of QEMU's, as some clouds leave it.
pub(crate) fn kvm() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "QEMU"),
            ("product_name", "Standard PC (Q35 + ICH9, 2009)"),
            ("product_uuid", "00000000-0000-0000-0000-000000000000"),
        ])
        .signature(0x4000_0000, KVM)
        .pci(2, "0x1af4", "0x1041")
}

pub(crate) fn digitalocean() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "DigitalOcean"),
            ("product_name", "Droplet"),
            ("product_serial", "2756294"),
        ])
        .signature(0x4000_0000, KVM)
}

pub(crate) fn hetzner() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "Hetzner"),
            ("product_name", "vServer"),
            ("product_serial", "42"),
        ])
        .signature(0x4000_0000, KVM)
}

pub(crate) fn vmware() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "VMware, Inc."),
            ("product_name", "VMware Virtual Platform"),
            ("product_serial", "VMware-42 1c 00"),
        ])
        .signature(0x4000_0000, b"VMwareVMware")
        .pci(3, "0x15ad", "0x07b0")
}

pub(crate) fn xen_hvm() -> Fixture {
    Fixture::new()
        .smbios(&[("sys_vendor", "Xen"), ("product_name", "HVM domU")])
        // Behind Hyper-V's interface.
        .signature(0x4000_0000, HYPER_V)
        .signature(0x4000_0100, XEN)
        .file("sys/hypervisor/type", "xen")
        .file("sys/hypervisor/guest_type", "HVM")
        .pci(2, "0x5853", "0x0001")
}

pub(crate) fn xen(kind: &str) -> Fixture {
    Fixture::new()
        .metal()
        .file("sys/hypervisor/type", "xen")
        .file("sys/hypervisor/guest_type", kind)
        .file(
            "sys/hypervisor/uuid",
            "b4ae0e1f-0000-0000-0000-000000000001",
        )
        .file("proc/xen/capabilities", "")
}

pub(crate) fn xen_dom0() -> Fixture {
    xen("PV")
        .smbios(&[("sys_vendor", "Dell Inc.")])
        .file("proc/xen/capabilities", "control_d")
}

pub(crate) fn dell() -> Fixture {
    Fixture::new()
        .smbios(&[
            ("sys_vendor", "Dell Inc."),
            ("product_name", "PowerEdge R640"),
            ("product_serial", "ABC1234"),
        ])
        .metal()
}

/// A small hypervisor without firmware.
pub(crate) fn bare_kvm() -> Fixture {
    Fixture::new().signature(0x4000_0000, KVM)
}
