//! Ways for packets.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::{Finding, read};

/// `CAP_NET_ADMIN` of `linux/capability.h`.
const CAP_NET_ADMIN: u32 = 12;

/// Effective capabilities, from `/proc/self/status`.
fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

pub(super) fn tun() -> Finding {
    const COST: &str = "guests have no network through taps";
    let device = match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(device) => device,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Finding::missing("no permission on /dev/net/tun", COST, "use root");
        }
        Err(error) => {
            return Finding::missing(format!("/dev/net/tun: {error}"), COST, "modprobe tun");
        }
    };
    let mut features: libc::c_uint = 0;
    // SAFETY: the kernel writes one unsigned int, which `features` is.
    let result = unsafe { ioctl_with_mut_ref(&device, libc::TUNGETFEATURES as _, &mut features) };
    let has = |flag: libc::c_int| result == 0 && features & flag.unsigned_abs() != 0;
    let status = read("/proc/self/status").unwrap_or_default();
    let admin = effective_capabilities(&status).unwrap_or(0) & (1 << CAP_NET_ADMIN) != 0;
    let (offloads, queues) = (has(libc::IFF_VNET_HDR), has(libc::IFF_MULTI_QUEUE));
    let finding = if !admin {
        Finding::limited(
            "there; this user cannot make taps",
            "only taps that were made for this user can be used",
            "ip tuntap add NAME mode tap user USER (as root), or use root",
        )
    } else if offloads && queues {
        Finding::ok("taps with offloads and several queues")
    } else {
        Finding::limited(
            "taps without offloads or several queues",
            "slower network for guests",
            "use a newer kernel",
        )
    };
    finding
        .fact("offloads", offloads)
        .fact("multiqueue", queues)
        .fact("net_admin", admin)
}

pub(super) fn af_xdp() -> Finding {
    const COST: &str = "uplinks use AF_PACKET: more copies and CPU per packet";
    // SAFETY: the call takes numbers alone and touches no memory.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd >= 0 {
        // SAFETY: the kernel has just made it for us; nobody else has it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
        return Finding::ok("sockets can be made");
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAFNOSUPPORT) => Finding::missing(
            "not in this kernel",
            COST,
            "use a kernel with CONFIG_XDP_SOCKETS (Debian's has it)",
        ),
        Some(libc::EPERM) => Finding::missing(
            "not allowed",
            COST,
            "use root, or give the program CAP_NET_RAW",
        ),
        _ => Finding::missing(error.to_string(), COST, "see the kernel's log (dmesg)"),
    }
}

/// `BPF_PROG_LOAD`, a command of bpf(2).
const BPF_PROG_LOAD: libc::c_long = 5;
/// `BPF_PROG_TYPE_XDP`.
const BPF_PROG_TYPE_XDP: u32 = 6;

/// The start of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// Loads the smallest XDP program (it passes every packet on) without
/// attaching it anywhere, and lets it go.
fn load_xdp_program() -> io::Result<()> {
    // r0 = XDP_PASS; exit. An instruction is opcode, registers, 16 bits of
    // offset, 32 bits of immediate value.
    let program: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];
    let license = c"Dual MIT/GPL";
    let attributes = ProgLoad {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: 2,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: the kernel reads `attributes`, whose size is given, and the
    // program and the license that it points to; all outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attributes,
            size_of::<ProgLoad>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for us; nobody else has it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

pub(super) fn xdp() -> Finding {
    const COST: &str = "AF_XDP uplinks cannot be fed; AF_PACKET is used";
    match load_xdp_program() {
        Ok(()) => Finding::ok("programs load"),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOSYS) => Finding::missing(
                "no bpf in this kernel",
                COST,
                "use a kernel with CONFIG_BPF_SYSCALL (Debian's has it)",
            ),
            Some(libc::EPERM) => Finding::missing(
                "not allowed",
                COST,
                "use root, or give the program CAP_BPF and CAP_NET_ADMIN",
            ),
            _ => Finding::missing(error.to_string(), COST, "see the kernel's log (dmesg)"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_in_hexadecimal() {
        let status = "Name:\tx\nCapEff:\t0000000000001000\n";
        assert_eq!(effective_capabilities(status), Some(1 << CAP_NET_ADMIN));
        assert_eq!(effective_capabilities("CapEff:\tzz"), None);
        assert_eq!(effective_capabilities(""), None);
    }
}
