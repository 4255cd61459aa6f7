//! The builder of pv domains with kernels that distributions ship.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::path::Path;

use blanket_memory::GuestRam;
use blanket_testbed::{Kernel as Package, KernelFlavor};
use blanket_vmm::pv::builder::{Error, Kernel, Ports, Start};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 256 << 20;
const FLAVORS: [KernelFlavor; 3] = [
    KernelFlavor::Cloud,
    KernelFlavor::Generic,
    KernelFlavor::Backports,
];

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

fn build(kernel: &Path, ram: &GuestRam) -> Result<Start, Error> {
    let ports = Ports {
        store: 1,
        console: 2,
    };
    let kernel = Kernel::open(kernel, None, "console=hvc0", MEMORY)?;
    kernel.build(ram, GuestAddress(0x40_0000_0000), ports)
}

#[test]
fn debians_kernels_build_the_same_domain_packed_and_unpacked() {
    for flavor in FLAVORS {
        let package = Package::get(flavor).unwrap();
        let (packed, unpacked) = (ram(), ram());
        let start = build(&package.vmlinuz(), &packed).unwrap();
        assert_eq!(build(&package.vmlinux(), &unpacked).unwrap(), start);
        assert!(start.entry >= 0xffff_ffff_8100_0000, "{:#x}", start.entry);
        let mut pages = [[0; 1 << 16]; 2];
        for at in (0..MEMORY).step_by(pages[0].len()) {
            packed.read_slice(&mut pages[0], GuestAddress(at)).unwrap();
            unpacked
                .read_slice(&mut pages[1], GuestAddress(at))
                .unwrap();
            assert!(pages[0] == pages[1], "{} at {at:#x}", package.release());
        }
        // There is code where the kernel starts.
        let entry = GuestAddress(start.entry & 0x7fff_ffff);
        assert_ne!(packed.read_obj::<u64>(entry).unwrap(), 0);
        Kernel::open(&package.vmlinuz(), None, "", MEMORY)
            .unwrap()
            .check()
            .unwrap();
    }
}

#[test]
fn a_kernel_that_was_cut_off_is_refused_wherever_that_was() {
    let ram = ram();
    for flavor in FLAVORS {
        let image = std::fs::read(Package::get(flavor).unwrap().vmlinuz()).unwrap();
        let cut = tempfile::NamedTempFile::new().unwrap();
        for eighths in 0..8 {
            std::fs::write(cut.path(), &image[..image.len() * eighths / 8]).unwrap();
            let error = build(cut.path(), &ram).unwrap_err();
            let text = error.to_string();
            let path = cut.path().to_string_lossy();
            assert!(text.contains(path.as_ref()), "{text}");
            let truncated = matches!(error, Error::Truncated { .. });
            assert!(truncated || eighths == 0, "{text}");
        }
    }
}

#[test]
fn a_damaged_payload_is_refused_or_builds_but_does_not_crash() {
    let ram = ram();
    for flavor in FLAVORS {
        let image = std::fs::read(Package::get(flavor).unwrap().vmlinuz()).unwrap();
        let damaged = tempfile::NamedTempFile::new().unwrap();
        for part in 1..6 {
            let mut image = image.clone();
            let at = image.len() * part / 6;
            image[at..at + 64].fill(0x5a);
            std::fs::write(damaged.path(), &image).unwrap();
            let _ = build(damaged.path(), &ram);
        }
    }
}
