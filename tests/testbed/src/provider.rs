//! The providers: what each one's machines look like from inside.

use crate::hardware::{Hardware, Smbios};
use crate::metadata::{Api, Instance};

/// A provider to rent a machine from.
///
/// | provider | network card, disks | metadata service |
/// |---|---|---|
/// | [`Provider::Ec2Nitro`] | virtio-net for Amazon's ENA, NVMe | EC2's |
/// | [`Provider::Ec2Xen`] | a real Xen's: netfront, blkfront | EC2's |
/// | [`Provider::Gce`] | virtio-net, virtio-scsi | Compute Engine's |
/// | [`Provider::Azure`] | e1000e for Hyper-V's or Mellanox', NVMe | Azure's |
/// | [`Provider::OpenStack`] | virtio-net, virtio-blk | OpenStack's |
/// | [`Provider::Vmware`] | vmxnet3, pvscsi | -- |
/// | [`Provider::Xen`] | a real Xen's: netfront, blkfront | -- |
/// | [`Provider::BareMetal`] | e1000e, NVMe | -- |
///
/// QEMU has no ENA, VMBus, Mellanox or MANA devices: others stand in for them. Under emulation
/// the processor cannot have another hypervisor's CPUID leaves (`KVMKVMKVM`, `Microsoft Hv`,
/// `VMwareVMware`: QEMU has them with KVM only); it says that there is a hypervisor, without a
/// name, and in OpenStack, which can use QEMU without KVM, that it is emulated. A real Xen has its
/// own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// Amazon EC2 on its own hypervisor, Nitro.
    Ec2Nitro,
    /// Amazon EC2's first generations: a guest of Xen, without nested virtualization. It is a PVH
    /// guest here, which has no firmware and no SMBIOS: the device model of HVM guests takes
    /// minutes to start one under emulation.
    Ec2Xen,
    /// Google Compute Engine.
    Gce,
    /// Microsoft Azure.
    Azure,
    /// A cloud of OpenStack with KVM.
    OpenStack,
    /// A VMware cluster.
    Vmware,
    /// A PVH guest of Xen, with nested virtualization.
    Xen,
    /// A server of one's own.
    BareMetal,
}

/// What a machine of a provider is.
pub(crate) struct Profile {
    pub(crate) hardware: Hardware,
    pub(crate) smbios: Smbios,
    /// Added to the emulated processor's properties. No two providers have the same one, but for
    /// what goes by the family: QEMU emulates no later way to tell speculation to wait. And
    /// `tcg-cpuid=off` leaves a hypervisor without a name.
    pub(crate) processor: &'static str,
    pub(crate) metadata: Option<Api>,
    /// The id, type, region and zone. The rest is the node's.
    pub(crate) instance: Instance,
    /// The first bytes of network cards' addresses.
    pub(crate) mac: [u8; 3],
    /// Of the network, in bytes; the driver's own if 0.
    pub(crate) mtu: u16,
}

impl Default for Profile {
    /// A machine that says what it is: one of QEMU's.
    fn default() -> Self {
        Self {
            hardware: Hardware::default(),
            smbios: Smbios::default(),
            processor: "",
            metadata: None,
            instance: Instance::default(),
            mac: [0x52, 0x54, 0x00],
            mtu: 0,
        }
    }
}

/// What Xen's domains have as little as others' machines, and Xen cannot be emulated with: its
/// host domain's kernel runs in ring 3 (no SMAP), its entries are emulated without process-context
/// identifiers, and QEMU has AVX only with XSAVE.
const BELOW_XEN: &str = "-avx,-avx2,-fma,-f16c,-vaes,-vpclmulqdq,-pku,-smap,-la57,-pcid";

