//! Streams of bytes from one node to a service on another.
//!
//! A service is a Unix stream socket that has a name on its node. A stream to
//! it is carried in one TCP connection of its own: bytes, the end of either
//! direction, and the wish to wait pass through as they are. Who needs more
//! throughput opens several; or has the connections itself ([`super::lend`]).

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blanket_migration::records::Secrets;
use rustls::ClientConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tokio_rustls::client;
use tokio_rustls::server::TlsStream;

use super::http::Io;
use super::lend::{asks_for_socket, used};
use super::listen::HANDSHAKE;
use super::{Node, cluster, lock, peer};
use crate::cluster::hello::{self, Answer, Hello, Ticket};
use crate::cluster::identity::{NodeId, Peer};
use crate::cluster::members::{Member, Membership};
use crate::cluster::names::{NodeName, ServiceName};
use crate::cluster::secrets::Kept;
use crate::cluster::tls;
use crate::failure::{answered, failure, problem};

/// How long a ticket is good for.
const TICKET_LIFE: Duration = Duration::from_secs(30);

/// So many tickets can be waiting to be redeemed.
const MAX_TICKETS: usize = 1024;

/// Bytes that are moved at once.
const PIECE: usize = 256 << 10;

/// Whether a stream's bytes are encrypted. Who may open it is settled with TLS
/// either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Carriage {
    /// TLS, as everything else.
    Tls,
    /// Plain TCP, for links that are trusted.
    Plain,
}

/// When a stream to the other node is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// When somebody connects.
    AtOnce,
    /// When something is to be sent on it, or its end: who connects has to speak
    /// first, and can do so when there was no way to the other node before.
    WhenUsed,
}

/// How a stream within TLS gets to the other node.
enum Way {
    /// Its ends have the connection, and its secrets.
    Sealed(TcpStream, Secrets),
    /// By the daemons.
    Relayed(Box<dyn Io>),
}

/// What a ticket is for.
#[derive(Debug)]
struct Right {
    node: NodeId,
    service: ServiceName,
    until: Instant,
}

/// The tickets that wait to be redeemed.
#[derive(Debug, Default)]
pub(super) struct Tickets(Mutex<HashMap<String, Right>>);

impl Tickets {
    pub(super) fn make(&self, node: NodeId, service: ServiceName) -> Result<Ticket> {
        let text = cluster::random_text()?;
        let now = Instant::now();
        let mut all = lock(&self.0);
        all.retain(|_, right| right.until > now);
        anyhow::ensure!(all.len() < MAX_TICKETS, "too many streams are being opened");
        let until = now + TICKET_LIFE;
        let right = Right {
            node,
            service,
            until,
        };
        all.insert(text.clone(), right);
        Ok(Ticket(text))
    }

    /// What a ticket is for: the node that may open a stream, and the service.
    /// It is good no more.
    fn redeem(&self, ticket: &Ticket) -> Option<(NodeId, ServiceName)> {
        let right = lock(&self.0).remove(&ticket.0)?;
        (right.until > Instant::now()).then_some((right.node, right.service))
    }
}

async fn send(io: &mut (impl Io + ?Sized), frame: &impl Serialize) -> Result<()> {
    io.write_all(&hello::encode(frame)?).await?;
    io.flush().await?;
    Ok(())
}

async fn receive<T: DeserializeOwned>(io: &mut (impl Io + ?Sized)) -> Result<T> {
    let read = async {
        let mut head = [0; hello::HEAD];
        io.read_exact(&mut head).await?;
        let mut body = vec![0; hello::body_len(head)?];
        io.read_exact(&mut body).await?;
        Ok(hello::decode(&body)?)
    };
    tokio::time::timeout(HANDSHAKE, read).await?
}

fn refusal(error: &anyhow::Error) -> Answer {
    let problem = problem(error);
    let cut = |text: String| text.chars().take(400).collect::<String>();
    Answer::Refused {
        error: cut(problem.error),
        remedy: problem.remedy.map(cut),
    }
}

