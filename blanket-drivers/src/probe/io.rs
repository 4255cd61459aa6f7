//! Asynchronous I/O and the kernel's own device back ends.

use std::fs::File;
use std::io;

use io_uring::{IoUring, Probe, opcode};

use super::{Finding, read};

pub(super) fn io_uring() -> Finding {
    const COST: &str = "disks are served by a thread that does one request at a time";
    let ring = match IoUring::new(8) {
        Ok(ring) => ring,
        Err(error) => {
            let disabled = read("/proc/sys/kernel/io_uring_disabled");
            let (found, remedy) = match (error.raw_os_error(), disabled.as_deref()) {
                (Some(libc::ENOSYS), _) => (
                    "not in this kernel".to_owned(),
                    "use a kernel with CONFIG_IO_URING (5.1 or newer)",
                ),
                (_, Some("1" | "2")) => (
                    "switched off by sysctl".to_owned(),
                    "sysctl kernel.io_uring_disabled=0",
                ),
                _ => (
                    format!("refused: {error}"),
                    "a container's seccomp profile may forbid it: allow io_uring_setup there",
                ),
            };
            return Finding::missing(found, COST, remedy);
        }
    };
    let mut probe = Probe::new();
    let needed = [
        ("readv", opcode::Readv::CODE),
        ("writev", opcode::Writev::CODE),
        ("fsync", opcode::Fsync::CODE),
        ("fallocate", opcode::Fallocate::CODE),
    ];
    let lacking: Vec<_> = match ring.submitter().register_probe(&mut probe) {
        Ok(()) => needed
            .into_iter()
            .filter(|(_, code)| !probe.is_supported(*code))
            .map(|(name, _)| name)
            .collect(),
        // Kernels before 5.6 cannot be asked, and lack fallocate.
        Err(_) => vec!["fallocate"],
    };
    if lacking.is_empty() {
        return Finding::ok("works").fact("features", features(&ring));
    }
    Finding::limited(
        format!("works without {}", lacking.join(", ")),
        "disks fall back to a thread for what is lacking",
        "use Linux 5.6 or newer",
    )
}

fn features(ring: &IoUring) -> String {
    let parameters = ring.params();
    let all = [
        ("nodrop", parameters.is_feature_nodrop()),
        ("single-mmap", parameters.is_feature_single_mmap()),
        ("ext-arg", parameters.is_feature_ext_arg()),
        ("fast-poll", parameters.is_feature_fast_poll()),
    ];
    let names = all
        .into_iter()
        .filter(|(_, has)| *has)
        .map(|(name, _)| name);
    names.collect::<Vec<_>>().join(",")
}

/// A device file that must open for reading and writing.
fn device(path: &str, module: &str, cost: &str) -> Finding {
    match File::options().read(true).write(true).open(path) {
        Ok(_) => Finding::ok(path),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Finding::limited(
            format!("no permission on {path}"),
            cost,
            "use root, or join the group that owns it",
        ),
        Err(_) => Finding::missing(
            format!("there is no usable {path}"),
            cost,
            &format!("modprobe {module} (Debian's kernels have it)"),
        ),
    }
}

pub(super) fn vhost_net() -> Finding {
    device(
        "/dev/vhost-net",
        "vhost_net",
        "the kernel cannot serve network queues; the monitor does, at more CPU per packet",
    )
}

pub(super) fn vhost_vsock() -> Finding {
    device(
        "/dev/vhost-vsock",
        "vhost_vsock",
        "no vsock between node and guest through the kernel",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Level;

    #[test]
    fn an_absent_device_names_its_module() {
        let finding = device("/dev/does-not-exist", "some_module", "x");
        assert_eq!(finding.level, Level::Missing);
        assert!(finding.remedy.unwrap().contains("modprobe some_module"));
        assert_eq!(device("/dev/null", "null", "x").level, Level::Ok);
    }
}
