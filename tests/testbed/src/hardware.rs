//! What a provider's machine looks like from inside.

use crate::kernel::KernelFlavor;

/// The devices of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Hardware {
    /// virtio network cards and disks, as in clouds that use KVM.
    #[default]
    Virtio,
    /// Intel 82574L network cards (e1000e) and NVMe disks, as in a rented server. Debian's cloud
    /// kernel has no driver for these cards, so the generic one is the default.
    BareMetal,
    /// vmxnet3 network cards and pvscsi disks, as in clouds that use VMware.
    Vmware,
    /// virtio network cards, in place of Amazon's own, and NVMe disks, as in EC2.
    Nitro,
    /// virtio network cards, and disks on virtio's SCSI controller, as in Compute Engine.
    VirtioScsi,
    /// Those of a real Xen for its PVH guests.
    Xen,
    /// The same, with nested virtualization.
    XenNested,
}

impl Hardware {
    /// The kernel with drivers for this hardware that boots fastest.
    pub(crate) fn kernel(self) -> KernelFlavor {
        match self {
            Self::BareMetal => KernelFlavor::Generic,
            _ => KernelFlavor::Cloud,
        }
    }

    /// Whether the machine is a guest of a real Xen.
    pub(crate) fn is_xen(self) -> bool {
        matches!(self, Self::Xen | Self::XenNested)
    }

    /// QEMU's name of the network card: below a Xen, that of its host.
    pub(crate) fn network_card(self) -> &'static str {
        match self {
            Self::BareMetal => "e1000e",
            Self::Vmware => "vmxnet3",
            _ => "virtio-net-pci",
        }
    }

    /// A controller that all disks hang on, if there is one.
    pub(crate) fn disk_controller(self) -> Option<&'static str> {
        match self {
            Self::Vmware => Some("pvscsi,id=scsi"),
            Self::VirtioScsi => Some("virtio-scsi-pci,id=scsi"),
            _ => None,
        }
    }

    /// QEMU's name of a disk: below a Xen, one of its host.
    pub(crate) fn disk(self) -> &'static str {
        match self {
            Self::BareMetal | Self::Nitro => "nvme",
            Self::Vmware | Self::VirtioScsi => "scsi-hd,bus=scsi.0",
            Self::Virtio | Self::Xen | Self::XenNested => "virtio-blk-pci",
        }
    }
}

/// What the firmware says about the machine (SMBIOS types 0 to 3). Fields that are `None` keep
/// QEMU's own values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Smbios {
    /// BIOS vendor.
    pub bios_vendor: Option<String>,
    /// BIOS version.
    pub bios_version: Option<String>,
    /// System manufacturer.
    pub manufacturer: Option<String>,
    /// System product name.
    pub product: Option<String>,
    /// System version.
    pub version: Option<String>,
    /// System serial number.
    pub serial: Option<String>,
    /// System UUID.
    pub uuid: Option<String>,
    /// Base board manufacturer.
    pub board_manufacturer: Option<String>,
    /// Base board product name.
    pub board_product: Option<String>,
    /// Base board version.
    pub board_version: Option<String>,
    /// Base board asset tag.
    pub board_asset: Option<String>,
    /// Chassis manufacturer.
    pub chassis_manufacturer: Option<String>,
    /// Chassis version.
    pub chassis_version: Option<String>,
    /// Chassis asset tag.
    pub chassis_asset: Option<String>,
    /// Do without the flag of the BIOS by which QEMU's machines say that they are virtual.
    pub physical: bool,
}

impl Smbios {
    /// The values of QEMU's `-smbios` options, one per type that has a field set.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let bios: &[(&str, &Option<String>)] = &[
            ("vendor", &self.bios_vendor),
            ("version", &self.bios_version),
        ];
        let types: [&[(&str, &Option<String>)]; 4] = [
            // Otherwise the table is a file's.
            if self.physical { &[] } else { bios },
            &[
                ("manufacturer", &self.manufacturer),
                ("product", &self.product),
                ("version", &self.version),
                ("serial", &self.serial),
                ("uuid", &self.uuid),
            ],
            &[
                ("manufacturer", &self.board_manufacturer),
                ("product", &self.board_product),
                ("version", &self.board_version),
                ("asset", &self.board_asset),
            ],
            &[
                ("manufacturer", &self.chassis_manufacturer),
                ("version", &self.chassis_version),
                ("asset", &self.chassis_asset),
            ],
        ];
        let set = |(name, value): &(&str, &Option<String>)| {
            // A comma within a value is doubled.
            value
                .as_ref()
                .map(|value| format!(",{name}={}", value.replace(',', ",,")))
        };
        types
            .iter()
            .enumerate()
            .map(|(number, fields)| (number, fields.iter().filter_map(set).collect::<String>()))
            .filter(|(_, fields)| !fields.is_empty())
            .map(|(number, fields)| format!("type={number}{fields}"))
            .collect()
    }

    /// The BIOS information of a physical machine, as its firmware has it (SMBIOS 3.6, 7.1): QEMU
    /// sets the flag "virtual machine" in those that it makes.
    pub(crate) fn bios_of_hardware(&self) -> Option<Vec<u8>> {
        /// PCI, flash, shadowing, boot from CD, selectable boot.
        const CHARACTERISTICS: u64 = 1 << 7 | 1 << 11 | 1 << 12 | 1 << 15 | 1 << 16;
        /// ACPI and USB; targeted content distribution and UEFI.
        const EXTENSION: [u8; 2] = [0x03, 0x0c];
        if !self.physical {
            return None;
        }
        // Type, length, handle; vendor and version; address, release date, size.
        let mut table = vec![0, 24, 0, 0, 1, 2, 0, 0xf0, 3, 0xff];
        table.extend_from_slice(&CHARACTERISTICS.to_le_bytes());
        table.extend_from_slice(&EXTENSION);
        // Releases of the BIOS and of an embedded controller: none.
        table.extend_from_slice(&[0xff; 4]);
        for text in [
            self.bios_vendor.as_deref().unwrap_or("-"),
            self.bios_version.as_deref().unwrap_or("-"),
            "07/14/2020",
        ] {
            table.extend_from_slice(text.as_bytes());
            table.push(0);
        }
        table.push(0);
        Some(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_types_with_a_value_are_given_and_commas_are_doubled() {
        let smbios = Smbios {
            manufacturer: Some("VMware, Inc.".to_owned()),
            serial: Some("VMware-42".to_owned()),
            chassis_asset: Some("tag".to_owned()),
            ..Smbios::default()
        };
        assert_eq!(
            smbios.arguments(),
            [
                "type=1,manufacturer=VMware,, Inc.,serial=VMware-42",
                "type=3,asset=tag"
            ]
        );
        assert!(Smbios::default().arguments().is_empty());
    }

    #[test]
    fn a_physical_bios_is_a_table_without_the_flag_of_virtual_machines() {
        let smbios = Smbios {
            bios_vendor: Some("Dell Inc.".to_owned()),
            bios_version: Some("2.1".to_owned()),
            physical: true,
            ..Smbios::default()
        };
        assert!(smbios.arguments().is_empty());
        let table = smbios.bios_of_hardware().unwrap();
        let (formatted, strings) = table.split_at(usize::from(table[1]));
        assert_eq!(formatted.len(), 24);
        assert_eq!(formatted[19] & 1 << 4, 0);
        assert_eq!(strings, b"Dell Inc.\x002.1\x0007/14/2020\0\0");
        assert_eq!(Smbios::default().bios_of_hardware(), None);
    }
}
