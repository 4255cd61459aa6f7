//! The processor, the memory and the provider underneath.

use std::arch::x86_64::__cpuid;

use super::{Finding, read};

/// Leaf with the hypervisor's signature (in EBX, ECX, EDX).
const HYPERVISOR_LEAF: u32 = 0x4000_0000;

/// "Running under a hypervisor": bit 31 of ECX of leaf 1.
const HYPERVISOR_BIT: u32 = 1 << 31;

/// Value of a `key : value` line of `/proc/cpuinfo` (the first processor's).
fn cpuinfo_value<'a>(cpuinfo: &'a str, key: &str) -> Option<&'a str> {
    cpuinfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

/// Whether the first processor has a flag, like `vmx`.
pub(super) fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    cpuinfo_value(cpuinfo, "flags").is_some_and(|flags| flags.split(' ').any(|f| f == flag))
}

pub(super) fn cpu() -> Finding {
    let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
    let vendor = cpuinfo_value(&cpuinfo, "vendor_id").unwrap_or("unknown");
    let model = cpuinfo_value(&cpuinfo, "model name").unwrap_or("unknown processor");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let plural = if cores == 1 { "" } else { "s" };
    Finding::ok(format!("{model}, {cores} core{plural}"))
        .fact("vendor", vendor)
        .fact("model", model)
        .fact("cores", cores as u64)
}

/// Bytes of a line of `/proc/meminfo`, which counts in KiB.
fn meminfo_bytes(meminfo: &str, key: &str) -> Option<u64> {
    let value = cpuinfo_value(meminfo, key)?;
    let kib: u64 = value.strip_suffix(" kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

pub(super) fn memory() -> Finding {
    let meminfo = read("/proc/meminfo").unwrap_or_default();
    let total = meminfo_bytes(&meminfo, "MemTotal").unwrap_or(0);
    let available = meminfo_bytes(&meminfo, "MemAvailable").unwrap_or(0);
    Finding::ok(format!(
        "{} MiB, {} MiB available",
        total >> 20,
        available >> 20
    ))
    .fact("total_bytes", total)
    .fact("available_bytes", available)
}

/// The name behind a hypervisor's signature.
fn hypervisor_name(signature: &str) -> &str {
    match signature {
        "KVMKVMKVM" => "KVM",
        "TCGTCGTCGTCG" => "QEMU TCG",
        "Microsoft Hv" => "Hyper-V",
        "VMwareVMware" => "VMware",
        "XenVMMXenVMM" => "Xen",
        "bhyve bhyve" => "bhyve",
        "ACRNACRNACRN" => "ACRN",
        other => other,
    }
}

/// The signature as text, from the three registers.
fn signature(registers: [u32; 3]) -> String {
    let bytes = registers.map(u32::to_le_bytes).concat();
    let text: String = bytes.into_iter().map(char::from).collect();
    text.chars()
        .filter(|c| c.is_ascii_graphic() || *c == ' ')
        .collect::<String>()
        .trim()
        .to_owned()
}

pub(super) fn provider() -> Finding {
    let product = ["sys_vendor", "product_name"]
        .into_iter()
        .filter_map(|name| read(&format!("/sys/class/dmi/id/{name}")))
        .collect::<Vec<_>>()
        .join(" ");
    let leaf = |leaf| __cpuid(leaf);
    let finding = if leaf(1).ecx & HYPERVISOR_BIT == 0 {
        Finding::ok("bare metal").fact("hypervisor", "none")
    } else {
        let found = leaf(HYPERVISOR_LEAF);
        let signature = signature([found.ebx, found.ecx, found.edx]);
        let name = hypervisor_name(&signature);
        let name = if name.is_empty() { "unnamed" } else { name };
        Finding::ok(format!("a virtual machine (hypervisor: {name})"))
            .fact("hypervisor", name)
            .fact("signature", signature.clone())
    };
    if product.is_empty() {
        finding
    } else {
        finding.fact("product", product)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{Fact, Level};

    const CPUINFO: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\n\
        model name\t: AMD EPYC\nflags\t\t: fpu svm npt\n\nprocessor\t: 1\n";

    #[test]
    fn flags_are_whole_words() {
        assert!(has_flag(CPUINFO, "svm"));
        assert!(!has_flag(CPUINFO, "sv"));
        assert!(!has_flag(CPUINFO, "vmx"));
        assert!(!has_flag("", "svm"));
    }

    #[test]
    fn memory_is_counted_in_bytes() {
        let text = "MemTotal:       24 kB\nMemAvailable: x\n";
        assert_eq!(meminfo_bytes(text, "MemTotal"), Some(24 << 10));
        assert_eq!(meminfo_bytes(text, "MemAvailable"), None);
        assert_ne!(memory().facts["total_bytes"], Fact::Number(0));
    }

    #[test]
    fn signatures_are_read_from_registers() {
        let registers = [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
        assert_eq!(hypervisor_name(&signature(registers)), "KVM");
        assert_eq!(signature([0, 0x0100_0001, u32::MAX]), "");
    }

    #[test]
    fn this_machine_has_a_processor_and_a_provider() {
        assert_ne!(cpu().facts["cores"], Fact::Number(0));
        assert_eq!(provider().level, Level::Ok);
    }
}
