//! Hypercalls of Linux that jump to the shim.
//!
//! `syscall` of a kernel in ring 3 is an exit to KVM, which brings it back to
//! ring 3: 0.9 us where there is no hardware virtualization. All of Linux's
//! hypercalls are made by one function and its return from exceptions by
//! another, so those jump straight to the shim of their vCPU instead. It finds
//! that in a word of its `vcpu_info`, which is among its per-CPU variables: at
//! the same distance from the base of GS on every vCPU. What does not look as
//! expected stays as it is, and works as before.

use memchr::memmem;

use super::abi::{Errno, HYPERCALL_IRET};
use super::mmu::Space;

/// Offset in `vcpu_info` of a word that is nobody's (`arch.pad`): where the
/// vCPU's shim is entered.
pub(super) const WORD: u64 = 24;

/// `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Before it in `xen_hypercall_pv`: push %rcx; push %r11.
const BEFORE: [u8; 3] = [0x51, 0x41, 0x53];
/// Behind it: pop %r11; pop %rcx.
const BEHIND: [u8; 3] = [0x41, 0x5b, 0x59];
/// endbr64.
const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// `jmp *%gs:` without the address.
const JUMP_BY_GS: [u8; 4] = [0x65, 0xff, 0x24, 0x25];
const JUMP_BY_GS_SIZE: usize = 8;
/// How far before the function for hypercalls the other one is looked for.
const REACH: u64 = 16 << 20;
const PIECE: u64 = 64 << 10;

/// Changes the kernel whose hypercall returns to `ret`, which no other vCPU
/// runs yet. `gs` is the base of GS, `info` the address of `vcpu_info`.
/// Returns where it jumps from, if it did.
///
/// # Errors
/// The kernel's code is not mapped.
pub(super) fn take(space: &Space<'_>, ret: u64, gs: u64, info: u64) -> Result<Option<u64>, Errno> {
    let Ok(from_gs) = i32::try_from(info.wrapping_add(WORD).wrapping_sub(gs).cast_signed()) else {
        return Ok(None);
    };
    let at = ret.wrapping_sub(SYSCALL.len() as u64);
    let mut around = [0; 8];
    space.read(at.wrapping_sub(BEFORE.len() as u64), &mut around)?;
    if around != *[&BEFORE[..], &SYSCALL, &BEHIND].concat() {
        return Ok(None);
    }
    // The padding before the function has room for a jump.
    let mut function = at.wrapping_sub(BEFORE.len() as u64);
    let mut entry = [0; ENDBR.len()];
    space.read(function.wrapping_sub(entry.len() as u64), &mut entry)?;
    if entry == ENDBR {
        function = function.wrapping_sub(entry.len() as u64);
    }
    let jump = function.wrapping_sub(JUMP_BY_GS_SIZE as u64);
    let mut padding = [0; JUMP_BY_GS_SIZE];
    space.read(jump, &mut padding)?;
    if !is_padding(&padding) {
        return Ok(None);
    }
    let from_gs = from_gs.to_le_bytes();
    space.write(jump, &[JUMP_BY_GS, from_gs].concat())?;
    // At most 24 bytes back. What follows stays: it is returned to.
    let back = jump.wrapping_sub(ret) as u8;
    space.write(at, &[0xeb, back])?;
    if let Some(at) = find_iret(space, at)? {
        let end = at.wrapping_add(5);
        if let Ok(way) = i32::try_from(jump.wrapping_sub(end).cast_signed()) {
            let way = way.to_le_bytes();
            space.write(at, &[0xe9, way[0], way[1], way[2], way[3]])?;
        }
    }
    Ok(Some(jump))
}

fn is_padding(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0xcc) || bytes.iter().all(|byte| *byte == 0x90)
}