impl Provider {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Ec2Nitro,
        Self::Ec2Xen,
        Self::Gce,
        Self::Azure,
        Self::OpenStack,
        Self::Vmware,
        Self::Xen,
        Self::BareMetal,
    ];

    /// Its name, such as `ec2-nitro`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ec2Nitro => "ec2-nitro",
            Self::Ec2Xen => "ec2-xen",
            Self::Gce => "gce",
            Self::Azure => "azure",
            Self::OpenStack => "openstack",
            Self::Vmware => "vmware",
            Self::Xen => "xen",
            Self::BareMetal => "bare-metal",
        }
    }

    pub(crate) fn profile(self) -> Profile {
        match self {
            Self::Ec2Nitro => ec2_nitro(),
            Self::Ec2Xen => ec2_xen(),
            Self::Gce => gce(),
            Self::Azure => azure(),
            Self::OpenStack => openstack(),
            Self::Vmware => vmware(),
            Self::Xen => xen(),
            Self::BareMetal => bare_metal(),
        }
    }
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn instance(id: &str, kind: &str, region: &str, zone: &str) -> Instance {
    Instance {
        id: id.to_owned(),
        kind: kind.to_owned(),
        region: region.to_owned(),
        zone: zone.to_owned(),
        ..Instance::default()
    }
}

fn ec2_nitro() -> Profile {
    let id = "i-0af01c0123456789a";
    let uuid = "ec2e1916-9099-7caf-fd21-012345abcdef";
    Profile {
        hardware: Hardware::Nitro,
        smbios: Smbios {
            bios_vendor: some("Amazon EC2"),
            bios_version: some("1.0"),
            manufacturer: some("Amazon EC2"),
            product: some("m5.xlarge"),
            version: some(""),
            serial: some(uuid),
            uuid: some(uuid),
            board_manufacturer: some("Amazon EC2"),
            board_asset: some(id),
            chassis_manufacturer: some("Amazon EC2"),
            chassis_asset: some("Amazon EC2"),
            ..Smbios::default()
        },
        processor: "tcg-cpuid=off,family=23,model=1,stepping=2,model-id=AMD EPYC 7571,-sha-ni",
        metadata: Some(Api::Ec2),
        instance: instance(id, "m5.xlarge", "us-east-1", "us-east-1a"),
        mac: [0x06, 0x1c, 0x01],
        mtu: 9001,
    }
}

fn ec2_xen() -> Profile {
    Profile {
        hardware: Hardware::Xen,
        smbios: Smbios {
            // Which Xen tells.
            uuid: some("ec21f6ab-5b3e-4a3c-9f0c-3f1b2a6c7d8e"),
            ..Smbios::default()
        },
        processor: BELOW_XEN,
        metadata: Some(Api::Ec2),
        instance: instance(
            "i-0b22a22eec53b9321",
            "m4.xlarge",
            "eu-west-1",
            "eu-west-1b",
        ),
        mac: [0x0a, 0x58, 0x0a],
        mtu: 9001,
    }
}

fn gce() -> Profile {
    Profile {
        hardware: Hardware::VirtioScsi,
        smbios: Smbios {
            bios_vendor: some("Google"),
            bios_version: some("Google"),
            manufacturer: some("Google"),
            product: some("Google Compute Engine"),
            version: some(""),
            serial: some("GoogleCloud-0123456789ABCDEF0123456789ABCDEF"),
            board_manufacturer: some("Google"),
            board_product: some("Google Compute Engine"),
            chassis_manufacturer: some("Google"),
            ..Smbios::default()
        },
        processor: "tcg-cpuid=off,family=23,model=49,stepping=0,model-id=AMD EPYC 7B12,-movbe,-bmi2",
        metadata: Some(Api::Gce),
        instance: instance(
            "4520031799277581759",
            "n2-standard-4",
            "us-central1",
            "us-central1-a",
        ),
        mac: [0x42, 0x01, 0x0a],
        mtu: 1460,
    }
}

