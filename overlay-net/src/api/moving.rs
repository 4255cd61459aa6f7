//! Guests that come and go, by the API.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /ports/NAME/departure` | | an [`Offer`] |
//! | `PUT /ports/NAME/departure` | where its guest will go: [`Whereabouts`] | `null` |
//! | `DELETE /ports/NAME/departure` | | `null`: its guest stays |
//! | `PUT /ports/NAME/arrival` | an [`Arrival`] | [`super::types::PortStatus`] |
//! | `DELETE /ports/NAME/arrival` | | [`super::types::PortStatus`]: its guest has come |
//!
//! A port whose guest has gone is removed like any other.

use std::collections::BTreeMap;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::get;
use serde::{Deserialize, Serialize};

use super::server::{Body, Shared, answer, with_body};
use super::types::{NetworkSpec, PortSpec, Rule};
use crate::bridge::PortConfig;

/// Where a guest comes from, or goes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whereabouts {
    /// Another port of this switch.
    Port(String),
    /// Another switch, by its public key.
    Peer(String),
}

/// A port whose guest is on its way here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arrival {
    /// The port.
    pub spec: PortSpec,
    /// Where its guest is now.
    pub from: Whereabouts,
    /// The epoch by which the directory knows its addresses: see [`Offer`].
    #[serde(default)]
    pub epoch: u64,
}

/// What another switch needs to know of a port whose guest may come there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Its network.
    pub network: NetworkSpec,
    /// The switch's public key, if it has a way to others.
    pub key: Option<String>,
    /// The epoch by which the directory knows its addresses.
    pub epoch: u64,
    /// How the bridge sees it.
    pub bridge: PortConfig,
    /// The security groups that it is in.
    pub groups: Vec<String>,
    /// Their rules, by name: of those that are there.
    pub rules: BTreeMap<String, Vec<Rule>>,
}

pub(super) fn routes() -> Router<Shared> {
    Router::new()
        .route(
            "/ports/{name}/departure",
            get(offer).put(leave).delete(stay),
        )
        .route(
            "/ports/{name}/arrival",
            axum::routing::put(expect).delete(arrived),
        )
}

async fn offer(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.offer(name).await)
}

async fn leave(
    State(control): State<Shared>,
    Path(name): Path<String>,
    to: Body<Whereabouts>,
) -> Response {
    with_body(&control, to, async |control, to| {
        control.leave(name, to).await
    })
    .await
}

async fn stay(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.stay(name).await)
}

async fn expect(
    State(control): State<Shared>,
    Path(name): Path<String>,
    arrival: Body<Arrival>,
) -> Response {
    with_body(&control, arrival, async |control, arrival| {
        control.expect(name, arrival).await
    })
    .await
}

async fn arrived(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.arrived(name).await)
}
