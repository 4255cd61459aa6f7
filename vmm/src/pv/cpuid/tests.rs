use super::*;
use policy::{OSXSAVE, XSAVE};
use proptest::prelude::*;

/// A processor with everything, or what a test leaves of it.
fn everything(function: u32, index: u32) -> Registers {
    match (function, index) {
        (0, _) => [0x20, 1, 2, 3],
        (4, index) if index > 2 => [0; 4],
        (0xd, 0) => [0xe7, 2696, 2696, 0],
        (0xd, 1) => [0xf, 0, 0, 0],
        (0xd, 2) => [256, 576, 0, 0],
        (0xd, 5) => [64, 832, 0, 0],
        (0xd, 6) => [512, 896, 0, 0],
        (0xd, 7) => [1024, 1408, 0, 0],
        (0x8000_0000, _) => [0x8000_0028, 0, 0, 0],
        _ => [u32::MAX; 4],
    }
}

fn native(xcr0: u64) -> Result<Visible, Error> {
    Visible::build(&everything, Some(xcr0))
}

#[test]
fn a_kernel_keeps_all_state_that_its_user_code_sees() {
    for xcr0 in [0x3, 0x7, 0xe7] {
        let visible = native(xcr0).unwrap();
        assert_eq!(visible.xcr0(), xcr0);
        let [eax, ebx, ecx, _] = visible.cpuid(0, 0xd, 0);
        assert_eq!(u64::from(eax), xcr0);
        assert_eq!(ebx, ecx);
        assert_ne!(visible.cpuid(0, 1, 0)[2] & XSAVE & (OSXSAVE >> 1), 0);
        let avx = visible.cpuid(0, 1, 0)[2] & (1 << 28) != 0;
        let avx512 = visible.cpuid(0, 7, 0)[1] & (1 << 16) != 0;
        assert_eq!((avx, avx512), (xcr0 & 4 != 0, xcr0 & 0xe0 != 0));
    }
    assert_eq!(native(0xe7).unwrap().cpuid(0, 0xd, 0)[1], 2432);
    assert_eq!(native(0x7).unwrap().cpuid(0, 0xd, 0)[1], 832);
    assert_eq!(native(0x3).unwrap().cpuid(0, 0xd, 0)[1], 576);
}

#[test]
fn without_xsave_nobody_sees_it_or_what_needs_it() {
    let ask = |function, index| match (function, index) {
        (1, _) => [0, 0, !(XSAVE | OSXSAVE), u32::MAX],
        _ => everything(function, index),
    };
    for xcr0 in [Some(3), None] {
        // Where KVM answers there is no leaf 0xd either.
        let ask = |function, index| match (function, xcr0) {
            (0xd, None) => [0; 4],
            _ => ask(function, index),
        };
        let visible = Visible::build(&ask, xcr0).unwrap();
        assert!(!visible.has_xsave());
        assert_eq!(visible.xcr0(), 3);
        assert_eq!(visible.cpuid(0, 0xd, 0), [0; 4]);
        let avx = 1 << 28;
        assert_eq!(visible.cpuid(0, 1, 0)[2] & (XSAVE | OSXSAVE | avx), 0);
        let (avx2, avx512) = (1 << 5, 1 << 16);
        assert_eq!(visible.cpuid(0, 7, 0)[1] & (avx2 | avx512), 0);
    }
    assert!(native(3).unwrap().has_xsave());
}

#[test]
fn a_host_with_state_that_no_kernel_would_keep_is_refused() {
    // Protection keys, and AMX.
    for xcr0 in [0x2e7, 0x600e7] {
        let error = native(xcr0).unwrap_err();
        assert!(matches!(error, Error::State { host, .. } if host == xcr0));
        assert!(error.to_string().contains("--machine hvm"));
    }
}

#[test]
fn where_kvm_answers_state_that_cannot_be_kept_is_not_offered() {
    let ask = |function, index| match (function, index) {
        (0xd, 0) => [0x602e7, 0, 0, 0],
        _ => everything(function, index),
    };
    assert_eq!(Visible::build(&ask, None).unwrap().xcr0(), 0xe7);
    let ask = |function, index| match (function, index) {
        (0xd, 0) => [0x63, 0, 0, 0],
        _ => everything(function, index),
    };
    assert_eq!(Visible::build(&ask, None).unwrap().xcr0(), 3);
}

