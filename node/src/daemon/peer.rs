//! What nodes ask each other.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::extract::{DefaultBodyLimit, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::Method;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::cluster::Pem;
use super::http::{self, Refusal};
use super::joining::Card;
use super::{Node, listen, migration};
use crate::cluster::identity::Peer;
use crate::cluster::members::{Member, Membership};
use crate::cluster::names::Address;
use crate::cluster::tls;
use crate::failure::{answered, failure, problem};
use crate::vm::{self, Summary};

/// How long it may take to reach a node.
const REACH: Duration = Duration::from_secs(3);

/// How long a node may take to answer: a monitor that does not answer has 5
/// seconds.
const ANSWER: Duration = Duration::from_secs(8);

/// What a node says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) version: String,
    pub(crate) provider: String,
    /// VMs whose monitors run.
    pub(crate) vms: usize,
    pub(crate) memory_bytes: u64,
    /// Memory that guests could be given now.
    pub(crate) memory_free_bytes: u64,
}

/// Connects to a node, called `who` in errors.
pub(super) async fn dial(
    who: &str,
    address: &Address,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> Result<TlsStream<TcpStream>> {
    let tcp = connect(who, address).await?;
    let handshake = TlsConnector::from(config).connect(name, tcp);
    match tokio::time::timeout(REACH, handshake).await {
        Ok(Ok(tls)) => Ok(tls),
        Ok(Err(error)) => Err(tell(who, &error.into())),
        Err(_) => Err(silent(who)),
    }
}

/// Connects to a node without TLS.
pub(super) async fn connect(who: &str, address: &Address) -> Result<TcpStream> {
    let failed = |error: std::io::Error| {
        failure(
            format!("{who} cannot be reached: {error}"),
            "check that blanketd runs there, and that its TCP port gets through",
        )
    };
    match tokio::time::timeout(REACH, TcpStream::connect(address.as_str())).await {
        Ok(Ok(tcp)) => {
            listen::tune(&tcp).map_err(failed)?;
            Ok(tcp)
        }
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => Err(silent(who)),
    }
}

fn silent(who: &str) -> anyhow::Error {
    failure(
        format!("{who} does not answer"),
        "check that the machine runs, and that its TCP port gets through",
    )
}

/// The error with a node in it, and what it means where TLS is the cause.
pub(super) fn tell(who: &str, error: &anyhow::Error) -> anyhow::Error {
    if let Some((what, remedy)) = tls::explain(error.as_ref()) {
        return failure(format!("{who}: {what}"), remedy);
    }
    let mut problem = problem(error);
    problem.error = format!("{who}: {}", problem.error);
    answered(problem)
}

/// What a node is called in errors.
pub(super) fn called(member: &Member) -> String {
    format!("node {} ({})", member.name, member.address)
}

impl Node {
    /// Asks another node.
    pub(super) async fn ask<A: DeserializeOwned>(
        &self,
        member: &Member,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<A> {
        let (trust, _) = self.joined()?;
        let who = called(member);
        let name = tls::server_name(&member.name)?;
        let tls = dial(&who, &member.address, Arc::clone(&trust.node), name).await?;
        match tokio::time::timeout(ANSWER, http::call(tls, method, path, body)).await {
            Ok(result) => result.map_err(|error| tell(&who, &error)),
            Err(_) => Err(silent(&who)),
        }
    }

    /// Asks the node that has the CA.
    pub(super) async fn ask_authority<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<A> {
        let (_, membership) = self.joined()?;
        let member = membership.member(&membership.authority);
        let member = member.context("the CA's node is no member")?;
        self.ask(member, method, path, body).await
    }

    /// The VMs of this node.
    pub(super) async fn own_vms(&self) -> Result<Vec<Summary>> {
        let home = self.home.clone();
        tokio::task::spawn_blocking(move || vm::summaries(&home, true)).await?
    }

    /// What this node says of itself.
    pub(super) async fn report(&self) -> Result<Report> {
        let vms = self.own_vms().await?;
        let memory = std::fs::read_to_string("/proc/meminfo")?;
        let figure = |name: &str| {
            let line = memory.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.split_ascii_whitespace().next());
            let kib = kib.and_then(|kib| kib.parse::<u64>().ok());
            kib.map(|kib| kib << 10)
                .with_context(|| format!("/proc/meminfo has no {name}"))
        };
        Ok(Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            provider: self.provider.to_owned(),
            vms: vms.iter().filter(|vm| vm.pid.is_some()).count(),
            memory_bytes: figure("MemTotal:")?,
            memory_free_bytes: figure("MemAvailable:")?,
        })
    }
}

type Caller = (Arc<Node>, Arc<Peer>);

/// The API for `peer`, which is a member.
pub(super) fn routes(node: &Arc<Node>, peer: Peer) -> Router {
    Router::new()
        .route("/node", get(report))
        .route("/vms", get(vms))
        .route("/switch", get(switch))
        .route("/members", get(members).put(learn))
        .route("/renew", post(renew))
        .route("/leave", post(leave))
        .route("/migrations", post(come))
        .layer(DefaultBodyLimit::max(http::MAX_BODY))
        .with_state((Arc::clone(node), Arc::new(peer)))
}

async fn report(State((node, _)): State<Caller>) -> Result<Json<Report>, Refusal> {
    Ok(Json(node.report().await?))
}

async fn vms(State((node, _)): State<Caller>) -> Result<Json<Vec<Summary>>, Refusal> {
    Ok(Json(node.own_vms().await?))
}

async fn switch(State((node, _)): State<Caller>) -> Json<Card> {
    Json(node.card().await)
}

async fn members(State((node, _)): State<Caller>) -> Result<Json<Membership>, Refusal> {
    let (_, membership) = node.joined()?;
    Ok(Json(Membership::clone(&membership)))
}

async fn learn(
    State((node, peer)): State<Caller>,
    Json(membership): Json<Membership>,
) -> Result<Json<()>, Refusal> {
    let (_, known) = node.joined()?;
    if !known.is_authority(&peer) {
        return Err(anyhow::anyhow!("only the CA's node says who is in the cluster").into());
    }
    node.learn(membership).await?;
    Ok(Json(()))
}

async fn renew(
    State((node, peer)): State<Caller>,
    Json(request): Json<Pem>,
) -> Result<Json<Pem>, Refusal> {
    let pem = node.renew_for(&peer, &request.pem)?;
    Ok(Json(Pem { pem }))
}

async fn come(
    State((node, peer)): State<Caller>,
    Json(call): Json<migration::Call>,
) -> Result<Json<()>, Refusal> {
    node.fetch(&peer, &call)?;
    Ok(Json(()))
}

async fn leave(State((node, peer)): State<Caller>) -> Result<Json<()>, Refusal> {
    node.remove(&peer.name, "itself").await?;
    Ok(Json(()))
}
