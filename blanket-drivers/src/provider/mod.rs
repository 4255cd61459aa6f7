//! Who provides this machine, and what they tell about it.
//!
//! What the machine shows by itself is read first ([`Facts`]): SMBIOS, CPUID,
//! Xen, PCI. Where that proves a cloud, its metadata service is asked and no
//! other; else all services are, at once. A metadata service is reached over
//! the network, so it may lie, hang or talk without end: it is given a bounded
//! time ([`Asking`]) and a bounded length, what it says is taken for text from
//! a stranger, and where it contradicts the firmware the firmware is believed.
//!
//! A provider is one file of `known/`: what it is told by, and how its metadata
//! is read.
//!
//! ```no_run
//! use blanket_drivers::provider::{Asking, Machine, notices, report};
//!
//! let asking = Asking::default();
//! let report = report(&Machine::this(), Some(&asking));
//! println!("{} on {}", report.provider, report.platform);
//! // To be polled: what is about to happen to this machine.
//! for notice in notices(report.provider, &asking)? {
//!     println!("{:?}: {}", notice.kind, notice.action);
//! }
//! # Ok::<(), blanket_drivers::provider::Error>(())
//! ```
//!
//! [`probe`](crate::probe) tells what the machine can do, whoever provides it.

mod disk;
mod facts;
mod identify;
mod instance;
mod known;
mod platform;
mod service;
mod text;

use std::time::{Duration, Instant};

use serde::Serialize;

pub use disk::{DiskFacts, Place, place};
pub use facts::{Fact, Facts, Machine, SMBIOS_FIELDS, Source};
pub use identify::Provider;
pub use instance::{Instance, Notice, NoticeKind};
pub use service::{Answers, Asking, LONGEST_ANSWER, Refusal, Service};

use identify::Verdict;
use service::Survey;
pub(crate) use text::clean;

/// Every provider that can be told, the more particular ones first.
pub const PROVIDERS: &[&Provider] = known::KNOWN;

/// What became of the metadata service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetadataState {
    /// It told about this machine.
    Answered,
    /// Something answers, but not as the provider's service does.
    Unusable,
    /// Nothing answers.
    Unanswered,
    /// It was not to be asked.
    NotAsked,
}

/// How the metadata service was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Metadata {
    /// What became of it.
    pub state: MetadataState,
    /// What was not answered as it should have been, and how instead.
    pub problems: Vec<String>,
    /// What to do about it, where the provider has such a service.
    pub remedy: Option<String>,
}

/// What was found out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// [`Provider::name`], or `unknown`.
    pub provider: &'static str,
    /// [`Provider::title`], for people.
    pub title: &'static str,
    /// What it runs on: `metal`, `kvm`, `nitro`, `xen`, `pv`, `pvh`, `hvm`,
    /// `dom0`, `hyper-v`, `vmware`, `tcg`, `bhyve`, `acrn`, or `virtual` if that
    /// cannot be told.
    pub platform: &'static str,
    /// What speaks for this provider.
    pub evidence: Vec<Fact>,
    /// What speaks against it, or does not fit.
    pub doubts: Vec<String>,
    /// The machine, as far as it is known.
    pub instance: Instance,
    /// What the provider is about to do to it.
    pub notices: Vec<Notice>,
    /// How the metadata service was asked.
    pub metadata: Metadata,
    /// All that the machine shows by itself.
    pub facts: Vec<Fact>,
    /// How long this took, in milliseconds.
    pub took_ms: u64,
}

/// Why there are no notices.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody knows this provider.
    #[error("no provider is called '{0}'; use the name that a report gives")]
    Unknown(String),
    /// It could not be asked.
    #[error("{title}'s notices: {source}; {remedy}")]
    Service {
        /// [`Provider::title`].
        title: &'static str,
        /// What came instead of an answer.
        source: Refusal,
        /// What to do about it.
        remedy: &'static str,
    },
}

fn platform_of(provider: Option<&Provider>, facts: &Facts) -> &'static str {
    provider.map_or(platform::platform as fn(&Facts) -> _, |it| it.platform)(facts)
}

/// Finds out who provides `machine`. Metadata services are asked as `asking`
/// says, if at all. Blocks for [`Asking::total`] at most.
#[must_use]
pub fn report(machine: &Machine, asking: Option<&Asking>) -> Report {
    let start = Instant::now();
    let facts = Facts::read(machine);
    let mut report = judge(facts, |candidates| {
        asking.map(|asking| service::survey(candidates, asking))
    });
    report.took_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    report
}

/// What the facts say by themselves.
#[must_use]
pub fn report_of(facts: Facts) -> Report {
    judge(facts, |_| None)
}

