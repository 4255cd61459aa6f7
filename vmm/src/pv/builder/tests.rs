use super::*;
use crate::pv::abi::note as kind;
use proptest::prelude::*;
use std::io::Write;
use vm_memory::ByteValued;

const MIB: u64 = 1 << 20;
const VIRT_BASE: u64 = 0xffff_ffff_8000_0000;
const INIT_P2M: u64 = 0x80_0000_0000;
const SHARED_INFO: GuestAddress = GuestAddress(0x40_0000_0000);
const PORTS: Ports = Ports {
    store: 1,
    console: 2,
};

/// One of Xen's notes.
pub(super) fn note(kind: u32, content: &[u8]) -> Vec<u8> {
    let header = [4, content.len() as u32, kind, u32::from_le_bytes(*b"Xen\0")];
    let mut out: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    out.extend(content);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// The notes of a kernel such as Linux.
pub(super) fn pv_notes(entry: u64) -> Vec<u8> {
    [
        note(kind::ENTRY, &entry.to_le_bytes()),
        note(kind::VIRT_BASE, &VIRT_BASE.to_le_bytes()),
        note(kind::INIT_P2M, &INIT_P2M.to_le_bytes()),
        note(kind::MOD_START_PFN, &1u32.to_le_bytes()),
    ]
    .concat()
}

/// An ELF image with `code` at 16 MiB, a page of .bss behind it, and notes
/// within its segment, as Linux has them.
fn elf(code: &[u8], notes: &[u8]) -> Vec<u8> {
    const CODE_AT: u64 = 4096;
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    out.extend([2u16, 62].iter().flat_map(|v| v.to_le_bytes()));
    out.extend(1u32.to_le_bytes());
    out.extend([0u64, 64, 0].iter().flat_map(|v| v.to_le_bytes()));
    out.extend(
        [0, 0, 64, 56, 2, 0, 0, 0u16]
            .iter()
            .flat_map(|v| v.to_le_bytes()),
    );
    let len = (code.len() + notes.len()) as u64;
    for (kind, at, size, extra) in [
        (1u32, CODE_AT, len, 4096),
        (4, CODE_AT + code.len() as u64, notes.len() as u64, 0),
    ] {
        out.extend([kind, 7].iter().flat_map(|v| v.to_le_bytes()));
        let load = 16 * MIB + at - CODE_AT;
        let fields = [at, VIRT_BASE + load, load, size, size + extra, 4];
        out.extend(fields.iter().flat_map(|v| v.to_le_bytes()));
    }
    out.resize(CODE_AT as usize, 0);
    out.extend(code);
    out.extend(notes);
    out
}

fn pv_elf() -> Vec<u8> {
    elf(&[0xf4; 5000], &pv_notes(VIRT_BASE + 16 * MIB))
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024 + 16];
    image[0x1f1] = 1;
    image[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    image[0x248] = 16;
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image.extend(payload);
    image
}

fn ram(mib: u64) -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), (mib * MIB) as usize)]).unwrap()
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn build(kernel: &[u8], initrd: Option<&[u8]>, ram: &GuestRam, mib: u64) -> Result<Start, Error> {
    let kernel = file(kernel);
    let initrd = initrd.map(file);
    let initrd = initrd.as_ref().map(tempfile::NamedTempFile::path);
    Kernel::open(kernel.path(), initrd, "console=hvc0", mib * MIB)?.build(ram, SHARED_INFO, PORTS)
}

/// The page-table entry of the lowest level for a virtual address.
fn entry(ram: &GuestRam, l4: GuestAddress, virt: u64) -> u64 {
    [39, 30, 21, 12].iter().fold(l4.0, |table, shift| {
        let at = (table & 0xf_ffff_ffff_f000) + ((virt >> shift) & 511) * 8;
        let entry: u64 = ram.read_obj(GuestAddress(at)).unwrap();
        assert_eq!(entry & 5, 5, "{virt:#x} is not mapped");
        entry
    })
}

fn physical(ram: &GuestRam, l4: GuestAddress, virt: u64) -> u64 {
    (entry(ram, l4, virt) & 0xf_ffff_ffff_f000) + virt % PAGE_SIZE
}

fn info(ram: &GuestRam, start: &Start) -> StartInfo {
    ram.read_obj(GuestAddress(physical(ram, start.l4, start.start_info)))
        .unwrap()
}