/// Serves a stream that came within TLS, whose secrets are in `kept`.
pub(super) async fn serve(
    node: &Arc<Node>,
    mut tls: TlsStream<TcpStream>,
    kept: &Kept,
    peer: Peer,
    checked: Result<()>,
) -> Result<()> {
    let wanted: Hello = receive(&mut tls).await?;
    let answer = async {
        checked?;
        match wanted {
            Hello::Open(service) => Ok((Answer::Open, Some(node.reach(&service, &peer.id).await?))),
            Hello::Sealed(service) => {
                let local = node.reach(&service, &peer.id).await?;
                let can = node.takes_sockets(&service) && kept.has(tls.get_ref().1);
                let answer = if can { Answer::Sealed } else { Answer::Open };
                Ok((answer, Some(local)))
            }
            Hello::Ticket(service) => {
                node.service(&service, &peer.id)?;
                let ticket = node.tickets.make(peer.id.clone(), service)?;
                Ok((Answer::Ticket(ticket), None))
            }
            Hello::Redeem(_) | Hello::Direct(_) => {
                Err(anyhow::anyhow!("a ticket is for plain TCP"))
            }
        }
    };
    match answer.await {
        Ok((Answer::Sealed, Some(local))) => {
            send(&mut tls, &Answer::Sealed).await?;
            // The other node says nothing before it has this answer: there is
            // nothing of it in rustls.
            let (tcp, connection) = tls.into_inner();
            let secrets = kept.of_server(connection)?;
            node.lend(local, tcp, Some(secrets), &peer.id).await
        }
        answer => {
            drop(kept.forget());
            answer_and_carry(node, tls, answer, &peer.id).await
        }
    }
}

/// Serves a stream that came over plain TCP.
pub(super) async fn serve_plain(
    node: &Arc<Node>,
    mut tcp: TcpStream,
    permit: OwnedSemaphorePermit,
) -> Result<()> {
    let wanted: Hello = receive(&mut tcp).await?;
    drop(permit);
    let (ticket, direct) = match wanted {
        Hello::Redeem(ticket) => (ticket, false),
        Hello::Direct(ticket) => (ticket, true),
        _ => anyhow::bail!("it came without TLS and without a ticket"),
    };
    let (from, service) = node
        .tickets
        .redeem(&ticket)
        .context("its ticket is wrong, used or expired")?;
    match node.reach(&service, &from).await {
        Ok(local) if direct && node.takes_sockets(&service) => {
            send(&mut tcp, &Answer::Open).await?;
            node.lend(local, tcp, None, &from).await
        }
        Ok(_) if direct => {
            let error = anyhow::anyhow!("the service {service} takes no sockets");
            answer_and_carry(node, tcp, Err(error), &from).await
        }
        reached => {
            let answer = reached.map(|local| (Answer::Open, Some(local)));
            answer_and_carry(node, tcp, answer, &from).await
        }
    }
}

async fn answer_and_carry(
    node: &Arc<Node>,
    mut io: impl Io,
    answer: Result<(Answer, Option<UnixStream>)>,
    from: &NodeId,
) -> Result<()> {
    match answer {
        Ok((answer, service)) => {
            send(&mut io, &answer).await?;
            match service {
                Some(service) => Ok(node.carry(io, service, from).await?),
                None => Ok(io.shutdown().await?),
            }
        }
        Err(error) => {
            send(&mut io, &refusal(&error)).await?;
            let _ = io.shutdown().await;
            Err(error)
        }
    }
}

/// A member of the cluster by its name.
pub(super) fn known<'a>(membership: &'a Membership, name: &NodeName) -> Result<&'a Member> {
    membership.member(name).ok_or_else(|| {
        failure(
            format!("there is no node {name}"),
            "blanket node ls shows all",
        )
    })
}

/// What other nodes can open streams to.
#[derive(Debug)]
pub(super) struct Service {
    /// A Unix stream socket.
    at: PathBuf,
    /// The one node that may, if not all.
    only: Option<NodeId>,
    /// It takes connections itself: [`blanket_migration::way`].
    takes_sockets: bool,
}

impl Service {
    fn is_for(&self, node: &NodeId) -> bool {
        self.only.as_ref().is_none_or(|only| only == node)
    }
}

/// A service under its name, for as long as this is held.
pub(crate) struct Offer {
    node: Arc<Node>,
    service: ServiceName,
}

impl Offer {
    /// The service takes connections itself: [`blanket_migration::way`].
    pub(crate) fn with_sockets(self) -> Self {
        if let Some(service) = lock(&self.node.services).get_mut(&self.service) {
            service.takes_sockets = true;
        }
        self
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        lock(&self.node.services).remove(&self.service);
    }
}