fn azure() -> Profile {
    Profile {
        hardware: Hardware::BareMetal,
        smbios: Smbios {
            bios_vendor: some("American Megatrends Inc."),
            bios_version: some("090008"),
            manufacturer: some("Microsoft Corporation"),
            product: some("Virtual Machine"),
            version: some("7.0"),
            serial: some("0000-0014-1234-5678-9012-3456-78"),
            board_manufacturer: some("Microsoft Corporation"),
            board_product: some("Virtual Machine"),
            board_version: some("7.0"),
            chassis_manufacturer: some("Microsoft Corporation"),
            chassis_version: some("7.0"),
            // The same in all machines of Azure.
            chassis_asset: some("7783-7084-3265-9085-8269-3286-77"),
            ..Smbios::default()
        },
        processor: "tcg-cpuid=off,family=23,model=96,stepping=1,model-id=AMD EPYC 7V12 64-Core Processor,\
                    -la57,-pku",
        metadata: Some(Api::Azure),
        instance: instance(
            "02aab8a4-74ef-476e-8182-f6d2ba4166a6",
            "Standard_D4s_v3",
            "westeurope",
            "2",
        ),
        mac: [0x00, 0x0d, 0x3a],
        mtu: 1500,
    }
}

fn openstack() -> Profile {
    let uuid = "d8e02d56-2648-49a3-bf97-6be8f1204f38";
    Profile {
        hardware: Hardware::Virtio,
        smbios: Smbios {
            manufacturer: some("OpenStack Foundation"),
            product: some("OpenStack Nova"),
            version: some("25.0.0"),
            serial: some(uuid),
            uuid: some(uuid),
            chassis_manufacturer: some("QEMU"),
            chassis_asset: some("OpenStack Nova"),
            ..Smbios::default()
        },
        processor: "family=23,model=24,stepping=1,model-id=EPYC-Rome,-x2apic",
        metadata: Some(Api::OpenStack),
        instance: instance(uuid, "m1.large", "RegionOne", "nova"),
        mac: [0xfa, 0x16, 0x3e],
        mtu: 1450,
    }
}

fn vmware() -> Profile {
    Profile {
        hardware: Hardware::Vmware,
        smbios: Smbios {
            bios_vendor: some("Phoenix Technologies LTD"),
            bios_version: some("6.00"),
            manufacturer: some("VMware, Inc."),
            product: some("VMware Virtual Platform"),
            version: some("None"),
            serial: some("VMware-42 1c 5a 0b 77 9d 3e 21-aa 10 4f 6c 8b 2d 9e 01"),
            board_manufacturer: some("Intel Corporation"),
            board_product: some("440BX Desktop Reference Platform"),
            board_version: some("None"),
            chassis_manufacturer: some("No Enclosure"),
            chassis_version: some("N/A"),
            chassis_asset: some("No Asset Tag"),
            ..Smbios::default()
        },
        processor: "tcg-cpuid=off,family=23,model=8,stepping=2,model-id=AMD EPYC 7302 16-Core Processor,\
                    -pcid,-sse4a",
        metadata: None,
        instance: Instance::default(),
        mac: [0x00, 0x50, 0x56],
        mtu: 1500,
    }
}

fn xen() -> Profile {
    Profile {
        hardware: Hardware::XenNested,
        smbios: Smbios::default(),
        processor: BELOW_XEN,
        metadata: None,
        instance: Instance::default(),
        mac: [0x00, 0x16, 0x3e],
        mtu: 1500,
    }
}

fn bare_metal() -> Profile {
    Profile {
        hardware: Hardware::BareMetal,
        smbios: Smbios {
            bios_vendor: some("Dell Inc."),
            bios_version: some("2.12.2"),
            manufacturer: some("Dell Inc."),
            version: some("Not Specified"),
            product: some("PowerEdge R6415"),
            serial: some("7XK1ZQ2"),
            board_manufacturer: some("Dell Inc."),
            board_product: some("065PKD"),
            board_version: some("A06"),
            chassis_manufacturer: some("Dell Inc."),
            chassis_version: some("Not Specified"),
            physical: true,
            ..Smbios::default()
        },
        processor: "hypervisor=off,family=23,model=113,stepping=0,model-id=AMD EPYC 7F52,-rdrand,-adx",
        metadata: None,
        instance: Instance::default(),
        mac: [0x24, 0x6e, 0x96],
        mtu: 1500,
    }
}