#[test]
fn a_kernel_finds_all_that_start_info_promises() {
    let ram = ram(64);
    let start = build(&pv_elf(), Some(b"0707 initrd"), &ram, 64).unwrap();
    assert_eq!(start.entry, VIRT_BASE + 16 * MIB);
    let code = GuestAddress(physical(&ram, start.l4, start.entry));
    assert_eq!(ram.read_obj::<u8>(code).unwrap(), 0xf4);

    let info = info(&ram, &start);
    assert_eq!(&info.magic[..15], b"xen-3.0-x86_64\0");
    assert_eq!(info.nr_pages, 64 * MIB / PAGE_SIZE);
    assert_eq!(info.shared_info, SHARED_INFO.0);
    assert_eq!((info.store_evtchn, info.console_evtchn), (1, 2));
    assert_eq!(info.store_mfn * PAGE_SIZE, start.store_page.0);
    assert_eq!(info.console_mfn * PAGE_SIZE, start.console_page.0);
    assert_eq!(&info.cmd_line[..13], b"console=hvc0\0");
    assert_eq!(physical(&ram, start.l4, info.pt_base), start.l4.0);

    assert_eq!((info.flags, info.mod_len), (SIF_MOD_START_PFN, 11));
    let mut initrd = [0; 11];
    ram.read_slice(&mut initrd, GuestAddress(info.mod_start * PAGE_SIZE))
        .unwrap();
    assert_eq!(&initrd, b"0707 initrd");
}

#[test]
fn the_table_of_frames_is_an_identity_where_the_kernel_wants_it() {
    let ram = ram(64);
    let start = build(&pv_elf(), None, &ram, 64).unwrap();
    let info = info(&ram, &start);
    assert_eq!(info.mfn_list, INIT_P2M);
    assert_eq!((info.flags, info.mod_start, info.mod_len), (0, 0, 0));
    for frame in [0, 1, 511, 512, 64 * MIB / PAGE_SIZE - 1] {
        let at = physical(&ram, start.l4, INIT_P2M + frame * 8);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(at)).unwrap(), frame);
        assert!(
            (info.first_p2m_pfn..info.first_p2m_pfn + info.nr_p2m_frames)
                .contains(&(at / PAGE_SIZE))
        );
    }
}

#[test]
fn all_that_the_builder_placed_is_mapped_writable_page_tables_too() {
    let ram = ram(64);
    let start = build(&pv_elf(), None, &ram, 64).unwrap();
    let writable = |physical| entry(&ram, start.l4, VIRT_BASE + physical) & 2 != 0;
    assert_eq!(start.l4.0, start.page_tables.start * PAGE_SIZE);
    for frame in start.page_tables.clone() {
        assert!(writable(frame * PAGE_SIZE), "{frame:#x}");
    }
    assert!(writable(start.page_tables.end * PAGE_SIZE));
    assert!(writable(start.stack - VIRT_BASE - 8));
    // 512 KiB behind the stack are mapped for the kernel's first needs.
    assert!(writable(start.stack - VIRT_BASE + (512 << 10) - 1));
    for page in [start.store_page.0, start.console_page.0, 0, 16 * MIB] {
        assert!(writable(page));
    }
}

#[test]
fn a_second_start_finds_no_trace_of_the_first_in_what_the_builder_owns() {
    let ram = ram(64);
    let first = build(&pv_elf(), None, &ram, 64).unwrap();
    ram.write_slice(&vec![0xaa; 48 * MIB as usize], GuestAddress(16 * MIB))
        .unwrap();
    assert_eq!(build(&pv_elf(), None, &ram, 64).unwrap(), first);
    // The .bss, and the rings.
    let bss = 16 * MIB + 5000 + pv_notes(0).len() as u64;
    for at in [
        bss,
        bss + 4095,
        first.store_page.0,
        first.console_page.0 + 4095,
    ] {
        assert_eq!(ram.read_obj::<u8>(GuestAddress(at)).unwrap(), 0, "{at:#x}");
    }
}

