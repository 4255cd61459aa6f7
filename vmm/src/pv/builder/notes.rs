//! What a kernel says about itself in its ELF notes.

use linux_loader::elf::Elf64_Nhdr;
use vm_memory::ByteValued;

use super::Problem;
use crate::pv::abi::note;

/// Features of this machine that a kernel may need (`features.h`): the names
/// of `XENFEAT_writable_page_tables`, `_auto_translated_physmap` and so on
/// without what they start with.
const FEATURES: [&str; 3] = [
    "writable_page_tables",
    "pae_pgdir_above_4gb",
    "mmu_pt_update_preserve_ad",
];

/// Xen's notes, as far as the builder needs them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Notes {
    /// Virtual address of the entry point.
    pub(super) entry: u64,
    /// Virtual address of frame 0.
    pub(super) virt_base: u64,
    /// What the segments' physical addresses exceed the frames' by.
    pub(super) paddr_offset: u64,
    /// Virtual address of the table of frames.
    pub(super) init_p2m: u64,
    /// Virtual address of the page for hypercall stubs: Linux has had one
    /// until 6.12 and its stable kernels of December 2024.
    pub(super) hypercall_page: Option<u64>,
}

/// One note after the other: (name, type, content).
fn each(mut bytes: &[u8]) -> impl Iterator<Item = (&[u8], u32, &[u8])> {
    std::iter::from_fn(move || {
        let mut header = Elf64_Nhdr::default();
        let size = size_of::<Elf64_Nhdr>();
        header.as_mut_slice().copy_from_slice(bytes.get(..size)?);
        bytes = &bytes[size..];
        let name = take(&mut bytes, header.n_namesz)?;
        let content = take(&mut bytes, header.n_descsz)?;
        Some((name, header.n_type, content))
    })
}

/// Takes `len` bytes off the front, and what pads them to four.
fn take<'a>(bytes: &mut &'a [u8], len: u32) -> Option<&'a [u8]> {
    let len = usize::try_from(len).ok()?;
    let taken = bytes.get(..len)?;
    let padded = len.next_multiple_of(4).min(bytes.len());
    *bytes = &bytes[padded..];
    Some(taken)
}

/// A number of up to eight bytes.
fn number(content: &[u8]) -> u64 {
    content
        .iter()
        .take(8)
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Reads the notes and checks that this machine can run such a kernel.
pub(super) fn parse(bytes: &[u8]) -> Result<Notes, Problem> {
    let mut notes = Notes::default();
    let (mut entry, mut init_p2m, mut virt_base) = (None, None, None);
    let (mut pvh, mut initrd_anywhere) = (false, false);
    for (_, kind, content) in each(bytes).filter(|(name, ..)| *name == b"Xen\0") {
        let value = number(content);
        match kind {
            note::ENTRY => entry = Some(value),
            note::VIRT_BASE => virt_base = Some(value),
            note::PADDR_OFFSET => notes.paddr_offset = value,
            note::INIT_P2M => init_p2m = Some(value),
            note::HYPERCALL_PAGE => notes.hypercall_page = Some(value),
            note::MOD_START_PFN => initrd_anywhere = value != 0,
            note::PHYS32_ENTRY => pvh = true,
            note::FEATURES => required_features(content)?,
            _ => {}
        }
    }
    let Some(entry) = entry else {
        return Err(Problem::NoPv(if pvh {
            "it can start by PVH only (CONFIG_XEN_PV is not set)"
        } else {
            "it has no note of Xen (CONFIG_XEN_PV is not set)"
        }));
    };
    let (Some(init_p2m), Some(virt_base), true) = (init_p2m, virt_base, initrd_anywhere) else {
        return Err(Problem::NoPv("it is older than Linux 4.19"));
    };
    Ok(Notes {
        entry,
        virt_base,
        init_p2m,
        ..notes
    })
}

/// `a|!b|c`: all that have a `!` must be there.
fn required_features(content: &[u8]) -> Result<(), Problem> {
    let text = String::from_utf8_lossy(content);
    let missing = text
        .trim_end_matches('\0')
        .split('|')
        .filter_map(|feature| feature.strip_prefix('!'))
        .find(|feature| !FEATURES.contains(feature));
    missing.map_or(Ok(()), |feature| {
        let feature = feature.chars().take(40).collect();
        Err(Problem::Feature(feature))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pv::builder::tests::{note, pv_notes};
    use proptest::prelude::*;

    #[test]
    fn the_notes_of_a_pv_kernel_are_understood() {
        let notes = parse(&pv_notes(0xffff_ffff_8100_0000)).unwrap();
        assert_eq!(notes.entry, 0xffff_ffff_8100_0000);
        assert_eq!(notes.virt_base, 0xffff_ffff_8000_0000);
        assert_eq!(notes.init_p2m, 0x80_0000_0000);
        assert_eq!(notes.hypercall_page, None);
    }

    #[test]
    fn a_kernel_without_pv_is_told_from_one_that_is_too_old() {
        let pvh = note(note::PHYS32_ENTRY, &8u32.to_le_bytes());
        assert!(matches!(parse(&pvh), Err(Problem::NoPv(why)) if why.contains("PVH")));
        assert!(matches!(parse(&[]), Err(Problem::NoPv(why)) if why.contains("no note")));
        let old = note(note::ENTRY, &8u64.to_le_bytes());
        assert!(matches!(parse(&old), Err(Problem::NoPv(why)) if why.contains("older")));
    }

    #[test]
    fn a_feature_that_the_kernel_needs_must_be_there() {
        let with = |features: &[u8]| {
            let mut notes = pv_notes(0xffff_ffff_8100_0000);
            notes.extend(note(note::FEATURES, features));
            parse(&notes)
        };
        assert!(with(b"!writable_page_tables|pae_pgdir_above_4gb\0").is_ok());
        assert!(with(b"auto_translated_physmap\0").is_ok());
        let refused = with(b"pae_pgdir_above_4gb|!auto_translated_physmap");
        assert!(
            matches!(refused, Err(Problem::Feature(name)) if name == "auto_translated_physmap")
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn damaged_notes_are_read_or_refused(at in 0usize..200, value: u8, cut in 0usize..200) {
            let mut notes = pv_notes(0xffff_ffff_8100_0000);
            let at = at % notes.len();
            notes[at] = value;
            notes.truncate(notes.len().max(cut) - cut);
            let _ = parse(&notes);
        }
    }
}
