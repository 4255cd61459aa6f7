//! Which provider the facts speak of.

use super::disk::DiskMark;
use super::facts::{Fact, Facts, Source};
use super::instance::Instance;
use super::service::Service;

/// All that is known of a provider; one file of `known/` each.
#[derive(Debug)]
pub struct Provider {
    /// Its name for programs, in lower case.
    pub name: &'static str,
    /// Its name for people.
    pub title: &'static str,
    /// Whether it is a cloud. The others are what a cloud may be built on; a
    /// cloud that can be told is the better answer.
    pub cloud: bool,
    /// Whether SMBIOS, where it can be read, always names it. Then a metadata
    /// service that claims to be its on a machine of another maker lies.
    pub in_smbios: bool,
    /// What it is told by.
    pub(super) marks: &'static [Mark],
    /// Which of its platforms the machine runs on.
    pub(super) platform: fn(&Facts) -> &'static str,
    /// What the facts say about the instance.
    pub(super) local: fn(&Facts) -> Instance,
    /// What its volumes are told by; the first that fits counts.
    pub(super) disks: &'static [DiskMark],
    /// Its metadata service, if it has one.
    pub service: Option<&'static Service>,
}

/// Something that a provider's machines show.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    source: Source,
    name: &'static str,
    test: Test,
    /// Whether machines of nobody else show it.
    proof: bool,
}

