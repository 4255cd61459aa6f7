//! The ACPI tables: a hardware-reduced machine (ACPI 6.5, 4.1) with one PCI
//! root, a serial port, a power button and a generation ID.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::legacy::{generation, power};
use crate::platform;

const OEM: [u8; 6] = *b"BLANKT";
const TABLE: [u8; 8] = *b"BLANKHVM";
const REVISION: u32 = 1;

/// The tables do not fit, or not into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There are too many of them.
    #[error("the ACPI tables need {0} bytes, more than the BIOS area has")]
    TooLarge(u64),
    /// Guest memory ends below them.
    #[error("cannot write ACPI tables to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// There is no generation ID.
    #[error(transparent)]
    Generation(#[from] generation::Error),
}

/// Writes tables one behind the other.
struct Writer<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<u64, Error> {
        let at = self.next;
        let end = at + bytes.len() as u64;
        if end > platform::ACPI_END {
            return Err(Error::TooLarge(end - platform::ACPI_START));
        }
        self.ram.write_slice(bytes, GuestAddress(at))?;
        self.next = end.next_multiple_of(16);
        Ok(at)
    }

    fn put_table(&mut self, table: &dyn Aml) -> Result<u64, Error> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.put(&bytes)
    }
}

/// Writes the tables of a machine with `cpus` processors, and its generation ID
/// if it has none, and returns where the root pointer is.
///
/// # Errors
/// They do not fit.
pub fn write_tables(ram: &GuestRam, cpus: u8) -> Result<GuestAddress, Error> {
    // The root pointer comes first, where a scan of the BIOS area finds it.
    let root = platform::ACPI_START;
    let mut writer = Writer {
        ram,
        next: root + 64,
    };
    let dsdt = writer.put(&dsdt::build())?;
    let tables = [
        writer.put_table(&fadt(dsdt))?,
        writer.put_table(&madt(cpus))?,
        writer.put_table(&mcfg())?,
    ];
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = writer.put_table(&xsdt)?;
    writer.next = root;
    writer.put_table(&Rsdp::new(OEM, xsdt))?;
    generation::ensure(ram)?;
    Ok(GuestAddress(root))
}

fn register(offset: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(platform::POWER_PORT + offset),
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    /// No VGA, no CMOS clock; and no 8042, whose bit is not set.
    const NO_VGA_NO_CMOS: u16 = 1 << 2 | 1 << 5;
    let mut builder = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    builder.iapc_boot_arch = NO_VGA_NO_CMOS.into();
    builder.reset_reg = register(power::RESET);
    builder.reset_value = power::RESET_VALUE;
    builder.sleep_control_reg = register(power::SLEEP_CONTROL);
    builder.sleep_status_reg = register(power::SLEEP_STATUS);
    builder.finalize()
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM,
        TABLE,
        REVISION,
        LocalInterruptController::Address(platform::LAPIC),
    );
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(cpus, platform::IOAPIC, 0));
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(platform::ECAM_START, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
        let len: u32 = ram.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; len as usize];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_sums_to_zero() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let root = write_tables(&ram, 64).unwrap();
        let mut rsdp = [0u8; 36];
        ram.read_slice(&mut rsdp, root).unwrap();
        assert_eq!(
            (&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)),
            (&b"RSD PTR "[..], 0, 0)
        );
        let xsdt = table(&ram, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let mut signatures = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let bytes = table(&ram, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&bytes), 0);
            signatures.push(String::from_utf8(bytes[..4].to_vec()).unwrap());
            if signatures.last().unwrap() == "FACP" {
                let dsdt = table(
                    &ram,
                    u64::from_le_bytes(bytes[140..148].try_into().unwrap()),
                );
                assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
            }
        }
        assert_eq!(signatures, ["FACP", "APIC", "MCFG"]);
    }
}