#[test]
fn what_traps_in_ring_3_is_hidden_from_the_kernel() {
    let visible = native(0xe7).unwrap();
    let [_, _, ecx, edx] = visible.cpuid(0, 1, 0);
    // MONITOR, VMX, PCID, x2APIC, TSC deadline; PSE, MCE, APIC, MTRR, PGE, HTT.
    assert_eq!(ecx & (1 << 3 | 1 << 5 | 1 << 17 | 1 << 21 | 1 << 24), 0);
    assert_eq!(
        edx & (1 << 3 | 1 << 7 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 28),
        0
    );
    let [_, ebx, ecx, _] = visible.cpuid(0, 7, 0);
    // FSGSBASE, SMEP, INVPCID, SMAP; UMIP, PKU, LA57, RDPID.
    assert_eq!(ebx & (1 | 1 << 7 | 1 << 10 | 1 << 20), 0);
    assert_eq!(ecx & (1 << 2 | 1 << 3 | 1 << 16 | 1 << 22), 0);
    // Pages of 1 GiB, a TSC that nobody may stop.
    assert_eq!(visible.cpuid(0, 0x8000_0001, 0)[3] & (1 << 26), 0);
    assert_eq!(visible.cpuid(0, 0x8000_0007, 0), [0; 4]);
    // No leaf behind the last.
    assert_eq!(visible.cpuid(0, 0, 0)[0], 0xd);
    for leaf in [
        5,
        6,
        0xa,
        0xb,
        0x14,
        0x1f,
        0x8000_001e,
        0x4000_0003,
        u32::MAX,
    ] {
        assert_eq!(visible.cpuid(0, leaf, 0), [0; 4], "{leaf:#x}");
    }
}

#[test]
fn the_hypervisor_is_xen() {
    let visible = native(0xe7).unwrap();
    assert_ne!(visible.cpuid(0, 1, 0)[2] >> 31, 0);
    let [last, ebx, ecx, edx] = visible.cpuid(0, 0x4000_0000, 0);
    let name = [ebx, ecx, edx].map(u32::to_le_bytes).concat();
    assert_eq!((last, name.as_slice()), (0x4000_0002, &b"XenVMMXenVMM"[..]));
}

#[test]
fn kvm_gets_the_same_and_what_the_hypervisor_itself_needs() {
    let visible = native(0xe7).unwrap();
    let table = visible.kvm(3);
    for entry in table.as_slice() {
        let seen = visible.cpuid(3, entry.function, entry.index);
        let given = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        for (seen, given) in seen.iter().zip(given) {
            assert_eq!(seen & !given, 0, "{entry:?}");
        }
    }
    let leaf = |function| cpu::ask(&table, function, 0);
    assert_eq!(leaf(1)[1] >> 24, 3, "each vCPU has its own APIC ID");
    assert_ne!(leaf(1)[2] & 1 << 24, 0, "TSC deadline");
    assert_ne!(leaf(7)[1] & 1, 0, "FSGSBASE");
}

#[test]
fn a_saved_guest_goes_on_only_where_it_sees_the_same() {
    let visible = native(0xe7).unwrap();
    visible.fits(&visible.clone()).unwrap();
    let other = native(0x7).unwrap();
    assert!(matches!(
        visible.fits(&other),
        Err(Error::OtherState { saved: 7, .. })
    ));
    let without_vnni = |function, index| {
        let mut registers = everything(function, index);
        if (function, index) == (7, 0) {
            registers[2] &= !(1 << 11);
        }
        registers
    };
    let other = Visible::build(&without_vnni, Some(0xe7)).unwrap();
    let error = visible.fits(&other).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Differs {
                leaf: 7,
                subleaf: 0
            }
        ),
        "{error}"
    );
    // Only user code sees this one.
    let without_xsavec = |function, index| {
        let mut registers = everything(function, index);
        if (function, index) == (0xd, 1) {
            registers[0] &= !2;
        }
        registers
    };
    let other = Visible::build(&without_xsavec, Some(0xe7)).unwrap();
    assert!(matches!(
        visible.fits(&other),
        Err(Error::Differs { leaf: 0xd, .. })
    ));
}

#[test]
fn this_machine_is_one_or_says_why_not() {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        return;
    };
    let supported = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .unwrap();
    for source in [Source::Native, Source::Kvm] {
        match Visible::new(source, supported.as_slice()) {
            Ok(visible) => {
                assert_eq!(visible.xcr0() & 3, 3);
                assert!(!visible.kvm(0).is_empty());
                if source == Source::Native {
                    assert_eq!(visible.xcr0(), host_xcr0());
                }
            }
            Err(error) => assert!(error.to_string().contains("--machine hvm"), "{error}"),
        }
    }
}

proptest! {
    #[test]
    fn no_processor_is_too_odd(
        values in prop::collection::vec(any::<u32>(), 16),
        xcr0 in prop::option::of(any::<u64>()),
        vcpu: usize,
    ) {
        let ask = |function: u32, index: u32| {
            let at = |i: u32| values[(function.wrapping_mul(7) ^ index.wrapping_add(i)) as usize % 16];
            [at(0), at(1), at(2), at(3)]
        };
        if let Ok(visible) = Visible::build(&ask, xcr0) {
            prop_assert_eq!(visible.xcr0() & !component::KEPT, 0);
            prop_assert!(visible.kvm(vcpu).len() <= kvm_bindings::KVM_MAX_CPUID_ENTRIES);
            visible.fits(&visible.clone()).unwrap();
        }
    }
}
