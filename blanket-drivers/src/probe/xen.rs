//! Pages and events shared with other domains, where Xen is the provider.

use super::Finding;
use crate::grant::xen::{self, Error, selftest};

const COST: &str = "no pages and no events are shared with the domains beside this one";

pub(super) fn sharing() -> Finding {
    if !xen::is_provider() {
        return Finding::ok("not needed: this is no guest of Xen").fact("provider", false);
    }
    let finding = match selftest::alone() {
        Ok(domain) => Finding::ok(format!(
            "domain {domain} can share pages and events with others; try it with `blanket doctor --offer`"
        ))
        .fact("domain", u64::from(domain)),
        Err(error) => fails(&error),
    };
    finding.fact("provider", true)
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

    use super::*;
    use crate::probe::Level;

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
}
