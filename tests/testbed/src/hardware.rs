//! What a provider's machine looks like from inside.

use crate::kernel::KernelFlavor;

/// The devices of a machine. More providers will follow.
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
}

impl Hardware {
    /// The kernel with drivers for this hardware that boots fastest.
    pub(crate) fn kernel(self) -> KernelFlavor {
        match self {
            Self::Virtio | Self::Vmware => KernelFlavor::Cloud,
            Self::BareMetal => KernelFlavor::Generic,
        }
    }

    /// QEMU's name of the network card.
    pub(crate) fn network_card(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-net-pci",
            Self::BareMetal => "e1000e",
            Self::Vmware => "vmxnet3",
        }
    }

    /// A controller that all disks hang on, if there is one.
    pub(crate) fn disk_controller(self) -> Option<&'static str> {
        match self {
            Self::Virtio | Self::BareMetal => None,
            Self::Vmware => Some("pvscsi,id=scsi"),
        }
    }

    /// QEMU's name of a disk.
    pub(crate) fn disk(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-blk-pci",
            Self::BareMetal => "nvme",
            Self::Vmware => "scsi-hd,bus=scsi.0",
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
    /// Base board asset tag.
    pub board_asset: Option<String>,
    /// Chassis manufacturer.
    pub chassis_manufacturer: Option<String>,
    /// Chassis asset tag.
    pub chassis_asset: Option<String>,
}

impl Smbios {
    /// The values of QEMU's `-smbios` options, one per type that has a field set.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let types: [&[(&str, &Option<String>)]; 4] = [
            &[
                ("vendor", &self.bios_vendor),
                ("version", &self.bios_version),
            ],
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
                ("asset", &self.board_asset),
            ],
            &[
                ("manufacturer", &self.chassis_manufacturer),
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
}