/// A Unix socket at which each connection becomes a stream to a service on
/// another node, for as long as this is held.
pub(crate) struct Forward {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Node {
    /// Offers the Unix stream socket `at` to other nodes as `service`, or to `only` one.
    pub(crate) fn offer(
        self: &Arc<Self>,
        service: ServiceName,
        at: PathBuf,
        only: Option<&NodeName>,
    ) -> Result<Offer> {
        let only = only.map(|name| {
            let (_, membership) = self.joined()?;
            Ok::<_, anyhow::Error>(known(&membership, name)?.id.clone())
        });
        let only = only.transpose()?;
        let mut services = lock(&self.services);
        anyhow::ensure!(
            !services.contains_key(&service),
            "there is a service {service} already"
        );
        let offered = Service {
            at,
            only,
            takes_sockets: false,
        };
        services.insert(service.clone(), offered);
        Ok(Offer {
            node: Arc::clone(self),
            service,
        })
    }

    fn takes_sockets(&self, service: &ServiceName) -> bool {
        let services = lock(&self.services);
        services
            .get(service)
            .is_some_and(|service| service.takes_sockets)
    }

    /// Where a service is. Who may not open it is not told that it is there.
    fn service(&self, service: &ServiceName, from: &NodeId) -> Result<PathBuf> {
        let services = lock(&self.services);
        let open = services.get(service).filter(|service| service.is_for(from));
        open.map(|service| service.at.clone())
            .with_context(|| format!("there is no service {service}"))
    }

    async fn reach(&self, service: &ServiceName, from: &NodeId) -> Result<UnixStream> {
        let path = self.service(service, from)?;
        let connected = UnixStream::connect(path).await;
        connected.with_context(|| format!("the service {service} does not answer"))
    }

    /// Opens a stream to a service on another node.
    pub(crate) async fn open_stream(
        &self,
        name: &NodeName,
        service: &ServiceName,
        carriage: Carriage,
    ) -> Result<Box<dyn Io>> {
        let (_, membership) = self.joined()?;
        let member = known(&membership, name)?;
        match carriage {
            Carriage::Plain => {
                let tcp = self.open_plain(member, service, Hello::Redeem).await?;
                Ok(Box::new(tcp))
            }
            Carriage::Tls => {
                let (trust, _) = self.joined()?;
                let wanted = Hello::Open(service.clone());
                match self.greet(member, &trust.stream, wanted).await? {
                    (Answer::Open, tls) => Ok(Box::new(tls)),
                    _ => Err(unclear(member)),
                }
            }
        }
    }

    /// Says something within TLS; the answer, and the stream behind it.
    async fn greet(
        &self,
        member: &Member,
        config: &Arc<ClientConfig>,
        wanted: Hello,
    ) -> Result<(Answer, client::TlsStream<TcpStream>)> {
        let who = peer::called(member);
        let config = Arc::clone(config);
        let server = tls::server_name(&member.name)?;
        let mut tls = peer::dial(&who, &member.address, config, server).await?;
        let answer = exchange(&mut tls, &wanted).await;
        let answer = answer.map_err(|error| peer::tell(&who, &error))?;
        Ok((answer, tls))
    }

    async fn open_plain(
        &self,
        member: &Member,
        service: &ServiceName,
        redeem: fn(Ticket) -> Hello,
    ) -> Result<TcpStream> {
        let (trust, _) = self.joined()?;
        let wanted = Hello::Ticket(service.clone());
        let (answer, tls) = self.greet(member, &trust.stream, wanted).await?;
        drop(tls);
        let Answer::Ticket(ticket) = answer else {
            return Err(unclear(member));
        };
        let who = peer::called(member);
        let mut tcp = peer::connect(&who, &member.address).await?;
        match exchange(&mut tcp, &redeem(ticket)).await {
            Ok(Answer::Open) => Ok(tcp),
            Ok(_) => Err(unclear(member)),
            Err(error) => Err(peer::tell(&who, &error)),
        }
    }

