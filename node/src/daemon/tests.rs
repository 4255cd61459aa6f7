//! Nodes in one process, on the loopback interface.

mod lend;
mod throughput;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use hyper::Method;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};

use super::stream::Carriage;
use super::{Node, Report};
use crate::cluster::ca::NODE_LIFE;
use crate::cluster::members::Membership;
use crate::cluster::names::{NodeName, ServiceName};
use crate::cluster::token::Token;
use crate::failure::describe;
use crate::home::Home;

const LIFE: Duration = Duration::from_secs(60);

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn service(text: &str) -> ServiceName {
    text.parse().unwrap()
}

/// A node's folder, and the daemon in it.
struct Place {
    dir: TempDir,
    node: Arc<Node>,
}

fn open(dir: &Path, port: u16) -> Arc<Node> {
    let home = Home::locate(Some(dir)).unwrap();
    Node::open(home, SocketAddr::from(([127, 0, 0, 1], port)), &[]).unwrap()
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let node = open(dir.path(), 0);
        Self { dir, node }
    }

    /// The first node of a cluster.
    async fn first(text: &str) -> Self {
        let place = Self::new();
        let at = place.node.start_listening().await.unwrap();
        place
            .node
            .create(name(text), Some(at.into()))
            .await
            .unwrap();
        place
    }

    async fn join(&self, token: &Token, text: &str) -> Result<Arc<Membership>> {
        self.node.join(token, None, name(text), None).await
    }

    async fn port(&self) -> u16 {
        self.node.start_listening().await.unwrap().port()
    }

    /// Ends the daemon and starts another one on the same port.
    async fn restart(&mut self) {
        let port = self.port().await;
        self.end().await;
        self.node = open(self.dir.path(), port);
        self.node.start_listening().await.unwrap();
    }

    /// Ends the daemon.
    async fn end(&mut self) {
        self.node.stop_listening().await;
        let other = Self::new();
        let mut old = std::mem::replace(&mut self.node, Arc::clone(&other.node));
        // Where another one lets go of it last, its store may still be open after that.
        while let Err(held) = Arc::try_unwrap(old) {
            old = held;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn ask(&self, text: &str) -> Result<Report> {
        let (_, membership) = self.node.joined()?;
        let member = membership.member(&name(text)).unwrap();
        self.node
            .ask(member, Method::GET, "/node", None::<&()>)
            .await
    }
}

/// Two nodes of one cluster.
async fn pair() -> (Place, Place) {
    let (a, b) = (Place::first("a").await, Place::new());
    let token = a.node.make_token(LIFE).unwrap();
    b.join(&token, "b").await.unwrap();
    (a, b)
}

fn said<T>(result: Result<T>) -> String {
    describe(&result.err().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_join_with_tokens_and_know_each_other() {
    let (a, b) = pair().await;
    let c = Place::new();
    let token = a.node.make_token(LIFE).unwrap();
    c.join(&token, "c").await.unwrap();
    // The node that was there before is told.
    let mut news = b.node.membership.subscribe();
    let three = |all: &Option<Arc<Membership>>| all.as_ref().unwrap().members.len() == 3;
    news.wait_for(three).await.unwrap();
    for node in [&a, &b, &c] {
        let lines = node.node.node_lines().await.unwrap();
        let up: Vec<_> = lines.iter().filter(|line| line.state == "up").collect();
        assert_eq!(up.len(), 3, "{lines:?}");
        assert!(
            up.iter()
                .all(|line| line.report.as_ref().unwrap().memory_bytes > 0)
        );
        assert_eq!(lines.iter().filter(|line| line.ca).count(), 1);
        assert_eq!(lines.iter().filter(|line| line.own).count(), 1);
    }
    let vms = b.node.all_vms().await.unwrap();
    assert!(vms.len() == 3 && vms.iter().all(|node| node.vms.is_some()));
    let log = std::fs::read_to_string(a.node.files.path("audit.log")).unwrap();
    assert_eq!(
        log.lines()
            .filter(|line| line.contains("\"joined\""))
            .count(),
        2
    );
    assert!(!log.contains(&token.text()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_once_for_its_time_and_its_cluster() {
    let a = Place::first("a").await;
    let (b, c) = (Place::new(), Place::new());
    let expired = a.node.make_token(Duration::ZERO).unwrap();
    let refused = said(b.join(&expired, "b").await);
    assert!(refused.contains("wrong, used or expired"), "{refused}");
    let token = a.node.make_token(LIFE).unwrap();
    let mut wrong = token.clone();
    wrong.secret[0] ^= 1;
    assert!(said(b.join(&wrong, "b").await).contains("wrong, used or expired"));
    let mut elsewhere = token.clone();
    elsewhere.fingerprint.0[0] ^= 1;
    let refused = said(b.join(&elsewhere, "b").await);
    assert!(refused.contains("another cluster"), "{refused}");
    // A name that is taken costs no token.
    let refused = said(b.join(&token, "a").await);
    assert!(refused.contains("there is a node a already"), "{refused}");
    assert!(b.node.joined().is_err());
    b.join(&token, "b").await.unwrap();
    assert!(said(c.join(&token, "c").await).contains("wrong, used or expired"));
    assert!(said(b.join(&token, "b").await).contains("in a cluster already"));
    assert!(said(b.node.make_token(LIFE).map(drop)).contains("do it on node a"));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_use_one_token_at_once_one_joins() {
    let a = Place::first("a").await;
    let token = a.node.make_token(LIFE).unwrap();
    let places: Vec<_> = (0..4).map(|_| Place::new()).collect();
    let joins = places.iter().enumerate().map(|(at, place)| {
        let (node, token) = (Arc::clone(&place.node), token.clone());
        tokio::spawn(async move { node.join(&token, None, name(&format!("n{at}")), None).await })
    });
    let mut joined = 0;
    for join in joins.collect::<Vec<_>>() {
        joined += usize::from(join.await.unwrap().is_ok());
    }
    assert_eq!(joined, 1);
    assert_eq!(a.node.joined().unwrap().1.members.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_tries_to_join_too_often_is_sent_away() {
    let a = Place::first("a").await;
    let b = Place::new();
    let mut token = a.node.make_token(LIFE).unwrap();
    token.secret = [0; 16];
    for _ in 0..10 {
        assert!(said(b.join(&token, "b").await).contains("wrong, used or expired"));
    }
    assert!(said(b.join(&token, "b").await).contains("too many attempts"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_another_cluster_is_refused_both_ways() {
    let (a, b) = pair().await;
    let impostor = Place::first("b").await;
    // It pretends to be a member.
    let (_, membership) = a.node.joined().unwrap();
    let asked = impostor
        .node
        .ask::<Report>(
            membership.member(&name("a")).unwrap(),
            Method::GET,
            "/node",
            None::<&()>,
        )
        .await;
    assert!(said(asked).contains("its certificate is of another cluster"));
    // It does not look whom it asks.
    let refused = said(blind(&impostor, a.port().await).await);
    assert!(refused.contains("refused there"), "{refused}");
    assert!(blind(&b, a.port().await).await.is_ok());
    // It stands where a member was.
    let mut fooled = Membership::clone(&membership);
    fooled.members[1].address = SocketAddr::from(([127, 0, 0, 1], impostor.port().await)).into();
    a.node.set_membership(fooled).unwrap();
    let lines = a.node.node_lines().await.unwrap();
    assert_eq!(lines[1].state, "unreachable");
    let reason = lines[1].reason.as_ref().unwrap();
    assert!(reason.contains("another cluster"), "{reason}");
}

/// Asks the node at `port` without a look at its certificate.
async fn blind(of: &Place, port: u16) -> Result<Report> {
    use rustls::client::danger::ServerCertVerifier;
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    #[derive(Debug)]
    struct Blind;
    impl ServerCertVerifier for Blind {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }
    let trust = of.node.trust().unwrap();
    let mut config = rustls::ClientConfig::clone(&trust.node);
    config.dangerous().set_certificate_verifier(Arc::new(Blind));
    let at = SocketAddr::from(([127, 0, 0, 1], port)).into();
    let any = ServerName::try_from("any").unwrap();
    let tls = super::peer::dial("it", &at, Arc::new(config), any).await?;
    let asked = super::http::call(tls, Method::GET, "/node", None::<&()>).await;
    asked.map_err(|error| super::peer::tell("it", &error))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_node_is_refused_with_the_reason_and_can_join_anew() {
    let (a, b) = pair().await;
    a.ask("b").await.unwrap();
    b.ask("a").await.unwrap();
    assert!(said(b.node.remove(&name("a"), "test").await).contains("do it on node a"));
    assert!(said(a.node.remove(&name("a"), "test").await).contains("cannot be removed"));
    assert!(said(a.node.remove(&name("x"), "test").await).contains("there is no node x"));
    a.node.remove(&name("b"), "test").await.unwrap();
    let refused = said(b.ask("a").await);
    assert!(
        refused.contains("node b was removed from the cluster"),
        "{refused}"
    );
    assert!(refused.contains("blanket node leave"), "{refused}");
    let wanted = service("x");
    let stream = b.node.open_stream(&name("a"), &wanted, Carriage::Tls).await;
    assert!(said(stream.map(drop)).contains("was removed"));
    b.node.leave().await.unwrap();
    let token = a.node.make_token(LIFE).unwrap();
    b.join(&token, "b").await.unwrap();
    b.ask("a").await.unwrap();
    a.ask("b").await.unwrap();
    // One that leaves by itself is removed.
    b.node.leave().await.unwrap();
    assert_eq!(a.node.joined().unwrap().1.members.len(), 1);
    assert!(!b.node.files.path("node.key").exists());
    a.node.leave().await.unwrap();
    assert!(!a.node.files.path("ca.key").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_starts_again_knows_what_it_knew() {
    let (mut a, mut b) = pair().await;
    let token = a.node.make_token(LIFE).unwrap();
    let gone = Place::new();
    gone.join(&a.node.make_token(LIFE).unwrap(), "gone")
        .await
        .unwrap();
    a.node.remove(&name("gone"), "test").await.unwrap();
    a.restart().await;
    b.restart().await;
    a.ask("b").await.unwrap();
    b.ask("a").await.unwrap();
    assert!(said(gone.ask("a").await).contains("was removed"));
    let c = Place::new();
    c.join(&token, "c").await.unwrap();
    assert_eq!(a.node.joined().unwrap().1.members.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_gone_is_named_and_the_others_are_shown() {
    let (a, mut b) = pair().await;
    b.end().await;
    let lines = a.node.node_lines().await.unwrap();
    let states: Vec<_> = lines.iter().map(|line| line.state.as_str()).collect();
    assert_eq!(states, ["up", "unreachable"]);
    assert!(
        lines[1].reason.as_ref().unwrap().contains("node b"),
        "{lines:?}"
    );
    let vms = a.node.all_vms().await.unwrap();
    assert!(vms[0].vms.is_some() && vms[1].vms.is_none() && vms[1].reason.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_in_time_and_the_key_stays() {
    let (a, b) = pair().await;
    for place in [&a, &b] {
        let before = place.node.trust().unwrap().identity.own.clone();
        place.node.renew_at(SystemTime::now()).await.unwrap();
        assert_eq!(place.node.trust().unwrap().identity.own, before);
        // The certificates' times have seconds.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let later = SystemTime::now() + NODE_LIFE * 3 / 4;
        place.node.renew_at(later).await.unwrap();
        let after = place.node.trust().unwrap().identity.own.clone();
        assert!(after.until > before.until && after.id == before.id);
    }
    a.ask("b").await.unwrap();
    b.ask("a").await.unwrap();
    let another = Place::first("x").await;
    let request = another.node.trust().unwrap().identity.request.clone();
    let peer = b.node.trust().unwrap().identity.own.clone();
    assert!(said(a.node.renew_for(&peer, &request)).contains("another key"));
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_that_send_garbage_or_nothing_harm_nobody() {
    let (a, b) = pair().await;
    let at = SocketAddr::from(([127, 0, 0, 1], a.port().await));
    let mut silent = Vec::new();
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"blnk\xff\xff",
        b"blnk\0\x02{}",
        b"\x16\x03\x01\0\x05hello",
    ] {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.len() < 64, "{answer:?}");
        silent.push(TcpStream::connect(at).await.unwrap());
    }
    b.ask("a").await.unwrap();
}

/// Serves a socket: what comes is sent back, and the end after the end.
fn echo(path: &Path) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(&all).await.unwrap();
            });
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_carry_bytes_and_the_end_of_each_direction() {
    let (a, b) = pair().await;
    let socket = b.dir.path().join("echo.sock");
    let _server = echo(&socket);
    let offer = b.node.offer(service("echo"), socket.clone(), None).unwrap();
    assert!(b.node.offer(service("echo"), socket, None).is_err());
    for carriage in [Carriage::Tls, Carriage::Plain] {
        let local = a.dir.path().join("to-b.sock");
        let forward = a
            .node
            .forward(&local, name("b"), service("echo"), carriage)
            .unwrap();
        let streams = (0..4u8).map(|seed| {
            let local = local.clone();
            tokio::spawn(async move {
                let bytes: Vec<u8> = (0..3_000_001u32).map(|n| (n >> 3) as u8 ^ seed).collect();
                let mut stream = UnixStream::connect(local).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
                stream.shutdown().await.unwrap();
                let mut back = Vec::new();
                stream.read_to_end(&mut back).await.unwrap();
                assert!(back == bytes, "{} bytes came back", back.len());
            })
        });
        for stream in streams.collect::<Vec<_>>() {
            stream.await.unwrap();
        }
        drop(forward);
        assert!(!local.exists());
        let wanted = service("other");
        let refused = a.node.open_stream(&name("b"), &wanted, carriage).await;
        let refused = said(refused.map(drop));
        assert!(refused.contains("no service other"), "{refused}");
    }
    drop(offer);
    let refused = a
        .node
        .open_stream(&name("b"), &service("echo"), Carriage::Tls)
        .await;
    assert!(said(refused.map(drop)).contains("no service echo"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_for_one_node_is_not_there_for_others() {
    let (a, b) = pair().await;
    let socket = b.dir.path().join("echo.sock");
    let _server = echo(&socket);
    let unknown = b
        .node
        .offer(service("echo"), socket.clone(), Some(&name("c")));
    assert!(said(unknown.map(drop)).contains("no node c"));
    for (only, opens) in [("a", true), ("b", false)] {
        let offer = b
            .node
            .offer(service("echo"), socket.clone(), Some(&name(only)))
            .unwrap();
        for carriage in [Carriage::Tls, Carriage::Plain] {
            let opened = a
                .node
                .open_stream(&name("b"), &service("echo"), carriage)
                .await;
            if opens {
                opened.unwrap();
            } else {
                let refused = said(opened.map(drop));
                assert!(refused.contains("no service echo"), "{refused}");
            }
        }
        drop(offer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_opens_one_stream() {
    use crate::cluster::hello::{Answer, Hello, Ticket, encode};
    let (a, b) = pair().await;
    let socket = a.dir.path().join("echo.sock");
    let _server = echo(&socket);
    let _offer = a.node.offer(service("echo"), socket, None).unwrap();
    let peer = b.node.trust().unwrap().identity.own.id.clone();
    let ticket = a.node.tickets.make(peer, service("echo")).unwrap();
    let redeem = async |ticket: Ticket| {
        let mut tcp = TcpStream::connect(("127.0.0.1", a.port().await))
            .await
            .unwrap();
        tcp.write_all(&encode(&Hello::Redeem(ticket)).unwrap())
            .await
            .unwrap();
        let mut open = vec![0; encode(&Answer::Open).unwrap().len()];
        tcp.read_exact(&mut open).await.map(|_| open)
    };
    assert!(redeem(Ticket("0".repeat(32))).await.is_err());
    assert_eq!(
        redeem(ticket.clone()).await.unwrap(),
        encode(&Answer::Open).unwrap()
    );
    assert!(redeem(ticket).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_is_waited_for_and_a_removed_nodes_streams_end() {
    let (a, b) = pair().await;
    let socket = a.dir.path().join("slow.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let _offer = a.node.offer(service("slow"), socket, None).unwrap();
    let mut stream = b
        .node
        .open_stream(&name("a"), &service("slow"), Carriage::Tls)
        .await
        .unwrap();
    let (mut unread, _) = listener.accept().await.unwrap();
    let piece = vec![7; 1 << 20];
    let mut sent = 0;
    while let Ok(written) =
        tokio::time::timeout(Duration::from_millis(700), stream.write(&piece)).await
    {
        sent += written.unwrap();
        assert!(sent < 64 << 20, "nobody waits");
    }
    let mut got = vec![0; 1 << 20];
    unread.read_exact(&mut got).await.unwrap();
    assert_eq!(got, piece);
    a.node.remove(&name("b"), "test").await.unwrap();
    let mut rest = Vec::new();
    let _ = unread.read_to_end(&mut rest).await;
    assert!(rest.len() < sent);
}
