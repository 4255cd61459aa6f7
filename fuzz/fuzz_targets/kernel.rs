//! A kernel file: any bytes load or are refused, within bounded time and
//! memory, and the same each time. Sound files load.
#![no_main]

use arbitrary::Arbitrary;
use blanket_fuzz::file::MemFile;
use blanket_memory::{Backing, Spec};
use blanket_vmm::hvm::boot::Payload;
use libfuzzer_sys::fuzz_target;

/// Bytes of guest memory.
const RAM: u64 = 8 << 20;

#[derive(Arbitrary, Debug)]
struct Input {
    base: Base,
    /// What differs: place and bytes.
    changes: Vec<(u16, Vec<u8>)>,
    /// Where the file ends.
    cut: Option<u16>,
}

#[derive(Arbitrary, Debug)]
enum Base {
    Any(Vec<u8>),
    Elf,
    Pvh,
    BzImage,
}

/// A 64-bit ELF image with one segment at 1 MiB, and Xen's note for PVH.
fn elf(pvh: bool) -> Vec<u8> {
    const LOAD: u64 = 1 << 20;
    const HEADERS: u64 = 64 + 2 * 56;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend([LOAD, 64, 0].iter().flat_map(|field| field.to_le_bytes()));
    let sizes = [0, 0, 64, 56, 2, 0, 0, 0u16];
    file.extend(sizes.iter().flat_map(|field| field.to_le_bytes()));
    // PT_LOAD, and PT_NOTE or PT_NULL.
    for (kind, at) in [(1u32, HEADERS + 20), (if pvh { 4 } else { 0 }, HEADERS)] {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        let fields = [at, LOAD, LOAD, if kind == 1 { 16 } else { 20 }, 20, 4];
        file.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    }
    // Name and descriptor of four bytes each, XEN_ELFNOTE_PHYS32_ENTRY.
    let note = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD as u32];
    file.extend(note.iter().flat_map(|field| field.to_le_bytes()));
    file.extend([0xf4; 16]);
    file
}

/// A bzImage with one sector of setup (Documentation/arch/x86/boot.rst).
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 3 * 512];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &32u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x214, &(1u32 << 20).to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &[1]);
    put(0x258, &(1u64 << 20).to_le_bytes());
    put(0x260, &(1u32 << 20).to_le_bytes());
    file
}

fuzz_target!(|input: Input| {
    let sound =
        input.changes.is_empty() && input.cut.is_none() && !matches!(input.base, Base::Any(_));
    let mut kernel = match input.base {
        Base::Any(bytes) => bytes,
        Base::Elf => elf(false),
        Base::Pvh => elf(true),
        Base::BzImage => bzimage(),
    };
    for (at, bytes) in &input.changes {
        let len = kernel.len().max(1);
        let rest = kernel.get_mut(usize::from(*at) % len..);
        let rest = rest.unwrap_or_default().iter_mut();
        rest.zip(bytes).for_each(|(to, from)| *to = *from);
    }
    kernel.truncate(input.cut.map_or(usize::MAX, usize::from));

    let ram = blanket_memory::build(&Spec {
        size: RAM,
        backing: Backing::Small,
        shared: false,
    });
    let ram = ram.expect("guest memory");
    let file = MemFile::new(&kernel, 0);
    let initrd = MemFile::new(b"an initrd", 0);
    let initrd = initrd.path();
    for initrd in [None, Some(initrd.as_path())] {
        let payload = Payload::open(&file.path(), initrd, "console=ttyS0", RAM);
        let Ok(mut payload) = payload else {
            assert!(!sound, "a sound kernel is refused");
            continue;
        };
        let first = payload.load(&ram, 1);
        assert!(first.is_ok() || !sound, "{first:?}");
        // A guest that resets is loaded again, from the same files.
        assert_eq!(first.ok(), payload.load(&ram, 1).ok());
    }
});
