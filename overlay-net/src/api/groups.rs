//! The API's routes for security groups.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::{get, post, put};
use tokio::sync::Mutex;

use super::server::{Body, Shared, answer, with_body};
use super::types::{GroupRemoval, Rule};
use crate::control::Control;

pub(super) fn router() -> Router<Arc<Mutex<Control>>> {
    Router::new()
        .route("/groups", get(groups))
        .route("/groups/{name}", put(add_group).delete(remove_group))
        .route("/groups/{name}/rules", post(add_rule).delete(remove_rule))
        .route("/ports/{name}/groups", put(put_port_groups))
}

async fn groups(State(control): State<Shared>) -> Response {
    answer(control.lock().await.groups().await)
}

async fn add_group(
    State(control): State<Shared>,
    Path(name): Path<String>,
    rules: Body<Vec<Rule>>,
) -> Response {
    with_body(&control, rules, async |control, rules| {
        control.add_group(name, rules).await
    })
    .await
}

async fn remove_group(
    State(control): State<Shared>,
    Path(name): Path<String>,
    removal: Body<GroupRemoval>,
) -> Response {
    with_body(&control, removal, async |control, removal| {
        control.remove_group(name, removal.force).await
    })
    .await
}

async fn add_rule(
    State(control): State<Shared>,
    Path(name): Path<String>,
    rule: Body<Rule>,
) -> Response {
    with_body(&control, rule, async |control, rule| {
        control.add_rule(name, rule).await
    })
    .await
}

async fn remove_rule(
    State(control): State<Shared>,
    Path(name): Path<String>,
    rule: Body<Rule>,
) -> Response {
    with_body(&control, rule, async |control, rule| {
        control.remove_rule(name, rule).await
    })
    .await
}

async fn put_port_groups(
    State(control): State<Shared>,
    Path(name): Path<String>,
    groups: Body<Vec<String>>,
) -> Response {
    with_body(&control, groups, async |control, groups| {
        control.put_port_groups(name, groups).await
    })
    .await
}
