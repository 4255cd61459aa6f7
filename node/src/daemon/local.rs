//! What `blanket` asks the daemon of its own node, over a Unix socket that is
//! its owner's only.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::response::Response;
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use hyper::Method;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::http::{self, Refusal, WhileHeard};
use super::peer::Report;
use super::stream::Carriage;
use super::{Node, cluster};
use crate::cluster::members::{Member, Membership};
use crate::cluster::names::{Address, NodeName, ServiceName};
use crate::cluster::token::Token;
use crate::failure::{failure, problem};
use crate::home::Home;
use crate::vm::Summary;

/// The longest that a request may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The longest life of a join token, in minutes.
const MAX_MINUTES: u64 = 24 * 60;

/// `POST /cluster`: this node becomes a cluster.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Create {
    pub(crate) name: Option<NodeName>,
    pub(crate) address: Option<Address>,
}

/// `POST /cluster/join`: this node joins one.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Join {
    pub(crate) token: String,
    /// Where the CA's node is, if not where the token says.
    pub(crate) at: Option<Address>,
    pub(crate) name: Option<NodeName>,
    pub(crate) address: Option<Address>,
}

/// What this node is now.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Joined {
    pub(crate) name: NodeName,
    pub(crate) address: Address,
    /// The CA's fingerprint.
    pub(crate) ca: String,
    pub(crate) nodes: usize,
}

/// `POST /cluster/tokens`: a join token, good for so long.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TokenLife {
    pub(crate) minutes: u64,
}

/// The join token.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NewToken {
    pub(crate) token: String,
    pub(crate) address: Address,
    pub(crate) minutes: u64,
}

/// A node as others see it now: an element of `blanket node ls --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NodeLine {
    pub(crate) name: NodeName,
    pub(crate) address: Address,
    /// `up` or `unreachable`.
    pub(crate) state: String,
    /// Whether this is the node that was asked.
    pub(crate) own: bool,
    /// Whether it has the cluster's CA.
    pub(crate) ca: bool,
    /// What it says of itself.
    #[serde(flatten)]
    pub(crate) report: Option<Report>,
    /// Why it is unreachable.
    pub(crate) reason: Option<String>,
}

/// The VMs of a node.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NodeVms {
    pub(crate) node: NodeName,
    /// None if it is unreachable.
    pub(crate) vms: Option<Vec<Summary>>,
    /// Why it is.
    pub(crate) reason: Option<String>,
}

/// `POST /cluster/services`: a Unix stream socket to which other nodes can open
/// streams, for as long as the client reads the answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) service: ServiceName,
    pub(crate) socket: PathBuf,
    /// Only this node may open streams; otherwise all may.
    #[serde(default)]
    pub(crate) node: Option<NodeName>,
}

/// `POST /cluster/forwards`: a Unix stream socket is made, and each connection
/// to it becomes a stream to a service on another node, for as long as the
/// client reads the answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Forward {
    pub(crate) node: NodeName,
    pub(crate) service: ServiceName,
    pub(crate) socket: PathBuf,
    pub(crate) carriage: Carriage,
}

/// `POST /cluster/migrations`: another node comes for a VM of this one. It can
/// for as long as the client reads the answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Migrate {
    pub(crate) node: NodeName,
    /// Where the client listens.
    pub(crate) control: PathBuf,
    /// Where the VM's monitor does.
    pub(crate) memory: PathBuf,
    pub(crate) carriage: Carriage,
}

