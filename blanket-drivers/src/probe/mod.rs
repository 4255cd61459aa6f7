//! What this machine can do.
//!
//! Each check asks the kernel itself (by a system call or an ioctl) where it
//! can, and reads `/proc` and `/sys` only for what cannot be asked. A missing
//! feature is a finding, never an error.
//!
//! [`provider`](crate::provider) tells who provides the machine.

mod confinement;
mod dirty;
mod host;
mod io;
mod kvm;
mod memory;
mod net;
mod xen;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use serde::Serialize;

pub use kvm::Virtualization;

/// How well the machine does in one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// All there.
    Ok,
    /// There, with less than Blanket could use.
    Limited,
    /// Not there.
    Missing,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        })
    }
}

/// A figure or a word for programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Fact {
    /// Yes or no.
    Flag(bool),
    /// A count, a version or a number of bytes.
    Number(u64),
    /// A name, or names joined by commas.
    Text(String),
}

impl From<bool> for Fact {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<u64> for Fact {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<&str> for Fact {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Fact {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How well the machine does.
    #[serde(rename = "state")]
    pub level: Level,
    /// What is there, in one line.
    pub found: String,
    /// What the lack of the rest costs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<String>,
    /// How to get the rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// The same for programs.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub facts: BTreeMap<&'static str, Fact>,
}

impl Finding {
    fn ok(found: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            found: found.into(),
            cost: None,
            remedy: None,
            facts: BTreeMap::new(),
        }
    }

    fn limited(found: impl Into<String>, cost: &str, remedy: &str) -> Self {
        Self {
            level: Level::Limited,
            cost: Some(cost.to_owned()),
            remedy: Some(remedy.to_owned()),
            ..Self::ok(found)
        }
    }

    fn missing(found: impl Into<String>, cost: &str, remedy: &str) -> Self {
        Self {
            level: Level::Missing,
            ..Self::limited(found, cost, remedy)
        }
    }

    fn fact(mut self, name: &'static str, value: impl Into<Fact>) -> Self {
        self.facts.insert(name, value.into());
        self
    }
}

/// One question to the machine.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// The heading that it belongs under.
    pub area: &'static str,
    /// What is asked for.
    pub name: &'static str,
    /// Whether guests can run at all without it.
    pub essential: bool,
    run: fn() -> Finding,
}

const fn check(area: &'static str, name: &'static str, run: fn() -> Finding) -> Check {
    Check {
        area,
        name,
        essential: false,
        run,
    }
}

/// Every check, in the order in which they are shown.
pub const CHECKS: &[Check] = &[
    check("host", "cpu", host::cpu),
    check("host", "memory", host::memory),
    check("host", "provider", host::provider),
    Check {
        essential: true,
        ..check("kvm", "kvm", kvm::kind)
    },
    check("kvm", "machine", kvm::machine),
    check("kvm", "processor", kvm::processor),
    check("kvm", "nested", kvm::nested),
    check("kvm", "capabilities", kvm::capabilities),
    check("kvm", "dirty pages", dirty::pages),
    check("memory", "userfaultfd", memory::userfaultfd),
    check("memory", "thp", memory::thp),
    check("memory", "hugetlb", memory::hugetlb),
    check("memory", "ksm", memory::ksm),
    check("io", "io_uring", io::io_uring),
    check("io", "vhost-net", io::vhost_net),
    check("io", "vhost-vsock", io::vhost_vsock),
    check("io", "xen", xen::sharing),
    check("net", "tun", net::tun),
    check("net", "af_xdp", net::af_xdp),
    check("net", "xdp", net::xdp),
    check("confinement", "seccomp", confinement::seccomp),
    check("confinement", "landlock", confinement::landlock),
    check(
        "confinement",
        "user namespaces",
        confinement::user_namespaces,
    ),
    check("confinement", "cgroups", confinement::cgroups),
];

/// A check and what it found.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// [`Check::area`].
    pub area: &'static str,
    /// [`Check::name`].
    pub name: &'static str,
    /// What was found.
    #[serde(flatten)]
    pub finding: Finding,
}

/// All that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Every check's outcome.
    pub checks: Vec<Outcome>,
    /// Why no guest can run here, if so.
    pub obstacle: Option<String>,
}

/// Runs every check.
#[must_use]
pub fn report() -> Report {
    let mut obstacle = None;
    let checks = CHECKS.iter().map(|check| {
        let finding = (check.run)();
        if check.essential && finding.level == Level::Missing {
            obstacle.get_or_insert_with(|| finding.found.clone());
        }
        Outcome {
            area: check.area,
            name: check.name,
            finding,
        }
    });
    Report {
        checks: checks.collect(),
        obstacle,
    }
}

/// A small file of `/proc` or `/sys`, trimmed; `None` if it cannot be read.
fn read(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_that_is_not_ok_says_what_it_costs_and_how_to_get_it() {
        let report = report();
        assert_eq!(report.checks.len(), CHECKS.len());
        for Outcome { name, finding, .. } in &report.checks {
            assert!(!finding.found.is_empty(), "{name}");
            let explained = finding.cost.is_some() && finding.remedy.is_some();
            assert_eq!(explained, finding.level != Level::Ok, "{name}: {finding:?}");
        }
        let kvm = report.checks.iter().find(|check| check.name == "kvm");
        let unusable = kvm.unwrap().finding.level == Level::Missing;
        assert_eq!(report.obstacle.is_some(), unusable);
    }

    #[test]
    fn checks_have_names_of_their_own_and_areas_stay_together() {
        let mut areas: Vec<_> = CHECKS.iter().map(|check| check.area).collect();
        areas.dedup();
        let mut unique = areas.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(areas.len(), unique.len());
        for (i, check) in CHECKS.iter().enumerate() {
            assert!(CHECKS[..i].iter().all(|other| other.name != check.name));
        }
    }

    #[test]
    fn the_report_is_json_with_states_and_facts() {
        let json = serde_json::to_value(report()).unwrap();
        for check in json["checks"].as_array().unwrap() {
            let state = check["state"].as_str().unwrap();
            assert!(["ok", "limited", "missing"].contains(&state));
        }
    }
}
