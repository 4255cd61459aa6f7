//! Metadata services are asked: several at once, and no longer than is said.

use std::future::Future;
use std::io;

use hyper::{Method, StatusCode};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::http::{self, Headers, Refusal};
use super::{Answers, Asking, Service, Token};
use crate::provider::identify::Provider;
use crate::provider::instance::Notice;

/// A request that was not answered with success.
#[derive(Debug)]
pub(in crate::provider) struct Failure {
    /// Whose service was meant.
    pub(in crate::provider) provider: &'static Provider,
    /// What was asked for.
    pub(in crate::provider) path: &'static str,
    /// What came instead.
    pub(in crate::provider) refusal: Refusal,
}

/// Whose service answers, and what.
#[derive(Debug, Default)]
pub(in crate::provider) struct Survey {
    /// The provider, and its answers.
    pub(in crate::provider) found: Option<(&'static Provider, Answers)>,
    /// What was not answered. That there is no such thing is an answer.
    pub(in crate::provider) failures: Vec<Failure>,
}

/// A provider whose service has answered, as it wants to be asked on.
struct Session {
    provider: &'static Provider,
    service: &'static Service,
    headers: Headers,
    answers: Answers,
}

/// Asks for all that the first of `candidates` whose service answers knows.
pub(in crate::provider) fn survey(candidates: &[&'static Provider], asking: &Asking) -> Survey {
    let (candidates, asking) = (candidates.to_vec(), *asking);
    let result = run(async move {
        let end = Instant::now() + asking.total;
        let mut survey = Survey::default();
        let session = choose(&candidates, asking, end, &mut survey.failures).await;
        if let Some(mut session) = session {
            let service = session.service;
            let wanted = [service.details, service.notices];
            let failures = all(&mut session, wanted, asking, end).await;
            survey.failures.extend(failures);
            survey.found = Some((session.provider, session.answers));
        }
        survey
    });
    // Without a way to ask nothing answers.
    result.unwrap_or_default()
}

/// Asks for the notices of a provider whose service is known.
///
/// # Errors
/// There are none, and not all could be asked for: why.
pub(in crate::provider) fn poll(
    provider: &'static Provider,
    service: &'static Service,
    asking: &Asking,
) -> Result<Vec<Notice>, Refusal> {
    let asking = *asking;
    run(async move {
        let end = Instant::now() + asking.total;
        let headers = timeout_at(end, authorize(service, asking)).await;
        let mut session = Session {
            provider,
            service,
            headers: headers.map_err(|_| Refusal::Late)??,
            answers: Answers::default(),
        };
        let wanted = [service.notices, &[]];
        let failures = all(&mut session, wanted, asking, end).await;
        let notices = service.read_notices(&session.answers);
        match failures.into_iter().next() {
            Some(failure) if notices.is_empty() => Err(failure.refusal),
            _ => Ok(notices),
        }
    })?
}

/// Runs on a thread and a runtime of its own, so that callers may have theirs.
fn run<T: Send>(task: impl Future<Output = T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("metadata".into());
        let thread = thread.spawn_scoped(scope, || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(task))
        })?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread ended")))
    })
}