/// The daemon's socket.
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Takes the place of what an earlier daemon has left.
    pub(super) fn bind(node: &Node) -> Result<Self> {
        let path = node.home.daemon_socket();
        let make = || {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => (),
            }
            UnixListener::bind(&path)
        };
        let socket = make().with_context(|| format!("cannot listen on {}", path.display()))?;
        Ok(Self { socket, path })
    }

    /// Serves commands, for ever.
    pub(super) async fn serve(&self, node: &Arc<Node>) {
        loop {
            match self.socket.accept().await {
                Ok((stream, _)) => {
                    let router = routes(node);
                    tokio::spawn(http::serve_unlimited(stream, router));
                }
                Err(error) => {
                    tracing::warn!("{}: {error}", self.path.display());
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn routes(node: &Arc<Node>) -> Router {
    Router::new()
        .route("/cluster", post(create))
        .route("/cluster/tokens", post(token))
        .route("/cluster/join", post(join))
        .route("/cluster/leave", post(leave))
        .route("/cluster/nodes", get(nodes))
        .route("/cluster/nodes/{name}", delete(remove))
        .route("/cluster/vms", get(vms))
        .route("/cluster/services", post(offer))
        .route("/cluster/forwards", post(forward))
        .route("/cluster/migrations", post(migrate))
        .layer(DefaultBodyLimit::max(http::MAX_BODY))
        .with_state(Arc::clone(node))
}

type Shared = State<Arc<Node>>;

/// The name that was asked for, or the machine's.
fn name_or_own(name: Option<NodeName>) -> Result<NodeName> {
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    name.or_else(|| NodeName::suggested(&host)).ok_or_else(|| {
        failure(
            format!("the machine's name '{host}' is none for a node"),
            "name one with --name",
        )
    })
}

fn described(node: &Node, membership: &Membership) -> Result<Joined> {
    let (trust, _) = node.joined()?;
    let own = membership.member(trust.name());
    let own = own.context("this node is no member")?;
    Ok(Joined {
        name: own.name.clone(),
        address: own.address.clone(),
        ca: cluster::fingerprint(&trust).to_string(),
        nodes: membership.members.len(),
    })
}

async fn create(State(node): Shared, Json(request): Json<Create>) -> Result<Json<Joined>, Refusal> {
    let name = name_or_own(request.name)?;
    let membership = node.create(name, request.address).await?;
    Ok(Json(described(&node, &membership)?))
}

async fn token(
    State(node): Shared,
    Json(TokenLife { minutes }): Json<TokenLife>,
) -> Result<Json<NewToken>, Refusal> {
    if !(1..=MAX_MINUTES).contains(&minutes) {
        let most = format!("take 1 to {MAX_MINUTES} minutes");
        return Err(failure("no token is good for so long", most).into());
    }
    let token = node.make_token(Duration::from_secs(minutes * 60))?;
    Ok(Json(NewToken {
        token: token.text(),
        address: token.address,
        minutes,
    }))
}

async fn join(State(node): Shared, Json(request): Json<Join>) -> Result<Json<Joined>, Refusal> {
    let token: Token = request.token.parse()?;
    let name = name_or_own(request.name)?;
    let membership = node.join(&token, request.at, name, request.address).await?;
    Ok(Json(described(&node, &membership)?))
}

async fn leave(State(node): Shared) -> Result<Json<()>, Refusal> {
    node.leave().await?;
    Ok(Json(()))
}

async fn remove(State(node): Shared, Path(name): Path<NodeName>) -> Result<Json<()>, Refusal> {
    node.remove(&name, "blanket node rm").await?;
    Ok(Json(()))
}

async fn nodes(State(node): Shared) -> Result<Json<Vec<NodeLine>>, Refusal> {
    Ok(Json(node.node_lines().await?))
}

async fn vms(State(node): Shared) -> Result<Json<Vec<NodeVms>>, Refusal> {
    Ok(Json(node.all_vms().await?))
}

async fn offer(State(node): Shared, Json(offer): Json<Offer>) -> Result<Response, Refusal> {
    let held = node.offer(offer.service, offer.socket, offer.node.as_ref())?;
    Ok(WhileHeard::answer(held))
}

async fn forward(State(node): Shared, Json(to): Json<Forward>) -> Result<Response, Refusal> {
    let held = node.forward(&to.socket, to.node, to.service, to.carriage)?;
    Ok(WhileHeard::answer(held))
}

async fn migrate(State(node): Shared, Json(wanted): Json<Migrate>) -> Result<Response, Refusal> {
    Ok(WhileHeard::answer(node.send_for(wanted).await?))
}

/// Why a node has not answered, in one line.
fn reason(error: &anyhow::Error) -> String {
    let problem = problem(error);
    match problem.remedy {
        Some(remedy) => format!("{} ({remedy})", problem.error),
        None => problem.error,
    }
}

impl Node {
    /// Does something for each node, all at the same time; in the nodes' order.
    async fn each<T, F>(
        self: &Arc<Self>,
        members: &[Member],
        one: impl Fn(Arc<Self>, Member) -> F,
    ) -> Result<Vec<T>>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let mut tasks = JoinSet::new();
        for (at, member) in members.iter().enumerate() {
            let task = one(Arc::clone(self), member.clone());
            tasks.spawn(async move { (at, task.await) });
        }
        let mut all = Vec::new();
        while let Some(done) = tasks.join_next().await {
            all.push(done?);
        }
        all.sort_by_key(|(at, _)| *at);
        Ok(all.into_iter().map(|(_, one)| one).collect())
    }

    /// All nodes, as they are now.
    pub(super) async fn node_lines(self: &Arc<Self>) -> Result<Vec<NodeLine>> {
        let (trust, membership) = self.joined()?;
        let own = trust.name().clone();
        let authority = membership.authority.clone();
        self.each(&membership.members, move |node, member| {
            let (is_own, is_ca) = (member.name == own, member.name == authority);
            async move {
                let report = if is_own {
                    node.report().await
                } else {
                    node.ask(&member, Method::GET, "/node", None::<&()>).await
                };
                let state = if report.is_ok() { "up" } else { "unreachable" };
                NodeLine {
                    name: member.name,
                    address: member.address,
                    state: state.to_owned(),
                    own: is_own,
                    ca: is_ca,
                    reason: report.as_ref().err().map(reason),
                    report: report.ok(),
                }
            }
        })
        .await
    }

    /// The VMs of all nodes; of this one alone, if it is in no cluster.
    pub(super) async fn all_vms(self: &Arc<Self>) -> Result<Vec<NodeVms>> {
        let Ok((trust, membership)) = self.joined() else {
            let vms = self.own_vms().await?;
            return Ok(vec![NodeVms {
                node: name_or_own(None)?,
                vms: Some(vms),
                reason: None,
            }]);
        };
        let own = trust.name().clone();
        self.each(&membership.members, move |node, member| {
            let is_own = member.name == own;
            async move {
                let vms = if is_own {
                    node.own_vms().await
                } else {
                    node.ask(&member, Method::GET, "/vms", None::<&()>).await
                };
                NodeVms {
                    node: member.name,
                    reason: vms.as_ref().err().map(reason),
                    vms: vms.ok(),
                }
            }
        })
        .await
    }
}

/// Connects to the daemon of this node.
async fn connect(home: &Home) -> Result<UnixStream> {
    let socket = home.daemon_socket();
    UnixStream::connect(&socket).await.map_err(|error| {
        let path = socket.display();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => failure(
                format!("blanketd does not run here: there is nobody at {path}"),
                "blanket up starts it at each boot; or run blanketd",
            ),
            _ => failure(
                format!("cannot ask blanketd at {path}: {error}"),
                "run this as the user that blanketd runs as",
            ),
        }
    })
}

fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")
}

/// Asks the daemon of this node.
pub(crate) fn ask<A: DeserializeOwned>(
    home: &Home,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<A> {
    runtime()?.block_on(async {
        let asked = http::call(connect(home).await?, method, path, body);
        tokio::time::timeout(LIMIT, asked)
            .await
            .context("blanketd does not answer")?
    })
}

/// What the daemon does for as long as this is held.
pub(crate) struct Hold {
    _heard: http::Heard,
    _runtime: Runtime,
}

/// Asks the daemon of this node for what it does as long as it is heard.
pub(crate) fn hold(home: &Home, path: &str, body: &impl Serialize) -> Result<Hold> {
    let runtime = runtime()?;
    let heard = runtime.block_on(async {
        let asked = http::listen(connect(home).await?, path, body);
        tokio::time::timeout(LIMIT, asked)
            .await
            .context("blanketd does not answer")?
    })?;
    Ok(Hold {
        _heard: heard,
        _runtime: runtime,
    })
}
