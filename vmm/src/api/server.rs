//! The API's server: routes and statuses; [`crate::monitor`] does the work.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use hyper::body::{Bytes, Frame};
use tokio::sync::mpsc::UnboundedSender;

use super::types::{
    Action, METRICS_PATH, MIGRATION_PATH, Problem, SNAPSHOT_PATH, SYSRQ_PATH, SysRq, TARGET_PATH,
    Target, VM_PATH,
};
use crate::config::VmConfig;
use crate::migrate::Request;
use crate::monitor::{Ending, Error, Monitor, Sending};

/// A configuration is never longer than this, in bytes.
const MAX_BODY: usize = 1 << 20;

/// What the handlers share. One thread runs them: the lock is never waited for.
#[derive(Clone)]
struct Shared {
    monitor: Arc<Mutex<Monitor>>,
    endings: UnboundedSender<Ending>,
}

impl Shared {
    fn monitor(&self) -> MutexGuard<'_, Monitor> {
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The API in front of `monitor`. An ending that a request causes goes to
/// `endings` after the request has been answered.
pub fn router(monitor: Arc<Mutex<Monitor>>, endings: UnboundedSender<Ending>) -> Router {
    let mut router = Router::new()
        .route(VM_PATH, get(info).put(create))
        .route(TARGET_PATH, put(target))
        .route(SYSRQ_PATH, put(sysrq))
        .route(SNAPSHOT_PATH, get(snapshot))
        .route(
            MIGRATION_PATH,
            get(migration).put(migrate).delete(cancel_migration),
        )
        .route(METRICS_PATH, get(metrics));
    for action in Action::ALL {
        router = router.route(
            action.path(),
            post(move |shared: State<Shared>| async move { act(&shared, action) }),
        );
    }
    router
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Shared { monitor, endings })
}

fn problem(status: StatusCode, error: String, remedy: Option<&str>) -> Response {
    let problem = Problem {
        error,
        remedy: remedy.map(str::to_owned),
    };
    (status, Json(problem)).into_response()
}

/// The status for an error: whose fault it is.
fn refused(error: &Error) -> Response {
    let status = match error {
        Error::NoVm => StatusCode::NOT_FOUND,
        Error::Exists
        | Error::State { .. }
        | Error::Saving
        | Error::NotLive(_)
        | Error::Following(_)
        | Error::Migrating
        | Error::Replicating => StatusCode::CONFLICT,
        Error::Config(_)
        | Error::Build(_)
        | Error::Target(_)
        | Error::Request(_)
        | Error::Unmovable(_)
        | Error::Snapshot(_) => StatusCode::BAD_REQUEST,
        Error::Jail(_) | Error::Lifecycle(_) | Error::Write(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, Json(Problem::from(error))).into_response()
}

fn info_of(monitor: &mut Monitor) -> Response {
    match monitor.info() {
        Ok(info) => Json(info).into_response(),
        Err(error) => refused(&error),
    }
}

async fn info(State(shared): State<Shared>) -> Response {
    info_of(&mut shared.monitor())
}

/// Does `one` with the body of a request, if it is one.
fn with_body<T>(
    shared: &Shared,
    body: Result<Json<T>, JsonRejection>,
    one: impl FnOnce(&mut Monitor, T) -> Result<(), Error>,
) -> Response {
    let body = match body {
        Ok(Json(body)) => body,
        Err(rejection) => return problem(rejection.status(), rejection.body_text(), None),
    };
    let mut monitor = shared.monitor();
    match one(&mut monitor, body) {
        Ok(()) => info_of(&mut monitor),
        Err(error) => refused(&error),
    }
}

async fn create(
    State(shared): State<Shared>,
    config: Result<Json<VmConfig>, JsonRejection>,
) -> Response {
    with_body(&shared, config, Monitor::create)
}

async fn target(
    State(shared): State<Shared>,
    target: Result<Json<Target>, JsonRejection>,
) -> Response {
    with_body(&shared, target, |monitor, target| {
        monitor.set_target(&target)
    })
}

async fn sysrq(
    State(shared): State<Shared>,
    sysrq: Result<Json<SysRq>, JsonRejection>,
) -> Response {
    with_body(&shared, sysrq, |monitor, sysrq| {
        monitor.press_sysrq(sysrq.key)
    })
}

fn act(shared: &Shared, action: Action) -> Response {
    let mut monitor = shared.monitor();
    match monitor.act(action) {
        Ok(ending) => {
            let response = info_of(&mut monitor);
            if let Some(ending) = ending {
                // The receiver lives as long as the server.
                let _ = shared.endings.send(ending);
            }
            response
        }
        Err(error) => refused(&error),
    }
}

/// The pieces of a snapshot as an answer's body.
struct Pieced(Sending);

impl hyper::body::Body for Pieced {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = match &mut self.0 {
            Sending::Resting(pieces) => Poll::Ready(pieces.next()),
            Sending::Live(live, _) => live.poll(context),
        };
        piece.map(|piece| piece.map(|piece| Ok(Frame::data(piece.into()))))
    }
}

async fn snapshot(State(shared): State<Shared>) -> Response {
    match shared.monitor().snapshot() {
        Ok(sending) => Body::new(Pieced(sending)).into_response(),
        Err(error) => refused(&error),
    }
}

fn answer<T: serde::Serialize>(result: Result<T, Error>) -> Response {
    match result {
        Ok(value) => Json(value).into_response(),
        Err(error) => refused(&error),
    }
}

async fn migrate(
    State(shared): State<Shared>,
    request: Result<Json<Request>, JsonRejection>,
) -> Response {
    match request {
        Ok(Json(request)) => answer(shared.monitor().depart(request)),
        Err(rejection) => problem(rejection.status(), rejection.body_text(), None),
    }
}

async fn migration(State(shared): State<Shared>) -> Response {
    answer(shared.monitor().migration())
}

async fn cancel_migration(State(shared): State<Shared>) -> Response {
    answer(shared.monitor().cancel_migration())
}

async fn metrics(State(shared): State<Shared>) -> Response {
    match shared.monitor().metrics() {
        Ok(metrics) => Json(metrics).into_response(),
        Err(error) => refused(&error),
    }
}

async fn unknown() -> Response {
    problem(
        StatusCode::NOT_FOUND,
        "no such path".to_owned(),
        Some("GET /vm describes the VM; POST /vm/ACTION acts on it"),
    )
}

async fn wrong_method() -> Response {
    problem(
        StatusCode::METHOD_NOT_ALLOWED,
        "this path does not take that method".to_owned(),
        Some(
            "GET or PUT /vm, PUT /vm/target, PUT /vm/sysrq, GET /vm/snapshot, GET, PUT or DELETE /vm/migration, POST /vm/ACTION, GET /metrics",
        ),
    )
}
