//! Guest memory: fault handling in user space, huge pages, page merging.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use super::{Finding, read};

/// `struct uffdio_api` of `linux/userfaultfd.h`.
#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `UFFD_API`, the version.
const UFFD_API: u64 = 0xaa;
/// `UFFD_USER_MODE_ONLY`: allowed without privileges.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, UffdioApi);
ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa, 0x00);

/// `UFFD_FEATURE_*` by bit.
const FEATURES: &[(&str, u32)] = &[
    ("write-protect", 0),
    ("missing-hugetlbfs", 4),
    ("missing-shmem", 5),
    ("minor-hugetlbfs", 9),
    ("minor-shmem", 10),
    ("write-protect-shmem", 12),
    ("write-protect-unpopulated", 13),
    ("poison", 14),
    ("write-protect-async", 15),
    ("move", 16),
];

/// A userfaultfd, and whether it also sees the kernel's (KVM's) faults.
fn open_userfaultfd() -> io::Result<(OwnedFd, bool)> {
    let new = |flags: libc::c_int| {
        // SAFETY: the call takes flags alone and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) };
        own(fd)
    };
    let by_device = || {
        let device = File::open("/dev/userfaultfd")?;
        let flags = libc::O_CLOEXEC.unsigned_abs().into();
        // SAFETY: the argument of this ioctl is flags, not an address.
        let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags) };
        own(fd.into())
    };
    new(0)
        .or_else(|_| by_device())
        .map(|fd| (fd, true))
        .or_else(|_| new(UFFD_USER_MODE_ONLY).map(|fd| (fd, false)))
}

/// Takes over the descriptor that a system call returned.
fn own(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for us; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn userfaultfd() -> Finding {
    const COST: &str = "no post-copy migration, no network memory; snapshots stop the guest, and \
                        are restored all at once";
    let (fd, kernel_faults) = match open_userfaultfd() {
        Ok(opened) => opened,
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            return Finding::missing(
                "not in this kernel",
                COST,
                "use a kernel with CONFIG_USERFAULTFD (Debian's has it)",
            );
        }
        Err(error) => {
            return Finding::missing(
                format!("refused: {error}"),
                COST,
                "use root, or give yourself access to /dev/userfaultfd",
            );
        }
    };
    let mut api = UffdioApi {
        api: UFFD_API,
        ..UffdioApi::default()
    };
    // SAFETY: the kernel reads and writes one `struct uffdio_api`, which `api` is.
    let result = unsafe { ioctl_with_mut_ref(&fd.as_raw_fd(), UFFDIO_API(), &mut api) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return Finding::missing(format!("UFFDIO_API: {error}"), COST, "use a newer kernel");
    }
    judge_userfaultfd(api.features, kernel_faults)
}

/// The finding for a set of features.
fn judge_userfaultfd(features: u64, kernel_faults: bool) -> Finding {
    let has = |bit: u32| features & (1 << bit) != 0;
    let names: Vec<_> = FEATURES.iter().filter(|f| has(f.1)).map(|f| f.0).collect();
    let found = names.join(" ");
    let finding = if !kernel_faults {
        Finding::limited(
            format!("faults of user space only; {found}"),
            "KVM's own faults on guest memory are not seen: no post-copy, no network memory; \
             snapshots stop the guest, and are restored all at once",
            "use root, sysctl vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd",
        )
    } else if has(0) && has(10) {
        Finding::ok(found)
    } else {
        Finding::limited(
            format!("only: {found}"),
            "without write-protect, snapshots stop the guest; without minor-shmem, memory \
             shared between processes is paged in by copying",
            "use Linux 5.13 or newer",
        )
    };
    finding
        .fact("features", names.join(","))
        .fact("kernel_faults", kernel_faults)
}

/// The choice in brackets of a line like `always [madvise] never`.
fn chosen(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once('[')?;
    Some(rest.split_once(']')?.0)
}

pub(super) fn thp() -> Finding {
    let mode = |file: &str| {
        let line = read(&format!("/sys/kernel/mm/transparent_hugepage/{file}"))?;
        chosen(&line).map(str::to_owned)
    };
    judge_thp(
        mode("enabled").as_deref(),
        mode("shmem_enabled").as_deref().unwrap_or("never"),
    )
}

