//! The API's server: routes and statuses; [`Control`] does the work.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde::Serialize;
use tokio::sync::Mutex;

use super::groups;
use super::types::{ControllerSpec, FlowFilter, NetworkSpec, PeerSpec, PortSpec, Problem};
use crate::control::{Control, Error};
use crate::controllers;
use crate::switch;

/// A request is never longer than this, in bytes.
const MAX_BODY: usize = 1 << 20;

pub(super) type Shared = Arc<Mutex<Control>>;

/// A body that may be none.
pub(super) type Body<T> = Result<Json<T>, JsonRejection>;

/// The API in front of `control`.
pub fn router(control: Control) -> Router {
    Router::new()
        .route("/switch", get(info))
        .route("/networks", get(networks))
        .route("/networks/{name}", put(put_network).delete(remove_network))
        .route("/networks/{name}/macs", get(macs))
        .route(
            "/networks/{name}/flows",
            get(flows).post(add_flows).delete(remove_flows),
        )
        .route(
            "/networks/{name}/controllers",
            get(controllers)
                .put(put_controllers)
                .delete(remove_controllers),
        )
        .route("/networks/{name}/trace", post(trace))
        .route("/peers", get(peers))
        .route("/peers/{name}", put(put_peer).delete(remove_peer))
        .route("/ports", get(ports))
        .route("/ports/{name}", put(put_port).delete(remove_port))
        .merge(groups::router())
        .merge(super::observing::routes())
        .merge(super::moving::routes())
        .merge(super::serving::routes())
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Arc::new(Mutex::new(control)))
}

pub(super) fn status(error: &Error) -> StatusCode {
    match error {
        Error::Switch(
            switch::Error::NoNetwork(_)
            | switch::Error::NoPort(_)
            | switch::Error::NoPeer(_)
            | switch::Error::NoGroup(_)
            | switch::Error::NoRule(_)
            | switch::Error::NoMirror(_)
            | switch::Error::NoVip(_)
            | switch::Error::Nothing(_),
        ) => StatusCode::NOT_FOUND,
        Error::Controllers(
            controllers::Error::None(_) | controllers::Error::Switch(switch::Error::NoNetwork(_)),
        ) => StatusCode::NOT_FOUND,
        Error::Switch(_) => StatusCode::CONFLICT,
        Error::Controllers(_) => StatusCode::BAD_REQUEST,
        Error::Port(_) | Error::Name(_) | Error::Key(_) | Error::Rule(_) => StatusCode::BAD_REQUEST,
        Error::NoBackend(..) => StatusCode::NOT_FOUND,
        Error::Save(_) | Error::Stopped(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

pub(super) fn problem(status: StatusCode, error: String, remedy: Option<&str>) -> Response {
    let remedy = remedy.map(str::to_owned);
    (status, Json(Problem { error, remedy })).into_response()
}

pub(super) fn answer<T: Serialize>(result: Result<T, Error>) -> Response {
    match result {
        Ok(value) => Json(value).into_response(),
        Err(error) => problem(status(&error), error.to_string(), None),
    }
}

/// Does `act` with a request's body, if it is one.
pub(super) async fn with_body<T, R: Serialize>(
    control: &Mutex<Control>,
    body: Body<T>,
    act: impl AsyncFnOnce(&mut Control, T) -> Result<R, Error>,
) -> Response {
    match body {
        Ok(Json(body)) => answer(act(&mut *control.lock().await, body).await),
        Err(rejection) => problem(rejection.status(), rejection.body_text(), None),
    }
}

async fn info(State(control): State<Shared>) -> Response {
    answer(control.lock().await.info().await)
}

async fn networks(State(control): State<Shared>) -> Response {
    answer(control.lock().await.networks().await)
}

async fn put_network(
    State(control): State<Shared>,
    Path(name): Path<String>,
    spec: Body<NetworkSpec>,
) -> Response {
    with_body(&control, spec, async |control, spec| {
        control.put_network(name, spec).await
    })
    .await
}

async fn remove_network(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.remove_network(name).await)
}

async fn macs(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.macs(name).await)
}

async fn flows(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.flows(name).await)
}

async fn add_flows(
    State(control): State<Shared>,
    Path(name): Path<String>,
    flows: Body<Vec<String>>,
) -> Response {
    with_body(&control, flows, async |control, flows| {
        control.add_flows(name, flows).await
    })
    .await
}

async fn remove_flows(
    State(control): State<Shared>,
    Path(name): Path<String>,
    filter: Body<FlowFilter>,
) -> Response {
    with_body(&control, filter, async |control, filter| {
        let FlowFilter { filter, strict } = filter;
        control.remove_flows(name, filter, strict).await
    })
    .await
}

async fn controllers(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.controllers(name).await)
}

async fn put_controllers(
    State(control): State<Shared>,
    Path(name): Path<String>,
    spec: Body<ControllerSpec>,
) -> Response {
    with_body(&control, spec, async |control, spec| {
        control.put_controllers(name, spec).await
    })
    .await
}

async fn remove_controllers(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.remove_controllers(name).await)
}

async fn trace(
    State(control): State<Shared>,
    Path(name): Path<String>,
    packet: Body<String>,
) -> Response {
    with_body(&control, packet, async |control, packet| {
        control.trace(name, packet).await
    })
    .await
}

async fn peers(State(control): State<Shared>) -> Response {
    answer(control.lock().await.peers().await)
}

async fn put_peer(
    State(control): State<Shared>,
    Path(name): Path<String>,
    spec: Body<PeerSpec>,
) -> Response {
    with_body(&control, spec, async |control, spec| {
        control.put_peer(name, spec).await
    })
    .await
}

async fn remove_peer(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.remove_peer(name).await)
}

async fn ports(State(control): State<Shared>) -> Response {
    answer(control.lock().await.ports().await)
}

async fn put_port(
    State(control): State<Shared>,
    Path(name): Path<String>,
    spec: Body<PortSpec>,
) -> Response {
    with_body(&control, spec, async |control, spec| {
        control.put_port(name, spec).await
    })
    .await
}

async fn remove_port(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.remove_port(name).await)
}

async fn unknown() -> Response {
    problem(
        StatusCode::NOT_FOUND,
        "no such path".to_owned(),
        Some("GET /switch, /networks, /ports, /groups, /peers; see `blanket net --help`"),
    )
}
