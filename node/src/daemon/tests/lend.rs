//! Connections that services have themselves.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;

use blanket_migration::way::{self, Stream, Way};
use tokio::task::spawn_blocking;

use super::super::stream::{Forward, Offer, Opened};
use super::*;

/// All that has passed by.
type Seen = Arc<Mutex<Vec<u8>>>;

/// Carries connections from a port to another one; what it sees.
async fn wire(to: SocketAddr) -> (SocketAddr, Seen) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (at, seen) = (listener.local_addr().unwrap(), Seen::default());
    let all = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(to).await else {
                continue;
            };
            let (near, far) = (near.into_split(), far.into_split());
            for (mut from, mut to) in [(near.0, far.1), (far.0, near.1)] {
                let all = Arc::clone(&all);
                tokio::spawn(async move {
                    let mut bytes = vec![0; 65536];
                    while let Ok(n @ 1..) = from.read(&mut bytes).await {
                        all.lock().unwrap().extend_from_slice(&bytes[..n]);
                        if to.write_all(&bytes[..n]).await.is_err() {
                            break;
                        }
                    }
                });
            }
        }
    });
    (at, seen)
}

/// A node that reaches another one by a wire that is watched, and a service there.
struct Watched {
    a: Place,
    b: Place,
    seen: Seen,
    listener: UnixListener,
    forward: Forward,
    offer: Offer,
}

impl Watched {
    async fn new(carriage: Carriage, takes_sockets: bool) -> Self {
        let b = Place::new();
        let at = b.node.start_listening().await.unwrap();
        let (wire, seen) = wire(at).await;
        let created = b.node.create(name("b"), Some(wire.into()));
        created.await.unwrap();
        let a = Place::new();
        a.join(&b.node.make_token(LIFE).unwrap(), "a")
            .await
            .unwrap();
        let socket = b.dir.path().join("memory.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut offer = b.node.offer(service("memory"), socket, None).unwrap();
        if takes_sockets {
            offer = offer.with_sockets();
        }
        let local = a.dir.path().join("to-b.sock");
        let (used, to) = (Opened::WhenUsed, name("b"));
        let to = a
            .node
            .forward_when(used, &local, to, service("memory"), carriage);
        let forward = to.unwrap();
        Self {
            a,
            b,
            seen,
            listener,
            forward,
            offer,
        }
    }

    /// Both ends of a stream: who asks for a socket, and the service.
    async fn open(&self) -> [Stream; 2] {
        let local = self.a.dir.path().join("to-b.sock");
        let asking = spawn_blocking(move || way::ask(UnixStream::connect(local).unwrap()));
        let listener = self.listener.try_clone().unwrap();
        let answering = spawn_blocking(move || {
            let mut stream = Stream::from(listener.accept().unwrap().0);
            loop {
                if let Some(stream) = way::answer(&mut stream).unwrap() {
                    return stream;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        [asking.await.unwrap().unwrap(), answering.await.unwrap()]
    }
}

/// Sends from one to the other, and the other way round.
async fn talk(ends: [Stream; 2], bytes: &[u8]) -> [Stream; 2] {
    let bytes = bytes.to_vec();
    let [mut one, mut other] = ends;
    let (sent, len) = (bytes.clone(), bytes.len());
    let one = spawn_blocking(move || {
        one.write_all(&sent).unwrap();
        one.read_exact(&mut vec![0; len]).unwrap();
        one
    });
    let other = spawn_blocking(move || {
        let mut got = vec![0; bytes.len()];
        other.read_exact(&mut got).unwrap();
        assert!(got == bytes);
        other.write_all(&got).unwrap();
        other
    });
    [one.await.unwrap(), other.await.unwrap()]
}

/// It ends, one way or another.
async fn ends(mut stream: Stream) {
    let read = spawn_blocking(move || stream.read(&mut [0]));
    let read = tokio::time::timeout(Duration::from_secs(10), read).await;
    assert!(!matches!(read.unwrap().unwrap(), Ok(1..)));
}

const PAGE: &[u8] = b"what a guest has in its memory. ";

#[tokio::test(flavor = "multi_thread")]
async fn a_service_has_its_connections_itself_and_they_are_encrypted() {
    for (carriage, takes_sockets, found) in [
        (Carriage::Tls, true, Way::Sealed),
        (Carriage::Plain, true, Way::Direct),
        // The daemons carry it.
        (Carriage::Tls, false, Way::Relayed),
    ] {
        let watched = Watched::new(carriage, takes_sockets).await;
        let bytes = PAGE.repeat(100_000);
        let mut all = Vec::new();
        for _ in 0..3 {
            let ends = watched.open().await;
            assert_eq!(ends.each_ref().map(Stream::way), [found; 2]);
            all.push(talk(ends, &bytes).await);
        }
        let seen = watched.seen.lock().unwrap().clone();
        assert!(seen.len() > 6 * bytes.len());
        let plain = seen.windows(PAGE.len()).any(|some| some == PAGE);
        assert_eq!(plain, carriage == Carriage::Plain);
        // The end of one is the end of the other.
        for [one, other] in all {
            drop(one);
            ends(other).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_others_have_end_with_what_they_are_there_for() {
    for carriage in [Carriage::Tls, Carriage::Plain] {
        let watched = Watched::new(carriage, true).await;
        let [one, other] = talk(watched.open().await, PAGE).await;
        // They are on without an offer, but not without who leads to it.
        drop(watched.offer);
        let [one, other] = talk([one, other], PAGE).await;
        drop(watched.forward);
        ends(one).await;
        ends(other).await;

        let watched = Watched::new(carriage, true).await;
        let [_one, other] = talk(watched.open().await, PAGE).await;
        watched.b.node.remove(&name("a"), "test").await.unwrap();
        ends(other).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_may_not_have_a_connection_is_told_so() {
    let mut watched = Watched::new(Carriage::Tls, true).await;
    drop(watched.offer);
    let socket = watched.b.dir.path().join("memory.sock");
    let offer = watched
        .b
        .node
        .offer(service("memory"), socket, Some(&name("b")));
    watched.offer = offer.unwrap().with_sockets();
    let local = watched.a.dir.path().join("to-b.sock");
    let asked = spawn_blocking(move || way::ask(UnixStream::connect(local).unwrap()));
    assert!(asked.await.unwrap().is_err());
}
