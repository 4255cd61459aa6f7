//! Connections that the ends of a stream have themselves, for as long as they may.

use std::io;
use std::net::Shutdown;

use anyhow::{Context, Result};
use blanket_migration::records::Secrets;
use blanket_migration::way;
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

use super::Node;
use crate::cluster::identity::NodeId;

/// A connection that somebody else has, too. It ends with this.
struct Lent(std::net::TcpStream);

impl Drop for Lent {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Node {
    /// Leaves a connection to who is at the other end of `local`; with `secrets`,
    /// one whose handshake is over. Returns when that one has ended `local`, or
    /// the node `with` has been removed from the cluster, and the connection is no
    /// more.
    pub(super) async fn lend(
        &self,
        local: UnixStream,
        tcp: TcpStream,
        secrets: Option<Secrets>,
        with: &NodeId,
    ) -> Result<()> {
        let (local, tcp) = (local.into_std()?, tcp.into_std()?);
        tcp.set_nonblocking(false)?;
        way::hand_over(&local, &tcp, secrets.as_ref()).context("a socket cannot be handed over")?;
        drop(secrets);
        let (local, _lent) = (UnixStream::from_std(local)?, Lent(tcp));
        tokio::select! {
            () = ended(&local) => Ok(()),
            () = self.removed(with) => anyhow::bail!("the node was removed from the cluster"),
        }
    }
}

/// Waits until who has a connection needs it no more: nothing else comes on it.
async fn ended(local: &UnixStream) {
    while local.readable().await.is_ok() {
        match local.try_read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

/// Waits until something has come on it, or its end.
pub(super) async fn used(local: &UnixStream) -> io::Result<()> {
    loop {
        local.readable().await?;
        // It may be said to be readable when it is not.
        match local.try_io(Interest::READABLE, || first(local)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            seen => return seen.map(drop),
        }
    }
}

/// Whether what has come on it is the question for a socket.
pub(super) fn asks_for_socket(local: &UnixStream) -> bool {
    first(local).is_ok_and(|byte| byte == Some(way::ASK))
}

/// The first byte of what has come, which stays there.
fn first(local: &UnixStream) -> io::Result<Option<u8>> {
    let mut first = [0];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let (n, _) = rustix::net::recv(local, &mut first[..], flags)?;
    Ok((n == 1).then_some(first[0]))
}