fn judge_thp(anonymous: Option<&str>, shared: &str) -> Finding {
    const COST: &str = "more TLB misses: guests that use much memory run slower";
    let finding = match anonymous {
        None => Finding::missing("not in this kernel", COST, "reserve hugetlb pages instead"),
        Some("never") => Finding::missing(
            "switched off",
            COST,
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(mode) if shared == "never" || shared == "deny" => Finding::limited(
            format!("{mode}; not for memfd memory"),
            "guests with --shared-memory get small pages",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
        Some(mode) => Finding::ok(format!("{mode}; memfd memory: {shared}")),
    };
    finding
        .fact("anonymous", anonymous.unwrap_or("absent"))
        .fact("shared", shared)
}

pub(super) fn hugetlb() -> Finding {
    const COST: &str = "no guaranteed huge pages (--hugepages 2m or 1g)";
    let mut pools: Vec<(u64, u64, u64)> = Vec::new();
    for entry in fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        let kib = name.to_str().and_then(pool_size_kib);
        let count = |file: &str| {
            let text = fs::read_to_string(entry.path().join(file)).ok()?;
            text.trim().parse::<u64>().ok()
        };
        if let (Some(kib), Some(all), Some(free)) =
            (kib, count("nr_hugepages"), count("free_hugepages"))
        {
            pools.push((kib, all, free));
        }
    }
    if pools.is_empty() {
        return Finding::missing(
            "not in this kernel",
            COST,
            "use a kernel with CONFIG_HUGETLBFS",
        );
    }
    pools.sort_unstable();
    let text: Vec<_> = pools
        .iter()
        .map(|(kib, all, free)| format!("{free} of {all} free of {} MiB each", kib >> 10))
        .collect();
    let found = text.join("; ");
    let finding = if pools.iter().any(|(_, _, free)| *free > 0) {
        Finding::ok(found)
    } else {
        let remedy = "sysctl vm.nr_hugepages=N (2 MiB each); 1 GiB ones at boot: \
                      hugepagesz=1G hugepages=N";
        Finding::limited(found, COST, remedy)
    };
    let pools = pools
        .iter()
        .map(|(kib, all, free)| format!("{kib}k:{free}/{all}"));
    finding.fact("pools_free_of_all", pools.collect::<Vec<_>>().join(","))
}

/// KiB of a pool's pages, by its directory's name.
fn pool_size_kib(directory: &str) -> Option<u64> {
    let kib = directory.strip_prefix("hugepages-")?.strip_suffix("kB")?;
    kib.parse().ok()
}

pub(super) fn ksm() -> Finding {
    const COST: &str = "equal pages of guests are not merged";
    match read("/sys/kernel/mm/ksm/run").as_deref() {
        Some("1") => Finding::ok("on").fact("run", true),
        Some(_) => Finding::limited("there, but off", COST, "echo 1 > /sys/kernel/mm/ksm/run")
            .fact("run", false),
        None => Finding::missing("not in this kernel", COST, "use a kernel with CONFIG_KSM"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Level;

    #[test]
    fn userfaultfd_is_ok_only_with_kernel_faults_and_both_features() {
        let both = 1 | 1 << 10;
        assert_eq!(judge_userfaultfd(both, true).level, Level::Ok);
        assert_eq!(judge_userfaultfd(both, false).level, Level::Limited);
        assert_eq!(judge_userfaultfd(1, true).level, Level::Limited);
        let facts = judge_userfaultfd(both, true).facts;
        assert_eq!(facts["features"], "write-protect,minor-shmem".into());
    }

    #[test]
    fn the_chosen_mode_is_the_one_in_brackets() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("always"), None);
        assert_eq!(judge_thp(Some("always"), "advise").level, Level::Ok);
        assert_eq!(judge_thp(Some("madvise"), "never").level, Level::Limited);
        assert_eq!(judge_thp(Some("never"), "always").level, Level::Missing);
        assert_eq!(judge_thp(None, "never").level, Level::Missing);
    }

    #[test]
    fn pools_are_sized_by_their_names() {
        assert_eq!(pool_size_kib("hugepages-2048kB"), Some(2048));
        assert_eq!(pool_size_kib("hugepages-x"), None);
    }
}