#[test]
fn a_compressed_kernel_is_the_same_as_an_elf_file() {
    let elf = pv_elf();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&elf).unwrap();
    let mut memories = Vec::new();
    for kernel in [elf.clone(), bzimage(&elf), bzimage(&gzip.finish().unwrap())] {
        let ram = ram(32);
        build(&kernel, None, &ram, 32).unwrap();
        let mut memory = vec![0; 32 * MIB as usize];
        ram.read_slice(&mut memory, GuestAddress(0)).unwrap();
        memories.push(memory);
    }
    assert!(memories.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_kernel_without_pv_is_refused_with_what_to_do() {
    let pvh = elf(&[0xf4; 64], &note(kind::PHYS32_ENTRY, &1u32.to_le_bytes()));
    let kernel = file(&pvh);
    let opened = Kernel::open(kernel.path(), None, "", 32 * MIB).unwrap();
    let ram = ram(32);
    for error in [
        opened.check().unwrap_err(),
        opened.build(&ram, SHARED_INFO, PORTS).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(
            text.contains("PVH") && text.contains("--machine hvm"),
            "{text}"
        );
    }
    assert!(
        Kernel::open(file(&pv_elf()).path(), None, "", 32 * MIB)
            .unwrap()
            .check()
            .is_ok()
    );
}

#[test]
fn an_older_kernel_gets_its_hypercall_page() {
    let mut notes = pv_notes(VIRT_BASE + 16 * MIB);
    let page = VIRT_BASE + 16 * MIB + 4096;
    notes.extend(note(kind::HYPERCALL_PAGE, &page.to_le_bytes()));
    let ram = ram(32);
    build(&elf(&[0xf4; 8192], &notes), None, &ram, 32).unwrap();
    let mut stub = [0; 14];
    let at = GuestAddress(16 * MIB + 4096 + 17 * 32);
    ram.read_slice(&mut stub, at).unwrap();
    assert_eq!(
        stub,
        [
            0x51, 0x41, 0x53, 0xb8, 17, 0, 0, 0, 0x0f, 5, 0x41, 0x5b, 0x59, 0xc3
        ]
    );
    // Nothing before and behind the page is touched.
    for at in [16 * MIB + 4095, 16 * MIB + 8192 - 4096 - 1] {
        assert_eq!(ram.read_obj::<u8>(GuestAddress(at)).unwrap(), 0xf4);
    }
    let outside = note(kind::HYPERCALL_PAGE, &0x1000u64.to_le_bytes());
    let notes = [pv_notes(VIRT_BASE + 16 * MIB), outside].concat();
    let refused = build(&elf(&[0xf4; 64], &notes), None, &ram, 32);
    assert!(matches!(refused, Err(Error::NoPv { .. })), "{refused:?}");
}

#[test]
fn a_guest_that_is_too_small_is_told_how_much_it_needs() {
    let ram = ram(64);
    let error = build(&pv_elf(), None, &ram, 8).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Memory {
                needed_mib: 17,
                have_mib: 8,
                ..
            }
        ),
        "{error:?}"
    );
    let initrd = vec![1; 20 * MIB as usize];
    let error = build(&pv_elf(), Some(&initrd), &ram, 32).unwrap_err();
    assert!(error.to_string().contains("--memory"), "{error}");
    build(&pv_elf(), Some(&initrd), &ram, 64).unwrap();
}

#[test]
fn files_that_are_no_kernels_are_told_apart() {
    let ram = ram(32);
    let text = |kernel: &[u8]| build(kernel, None, &ram, 32).unwrap_err().to_string();
    assert!(text(b"").contains("empty"));
    assert!(text(&[0x55; 4096]).contains("neither"));
    assert!(text(&pv_elf()[..4100]).contains("truncated"));
    assert!(text(&bzimage(&pv_elf())[..4100]).contains("truncated"));
    assert!(text(&bzimage(b"\x1f\x8b\x08\0damaged, really")).contains("damaged"));
    let long = "x".repeat(1024);
    let kernel = file(&pv_elf());
    let error = Kernel::open(kernel.path(), None, &long, 32 * MIB)
        .err()
        .unwrap();
    assert!(matches!(error, Error::Cmdline(1024)));
    let empty = file(b"");
    let error = Kernel::open(kernel.path(), Some(empty.path()), "", 32 * MIB).err();
    assert!(matches!(error, Some(Error::EmptyInitrd(_))));
}

#[test]
fn impossible_addresses_in_notes_are_refused() {
    let ram = ram(32);
    for (what, value) in [
        (kind::VIRT_BASE, VIRT_BASE + 4096),
        (kind::VIRT_BASE, 0xffff_8080_0000_0000),
        (kind::INIT_P2M, INIT_P2M + 4096),
        (kind::INIT_P2M, 0xffff_8080_0000_0000),
        (kind::INIT_P2M, 0xffff_ff80_0000_0000),
        (kind::ENTRY, 0x1000),
        (kind::PADDR_OFFSET, 0x1000),
    ] {
        let changed = note(what, &value.to_le_bytes());
        let notes = [pv_notes(VIRT_BASE + 16 * MIB), changed].concat();
        let result = build(&elf(&[0xf4; 64], &notes), None, &ram, 32);
        assert!(
            matches!(result, Err(Error::NoPv { .. })),
            "{what} {value:#x}: {result:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_damaged_image_builds_or_is_refused_but_never_panics(
        changes in prop::collection::vec((0usize..180, any::<u8>()), 1..6),
        notes in prop::collection::vec((0usize..120, any::<u8>()), 0..4),
        cut in prop::option::of(0usize..10_000),
        compressed: bool,
    ) {
        let mut kernel = pv_elf();
        for (at, value) in changes {
            kernel[at] = value;
        }
        let len = kernel.len();
        for (at, value) in notes {
            kernel[len - 1 - at] = value;
        }
        kernel.truncate(cut.unwrap_or(usize::MAX));
        let kernel = if compressed { bzimage(&kernel) } else { kernel };
        let _ = build(&kernel, Some(b"initrd"), &ram(24), 24);
    }

    #[test]
    fn a_damaged_setup_header_is_no_harm(at in 0x1f1usize..0x268, value: u8) {
        let mut kernel = bzimage(&pv_elf());
        kernel[at] = value;
        let _ = build(&kernel, None, &ram(24), 24);
    }
}

#[test]
fn start_info_is_as_long_as_the_abi_says() {
    assert_eq!(size_of::<StartInfo>(), 1168);
    let info = StartInfo::zeroed();
    assert_eq!(info.as_slice().len(), 1168);
}
