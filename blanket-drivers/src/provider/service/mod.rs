//! Metadata services: what is asked of them, and what they answered.

mod ask;
mod http;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde_json::Value;

use super::instance::{Instance, Notice};
use super::text::clean;

/// Lines of an answer that are looked at.
const MOST_LINES: usize = 64;

pub(super) use ask::{Survey, poll, survey};
pub use http::{LONGEST_ANSWER, Refusal};

/// A provider's metadata service, as far as it differs from others'.
#[derive(Debug)]
pub struct Service {
    /// Headers of each request.
    pub(super) headers: &'static [(&'static str, &'static str)],
    /// What opens a session, if one is needed.
    pub(super) token: Option<Token>,
    /// A header that each genuine answer has, and its value.
    pub(super) seal: Option<(&'static str, &'static str)>,
    /// What is asked for first: its answer tells whose service it is.
    pub(super) document: &'static str,
    /// What else there is about the instance.
    pub(super) details: &'static [&'static str],
    /// What tells of things to come.
    pub(super) notices: &'static [&'static str],
    /// How often to ask for these, as the provider recommends.
    pub(super) interval: Duration,
    /// Reads what was answered; `None` if the document is not this provider's.
    pub(super) read: fn(&Answers) -> Option<Instance>,
    /// Reads what was answered of `notices`.
    pub(super) read_notices: fn(&Answers) -> Vec<Notice>,
    /// What to do where it does not answer.
    pub(super) remedy: &'static str,
}

impl Service {
    /// All paths that are asked for.
    pub fn paths(&self) -> impl Iterator<Item = &'static str> {
        let more = self.details.iter().chain(self.notices).copied();
        std::iter::once(self.document).chain(more)
    }

    /// What the answers say about the instance; `None` if they are not those of
    /// this provider's service.
    #[must_use]
    pub fn read(&self, answers: &Answers) -> Option<Instance> {
        (self.read)(answers)
    }

    /// What the answers say will happen.
    #[must_use]
    pub fn read_notices(&self, answers: &Answers) -> Vec<Notice> {
        (self.read_notices)(answers)
    }
}

/// A token that each request has to carry.
#[derive(Debug)]
pub(super) struct Token {
    /// What is asked for by PUT.
    pub(super) path: &'static str,
    /// The header that says for how long, and how long: long enough for what
    /// is asked at one time.
    pub(super) lifetime: (&'static str, &'static str),
    /// The header that carries it.
    pub(super) header: &'static str,
}

/// Bodies that were answered, by path.
#[derive(Clone, Debug, Default)]
pub struct Answers(BTreeMap<&'static str, Vec<u8>>);

impl Answers {
    /// Adds what was answered to a path.
    pub fn add(&mut self, path: &'static str, body: Vec<u8>) {
        self.0.insert(path, body);
    }

    /// A body as text of many lines.
    pub(super) fn body(&self, path: &str) -> Option<Cow<'_, str>> {
        self.0.get(path).map(|body| String::from_utf8_lossy(body))
    }

    /// A body as one line of text.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        self.0.get(path).and_then(|body| clean(body))
    }

    /// The lines of a body, each as plain text; none if it has not come.
    pub(super) fn lines(&self, path: &str) -> Option<Vec<String>> {
        let lines = self.0.get(path)?.split(|byte| *byte == b'\n');
        Some(lines.filter_map(clean).take(MOST_LINES).collect())
    }

    /// A body as JSON; null if it is none.
    pub(super) fn json(&self, path: &str) -> Value {
        let body = self.0.get(path).map(Vec::as_slice);
        serde_json::from_slice(body.unwrap_or_default()).unwrap_or_default()
    }
}

/// How metadata services are asked.
#[derive(Clone, Copy, Debug)]
pub struct Asking {
    /// Where they are.
    pub address: SocketAddr,
    /// The longest that a connection may take.
    pub connect: Duration,
    /// The longest that all of it may take.
    pub total: Duration,
    /// How long others are waited for once what is wanted is there: services
    /// that might be meant instead, and notices, which take Azure two minutes
    /// when they are asked for the first time.
    pub grace: Duration,
}

impl Default for Asking {
    /// The link-local address that all providers use. Two seconds to connect
    /// (Linux sends a lost SYN again after one), two and a half in all, half a
    /// second of grace.
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::new(169, 254, 169, 254), 80).into(),
            connect: Duration::from_secs(2),
            total: Duration::from_millis(2500),
            grace: Duration::from_millis(500),
        }
    }
}
