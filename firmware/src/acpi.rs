//! As much of ACPI 6.5 as a payload needs: where the tables are.

use core::slice;

use crate::io::{Width, load};

/// Longest table that is looked at, in bytes.
const TABLE_MAX: u64 = 1 << 20;
const HEADER: u64 = 36;

/// The root of a machine's ACPI tables.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    root: u64,
    /// Bytes of an entry of the root table: 8 (XSDT) or 4 (RSDT).
    entry: Width,
}

/// One table, its header included.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    address: u64,
    len: u64,
}

fn read(address: u64, width: Width) -> u64 {
    // SAFETY: called for addresses that firmware tables gave, all of them in
    // the identity map; reading has no effect on this program.
    unsafe { load(address, width) }
}

impl Table {
    fn at(address: u64) -> Self {
        Self {
            address,
            len: read(address + 4, Width::Long).min(TABLE_MAX),
        }
    }

    /// The field of `width` at `offset`; 0 where the table is too short.
    #[must_use]
    pub fn field(&self, offset: u64, width: Width) -> u64 {
        if offset + width.bytes() > self.len {
            return 0;
        }
        read(self.address + offset, width)
    }

    /// The table's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the table is mapped and nobody changes it while it is read.
        unsafe { slice::from_raw_parts(self.address as *const u8, self.len as usize) }
    }

    /// The table that the 64-bit field at `long` points at or, where that is
    /// 0, the 32-bit field at `short`.
    #[must_use]
    pub fn follow(&self, long: u64, short: u64) -> Option<Self> {
        [
            self.field(long, Width::Quad),
            self.field(short, Width::Long),
        ]
        .into_iter()
        .find(|&address| address != 0)
        .map(Self::at)
    }
}

impl Tables {
    /// The tables of the root pointer at `rsdp`; none if that is 0.
    #[must_use]
    pub fn find(rsdp: u64) -> Option<Self> {
        if rsdp == 0 || read(rsdp, Width::Quad) != u64::from_le_bytes(*b"RSD PTR ") {
            return None;
        }
        let (xsdt, rsdt) = (read(rsdp + 24, Width::Quad), read(rsdp + 16, Width::Long));
        // The first revision has no XSDT.
        if read(rsdp + 15, Width::Byte) >= 2 && xsdt != 0 {
            return Some(Self {
                root: xsdt,
                entry: Width::Quad,
            });
        }
        Some(Self {
            root: rsdt,
            entry: Width::Long,
        })
    }

    /// The first table with this signature.
    #[must_use]
    pub fn table(&self, signature: [u8; 4]) -> Option<Table> {
        let root = Table::at(self.root);
        let entries = root.len.saturating_sub(HEADER) / self.entry.bytes();
        (0..entries)
            .map(|i| root.field(HEADER + i * self.entry.bytes(), self.entry))
            .filter(|&address| address != 0)
            .find(|&address| read(address, Width::Long) == u64::from(u32::from_le_bytes(signature)))
            .map(Table::at)
    }
}