    /// Opens a stream within TLS to a service that may take its connection itself.
    async fn open_sealed(&self, member: &Member, service: &ServiceName) -> Result<Way> {
        let (trust, _) = self.joined()?;
        let (config, kept) = Kept::asking(&trust.stream);
        let wanted = Hello::Sealed(service.clone());
        match self.greet(member, &config, wanted).await? {
            // The service says nothing before this end has.
            (Answer::Sealed, tls) => {
                let (tcp, connection) = tls.into_inner();
                Ok(Way::Sealed(tcp, kept.of_client(connection)?))
            }
            (Answer::Open, tls) => {
                drop(kept.forget());
                Ok(Way::Relayed(Box::new(tls)))
            }
            _ => Err(unclear(member)),
        }
    }

    /// Makes a Unix socket at `path`; each connection to it becomes a stream to
    /// a service on another node.
    pub(crate) fn forward(
        self: &Arc<Self>,
        path: &Path,
        name: NodeName,
        service: ServiceName,
        carriage: Carriage,
    ) -> Result<Forward> {
        self.forward_when(Opened::AtOnce, path, name, service, carriage)
    }

    /// The same, with streams that are opened when that is said.
    pub(crate) fn forward_when(
        self: &Arc<Self>,
        opened: Opened,
        path: &Path,
        name: NodeName,
        service: ServiceName,
        carriage: Carriage,
    ) -> Result<Forward> {
        let listener = UnixListener::bind(path)
            .with_context(|| format!("cannot listen on {}", path.display()))?;
        let node = Arc::clone(self);
        let task = tokio::spawn(async move {
            // Those that are under way end with this task.
            let mut streams = JoinSet::new();
            while let Ok((local, _)) = listener.accept().await {
                while streams.try_join_next().is_some() {}
                let (node, name, service) = (Arc::clone(&node), name.clone(), service.clone());
                streams.spawn(async move {
                    if opened == Opened::WhenUsed && used(&local).await.is_err() {
                        return;
                    }
                    if let Err(error) = node.forward_one(local, &name, &service, carriage).await {
                        tracing::warn!("a stream to {service} on {name} has ended: {error:#}");
                    }
                });
            }
        });
        Ok(Forward {
            path: path.to_owned(),
            task,
        })
    }

    async fn forward_one(
        &self,
        local: UnixStream,
        name: &NodeName,
        service: &ServiceName,
        carriage: Carriage,
    ) -> Result<()> {
        let (_, membership) = self.joined()?;
        let member = known(&membership, name)?;
        let (tcp, secrets) = match (carriage, asks_for_socket(&local)) {
            (_, false) => {
                let remote = self.open_stream(name, service, carriage).await?;
                return Ok(self.carry(remote, local, &member.id).await?);
            }
            (Carriage::Plain, true) => {
                (self.open_plain(member, service, Hello::Direct).await?, None)
            }
            (Carriage::Tls, true) => match self.open_sealed(member, service).await? {
                Way::Sealed(tcp, secrets) => (tcp, Some(secrets)),
                // The service answers the question.
                Way::Relayed(remote) => {
                    return Ok(self.carry(remote, local, &member.id).await?);
                }
            },
        };
        // The question is answered here.
        local.try_read(&mut [0])?;
        self.lend(local, tcp, secrets, &member.id).await
    }

    /// Moves bytes both ways until both have ended, one has failed, or the node
    /// `with` is removed from the cluster.
    async fn carry(&self, mut a: impl Io, mut b: UnixStream, with: &NodeId) -> io::Result<()> {
        tokio::select! {
            done = copy_bidirectional_with_sizes(&mut a, &mut b, PIECE, PIECE) => done.map(drop),
            () = self.removed(with) => Err(io::Error::other("the node was removed from the cluster")),
        }
    }

    /// Waits until a node is removed from the cluster.
    pub(super) async fn removed(&self, node: &NodeId) {
        let mut membership = self.membership.subscribe();
        let removed = membership.wait_for(|membership| {
            let gone = |all: &Membership| all.is_removed(node);
            membership.as_deref().is_none_or(gone)
        });
        let _ = removed.await;
    }
}

fn unclear(member: &Member) -> anyhow::Error {
    anyhow::anyhow!("{}: the answer cannot be understood", peer::called(member))
}

async fn exchange(io: &mut impl Io, wanted: &Hello) -> Result<Answer> {
    send(io, wanted).await?;
    match receive(io).await? {
        Answer::Refused { error, remedy } => {
            Err(answered(blanket_vmm::api::types::Problem { error, remedy }))
        }
        answer => Ok(answer),
    }
}
