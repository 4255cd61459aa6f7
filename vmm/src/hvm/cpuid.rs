//! What the guest's CPUID instruction says.

use kvm_bindings::kvm_cpuid_entry2;

/// Leaf 1 ECX: the local APIC has a TSC-deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: a hypervisor is there.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: the package has more than one logical processor.
const MULTI: u32 = 1 << 28;
/// Leaf 0x8000_0001 ECX: these are cores. It goes with [`MULTI`] on AMD's processors.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0 EBX: the first letters of `AuthenticAMD`.
const AMD: u32 = u32::from_le_bytes(*b"Auth");

/// Adapts what KVM supports to processor `index` of `count` in one package.
/// `deadline` says whether KVM emulates the TSC-deadline timer.
pub(super) fn adapt(cpuid: &mut Vec<kvm_cpuid_entry2>, index: u8, count: u8, deadline: bool) {
    let (index, count) = (u32::from(index), u32::from(count));
    let amd = cpuid
        .iter()
        .any(|leaf| leaf.function == 0 && leaf.ebx == AMD);
    for entry in cpuid.iter_mut() {
        match entry.function {
            1 => {
                let id_size_brand = entry.ebx & 0x0000_ffff;
                entry.ebx = id_size_brand | (count << 16) | (index << 24);
                entry.ecx |= HYPERVISOR;
                if deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                if count > 1 {
                    entry.edx |= MULTI;
                }
            }
            // Deterministic cache parameters: Intel's and AMD's leaf.
            4 | 0x8000_001d => cache(entry, count),
            0xb | 0x1f => topology(entry, index, count),
            // The node's own flag tells of the node's processors.
            0x8000_0001 => {
                entry.ecx &= !CMP_LEGACY;
                if amd && count > 1 {
                    entry.ecx |= CMP_LEGACY;
                }
            }
            // One thread a core, `count` cores; bits 12-15 size the APIC ID.
            0x8000_0008 => {
                let bits = id_bits(count);
                entry.ecx = (entry.ecx & !0xf0ff) | (bits << 12) | (count - 1);
            }
            0x8000_001e => {
                entry.eax = index;
                entry.ebx = index & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    add_topology_leaf(cpuid, index, count);
}

/// Bits of an APIC ID that number `count` processors.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// First and second level caches are a core's own, further ones the package's.
fn cache(entry: &mut kvm_cpuid_entry2, count: u32) {
    let level = (entry.eax >> 5) & 7;
    let sharing = if level >= 3 { count - 1 } else { 0 };
    entry.eax = (entry.eax & !0xffff_c000) | (sharing << 14);
    if entry.function == 4 {
        entry.eax |= (count.next_power_of_two() - 1).min(0x3f) << 26;
    }
}

/// Extended topology: level 0 threads (one), level 1 cores.
fn topology(entry: &mut kvm_cpuid_entry2, index: u32, count: u32) {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let (shift, processors, level) = match entry.index {
        0 => (0, 1, THREADS),
        1 => (id_bits(count), count, CORES),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = processors;
    entry.ecx = (entry.index & 0xff) | (level << 8);
    entry.edx = index;
}

/// KVM reports one sub-leaf of leaf 0xb only; add that of the cores.
fn add_topology_leaf(cpuid: &mut Vec<kvm_cpuid_entry2>, index: u32, count: u32) {
    for function in [0xb, 0x1f] {
        let has = |sub| {
            cpuid
                .iter()
                .find(|e| e.function == function && e.index == sub)
        };
        let (Some(first), None) = (has(0), has(1)) else {
            continue;
        };
        let mut entry = kvm_cpuid_entry2 { index: 1, ..*first };
        topology(&mut entry, index, count);
        cpuid.push(entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, index, eax| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        };
        vec![
            kvm_cpuid_entry2 {
                ebx: AMD,
                ..leaf(0, 0, 1)
            },
            leaf(1, 0, 0),
            leaf(4, 0, 1 << 5 | 1),
            leaf(4, 3, 3 << 5 | 3),
            leaf(0xb, 0, 0),
            leaf(0x8000_0001, 0, 0),
            leaf(0x8000_0008, 0, 0),
        ]
    }

    fn find(cpuid: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn every_processor_has_its_own_apic_id_in_one_package() {
        for count in [1u8, 2, 3, 4, 64] {
            for index in 0..count {
                let mut cpuid = supported();
                adapt(&mut cpuid, index, count, true);
                assert_eq!(find(&cpuid, 1, 0).ebx >> 24, u32::from(index));
                assert_eq!(find(&cpuid, 0xb, 1).edx, u32::from(index));
                let cores = find(&cpuid, 0xb, 1);
                assert_eq!(cores.ebx, u32::from(count));
                // All IDs agree above the shift: the same package.
                assert_eq!(u32::from(index) >> cores.eax, 0);
            }
        }
    }

    #[test]
    fn the_flag_of_cores_tells_of_the_guests_and_not_of_the_nodes() {
        for (node, count, guest) in [
            (CMP_LEGACY, 1, 0),
            (0, 2, CMP_LEGACY),
            (CMP_LEGACY, 2, CMP_LEGACY),
        ] {
            let mut cpuid = supported();
            for leaf in &mut cpuid {
                if leaf.function == 0x8000_0001 {
                    leaf.ecx = node;
                }
            }
            adapt(&mut cpuid, 0, count, false);
            assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx, guest);
        }
    }

    #[test]
    fn inner_caches_are_private_and_the_last_one_is_shared() {
        let mut cpuid = supported();
        adapt(&mut cpuid, 0, 4, false);
        assert_eq!((find(&cpuid, 4, 0).eax >> 14) & 0xfff, 0);
        assert_eq!((find(&cpuid, 4, 3).eax >> 14) & 0xfff, 3);
        assert_eq!(find(&cpuid, 1, 0).ecx & TSC_DEADLINE, 0);
    }
}
