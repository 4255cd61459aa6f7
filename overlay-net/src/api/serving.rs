//! Routes for virtual addresses.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::{get, put};
use tokio::sync::Mutex;

use super::server::{Body, Shared, answer, with_body};
use super::services::{BackendChange, VipSpec};
use crate::control::Control;

pub(super) fn routes() -> Router<Arc<Mutex<Control>>> {
    Router::new()
        .route("/vips", get(vips))
        .route("/vips/{name}", put(put_vip).delete(remove_vip))
        .route(
            "/vips/{name}/backends/{backend}",
            put(put_backend).delete(remove_backend),
        )
}

async fn vips(State(control): State<Shared>) -> Response {
    answer(control.lock().await.vips().await)
}

async fn put_vip(
    State(control): State<Shared>,
    Path(name): Path<String>,
    spec: Body<VipSpec>,
) -> Response {
    with_body(&control, spec, async |control, spec| {
        control.put_vip(name, spec).await
    })
    .await
}

async fn remove_vip(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.remove_vip(name).await)
}

async fn put_backend(
    State(control): State<Shared>,
    Path((name, backend)): Path<(String, String)>,
    change: Body<BackendChange>,
) -> Response {
    with_body(&control, change, async |control, change| {
        control.put_backend(name, backend, change).await
    })
    .await
}

async fn remove_backend(
    State(control): State<Shared>,
    Path((name, backend)): Path<(String, String)>,
) -> Response {
    answer(control.lock().await.remove_backend(name, backend).await)
}