/// How a value is told. Case does not matter.
#[derive(Clone, Copy, Debug)]
pub(super) enum Test {
    /// It is this.
    Is(&'static str),
    /// It begins with this.
    Begins(&'static str),
    /// It ends with this.
    Ends(&'static str),
    /// It passes this.
    Passes(fn(&str) -> bool),
}

impl Test {
    /// Whether it does.
    pub(super) fn holds(self, value: &str) -> bool {
        let same = |part: Option<&str>, text: &str| {
            part.is_some_and(|part| part.eq_ignore_ascii_case(text))
        };
        match self {
            Self::Is(text) => same(Some(value), text),
            Self::Begins(text) => same(value.get(..text.len()), text),
            Self::Ends(text) => {
                let start = value.len().checked_sub(text.len());
                same(start.and_then(|start| value.get(start..)), text)
            }
            Self::Passes(test) => test(value),
        }
    }
}

/// A mark that nobody else's machines have.
pub(super) const fn proof(source: Source, name: &'static str, test: Test) -> Mark {
    Mark {
        source,
        name,
        test,
        proof: true,
    }
}

/// A mark that others' machines may have too.
pub(super) const fn hint(source: Source, name: &'static str, test: Test) -> Mark {
    Mark {
        proof: false,
        ..proof(source, name, test)
    }
}

/// What the facts say.
#[derive(Debug)]
pub(super) struct Verdict {
    /// The provider; `None` if nothing proves one.
    pub(super) provider: Option<&'static Provider>,
    /// The facts that speak for it.
    pub(super) evidence: Vec<Fact>,
    /// What speaks for others.
    pub(super) doubts: Vec<String>,
}

/// What speaks for one provider.
struct Claim {
    provider: &'static Provider,
    /// Facts that only its machines show.
    proofs: Vec<Fact>,
    /// All facts that its machines show.
    evidence: Vec<Fact>,
}

impl Claim {
    fn rank(&self) -> (bool, usize, usize) {
        (self.provider.cloud, self.proofs.len(), self.evidence.len())
    }
}

/// Chooses among `known`: a cloud before what clouds are built on, then the one
/// with more proofs, then the one with more marks, then the one named first.
pub(super) fn identify(known: &[&'static Provider], facts: &Facts) -> Verdict {
    let claims: Vec<_> = known.iter().filter_map(|it| claim(it, facts)).collect();
    let better = |best: usize, next: usize| match claims[next].rank() > claims[best].rank() {
        true => next,
        false => best,
    };
    let best = (0..claims.len()).reduce(better).map(|best| &claims[best]);
    let others = claims
        .iter()
        .filter(|claim| claim.provider.cloud && best.is_some_and(|it| !std::ptr::eq(it, *claim)));
    let doubts = others
        .flat_map(|claim| {
            let proofs = claim.proofs.iter();
            proofs.map(|fact| format!("{fact}, as on {}", claim.provider.title))
        })
        .collect();
    Verdict {
        provider: best.map(|claim| claim.provider),
        evidence: best.map(|claim| claim.evidence.clone()).unwrap_or_default(),
        doubts,
    }
}

/// What speaks for a provider, if anything proves it.
fn claim(provider: &'static Provider, facts: &Facts) -> Option<Claim> {
    let marks_of = |fact: &Fact| {
        let same = |mark: &&Mark| mark.source == fact.source && mark.name == fact.name;
        let marks = provider.marks.iter().filter(same);
        let held: Vec<_> = marks.filter(|mark| mark.test.holds(&fact.value)).collect();
        held
    };
    let (mut proofs, mut evidence) = (Vec::new(), Vec::new());
    for fact in facts.iter() {
        let marks = marks_of(fact);
        if marks.iter().any(|mark| mark.proof) {
            proofs.push(fact.clone());
        }
        if !marks.is_empty() {
            evidence.push(fact.clone());
        }
    }
    (!proofs.is_empty()).then_some(Claim {
        provider,
        proofs,
        evidence,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::known::KNOWN;

    fn facts(smbios: &[(&'static str, &str)]) -> Facts {
        let mut facts = Facts::default();
        for (name, value) in smbios {
            facts.add(Source::Smbios, name, value.as_bytes());
        }
        facts
    }

    #[test]
    fn values_are_compared_without_case_and_by_whole_characters() {
        assert!(Test::Is("Xen").holds("xen"));
        assert!(!Test::Is("Xen").holds("xenial"));
        assert!(Test::Begins("VMware").holds("vmware, Inc."));
        assert!(!Test::Begins("VMware").holds("VM"));
        assert!(Test::Ends(".amazon").holds("4.11.AMAZON"));
        assert!(!Test::Ends(".amazon").holds("amazon"));
        assert!(!Test::Begins("a").holds("\u{e4}"));
        assert!(!Test::Ends("a").holds("\u{e4}"));
    }

    #[test]
    fn where_two_clouds_are_named_the_one_with_more_proofs_wins_and_the_other_is_a_doubt() {
        let verdict = identify(
            KNOWN,
            &facts(&[
                ("sys_vendor", "Amazon EC2"),
                ("bios_vendor", "Amazon EC2"),
                ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),
            ]),
        );
        assert_eq!(verdict.provider.unwrap().name, "ec2");
        assert_eq!(verdict.evidence.len(), 2);
        assert_eq!(verdict.doubts.len(), 1);
        assert!(verdict.doubts[0].contains("Azure"), "{verdict:?}");
    }

    #[test]
    fn hints_alone_prove_nothing() {
        let mut seen = facts(&[("sys_vendor", "Microsoft Corporation")]);
        seen.add(Source::Cpuid, "signature", b"Microsoft Hv");
        seen.add(Source::Pci, "device", b"1d0f:ec20");
        assert!(identify(KNOWN, &seen).provider.is_none());
    }

    #[test]
    fn what_a_cloud_is_built_on_is_no_doubt() {
        let mut seen = facts(&[("sys_vendor", "Xen"), ("bios_version", "4.11.amazon")]);
        seen.add(Source::Xen, "type", b"xen");
        let verdict = identify(KNOWN, &seen);
        assert_eq!(verdict.provider.unwrap().name, "ec2");
        assert!(verdict.doubts.is_empty());
    }

    #[test]
    fn names_are_unique_and_lower_case() {
        for (n, provider) in KNOWN.iter().enumerate() {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(provider.name.chars().all(plain));
            assert!(KNOWN[..n].iter().all(|other| other.name != provider.name));
            assert!(provider.marks.iter().any(|mark| mark.proof));
        }
    }
}
