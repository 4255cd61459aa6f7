//! From the PVH entry point, in 32-bit mode without paging, to Rust.
//!
//! The boot protocol is Xen's "x86/HVM direct boot ABI": the ELF note
//! `XEN_ELFNOTE_PHYS32_ENTRY` tells where to start, `ebx` points at a
//! [`StartInfo`]. The stub identity-maps the low 4 GiB with 2 MiB pages, turns
//! SSE on (compiled code uses it) and enters 64-bit mode; [`enter`] then maps
//! the rest of the low 512 GiB where the processor has 1 GiB pages.

use core::arch::{global_asm, x86_64::__cpuid};
use core::slice;

use crate::{acpi, console, fault, power};

const START_MAGIC: u32 = 0x336e_c578;
/// Longest command line that is read, in bytes.
const CMDLINE_MAX: usize = 2048;
/// Most memory map entries that are read.
const MEMMAP_MAX: usize = 128;
/// Kind of a memory map entry: ordinary RAM.
const RAM: u32 = 1;

global_asm!(
    r#"
.section .bss.boot, "aw", @nobits
.balign 4096
boot_pml4: .skip 4096
.globl boot_pdpt
boot_pdpt: .skip 4096
boot_pd: .skip 4 * 4096
boot_stack: .skip 64 * 1024
boot_stack_top:

.section .rodata.boot, "a"
.balign 8
boot_gdt:
.quad 0
.quad 0x00af9b000000ffff
.quad 0x00cf93000000ffff
boot_gdt_end:
boot_gdt_pointer:
.word boot_gdt_end - boot_gdt - 1
.long boot_gdt

.section .text.boot, "ax"
.code32
.globl pvh_start
pvh_start:
    cli
    cld
    movl %ebx, %esi
    # PML4 -> PDPT -> four page directories of 2 MiB pages.
    movl $(boot_pdpt + 3), boot_pml4
    xorl %ecx, %ecx
    movl $(boot_pd + 3), %eax
1:  movl %eax, boot_pdpt(, %ecx, 8)
    addl $4096, %eax
    incl %ecx
    cmpl $4, %ecx
    jb 1b
    xorl %ecx, %ecx
    movl $0x83, %eax
2:  movl %eax, boot_pd(, %ecx, 8)
    addl $0x200000, %eax
    incl %ecx
    cmpl $2048, %ecx
    jb 2b
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0x620, %eax          # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx     # EFER
    rdmsr
    orl $0x100, %eax           # LME
    wrmsr
    movl $0x80000023, %eax     # PG, NE, MP, PE
    movl %eax, %cr0
    lgdt boot_gdt_pointer
    ljmp $8, $3f
.code64
3:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    leaq boot_stack_top(%rip), %rsp
    movl %esi, %edi
    call pvh_enter
    ud2
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static mut boot_pdpt: [u64; 512];
}

/// Names the main function of a payload: `fn(&StartInfo) -> !`.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        // XEN_ELFNOTE_PHYS32_ENTRY. It is here, not beside the stub, so that
        // programs with another entry point have neither.
        ::core::arch::global_asm!(
            r#"
.section .note.pvh, "a", @note
.balign 4
.long 4, 8, 18
.asciz "Xen"
.quad pvh_start
.text
"#
        );

        // SAFETY: the only definition of this symbol in the program; the boot
        // stub calls it once, with what the loader left in ebx.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn pvh_enter(info: *const $crate::boot::StartInfo) -> ! {
            // SAFETY: as above.
            unsafe { $crate::boot::enter(info, $main) }
        }
    };
}

/// What the loader says about the machine (`struct hvm_start_info`).
#[repr(C)]
#[derive(Debug)]
pub struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memmap: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct MemmapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

impl StartInfo {
    /// Physical address of the ACPI root pointer, 0 if there is none.
    #[must_use]
    pub fn rsdp(&self) -> u64 {
        self.rsdp
    }

    /// The command line; empty if there is none or it is not UTF-8.
    #[must_use]
    pub fn cmdline(&self) -> &str {
        if self.cmdline == 0 {
            return "";
        }
        // SAFETY: the loader put a NUL-terminated string there, which nobody
        // changes, in memory that is mapped; the length is bounded.
        let bytes = unsafe { slice::from_raw_parts(self.cmdline as *const u8, CMDLINE_MAX) };
        let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        core::str::from_utf8(text).unwrap_or_default()
    }

    /// The number that the command line gives as `name=NUMBER` (decimal).
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        self.cmdline()
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
            .find(|(key, _)| *key == name)
            .and_then(|(_, value)| value.parse().ok())
    }

    /// Whether the command line has `word`.
    #[must_use]
    pub fn has(&self, word: &str) -> bool {
        self.cmdline().split_ascii_whitespace().any(|w| w == word)
    }

    /// First address behind the RAM that `address` lies in.
    #[must_use]
    pub fn ram_end(&self, address: u64) -> Option<u64> {
        if self.version == 0 || self.memmap == 0 {
            return None;
        }
        let entries = (self.memmap_entries as usize).min(MEMMAP_MAX);
        // SAFETY: the loader put that many entries there, in mapped memory
        // that nobody changes.
        let map = unsafe { slice::from_raw_parts(self.memmap as *const MemmapEntry, entries) };
        map.iter()
            .filter(|entry| entry.kind == RAM && entry.address <= address)
            .map(|entry| entry.address + entry.size)
            .find(|&end| address < end)
    }
}

const GIB: u64 = 1 << 30;

/// First address behind the identity map: 512 GiB where the processor has
/// 1 GiB pages, else 4 GiB.
#[must_use]
pub fn mapped_end() -> u64 {
    const GIGABYTE_PAGES: u32 = 1 << 26;
    if __cpuid(0x8000_0001).edx & GIGABYTE_PAGES == 0 {
        4 * GIB
    } else {
        512 * GIB
    }
}

fn map_high_memory() {
    let first = (&raw mut boot_pdpt).cast::<u64>();
    for gib in 4..mapped_end() / GIB {
        // SAFETY: the table has 512 entries, and only this code changes those
        // from 4 on; none was present, so no stale translation exists.
        unsafe { first.add(gib as usize).write_volatile((gib * GIB) | 0x83) };
    }
}

/// Completes what the boot stub began and calls `main`.
///
/// # Safety
/// Called once, by the boot stub, with the address that the loader gave.
pub unsafe fn enter(info: *const StartInfo, main: fn(&StartInfo) -> !) -> ! {
    fault::init();
    console::init();
    map_high_memory();
    // SAFETY: the boot protocol says that ebx points at the structure; the
    // magic number tells whether it does.
    let info = unsafe { &*info };
    assert_eq!(info.magic, START_MAGIC, "not started by a PVH loader");
    power::init(&acpi::Tables::find(info.rsdp()));
    main(info)
}
