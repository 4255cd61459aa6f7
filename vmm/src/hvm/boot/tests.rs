use super::*;
use std::io::Write;

use linux_loader::loader::elf::start_info::hvm_start_info;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn ram(mib: u64) -> GuestRam {
    blanket_memory::build(&blanket_memory::Spec {
        size: mib * MIB,
        backing: blanket_memory::Backing::Small,
        shared: false,
    })
    .unwrap()
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An ELF image with one segment of `code` at `load`, and a PVH note if asked.
fn elf(load: u64, code: &[u8], pvh: Option<u32>) -> Vec<u8> {
    let note: Vec<u8> = pvh
        .map(|entry| {
            let words = [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry];
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        })
        .unwrap_or_default();
    let headers = if pvh.is_some() { 2u16 } else { 1 };
    let note_at = 64 + 56 * u64::from(headers);
    let code_at = note_at + note.len() as u64;
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    out.extend([2u16, 62].iter().flat_map(|v| v.to_le_bytes()));
    out.extend(1u32.to_le_bytes());
    out.extend([load, 64, 0].iter().flat_map(|v| v.to_le_bytes()));
    out.extend(0u32.to_le_bytes());
    out.extend(
        [64u16, 56, headers, 0, 0, 0]
            .iter()
            .flat_map(|v| v.to_le_bytes()),
    );
    let mut header = |kind: u32, at: u64, addr: u64, len: u64| {
        out.extend([kind, 7].iter().flat_map(|v| v.to_le_bytes()));
        out.extend(
            [at, addr, addr, len, len, 4]
                .iter()
                .flat_map(|v| v.to_le_bytes()),
        );
    };
    header(1, code_at, load, code.len() as u64);
    if pvh.is_some() {
        header(4, note_at, 0, note.len() as u64);
    }
    out.extend(note);
    out.extend(code);
    out
}

fn load(kernel: &[u8], initrd: Option<&[u8]>, ram: &GuestRam) -> Result<Entry, Error> {
    let kernel = file(kernel);
    let initrd = initrd.map(file);
    Payload::open(
        kernel.path(),
        initrd.as_ref().map(tempfile::NamedTempFile::path),
        "console=ttyS0",
        low_memory(ram),
    )?
    .load(ram, 2)
}

#[test]
fn an_elf_image_with_a_note_starts_by_pvh_and_finds_its_initrd() {
    let ram = ram(64);
    let entry = load(&elf(MIB, b"code", Some(0x10_0040)), Some(b"0707"), &ram).unwrap();
    assert_eq!(entry, Entry::Pvh(0x10_0040));
    let mut code = [0; 4];
    ram.read_slice(&mut code, GuestAddress(MIB)).unwrap();
    assert_eq!(&code, b"code");
    let mut info = [0u8; size_of::<hvm_start_info>()];
    ram.read_slice(&mut info, at::START_INFO).unwrap();
    let field = |at: usize| image::u64_at(&info, at);
    assert_eq!(field(0) as u32, 0x336e_c578);
    let mut cmdline = [0; 13];
    ram.read_slice(&mut cmdline, GuestAddress(field(24)))
        .unwrap();
    assert_eq!(&cmdline, b"console=ttyS0");
    let module: u64 = ram.read_obj(GuestAddress(field(16))).unwrap();
    let mut initrd = [0; 4];
    ram.read_slice(&mut initrd, GuestAddress(module)).unwrap();
    assert_eq!(&initrd, b"0707");
    assert_eq!(field(32), platform::ACPI_START);
}

#[test]
fn an_elf_image_without_a_note_starts_in_64_bit_mode() {
    let ram = ram(32);
    let entry = load(&elf(MIB, b"code", None), None, &ram).unwrap();
    assert_eq!(entry, Entry::Linux64(MIB));
    // boot_params: the signature, and RAM from 1 MiB on in the third line.
    let magic: u32 = ram.read_obj(GuestAddress(at::ZERO_PAGE.0 + 0x202)).unwrap();
    assert_eq!(&magic.to_le_bytes(), b"HdrS");
    let third = at::ZERO_PAGE.0 + 0x2d0 + 2 * 20;
    let start: u64 = ram.read_obj(GuestAddress(third)).unwrap();
    let len: u64 = ram.read_obj(GuestAddress(third + 8)).unwrap();
    assert_eq!((start, len), (MIB, 31 * MIB));
}

#[test]
fn a_jump_to_the_reset_vector_writes_the_reset_register() {
    let ram = ram(64);
    load(&elf(2 * MIB, &[0xf4; 64], None), None, &ram).unwrap();
    let mut code = [0; 7];
    ram.read_slice(&mut code, GuestAddress(0xf_fff0)).unwrap();
    // mov al, 1; mov dx, 0x601; out dx, al; hlt
    assert_eq!(code, [0xb0, 1, 0xba, 0x01, 0x06, 0xee, 0xf4]);
}

#[test]
fn a_kernel_or_initrd_that_does_not_fit_says_how_much_would_do() {
    let ram = ram(16);
    let kernel = elf(15 * MIB, &vec![0; 2 << 20], None);
    let error = load(&kernel, None, &ram).unwrap_err().to_string();
    assert!(
        error.contains("17 MiB") && error.contains("--memory"),
        "{error}"
    );
    let error = load(&elf(MIB, b"code", None), Some(&vec![1; 16 << 20]), &ram).unwrap_err();
    assert!(matches!(error, Error::Memory { .. }), "{error}");
}

#[test]
fn memory_for_the_kernel_to_take_is_populated_behind_it_and_no_further() {
    // Room for rounding to huge pages, at either end.
    const HUGE: u64 = 2 * MIB;
    let kernel = file(&elf(2 * MIB, &vec![0x90; 12 << 20], None));
    // (MiB of RAM, bytes behind the kernel that are populated)
    for (mib, expected) in [(64, 6 * MIB), (16, 2 * MIB)] {
        let ram = ram(mib);
        let mut payload = Payload::open(kernel.path(), None, "", low_memory(&ram)).unwrap();
        payload.load(&ram, 1).unwrap();
        let loaded = blanket_memory::touched_bytes(&ram);
        payload.populate_loaded(&ram)();
        assert!(blanket_memory::touched_bytes(&ram) <= loaded + HUGE);
        payload.populate_ahead(&ram)();
        let ahead = blanket_memory::touched_bytes(&ram) - loaded;
        assert!(
            (expected - HUGE..=expected + HUGE).contains(&ahead),
            "{ahead}"
        );
        assert_eq!(payload.ahead, 14 * MIB..14 * MIB + expected);
    }
}

#[test]
fn what_is_no_kernel_is_named() {
    let ram = ram(16);
    for (bytes, what) in [
        (&b""[..], "empty"),
        (b"\x1f\x8b rest", "gzip"),
        (b"QFI\xfb rest", "qcow2"),
        (b"#!/bin/sh", "neither"),
    ] {
        let error = load(bytes, None, &ram).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("bzImage"), "{error}");
    }
    let missing = Payload::open(Path::new("no/such/kernel"), None, "", 16 * MIB).err();
    assert!(missing.unwrap().to_string().contains("no/such/kernel"));
}

#[test]
fn every_cut_of_an_elf_image_is_noticed() {
    let ram = ram(16);
    let whole = elf(MIB, b"some code", Some(0x10_0000));
    for len in 5..whole.len() {
        let error = load(&whole[..len], None, &ram).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{len}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_kernel_file_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..2048), kind in 0..3) {
        let magic: (usize, &[u8]) = match kind {
            0 => (0, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0"),
            1 => (0x202, b"HdrS"),
            _ => (0, b""),
        };
        if bytes.len() > magic.0 + magic.1.len() {
            bytes[magic.0..magic.0 + magic.1.len()].copy_from_slice(magic.1);
        }
        let _ = load(&bytes, None, &ram(16));
    }
}
