//! The XDP program that gives an uplink's datagrams to its sockets and leaves
//! everything else to the kernel (Linux `Documentation/bpf/`, RFC 9669).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Commands of bpf(2).
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
/// `BPF_MAP_TYPE_XSKMAP`, `BPF_PROG_TYPE_XDP`, `BPF_XDP`.
const XSKMAP: u32 = 17;
const TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
/// `XDP_FLAGS_SKB_MODE`, `XDP_FLAGS_DRV_MODE`.
const SKB_MODE: u32 = 1 << 1;
const DRV_MODE: u32 = 1 << 2;
/// `XDP_PASS`.
const PASS: i32 = 2;
/// `bpf_redirect_map`.
const REDIRECT_MAP: i32 = 51;

/// Bytes of `union bpf_attr` that are of use here.
const ATTRIBUTES: usize = 72;

/// Attributes of a command, field by field.
#[repr(C, align(8))]
pub(super) struct Attributes([u8; ATTRIBUTES]);

impl Attributes {
    pub(super) fn new() -> Self {
        Self([0; ATTRIBUTES])
    }

    pub(super) fn u32(mut self, at: usize, value: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    pub(super) fn u64(mut self, at: usize, value: u64) -> Self {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn fd(self, at: usize, fd: BorrowedFd<'_>) -> Self {
        self.u32(at, fd.as_raw_fd().unsigned_abs())
    }

    /// Runs a command.
    ///
    /// # Safety
    /// What the attributes point to is as the command wants it, and lives.
    pub(super) unsafe fn run(&mut self, command: libc::c_long) -> io::Result<libc::c_int> {
        // SAFETY: the attributes have the size that is given; the caller's
        // promise.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), ATTRIBUTES) };
        super::check(result as libc::c_int)
    }

    /// Runs a command that makes a descriptor.
    ///
    /// # Safety
    /// As for [`Self::run`].
    unsafe fn open(&mut self, command: libc::c_long) -> io::Result<OwnedFd> {
        // SAFETY: the caller's promise.
        let fd = unsafe { self.run(command) }?;
        // SAFETY: the command has just made it: nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Registers by number; 1 to 5 are arguments, 6 to 9 are kept over calls.
type Register = u8;

/// Instructions in the making. All forward jumps go to the end: let it pass.
struct Assembler {
    code: Vec<u64>,
    to_pass: Vec<usize>,
}

/// `BPF_LDX | BPF_MEM` of 8, 16 and 32 bits; `BPF_ALU64 | BPF_MOV` of a
/// register and a value, `BPF_ADD` and `BPF_AND` of a value; `BPF_JMP |
/// BPF_JGT` of a register, `BPF_JMP32 | BPF_JNE` of a value; call; exit.
const LDX_B: u8 = 0x71;
const LDX_H: u8 = 0x69;
const LDX_W: u8 = 0x61;
const MOV_REG: u8 = 0xbf;
const MOV: u8 = 0xb7;
const ADD: u8 = 0x07;
const AND: u8 = 0x57;
const JGT_REG: u8 = 0x2d;
const JNE_32: u8 = 0x56;
const LD_IMM64: u8 = 0x18;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// `BPF_PSEUDO_MAP_FD`: the value of `LD_IMM64` is a map's descriptor.
const MAP_FD: Register = 1;

impl Assembler {
    fn push(&mut self, op: u8, to: Register, from: Register, offset: i16, value: i32) {
        let bytes = [op, from << 4 | to];
        let [o0, o1] = offset.to_le_bytes();
        let [v0, v1, v2, v3] = value.to_le_bytes();
        self.code.push(u64::from_le_bytes([
            bytes[0], bytes[1], o0, o1, v0, v1, v2, v3,
        ]));
    }

    /// Lets the packet pass unless `packet[at]`, in the wire's order, is
    /// `value` where `mask` says.
    fn require(&mut self, size: u8, at: i16, mask: Option<i32>, value: i32) {
        self.push(size, 5, 2, at, 0);
        if let Some(mask) = mask {
            self.push(AND, 5, 0, 0, mask);
        }
        self.to_pass.push(self.code.len());
        self.push(JNE_32, 5, 0, 0, value);
    }

    /// Fills the jumps in.
    fn finish(mut self) -> Vec<u64> {
        let pass = self.code.len();
        self.push(MOV, 0, 0, 0, PASS);
        self.push(EXIT, 0, 0, 0, 0);
        for at in self.to_pass {
            // A few dozen instructions: it fits.
            let offset = (pass - at - 1) as u64 & 0xffff;
            self.code[at] |= offset << 16;
        }
        self.code
    }
}

/// 16 bits as the program loads them from the wire.
fn wire16(value: u16) -> i32 {
    i32::from(u16::from_ne_bytes(value.to_be_bytes()))
}

/// Unfragmented UDP without IP options to `local` goes to the queue's socket
/// in `map`, if there is one; all else passes.
fn assemble(local: SocketAddr, map: BorrowedFd<'_>) -> Vec<u64> {
    let mut code = Assembler {
        code: Vec::new(),
        to_pass: Vec::new(),
    };
    let headers = 14 + super::wire::overhead(local.ip()) as i32;
    // r6 = context; r2 = data; r3 = data_end.
    code.push(MOV_REG, 6, 1, 0, 0);
    code.push(LDX_W, 2, 6, 0, 0);
    code.push(LDX_W, 3, 6, 4, 0);
    // All headers are there.
    code.push(MOV_REG, 4, 2, 0, 0);
    code.push(ADD, 4, 0, 0, headers);
    code.to_pass.push(code.code.len());
    code.push(JGT_REG, 4, 3, 0, 0);
    match local.ip() {
        IpAddr::V4(ip) => {
            code.require(LDX_H, 12, None, wire16(0x0800));
            code.require(LDX_B, 14, None, 0x45);
            code.require(LDX_B, 23, None, 17);
            code.require(LDX_H, 20, Some(wire16(0x3fff)), 0);
            code.require(LDX_W, 30, None, i32::from_ne_bytes(ip.octets()));
            code.require(LDX_H, 36, None, wire16(local.port()));
        }
        IpAddr::V6(ip) => {
            code.require(LDX_H, 12, None, wire16(0x86dd));
            code.require(LDX_B, 20, None, 17);
            for (at, word) in (38..).step_by(4).zip(ip.octets().chunks_exact(4)) {
                let word = [word[0], word[1], word[2], word[3]];
                code.require(LDX_W, at, None, i32::from_ne_bytes(word));
            }
            code.require(LDX_H, 56, None, wire16(local.port()));
        }
    }
    // return bpf_redirect_map(map, rx_queue_index, XDP_PASS)
    code.push(LDX_W, 2, 6, 16, 0);
    code.push(LD_IMM64, 1, MAP_FD, 0, map.as_raw_fd());
    code.push(0, 0, 0, 0, 0);
    code.push(MOV, 3, 0, 0, PASS);
    code.push(CALL, 0, 0, 0, REDIRECT_MAP);
    code.push(EXIT, 0, 0, 0, 0);
    code.finish()
}

/// A program that is loaded, and the sockets that it feeds.
pub(super) struct Program {
    map: OwnedFd,
    pub(super) program: OwnedFd,
}

/// A program that is attached, until this is dropped.
pub(super) struct Attached {
    _link: OwnedFd,
    /// Whether the driver runs it, before the kernel has made a packet.
    pub(super) native: bool,
}

impl Program {
    /// Loads a program for `local` and `queues` queues.
    pub(super) fn load(local: SocketAddr, queues: u32) -> io::Result<Self> {
        // map_type, key_size, value_size, max_entries
        let mut map = Attributes::new().u32(0, XSKMAP).u32(4, 4).u32(8, 4);
        map = map.u32(12, queues.max(1));
        // SAFETY: BPF_MAP_CREATE reads no memory but its attributes.
        let map = unsafe { map.open(MAP_CREATE) }?;
        let code = assemble(local, std::os::fd::AsFd::as_fd(&map));
        let license = c"Apache-2.0";
        // prog_type, insn_cnt, insns, license
        let mut load = Attributes::new()
            .u32(0, TYPE_XDP)
            .u32(4, code.len() as u32)
            .u64(8, code.as_ptr() as u64)
            .u64(16, license.as_ptr() as u64);
        // SAFETY: the code has as many instructions as are said, the license
        // ends in a zero, and both outlive the call.
        let program = unsafe { load.open(PROG_LOAD) }?;
        Ok(Self { map, program })
    }

    /// Feeds the packets of a queue to a socket.
    pub(super) fn feed(&self, queue: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let value = socket.as_raw_fd();
        let mut update = Attributes::new()
            .fd(0, std::os::fd::AsFd::as_fd(&self.map))
            .u64(8, (&raw const queue) as u64)
            .u64(16, (&raw const value) as u64);
        // SAFETY: key and value have the map's 4 bytes and outlive the call.
        unsafe { update.run(MAP_UPDATE_ELEM) }.map(drop)
    }

    /// Attaches it to an interface: in the driver, or where that does not do
    /// it, in front of the kernel's stack.
    pub(super) fn attach(&self, index: u32) -> io::Result<Attached> {
        let attach = |mode| {
            // prog_fd, target_ifindex, attach_type, flags
            let mut link = Attributes::new()
                .fd(0, std::os::fd::AsFd::as_fd(&self.program))
                .u32(4, index)
                .u32(8, ATTACH_XDP)
                .u32(12, mode);
            // SAFETY: BPF_LINK_CREATE of XDP reads no memory but its
            // attributes.
            unsafe { link.open(LINK_CREATE) }
        };
        match attach(DRV_MODE) {
            Ok(link) => Ok(Attached {
                _link: link,
                native: true,
            }),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(error),
            Err(_) => attach(SKB_MODE).map(|link| Attached {
                _link: link,
                native: false,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::in_own_network;
    use super::*;
    use crate::mac::MacAddress;
    use crate::uplink::wire::{Checksum, End, Headers};
    use std::os::fd::AsFd;

    /// `BPF_PROG_TEST_RUN`.
    const TEST_RUN: libc::c_long = 10;
    const XDP_REDIRECT: u32 = 4;

    fn verdict(program: &Program, frame: &[u8]) -> u32 {
        let mut out = vec![0u8; 4096];
        // prog_fd, retval, data_size_in, data_size_out, data_in, data_out
        let mut run = Attributes::new()
            .fd(0, program.program.as_fd())
            .u32(8, frame.len() as u32)
            .u32(12, out.len() as u32)
            .u64(16, frame.as_ptr() as u64)
            .u64(24, out.as_mut_ptr() as u64);
        // SAFETY: both buffers have the sizes that are given.
        unsafe { run.run(TEST_RUN) }.unwrap();
        u32::from_ne_bytes(run.0[4..8].try_into().unwrap())
    }

    fn frame(to: &str) -> Vec<u8> {
        let to: SocketAddr = to.parse().unwrap();
        let from = if to.is_ipv4() {
            "10.0.0.9:5"
        } else {
            "[fd00::9]:5"
        };
        let end = |address| End {
            mac: MacAddress([2, 0, 0, 0, 0, 1]),
            address,
        };
        let from = end(from.parse().unwrap());
        let headers = Headers::new(from, end(to), b"hello", Checksum::Full).unwrap();
        [headers.as_bytes(), b"hello"].concat()
    }

    #[test]
    fn only_whole_datagrams_to_the_uplink_are_taken_from_the_kernel() {
        in_own_network(|| {
            for (local, others) in [
                (
                    "10.0.0.1:4789",
                    ["10.0.0.1:4790", "10.0.0.2:4789", "[fd00::1]:4789"],
                ),
                (
                    "[fd00::1]:4789",
                    ["[fd00::1]:4790", "[fd00::2]:4789", "10.0.0.1:4789"],
                ),
            ] {
                let program = match Program::load(local.parse().unwrap(), 1) {
                    Ok(program) => program,
                    Err(error) => {
                        println!("skipped, because no XDP program loads: {error}");
                        return;
                    }
                };
                let socket = ::xdp::socket::XdpSocketBuilder::new().unwrap();
                // SAFETY: the builder owns the descriptor and outlives this.
                let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
                let mine = frame(local);
                assert_eq!(verdict(&program, &mine), PASS as u32, "no socket");
                program.feed(0, fd).unwrap();
                assert_eq!(verdict(&program, &mine), XDP_REDIRECT);
                for len in 0..mine.len() - 5 {
                    // The kernel does not run it on less than a header.
                    let short = &mine[..len.max(14)];
                    assert_eq!(verdict(&program, short), PASS as u32, "{len}");
                }
                for other in others {
                    assert_eq!(verdict(&program, &frame(other)), PASS as u32, "{other}");
                }
            }
        });
    }
}
