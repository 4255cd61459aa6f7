//! The DSDT, in AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Method, Name, Notify,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::sdt::Sdt;

use super::{OEM, REVISION, TABLE};
use crate::legacy::power;
use crate::platform;

/// The table's bytes.
pub(super) fn build() -> Vec<u8> {
    let mut body = Vec::new();
    let sleep = power::SLEEP_TYPE_S5;
    Name::new("_S5_".into(), &Package::new(vec![&sleep])).to_aml_bytes(&mut body);
    pci(&mut body);
    serial(&mut body);
    generation(&mut body);
    button(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

fn pci(out: &mut Vec<u8>) {
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let config = IO::new(platform::PCI_PORT, platform::PCI_PORT, 1, 8);
    // The windows end inclusively.
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        platform::PCI_WINDOW_START as u32,
        (platform::PCI_WINDOW_END - 1) as u32,
        None,
    );
    let ports = AddressSpace::new_io(0x1000u16, 0xfffeu16, None);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_SEG".into(), &0u8),
                &Name::new("_BBN".into(), &0u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&buses, &config, &ports, &memory]),
                ),
            ],
        )],
    )
    .to_aml_bytes(out);
}

fn serial(out: &mut Vec<u8>) {
    let ports = IO::new(platform::SERIAL_PORT, platform::SERIAL_PORT, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, platform::SERIAL_GSI);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&interrupt, &ports]),
                ),
            ],
        )],
    )
    .to_aml_bytes(out);
}

/// Where the generation ID is. Both names are in use.
fn generation(out: &mut Vec<u8>) {
    let low = platform::GENERATION as u32;
    let high = (platform::GENERATION >> 32) as u32;
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"QEMUVGID"),
                &Name::new(
                    "_CID".into(),
                    &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]),
                ),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
            ],
        )],
    )
    .to_aml_bytes(out);
}

/// The power button, and the general event device that tells of it and of new
/// generations.
fn button(out: &mut Vec<u8>) {
    let interrupt = Interrupt::new(true, true, false, false, platform::POWER_GSI);
    let port = platform::POWER_PORT + power::EVENTS;
    let pressed = And::new(&Local(1), &Local(0), &power::EVENT_BUTTON);
    let renewed = And::new(&Local(3), &Local(0), &power::EVENT_GENERATION);
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "PWRB".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                    &Name::new("_UID".into(), &0u8),
                ],
            ),
            &Device::new(
                "GED_".into(),
                vec![
                    &Name::new("_HID".into(), &"ACPI0013"),
                    &Name::new("_UID".into(), &0u8),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
                    &OpRegion::new("EVTR".into(), OpRegionSpace::SystemIO, &port, &1u8),
                    &Field::new(
                        "EVTR".into(),
                        FieldAccessType::Byte,
                        FieldLockRule::NoLock,
                        FieldUpdateRule::WriteAsZeroes,
                        vec![FieldEntry::Named(*b"EVNT", 8)],
                    ),
                    &Method::new(
                        "_EVT".into(),
                        1,
                        true,
                        vec![
                            // Only one line comes here: the argument says nothing.
                            &Store::new(&Local(2), &Arg(0)),
                            &Store::new(&Local(0), &Path::new("EVNT")),
                            &pressed,
                            &If::new(
                                &Local(1),
                                vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)],
                            ),
                            &renewed,
                            &If::new(
                                &Local(3),
                                vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80u8)],
                            ),
                        ],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(out);
}
