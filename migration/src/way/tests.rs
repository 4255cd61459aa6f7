use std::net::{TcpListener, TcpStream};

use super::*;
use crate::records::{Suite, Traffic};

fn is_the_way(mut here: impl Write, mut there: impl Read) {
    here.write_all(b"page").unwrap();
    let mut four = [0; 4];
    there.read_exact(&mut four).unwrap();
    assert_eq!(four, *b"page");
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (tcp, listener.accept().unwrap().0)
}

/// The secrets of both ends of a connection.
fn secrets() -> [Secrets; 2] {
    let suite = Suite::Aes256Gcm;
    let traffic = |secret: u8| Traffic::new(suite, &[secret; 48], 7).unwrap();
    [(1, 2), (2, 1)].map(|(write, read)| Secrets::new(suite, traffic(write), traffic(read)))
}

/// Both ends of a data stream for which somebody in between has this; and the
/// ends of what it came on, which that one has.
fn handed(
    secrets: &[Option<Secrets>; 2],
    sockets: [impl AsFd; 2],
) -> ([Stream; 2], [UnixStream; 2]) {
    let (destination, its) = UnixStream::pair().unwrap();
    let (source, ours) = UnixStream::pair().unwrap();
    for ((stream, socket), secrets) in [&its, &ours].into_iter().zip(sockets).zip(secrets) {
        hand_over(stream, socket, secrets.as_ref()).unwrap();
    }
    let found = answer(&mut source.into()).unwrap().unwrap();
    ([ask(destination).unwrap(), found], [its, ours])
}

#[test]
fn without_anybody_between_them_the_stream_stays() {
    let (here, there) = UnixStream::pair().unwrap();
    let mut there = there.into();
    let asked = std::thread::spawn(move || ask(here).unwrap());
    let found = loop {
        if let Some(found) = answer(&mut there).unwrap() {
            break found;
        }
    };
    let asked = asked.join().unwrap();
    assert_eq!((asked.way(), found.way()), (Way::Relayed, Way::Relayed));
    is_the_way(asked, found);
}

#[test]
fn who_is_between_them_hands_a_connection_to_both() {
    let (one, other) = pair();
    let ([asked, found], its) = handed(&[None, None], [&one, &other]);
    drop((one, other));
    assert_eq!((asked.way(), found.way()), (Way::Direct, Way::Direct));
    is_the_way(asked, found);
    // It hears that they are not used any more, and nothing else.
    for mut stream in its {
        let mut rest = Vec::new();
        // The question has not been read.
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty() || rest == [ASK]);
    }
}

#[test]
fn who_hands_over_secrets_too_sees_nothing_of_what_is_sent() {
    let (one, other) = pair();
    let (there, mut wire) = UnixStream::pair().unwrap();
    let [a, b] = secrets();
    let ([mut asked, mut found], _its) = handed(&[Some(a), Some(b)], [&one, &other]);
    assert_eq!((asked.way(), found.way()), (Way::Sealed, Way::Sealed));
    let mut frames = Frames::default();
    for (round, len) in [0, 1, 16_000, 200_000, 300_000, 600_000]
        .into_iter()
        .enumerate()
    {
        let payload: Vec<u8> = (0..len).map(|n| (n * 7 + round) as u8).collect();
        let sent = payload.clone();
        for _ in 0..3 {
            frames.begin();
            frames.push(&payload);
            frames.end(Kind::Missing);
        }
        let sender = std::thread::spawn(move || {
            asked.send(&mut frames).unwrap();
            assert!(frames.bytes().is_empty());
            (asked, frames)
        });
        let mut room = Vec::new();
        for _ in 0..3 {
            let (kind, payload) = found.receive(&mut room).unwrap();
            assert_eq!(kind, Kind::Missing);
            assert!(payload == sent);
        }
        (asked, frames) = sender.join().unwrap();
        wire::send(&mut found, Kind::Sync, &[1; 4]).unwrap();
        assert_eq!(wire::expect(&mut asked, Kind::Sync).unwrap(), [1; 4]);
    }
    // Its end, as a word.
    drop(asked);
    assert_eq!(found.read(&mut [0]).unwrap(), 0);
    let mut room = Vec::new();
    assert!(matches!(found.receive(&mut room), Err(wire::Error::Cut)));

    // What a wire sees.
    let [a, _] = secrets();
    let ([mut asked, _found], _its) = handed(&[Some(a), None], [there.as_fd(), other.as_fd()]);
    asked.write_all(&[b'p'; 100_000]).unwrap();
    drop((asked, there));
    let mut seen = Vec::new();
    wire.read_to_end(&mut seen).unwrap();
    assert!(seen.len() > 100_000 && !seen.windows(4).any(|four| four == b"pppp"));
}

#[test]
fn frames_are_left_alone_and_nonsense_is_an_error() {
    let (mut here, there) = UnixStream::pair().unwrap();
    let mut there = Stream::from(there);
    here.write_all(b"join").unwrap();
    assert!(answer(&mut there).unwrap().is_none());
    let mut four = [0; 4];
    there.read_exact(&mut four).unwrap();
    // An answer without the socket that it promises.
    for word in [ASK, SEALED] {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(&[word]).unwrap();
        assert!(ask(here).is_err());
    }
    // One without its secrets, and one with secrets of nothing known.
    for rest in [0, Secrets::LEN] {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.send_with_fd(&[SEALED][..], here.as_raw_fd()).unwrap();
        there.write_all(&vec![0; rest]).unwrap();
        drop(there);
        assert!(ask(here).is_err());
    }
    let (here, there) = UnixStream::pair().unwrap();
    drop::<OwnedFd>(there.into());
    assert!(ask(here).is_err());
}