/// Opens sessions with all candidates at once; the first in their order that
/// answers, of those that do so within the grace period.
async fn choose(
    candidates: &[&'static Provider],
    asking: Asking,
    mut end: Instant,
    failures: &mut Vec<Failure>,
) -> Option<Session> {
    let mut open = JoinSet::new();
    let mut waiting = Vec::new();
    for (rank, provider) in candidates.iter().copied().enumerate() {
        let Some(service) = provider.service else {
            continue;
        };
        waiting.push(rank);
        open.spawn(async move { (rank, enter(provider, service, asking).await) });
    }
    let mut best: Option<(usize, Session)> = None;
    while let Ok(Some(Ok((rank, result)))) = timeout_at(end, open.join_next()).await {
        waiting.retain(|other| *other != rank);
        match result {
            Ok(session) => {
                end = end.min(Instant::now() + asking.grace);
                if best.as_ref().is_none_or(|(least, _)| rank < *least) {
                    best = Some((rank, session));
                }
            }
            Err(failure) => failures.push(failure),
        }
        let least = best.as_ref().map_or(usize::MAX, |(rank, _)| *rank);
        if waiting.iter().all(|rank| *rank > least) && best.is_some() {
            break;
        }
    }
    if best.is_none() {
        failures.extend(waiting.into_iter().filter_map(|rank| {
            let provider = candidates[rank];
            let path = provider.service?.document;
            Some(Failure {
                provider,
                path,
                refusal: Refusal::Late,
            })
        }));
    }
    best.map(|(_, session)| session)
}

/// The headers that requests need, with a token if there are such.
async fn authorize(service: &'static Service, asking: Asking) -> Result<Headers, Refusal> {
    let bytes = |(name, value): &(&'static str, &'static str)| (*name, value.as_bytes());
    let mut headers = http::headers(service.headers.iter().map(bytes));
    if let Some(token) = &service.token {
        headers.extend(fetch_token(token, service, asking).await?);
    }
    Ok(headers)
}

/// The header with a token; none where the service says that it has none, as
/// EC2's first version did.
async fn fetch_token(
    token: &'static Token,
    service: &'static Service,
    asking: Asking,
) -> Result<Headers, Refusal> {
    let (name, value) = token.lifetime;
    let headers = http::headers([(name, value.as_bytes())]);
    let request = (Method::PUT, token.path);
    let answer = http::ask(
        asking.address,
        asking.connect,
        request,
        headers,
        service.seal,
    );
    match answer.await {
        Ok(body) => {
            let header = http::headers([(token.header, body.trim_ascii())]);
            // Garbage that no header can carry is no token.
            if header.is_empty() || body.trim_ascii().is_empty() {
                return Err(Refusal::Foreign);
            }
            Ok(header)
        }
        Err(Refusal::Status(StatusCode::FORBIDDEN | StatusCode::NOT_FOUND)) => Ok(Vec::new()),
        Err(refusal) => Err(refusal),
    }
}

/// Asks for the document that tells whose service it is.
async fn enter(
    provider: &'static Provider,
    service: &'static Service,
    asking: Asking,
) -> Result<Session, Failure> {
    let path = service.document;
    let session = async {
        let headers = authorize(service, asking).await?;
        let request = (Method::GET, path);
        let answer = http::ask(
            asking.address,
            asking.connect,
            request,
            headers.clone(),
            service.seal,
        );
        let mut answers = Answers::default();
        answers.add(path, answer.await?);
        if service.read(&answers).is_none() {
            return Err(Refusal::Foreign);
        }
        Ok(Session {
            provider,
            service,
            headers,
            answers,
        })
    };
    session.await.map_err(|refusal| Failure {
        provider,
        path,
        refusal,
    })
}

/// Asks for all of `wanted` at once and keeps the answers; what there is none
/// to. Once the first list is done the rest has the grace period left.
async fn all(
    session: &mut Session,
    wanted: [&'static [&'static str]; 2],
    asking: Asking,
    mut end: Instant,
) -> Vec<Failure> {
    let [first, then] = wanted;
    let mut waiting: Vec<&'static str> = [first, then].concat();
    let mut requests = JoinSet::new();
    for path in waiting.clone() {
        let (headers, seal) = (session.headers.clone(), session.service.seal);
        requests.spawn(async move {
            let request = (Method::GET, path);
            let answer = http::ask(asking.address, asking.connect, request, headers, seal);
            (path, answer.await)
        });
    }
    let provider = session.provider;
    let mut failures = Vec::new();
    let mut fail = |path, refusal| {
        failures.push(Failure {
            provider,
            path,
            refusal,
        });
    };
    loop {
        if !then.is_empty() && waiting.iter().all(|path| then.contains(path)) {
            end = end.min(Instant::now() + asking.grace);
        }
        let Ok(Some(Ok((path, result)))) = timeout_at(end, requests.join_next()).await else {
            break;
        };
        waiting.retain(|other| *other != path);
        match result {
            Ok(body) => session.answers.add(path, body),
            Err(refusal) if refusal.is_absent() => {}
            Err(refusal) => fail(path, refusal),
        }
    }
    for path in waiting {
        fail(path, Refusal::Late);
    }
    failures
}