/// The `syscall` of `xen_iret`, which nothing returns to; padding follows it.
fn find_iret(space: &Space<'_>, hypercall: u64) -> Result<Option<u64>, Errno> {
    let number = HYPERCALL_IRET.to_le_bytes();
    // push %rcx; push %r11; push %rax; mov $23,%eax; syscall
    let pattern = [&BEFORE[..], &[0x50, 0xb8], &number, &SYSCALL].concat();
    let finder = memmem::Finder::new(&pattern);
    let mut piece = vec![0; PIECE as usize + pattern.len() + 3];
    let mut at = hypercall & !(REACH - 1);
    while at < hypercall {
        // The kernel's image is mapped as a whole; what lies before it is not.
        if space.read(at, &mut piece).is_ok()
            && let Some(found) = finder.find(&piece)
        {
            let end = found + pattern.len();
            let behind = piece.get(end..end + 3);
            let free = behind.is_some_and(|b| is_padding(b) || b == [0xcc, 0x66, 0x90]);
            return Ok(free.then_some(at + (end - SYSCALL.len()) as u64));
        }
        at += PIECE;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use blanket_memory::GuestRam;
    use vm_memory::{Bytes, GuestAddress};

    /// Where the kernel's image is mapped, as one large page.
    const TEXT: u64 = 0xffff_ffff_8100_0000;
    const IRET: u64 = TEXT + 0x2_6146;
    const HYPERCALL: u64 = TEXT + 0x10_43a0;
    const GS: u64 = 0xffff_8880_1f20_0000;
    const INFO: u64 = GS + 0x3_1100;

    /// A kernel as Debian builds it: in memory from 2 MiB on.
    fn kernel(prefix: &[u8], padding: u8) -> GuestRam {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        for (at, entry) in [
            (0x1000 + 511 * 8, 0x2003u64),
            (0x2000 + 510 * 8, 0x3003),
            (0x3000 + 8 * 8, 0x20_0083),
        ] {
            ram.write_obj(entry, GuestAddress(at)).unwrap();
        }
        let function = [
            &[padding; 8][..],
            prefix,
            &[0x51, 0x41, 0x53, 0x0f, 0x05, 0x41, 0x5b, 0x59, 0xc3],
        ];
        put(&ram, HYPERCALL - 8, &function.concat());
        let iret = [
            0x6a, 0, 0x51, 0x41, 0x53, 0x50, 0xb8, 23, 0, 0, 0, 0x0f, 0x05, 0xcc, 0x66, 0x90, 0x41,
        ];
        put(&ram, IRET, &iret);
        ram
    }

    fn put(ram: &GuestRam, at: u64, bytes: &[u8]) {
        Space::new(ram, 0x1000).write(at, bytes).unwrap();
    }

    fn read<const N: usize>(ram: &GuestRam, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        Space::new(ram, 0x1000).read(at, &mut bytes).unwrap();
        bytes
    }

    /// Follows the jump of `N` bytes at `at`.
    fn target<const N: usize>(ram: &GuestRam, at: u64) -> u64 {
        let bytes: [u8; N] = read(ram, at);
        let way = match bytes[..] {
            [0xeb, way] => i64::from(way.cast_signed()),
            [0xe9, a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
            _ => panic!("no jump: {bytes:02x?}"),
        };
        (at + N as u64).wrapping_add_signed(way)
    }

    #[test]
    fn both_functions_jump_by_the_word_and_all_else_stays() {
        for prefix in [&[][..], &ENDBR] {
            let ram = kernel(prefix, 0xcc);
            let space = Space::new(&ram, 0x1000);
            let at = HYPERCALL + prefix.len() as u64 + 3;
            let from = take(&space, at + 2, GS, INFO).unwrap();
            assert_eq!(from, Some(HYPERCALL - 8));
            assert_eq!(target::<2>(&ram, at), HYPERCALL - 8);
            assert_eq!(target::<5>(&ram, IRET + 11), HYPERCALL - 8);
            let jump: [u8; 8] = read(&ram, HYPERCALL - 8);
            assert_eq!(jump, [0x65, 0xff, 0x24, 0x25, 0x18, 0x11, 0x03, 0]);
            let behind: [u8; 4] = read(&ram, at + 2);
            assert_eq!(behind, [0x41, 0x5b, 0x59, 0xc3]);
            let behind: [u8; 1] = read(&ram, IRET + 16);
            assert_eq!(behind, [0x41]);
            // Once is enough.
            assert_eq!(take(&space, at + 2, GS, INFO), Ok(None));
        }
    }

    #[test]
    fn a_kernel_that_looks_otherwise_is_left_alone() {
        let unchanged = |ram: &GuestRam, ret, gs, result| {
            let space = Space::new(ram, 0x1000);
            let [mut before, mut after] = [vec![0; 2 << 20], vec![0; 2 << 20]];
            space.read(TEXT, &mut before).unwrap();
            assert_eq!(take(&space, ret, gs, INFO), result);
            space.read(TEXT, &mut after).unwrap();
            assert!(before == after);
        };
        let good = kernel(&[], 0x90);
        unchanged(&good, HYPERCALL + 6, GS, Ok(None));
        unchanged(&good, HYPERCALL + 5, GS >> 1, Ok(None));
        unchanged(&good, 0x1234, GS, Err(Errno::Fault));
        unchanged(&good, 0, GS, Err(Errno::Fault));
        // No room before the function.
        unchanged(&kernel(&[], 0x55), HYPERCALL + 5, GS, Ok(None));
    }

    #[test]
    fn without_room_behind_the_return_only_hypercalls_jump() {
        let ram = kernel(&[], 0x90);
        put(&ram, IRET + 13, &[0x48, 0xcf, 0xcc]);
        let taken = take(&Space::new(&ram, 0x1000), HYPERCALL + 5, GS, INFO);
        assert_eq!(taken, Ok(Some(HYPERCALL - 8)));
        let iret: [u8; 2] = read(&ram, IRET + 11);
        assert_eq!(iret, SYSCALL);
    }
}