/// What the facts and a metadata service say together. `ask` asks those of the
/// candidates that it is given, or does not ask.
fn judge(facts: Facts, ask: impl FnOnce(&[&'static Provider]) -> Option<Survey>) -> Report {
    let Verdict {
        provider: by_facts,
        mut evidence,
        mut doubts,
    } = identify::identify(PROVIDERS, &facts);
    let cloud = by_facts.filter(|provider| provider.cloud);
    let survey = match cloud {
        Some(cloud) => ask(&[cloud]),
        None => ask(PROVIDERS),
    };
    let mut metadata = Metadata::of(survey.as_ref(), cloud);
    let mut found = survey.and_then(|survey| survey.found);
    if let (None, Some((claimed, _))) = (cloud, &found)
        && let Some(doubt) = disbelief(claimed, &facts)
    {
        doubts.push(doubt);
        metadata.state = MetadataState::Unusable;
        found = None;
    }
    let provider = found.as_ref().map(|(provider, _)| *provider).or(by_facts);
    let mut instance = provider.map_or_else(Instance::default, |it| (it.local)(&facts));
    let mut notices = Vec::new();
    if let Some((provider, answers)) = found
        && let Some(service) = provider.service
    {
        evidence.push(Fact {
            source: Source::Metadata,
            name: "service",
            value: format!("answers as {}'s", provider.title),
        });
        let told = service.read(&answers).unwrap_or_default();
        instance = merge(instance, told, &mut doubts);
        notices = service.read_notices(&answers);
    }
    Report {
        provider: provider.map_or("unknown", |provider| provider.name),
        title: provider.map_or("unknown", |provider| provider.title),
        platform: platform_of(provider, &facts),
        evidence,
        doubts,
        instance,
        notices,
        metadata,
        facts: facts.into_vec(),
        took_ms: 0,
    }
}

/// Why a service is not believed that claims to be a provider's whose machines
/// say so themselves.
fn disbelief(claimed: &Provider, facts: &Facts) -> Option<String> {
    let maker = facts.get(Source::Smbios, "sys_vendor")?;
    claimed.in_smbios.then(|| {
        format!(
            "a metadata service answers as {}'s, but the machine's maker is {maker}: not believed",
            claimed.title
        )
    })
}

/// What the metadata tells, but for what the firmware tells otherwise: that
/// comes from the hypervisor and not over a network.
fn merge(local: Instance, told: Instance, doubts: &mut Vec<String>) -> Instance {
    let mut one = |name: &str, local: Option<String>, told: Option<String>| match (local, told) {
        (Some(local), Some(told)) if !local.eq_ignore_ascii_case(&told) => {
            doubts.push(format!(
                "the metadata's {name} is {told}, the firmware's {local}: the latter is believed"
            ));
            Some(local)
        }
        (local, told) => told.or(local),
    };
    Instance {
        id: one("id", local.id, told.id),
        kind: one("type", local.kind, told.kind),
        ..told
    }
}

impl Metadata {
    fn of(survey: Option<&Survey>, cloud: Option<&Provider>) -> Self {
        let Some(survey) = survey else {
            return Self {
                state: MetadataState::NotAsked,
                problems: Vec::new(),
                remedy: None,
            };
        };
        let answers = survey.failures.iter().any(|one| one.refusal.is_answer());
        let state = match survey.found {
            Some(_) => MetadataState::Answered,
            None if answers => MetadataState::Unusable,
            None => MetadataState::Unanswered,
        };
        // Which services are not there is of no interest where another is.
        let of_interest = |provider: &Provider| match &survey.found {
            Some((found, _)) => found.name == provider.name,
            None => true,
        };
        // What failed alike is one problem.
        let mut problems: Vec<(String, String)> = Vec::new();
        for failure in survey
            .failures
            .iter()
            .filter(|one| of_interest(one.provider))
        {
            let what = format!("{} {}", failure.provider.name, failure.path);
            let how = failure.refusal.to_string();
            match problems.iter_mut().find(|(_, other)| *other == how) {
                Some((all, _)) => *all = format!("{all}, {what}"),
                None => problems.push((what, how)),
            }
        }
        let problems = problems
            .into_iter()
            .map(|(what, how)| format!("{what}: {how}"));
        let service = cloud.and_then(|cloud| cloud.service);
        let remedy = service.filter(|_| state != MetadataState::Answered);
        Self {
            state,
            problems: problems.collect(),
            remedy: remedy.map(|service| service.remedy.to_owned()),
        }
    }
}

/// How often [`notices`] of this provider want to be polled; `None` if it tells none.
#[must_use]
pub fn poll_interval(provider: &str) -> Option<Duration> {
    let known = PROVIDERS.iter().find(|known| known.name == provider)?;
    let service = known.service.filter(|it| !it.notices.is_empty())?;
    Some(service.interval)
}

/// What the provider of the name `provider` is about to do to this machine:
/// spot terminations, maintenance. For polling; blocks for [`Asking::total`] at
/// most. A provider that tells no such things has none.
///
/// # Errors
/// There is no such provider, or no answer to all that was asked and no notice
/// among what was answered.
pub fn notices(provider: &str, asking: &Asking) -> Result<Vec<Notice>, Error> {
    let named = PROVIDERS.iter().find(|known| known.name == provider);
    let Some(known) = named else {
        return match provider {
            "unknown" => Ok(Vec::new()),
            other => Err(Error::Unknown(other.to_owned())),
        };
    };
    let Some(service) = known.service.filter(|service| !service.notices.is_empty()) else {
        return Ok(Vec::new());
    };
    service::poll(known, service, asking).map_err(|source| Error::Service {
        title: known.title,
        source,
        remedy: service.remedy,
    })
}
