//! Pages and events shared with other domains, where Xen is the provider.

use super::Finding;
use crate::grant::xen::{self, Error, Report};

const COST: &str = "no pages and no events are shared with the domains beside this one";

pub(super) fn sharing() -> Finding {
    if !xen::is_provider() {
        return Finding::ok("not needed: this is no guest of Xen").fact("provider", false);
    }
    let finding = match xen::self_test() {
        Ok(report) => works(&report),
        Err(error) => fails(&error),
    };
    finding.fact("provider", true)
}

fn works(report: &Report) -> Finding {
    let (map, kept) = (report.map.as_nanos(), report.kept.as_nanos());
    Finding::ok(format!(
        "grants and events work in domain {}; a mapping takes {map} ns, one that is kept {kept} ns",
        report.domain
    ))
    .fact("domain", u64::from(report.domain))
    .fact("map_ns", map as u64)
    .fact("kept_ns", kept as u64)
}

fn fails(error: &Error) -> Finding {
    match error {
        Error::Device { module, .. } => Finding::missing(
            error.to_string(),
            COST,
            &format!("as root: modprobe {module} (Debian's kernels have it)"),
        ),
        _ => Finding::limited(
            error.to_string(),
            COST,
            "ask the provider: its Xen, or its policy (XSM), does not let domains share",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::Duration;

    use super::*;
    use crate::probe::{Fact, Level};

    #[test]
    fn a_driver_that_is_missing_is_named_with_its_module() {
        let finding = fails(&Error::Device {
            path: "/dev/xen/gntdev",
            module: "xen_gntdev",
            source: io::ErrorKind::NotFound.into(),
        });
        assert_eq!(finding.level, Level::Missing);
        assert!(finding.found.contains("/dev/xen/gntdev"));
        assert!(finding.remedy.unwrap().contains("modprobe xen_gntdev"));
        let finding = fails(&Error::SelfTest("an event does not arrive"));
        assert_eq!(finding.level, Level::Limited);
        assert!(finding.found.contains("an event does not arrive"));
    }

    #[test]
    fn what_a_mapping_takes_is_a_fact() {
        let finding = works(&Report {
            domain: 3,
            map: Duration::from_micros(7),
            kept: Duration::from_nanos(40),
        });
        assert_eq!(finding.level, Level::Ok);
        assert_eq!(finding.facts["map_ns"], Fact::Number(7_000));
        assert_eq!(finding.facts["kept_ns"], Fact::Number(40));
    }
}
