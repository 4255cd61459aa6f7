//! A kernel file for a pv machine: any bytes make a domain or are refused,
//! within bounded time and memory, and the same each time. Sound files do.
#![no_main]

use arbitrary::Arbitrary;
use blanket_fuzz::file::MemFile;
use blanket_memory::{Backing, Spec};
use blanket_vmm::pv::builder::{Kernel, Ports};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

/// Bytes of guest memory.
const RAM: u64 = 12 << 20;
/// Where the kernel lies in memory and, with the notes, in its file.
const LOAD: u64 = 2 << 20;
const CODE_AT: usize = 64 + 2 * 56;
const VIRT_BASE: u64 = 0xffff_ffff_8000_0000;
const SETUP: usize = 3 * 512;

#[derive(Arbitrary, Debug)]
struct Input {
    base: Base,
    /// What differs: place and bytes.
    changes: Vec<(u16, Vec<u8>)>,
    /// Further notes: type and content.
    notes: Vec<(u8, Vec<u8>)>,
    /// Where the file ends.
    cut: Option<u16>,
    initrd: bool,
}

#[derive(Arbitrary, Debug)]
enum Base {
    Any(Vec<u8>),
    Elf,
    /// A bzImage with the ELF image as it is.
    BzImage,
    /// One with a payload that starts as a compressed one does.
    Compressed(Compression, Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Compression {
    Gzip,
    Xz,
    Zstd,
    Lz4,
}

/// One of Xen's notes.
fn note(kind: u32, content: &[u8]) -> Vec<u8> {
    let header = [4, content.len() as u32, kind, u32::from_le_bytes(*b"Xen\0")];
    let mut out: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    out.extend(content);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// A 64-bit ELF image with one segment, at whose end are Xen's notes: entry,
/// base, place of the table of frames, initrd by frame.
fn elf(further: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut notes = note(1, &(VIRT_BASE + LOAD).to_le_bytes());
    notes.extend(note(3, &VIRT_BASE.to_le_bytes()));
    notes.extend(note(15, &0x80_0000_0000u64.to_le_bytes()));
    notes.extend(note(16, &[1]));
    for (kind, content) in further {
        notes.extend(note(u32::from(*kind), content));
    }
    let code = [0xf4; 64];
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend([0, 64, 0u64].iter().flat_map(|field| field.to_le_bytes()));
    let sizes = [0, 0, 64, 56, 2, 0, 0, 0u16];
    file.extend(sizes.iter().flat_map(|field| field.to_le_bytes()));
    let (len, notes_len) = ((code.len() + notes.len()) as u64, notes.len() as u64);
    for (kind, at, size) in [(1u32, CODE_AT, len), (4, CODE_AT + code.len(), notes_len)] {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        let fields = [at as u64, VIRT_BASE + LOAD, LOAD, size, size, 4];
        file.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    }
    file.extend(code);
    file.extend(notes);
    file
}

/// A bzImage with two sectors of setup (Documentation/arch/x86/boot.rst).
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; SETUP];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[2]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    file.extend(payload);
    file
}

fuzz_target!(|input: Input| {
    let sound = input.changes.is_empty()
        && input.notes.is_empty()
        && input.cut.is_none()
        && matches!(input.base, Base::Elf | Base::BzImage);
    let mut kernel = match input.base {
        Base::Any(bytes) => bytes,
        Base::Elf => elf(&input.notes),
        Base::BzImage => bzimage(&elf(&input.notes)),
        Base::Compressed(compression, bytes) => {
            let magic: &[u8] = match compression {
                Compression::Gzip => &[0x1f, 0x8b, 8, 0],
                Compression::Xz => b"\xfd7zXZ\0",
                Compression::Zstd => &[0x28, 0xb5, 0x2f, 0xfd],
                Compression::Lz4 => &[2, 0x21, 0x4c, 0x18],
            };
            bzimage(&[magic, &bytes].concat())
        }
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
    let initrd = input.initrd.then(|| initrd.path());
    let opened = Kernel::open(&file.path(), initrd.as_deref(), "console=hvc0", RAM);
    let Ok(kernel) = opened else {
        assert!(!sound, "a sound kernel is refused");
        return;
    };
    let ports = Ports {
        store: 1,
        console: 2,
    };
    let checked = kernel.check();
    let first = kernel.build(&ram, GuestAddress(0x40_0000_0000), ports);
    assert!(first.is_ok() || !sound, "{first:?}");
    assert!(checked.is_ok() || first.is_err(), "{checked:?}");
    // A guest that resets is built again, from the same files.
    let second = kernel.build(&ram, GuestAddress(0x40_0000_0000), ports);
    assert_eq!(first.ok(), second.ok());
});
