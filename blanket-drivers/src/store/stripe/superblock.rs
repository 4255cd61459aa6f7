//! What each volume of a striped set says about the set.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use imago::io_buffers::IoBuffer;

use super::{DATA_START, Layout, MAX_CHUNK, MAX_VOLUMES, MIN_CHUNK};

/// Bytes of a superblock, at a volume's beginning.
pub(super) const LEN: usize = 4096;

const MAGIC: &[u8; 8] = b"BLNKTSTR";
const VERSION: u32 = 1;
/// Where its checksum (CRC-32) is.
const CHECKSUM: usize = LEN - 4;

/// A volume's place in its set. All numbers are little-endian.
///
/// | bytes | |
/// |---|---|
/// | 0 | `BLNKTSTR` |
/// | 8 | version: 1 |
/// | 12 | number of volumes |
/// | 16 | which of them this is, from 0 |
/// | 24 | bytes of a chunk |
/// | 32 | bytes of data on each volume |
/// | 40 | 16 random bytes, the same on all volumes of the set |
/// | 4092 | CRC-32 of all before it |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    /// The set.
    pub(super) set: [u8; 16],
    /// Which volume this is.
    pub(super) index: u32,
    /// How the data lies on them.
    pub(super) layout: Layout,
}

/// Why bytes are no superblock.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reject {
    /// There is none.
    None,
    /// A newer version wrote it.
    Version(u32),
    /// It is damaged.
    Damaged,
}

impl Superblock {
    /// Understands the beginning of a volume.
    ///
    /// # Errors
    /// It is no superblock that can be used.
    pub(super) fn parse(bytes: &[u8; LEN]) -> Result<Self, Reject> {
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if !bytes.starts_with(MAGIC) {
            return Err(Reject::None);
        }
        if u32_at(CHECKSUM) != crc32fast::hash(&bytes[..CHECKSUM]) {
            return Err(Reject::Damaged);
        }
        if u32_at(8) != VERSION {
            return Err(Reject::Version(u32_at(8)));
        }
        let layout = Layout {
            volumes: u32_at(12),
            chunk: u64_at(24),
            data: u64_at(32),
        };
        let index = u32_at(16);
        if !layout.is_sound() || index >= layout.volumes {
            return Err(Reject::Damaged);
        }
        Ok(Self {
            set: std::array::from_fn(|i| bytes[40 + i]),
            index,
            layout,
        })
    }

    /// The superblock's bytes.
    pub(super) fn format(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &self.layout.volumes.to_le_bytes());
        put(16, &self.index.to_le_bytes());
        put(24, &self.layout.chunk.to_le_bytes());
        put(32, &self.layout.data.to_le_bytes());
        put(40, &self.set);
        let checksum = crc32fast::hash(&bytes[..CHECKSUM]);
        bytes[CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a volume's, whose file may be one for direct I/O.
    ///
    /// # Errors
    /// The volume cannot be read. `Ok(Err(_))`: it has none that can be used.
    pub(super) fn read(file: &File) -> io::Result<Result<Self, Reject>> {
        let mut buffer = IoBuffer::new(LEN, LEN)?;
        let room = buffer.as_mut().into_slice();
        match file.read_exact_at(room, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(Err(Reject::None));
            }
            Err(error) => return Err(error),
        }
        let mut bytes = [0; LEN];
        bytes.copy_from_slice(room);
        Ok(Self::parse(&bytes))
    }
}

impl Layout {
    /// Whether nothing in it can overflow or divide by zero.
    pub(super) fn is_sound(&self) -> bool {
        let ends = |data: u64| {
            let all = data.checked_mul(u64::from(self.volumes))?;
            all.checked_add(DATA_START)
        };
        (2..=MAX_VOLUMES).contains(&self.volumes)
            && self.chunk.is_power_of_two()
            && (MIN_CHUNK..=MAX_CHUNK).contains(&self.chunk)
            && self.data > 0
            && self.data.is_multiple_of(self.chunk)
            && ends(self.data).is_some_and(|end| i64::try_from(end).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> Superblock {
        Superblock {
            set: [7; 16],
            index: 1,
            layout: Layout {
                volumes: 3,
                chunk: 64 << 10,
                data: 1 << 30,
            },
        }
    }

    #[test]
    fn a_superblock_is_read_as_it_was_written() {
        assert_eq!(Superblock::parse(&example().format()), Ok(example()));
        assert_eq!(Superblock::parse(&[0; LEN]), Err(Reject::None));
    }

    #[test]
    fn what_makes_no_sense_is_damaged_whatever_its_checksum_says() {
        for wrong in [
            Superblock {
                index: 3,
                ..example()
            },
            with(|it| it.volumes = 1),
            with(|it| it.volumes = u32::MAX),
            with(|it| it.chunk = 0),
            with(|it| it.chunk = 12_288),
            with(|it| it.data = 0),
            with(|it| it.data = 100),
            with(|it| it.data = u64::MAX << 16),
        ] {
            assert_eq!(
                Superblock::parse(&wrong.format()),
                Err(Reject::Damaged),
                "{wrong:?}"
            );
        }
    }

    fn with(change: impl Fn(&mut Layout)) -> Superblock {
        let mut superblock = example();
        change(&mut superblock.layout);
        superblock
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed(at in 0..LEN, by in 1..=255u8) {
            let mut bytes = example().format();
            bytes[at] ^= by;
            prop_assert!(Superblock::parse(&bytes).is_err());
        }

        #[test]
        fn any_bytes_give_a_sound_layout_or_none(
            fields in prop::collection::vec(any::<u8>(), 56 - 12),
        ) {
            let mut bytes = example().format();
            bytes[12..56].copy_from_slice(&fields);
            let checksum = crc32fast::hash(&bytes[..CHECKSUM]);
            bytes[CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
            if let Ok(superblock) = Superblock::parse(&bytes) {
                prop_assert!(superblock.layout.is_sound());
                prop_assert!(superblock.index < superblock.layout.volumes);
            }
        }
    }
}
