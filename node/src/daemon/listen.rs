//! Other nodes' connections.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::routing::any;
use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{Node, cluster, http, peer, stream};
use crate::cluster::hello;
use crate::cluster::identity::Peer;
use crate::cluster::secrets::Kept;
use crate::cluster::tls::Protocol;
use crate::failure::failure;

/// So many connections may be about to say who they are.
const MAX_STRANGERS: usize = 128;

/// How long they may take to.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a request of another node may take.
const REQUEST: Duration = Duration::from_secs(60);

/// How long a request to join may take.
const JOIN: Duration = Duration::from_secs(20);

/// Sets what all connections between nodes have: nothing waits for more to
/// send, and an end that is gone is noticed within half a minute.
pub(super) fn tune(tcp: &TcpStream) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(tcp, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(tcp, 4)?;
    sockopt::set_tcp_user_timeout(tcp, 30_000)?;
    Ok(())
}

/// Where a node listens, for as long as this is held.
pub(super) struct Bound {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Node {
    /// Listens from now on, if it does not yet. Returns where.
    pub(super) async fn start_listening(self: &Arc<Self>) -> Result<SocketAddr> {
        let mut bound = self.bound.lock().await;
        if let Some(bound) = &*bound {
            return Ok(bound.address);
        }
        let listener = match TcpListener::bind(self.listen).await {
            // A machine without IPv6.
            Err(_) if self.listen.ip() == IpAddr::from([0u16; 8]) => {
                TcpListener::bind(SocketAddr::from(([0; 4], self.listen.port()))).await
            }
            other => other,
        };
        let listener = listener.map_err(|error| {
            failure(
                format!("cannot listen on {}: {error}", self.listen),
                "end what uses that port, or have blanketd use another with --listen",
            )
        })?;
        let address = listener.local_addr()?;
        tracing::info!("listening on {address}");
        let task = tokio::spawn(accept(Arc::downgrade(self), listener));
        *bound = Some(Bound { address, task });
        Ok(address)
    }

    /// Listens no more. Connections stay.
    pub(super) async fn stop_listening(&self) {
        *self.bound.lock().await = None;
    }
}

async fn accept(node: std::sync::Weak<Node>, listener: TcpListener) {
    let strangers = Arc::new(Semaphore::new(MAX_STRANGERS));
    loop {
        let (tcp, from) = match listener.accept().await {
            Ok(connection) => connection,
            Err(error) => {
                // Out of descriptors, most likely: some are about to be closed.
                tracing::warn!("cannot take a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(node) = node.upgrade() else { return };
        let Ok(permit) = Arc::clone(&strangers).try_acquire_owned() else {
            continue;
        };
        tokio::spawn(async move {
            let from = from.ip().to_canonical();
            if let Err(error) = serve(&node, tcp, from, permit).await {
                tracing::info!("a connection from {from} was refused: {error:#}");
            }
        });
    }
}

async fn serve(
    node: &Arc<Node>,
    tcp: TcpStream,
    from: IpAddr,
    permit: OwnedSemaphorePermit,
) -> Result<()> {
    let Some(trust) = node.trust() else {
        return Ok(());
    };
    tune(&tcp)?;
    let mut first = [0];
    tokio::time::timeout(HANDSHAKE, tcp.peek(&mut first)).await??;
    if first[0] == hello::MAGIC[0] {
        return stream::serve_plain(node, tcp, permit).await;
    }
    let (config, kept) = Kept::serving(&trust.server);
    let acceptor = TlsAcceptor::from(config);
    let accepted = tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp).into_fallible()).await?;
    let tls = match accepted {
        Ok(tls) => tls,
        Err((error, tcp)) => {
            let_it_read(tcp).await;
            return Err(error.into());
        }
    };
    let connection = tls.get_ref().1;
    let protocol = Protocol::of(connection.alpn_protocol());
    if protocol != Some(Protocol::Stream) {
        drop(kept.forget());
    }
    if protocol == Some(Protocol::Join) {
        // A stranger still: the permit is held.
        http::serve(tls, cluster::join_routes(node, from), JOIN).await;
        return Ok(());
    }
    let own = connection.peer_certificates().and_then(<[_]>::first);
    let peer = own.map(Peer::of).transpose()?;
    let (Some(peer), Some(protocol)) = (peer, protocol) else {
        anyhow::bail!("it has shown no certificate");
    };
    drop(permit);
    dispatch(node, tls, &kept, peer, protocol).await
}

/// Serves a node whose certificate is of this cluster.
async fn dispatch(
    node: &Arc<Node>,
    tls: TlsStream<TcpStream>,
    kept: &Kept,
    peer: Peer,
    protocol: Protocol,
) -> Result<()> {
    let checked = node.check_peer(&peer);
    match (protocol, checked) {
        (Protocol::Stream, checked) => stream::serve(node, tls, kept, peer, checked).await,
        (_, Ok(())) => {
            http::serve(tls, peer::routes(node, peer), REQUEST).await;
            Ok(())
        }
        (_, Err(error)) => {
            let text = format!("{error:#}");
            let refusal = http::Refusal::from(error);
            let router = Router::new().fallback(any(move || async move { refusal }));
            http::serve(tls, router, REQUEST).await;
            anyhow::bail!(text)
        }
    }
}

impl Node {
    /// Whether a node with a certificate of this cluster is still in it.
    fn check_peer(&self, peer: &Peer) -> Result<()> {
        let (_, membership) = self.joined()?;
        if membership.is_removed(&peer.id) {
            return Err(failure(
                format!("node {} was removed from the cluster", peer.name),
                "take it out there (blanket node leave), then join again with a new token",
            ));
        }
        Ok(())
    }
}

/// Waits until the other end has read why it is refused: closing at once, with
/// what it has sent unread, would take that away from it.
async fn let_it_read(mut tcp: TcpStream) {
    let _ = tcp.shutdown().await;
    let mut rest = [0; 1024];
    let drain = async { while matches!(tcp.read(&mut rest).await, Ok(n) if n > 0) {} };
    let _ = tokio::time::timeout(Duration::from_secs(1), drain).await;
}
