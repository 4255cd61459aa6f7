//! The processor, the memory and the provider underneath.

use super::{Finding, read};
use crate::provider::{self, Facts, Machine, Source};

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

/// Who provides the machine, without asking them.
pub(super) fn provider() -> Finding {
    let facts = Facts::read(&Machine::this());
    let found = provider::report_of(facts.clone());
    let title = found.title.to_ascii_lowercase();
    let text = if title.ends_with(found.platform) {
        found.title.to_owned()
    } else {
        format!("{} ({})", found.title, found.platform)
    };
    let mut finding = Finding::ok(format!("{text}; `blanket provider` tells more"))
        .fact("provider", found.provider)
        .fact("platform", found.platform);
    for (name, source, field) in [
        ("maker", Source::Smbios, "sys_vendor"),
        ("product", Source::Smbios, "product_name"),
        ("signature", Source::Cpuid, "signature"),
    ] {
        if let Some(value) = facts.get(source, field) {
            finding = finding.fact(name, value);
        }
    }
    finding
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
    fn this_machine_has_a_processor_and_a_provider() {
        assert_ne!(cpu().facts["cores"], Fact::Number(0));
        let provider = provider();
        assert_eq!(provider.level, Level::Ok);
        assert!(provider.facts.contains_key("platform"));
    }
}
