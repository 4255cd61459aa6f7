//! One end is rustls, the other this; and what becomes of records on a bad way.

use std::io::{Cursor, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use proptest::prelude::*;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, KeyLog};
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned, SupportedCipherSuite};

use super::*;

/// What a connection's secrets are.
#[derive(Debug, Default)]
struct Log(Mutex<[Vec<u8>; 2]>);

impl KeyLog for Log {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        let labels = ["CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"];
        if let Some(index) = labels.iter().position(|it| *it == label) {
            self.0.lock().unwrap()[index] = secret.to_vec();
        }
    }
}

type Client = StreamOwned<ClientConnection, TcpStream>;
type Server = StreamOwned<ServerConnection, TcpStream>;

/// A connection after its handshake, and what its secrets are.
fn connected(suite: SupportedCipherSuite) -> (Client, Server, [Vec<u8>; 2]) {
    let own = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(own.cert.der().clone()).unwrap();
    let provider = Arc::new(CryptoProvider {
        cipher_suites: vec![suite],
        ..ring::default_provider()
    });
    let log = Arc::new(Log::default());
    let key = PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()).into();
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .unwrap();
    server.send_tls13_tickets = 0;
    server.enable_secret_extraction = true;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.enable_secret_extraction = true;
    client.key_log = Arc::clone(&log) as Arc<dyn KeyLog>;

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    let accepting = thread::spawn(move || {
        let server = ServerConnection::new(Arc::new(server)).unwrap();
        let mut server = StreamOwned::new(server, other);
        let mut hello = [0; 5];
        server.read_exact(&mut hello).unwrap();
        server.write_all(b"open").unwrap();
        server
    });
    let name = ServerName::try_from("a").unwrap();
    let client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut client = StreamOwned::new(client, tcp);
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut [0; 4]).unwrap();
    let server = accepting.join().unwrap();
    let secrets = log.0.lock().unwrap().clone();
    (client, server, secrets)
}

/// What takes the place of an end whose own secret is `secrets[own]`.
fn ends(
    suite: SupportedCipherSuite,
    extracted: &rustls::ExtractedSecrets,
    secrets: &[Vec<u8>; 2],
    own: usize,
) -> (Sealer, Opener) {
    let suite = Suite::of(suite.suite().into()).unwrap();
    let traffic = |which: usize, sequence| Traffic::new(suite, &secrets[which], sequence).unwrap();
    let write = traffic(own, extracted.tx.0);
    let read = traffic(1 - own, extracted.rx.0);
    let bytes = Secrets::new(suite, write, read).to_bytes();
    Secrets::from_bytes(&bytes).unwrap().ends().unwrap()
}

/// Sends and receives with both; the end of each.
fn talk<T: Read + Write + Send + 'static>(
    mut peer: T,
    refresh: impl Fn(&mut T) + Send + 'static,
    (mut sealer, mut opener): (Sealer, Opener),
    mut tcp: TcpStream,
) -> (Sealer, Opener, TcpStream, T) {
    const LENS: [usize; 8] = [1, 16_383, 16_384, 16_385, 100_000, 400_000, 3_000_000, 5];
    let bytes = |len: usize| -> Vec<u8> { (0..len).map(|n| (n / 3 + len) as u8).collect() };
    let other = thread::spawn(move || {
        for (round, len) in LENS.into_iter().enumerate() {
            let mut got = vec![0; len];
            peer.read_exact(&mut got).unwrap();
            assert!(got == bytes(len));
            if round % 2 == 1 {
                refresh(&mut peer);
            }
            peer.write_all(&got).unwrap();
            peer.flush().unwrap();
        }
        peer
    });
    for (round, len) in LENS.into_iter().enumerate() {
        let mut sent = bytes(len);
        if round % 3 == 0 {
            sealer.send_copy(&mut tcp, &sent).unwrap();
        } else {
            sealer.send(&mut tcp, &mut sent).unwrap();
            assert!(sent.is_empty());
        }
        let mut got = Vec::new();
        while got.len() < len {
            opener.have(&mut tcp, (len - got.len()).min(7000)).unwrap();
            got.extend_from_slice(opener.take(len - got.len()));
        }
        assert!(got == bytes(len));
        if opener.wants_update() {
            sealer.owe_update();
        }
    }
    (sealer, opener, tcp, other.join().unwrap())
}

#[test]
fn what_rustls_has_begun_goes_on_with_rustls_at_the_other_end() {
    for suite in ring::DEFAULT_CIPHER_SUITES {
        if suite.tls13().is_none() {
            continue;
        }
        // With their first keys, and with ever new ones.
        for most in [u64::MAX, 12] {
            let (client, server, secrets) = connected(*suite);
            let (client, tcp) = client.into_parts();
            let extracted = client.dangerous_extract_secrets().unwrap();
            let (mut sealer, opener) = ends(*suite, &extracted, &secrets, 0);
            sealer.set_most(most);
            let refresh = move |server: &mut Server| {
                if most == 12 {
                    server.conn.refresh_traffic_keys().unwrap();
                }
            };
            let (mut sealer, _, mut tcp, mut server) = talk(server, refresh, (sealer, opener), tcp);
            // The end is told.
            sealer.close(&mut tcp, None).unwrap();
            assert!(sealer.send_copy(&mut tcp, b"more").is_err());
            assert_eq!(server.read(&mut [0]).unwrap(), 0);

            let (client, server, secrets) = connected(*suite);
            let (server, tcp) = server.into_parts();
            let extracted = server.dangerous_extract_secrets().unwrap();
            let (mut sealer, opener) = ends(*suite, &extracted, &secrets, 1);
            sealer.set_most(most);
            let refresh = move |client: &mut Client| {
                if most == 12 {
                    client.conn.refresh_traffic_keys().unwrap();
                }
            };
            let (_, mut opener, mut tcp, mut client) = talk(client, refresh, (sealer, opener), tcp);
            // The other end's is understood.
            client.conn.send_close_notify();
            client.flush().unwrap();
            opener.have(&mut tcp, 1).unwrap();
            assert_eq!((opener.content(), opener.error()), (&[][..], None));
        }
    }
}

#[test]
fn rustls_hears_why_nothing_more_is_read() {
    let (client, mut server, secrets) = connected(ring::cipher_suite::TLS13_AES_128_GCM_SHA256);
    let (client, mut tcp) = client.into_parts();
    let extracted = client.dangerous_extract_secrets().unwrap();
    let suite = ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let (mut sealer, _) = ends(suite, &extracted, &secrets, 0);
    sealer.close(&mut tcp, Some(Error::Forged)).unwrap();
    let heard = server.read(&mut [0]).unwrap_err().to_string();
    assert!(heard.contains("BadRecordMac"), "{heard}");

    // And what rustls has against it is understood here.
    let (client, mut server, secrets) = connected(suite);
    let (client, mut tcp) = client.into_parts();
    let extracted = client.dangerous_extract_secrets().unwrap();
    let (_, mut opener) = ends(suite, &extracted, &secrets, 0);
    tcp.write_all(&[23, 3, 3, 0, 20]).unwrap();
    tcp.write_all(&[1; 20]).unwrap();
    assert!(server.read(&mut [0]).is_err());
    let _ = server.flush();
    assert_eq!(had(&mut opener, &mut tcp), Err(Error::Alert(20)));
}

/// Both ends of a direction, as long as nothing has been sent.
fn direction(suite: Suite) -> (Sealer, Opener) {
    let len = if suite == Suite::Aes256Gcm { 48 } else { 32 };
    let traffic = || Traffic::new(suite, &[9; 48][..len], 3).unwrap();
    Secrets::new(suite, traffic(), traffic()).ends().unwrap()
}

/// What is read of `from` up to its end, or why not all is.
fn had(opener: &mut Opener, from: &mut impl Read) -> Result<Vec<u8>, Error> {
    let mut all = Vec::new();
    loop {
        let had = opener.have(from, 1);
        let content = opener.take(usize::MAX);
        all.extend_from_slice(content);
        match had {
            Ok(()) if content.is_empty() => return Ok(all),
            Ok(()) => {}
            Err(error) => {
                let inner = error.get_ref().and_then(|it| it.downcast_ref::<Error>());
                return Err(*inner.unwrap());
            }
        }
    }
}

/// Records with these contents.
fn records(sealer: &mut Sealer, contents: &[(u8, &[u8])]) -> Vec<Vec<u8>> {
    let sealed = contents.iter();
    sealed
        .map(|(kind, content)| sealer.record(*kind, content).unwrap())
        .collect()
}

#[test]
fn records_that_are_out_of_order_missing_or_twice_are_refused() {
    for suite in [Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::ChaCha20Poly1305] {
        let contents = [(DATA, &b"one"[..]), (DATA, b"two"), (DATA, b"three")];
        for (order, came) in [
            (&[1, 0, 2][..], ""),
            (&[0, 2], "one"),
            (&[0, 0, 1], "one"),
            (&[0, 1, 1], "onetwo"),
            (&[2], ""),
        ] {
            let (mut sealer, mut opener) = direction(suite);
            let records = records(&mut sealer, &contents);
            let bytes: Vec<u8> = order.iter().flat_map(|n| records[*n].clone()).collect();
            let mut from = bytes.as_slice();
            opener.have(&mut from, came.len()).unwrap();
            assert_eq!(opener.take(9), came.as_bytes());
            assert_eq!(had(&mut opener, &mut from), Err(Error::Forged));
            // It stays so.
            assert_eq!(had(&mut opener, &mut Cursor::new([])), Err(Error::Forged));
        }
    }
}

#[test]
fn what_is_no_data_is_carried_out_or_refused() {
    const END: (u8, &[u8]) = (ALERT, &[WARNING, CLOSE_NOTIFY]);
    const NOTHING: (u8, &[u8]) = (DATA, &[]);
    let long = [7; MOST_CONTENT];
    let padded = [1, 2, DATA, 0, 0, 0];
    for (contents, came) in [
        (&[(DATA, &b"x"[..]), END][..], Ok(b"x".to_vec())),
        // Nothing counts behind it.
        (&[(DATA, b"x"), END, (DATA, b"y")], Ok(b"x".to_vec())),
        (&[(DATA, b"x")], Err(Error::Truncated)),
        (&[(DATA, &long), END], Ok(long.to_vec())),
        // Padding.
        (&[(0, &padded), END], Ok(vec![1, 2])),
        (&[(0, &[0; 9]), END], Err(Error::Malformed)),
        (&[(0, &[]), END], Err(Error::Malformed)),
        (&[(DATA, &[7; MOST_CONTENT + 1]), END], Err(Error::Overflow)),
        (
            &[(DATA, &[7; MOST_CONTENT + 300]), END],
            Err(Error::Overflow),
        ),
        (&[(ALERT, &[FATAL, 80])], Err(Error::Alert(80))),
        (&[(ALERT, &[FATAL])], Err(Error::Unexpected(ALERT))),
        // A ticket, two messages, a part of one, and a wish for neither.
        (
            &[(HANDSHAKE, &[4, 0, 0, 0])],
            Err(Error::Unexpected(HANDSHAKE)),
        ),
        (
            &[(HANDSHAKE, &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0])],
            Err(Error::Unexpected(HANDSHAKE)),
        ),
        (
            &[(HANDSHAKE, &[24, 0, 0, 1])],
            Err(Error::Unexpected(HANDSHAKE)),
        ),
        (
            &[(HANDSHAKE, &[24, 0, 0, 1, 2])],
            Err(Error::Unexpected(HANDSHAKE)),
        ),
        (&[(20, &[1])], Err(Error::Unexpected(20))),
        (&[NOTHING; 32], Err(Error::Truncated)),
        (&[NOTHING; 33], Err(Error::Idle)),
    ] {
        let (mut sealer, mut opener) = direction(Suite::Aes128Gcm);
        let bytes = records(&mut sealer, contents).concat();
        assert_eq!(
            had(&mut opener, &mut bytes.as_slice()),
            came,
            "{contents:?}"
        );
    }
    // Without protection, and of lengths that no record has.
    for (header, error) in [
        ([ALERT, 3, 3, 0, 2], Error::Unexpected(ALERT)),
        ([HANDSHAKE, 3, 3, 0, 40], Error::Unexpected(HANDSHAKE)),
        ([DATA, 3, 1, 0, 40], Error::Malformed),
        ([DATA, 3, 3, 0, 16], Error::Malformed),
        ([DATA, 3, 3, 0x41, 1], Error::Overflow),
    ] {
        let (_, mut opener) = direction(Suite::Aes128Gcm);
        assert_eq!(had(&mut opener, &mut &header[..]), Err(error));
    }
    // New keys for ever.
    let (mut sealer, mut opener) = direction(Suite::Aes128Gcm);
    let mut bytes = Vec::new();
    for _ in 0..33 {
        sealer.update(&mut bytes).unwrap();
    }
    assert_eq!(had(&mut opener, &mut bytes.as_slice()), Err(Error::Idle));
    assert!(!opener.wants_update());
}

#[test]
fn no_record_has_a_number_that_another_one_has() {
    let last = || Traffic::new(Suite::Aes128Gcm, &[1; 32], u64::MAX).unwrap();
    let secrets = || Secrets::new(Suite::Aes128Gcm, last(), last());
    let (mut sealer, _) = secrets().ends().unwrap();
    // It has to have new keys, and cannot say so.
    let sent = sealer.send_copy(&mut Vec::new(), b"x").unwrap_err();
    assert!(sent.to_string().contains("too many"), "{sent}");
    assert!(sealer.send_copy(&mut Vec::new(), b"x").is_err());
    let (_, mut opener) = secrets().ends().unwrap();
    let record = [&[DATA, 3, 3, 0, 20][..], &[0; 20]].concat();
    assert_eq!(
        had(&mut opener, &mut record.as_slice()),
        Err(Error::Exhausted)
    );
}

#[test]
fn secrets_have_the_length_of_their_suites() {
    for (suite, good) in [
        (Suite::Aes128Gcm, 32),
        (Suite::Aes256Gcm, 48),
        (Suite::ChaCha20Poly1305, 32),
    ] {
        for len in [0, 16, 31, 32, 33, 48, 49, 64] {
            assert_eq!(Traffic::new(suite, &[1; 64][..len], 0).is_ok(), len == good);
        }
    }
    assert!(Secrets::from_bytes(&[0; Secrets::LEN]).is_err());
}

/// A reader that gives as much at a time as it is told.
struct Pieces<'a>(&'a [u8], std::iter::Cycle<std::vec::IntoIter<usize>>);

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let most = self.1.next().unwrap().min(into.len());
        self.0.read(&mut into[..most])
    }
}

proptest! {
    #[test]
    fn whatever_is_sent_comes_in_whatever_pieces(
        sent in prop::collection::vec(0usize..300_000, 0..6),
        pieces in prop::collection::vec(1usize..200_000, 1..5),
        takes in prop::collection::vec(1usize..300_000, 1..5),
        most in 4u64..40,
    ) {
        let (mut sealer, mut opener) = direction(Suite::Aes128Gcm);
        sealer.set_most(most);
        let (mut wire, mut all) = (Vec::new(), Vec::new());
        for (round, len) in sent.into_iter().enumerate() {
            let mut bytes: Vec<u8> = (0..len).map(|n| (n * 13 / 7 + round) as u8).collect();
            all.extend_from_slice(&bytes);
            sealer.send(&mut wire, &mut bytes).unwrap();
        }
        sealer.close(&mut wire, None).unwrap();
        let mut from = Pieces(&wire, pieces.into_iter().cycle());
        let mut came = Vec::new();
        for take in takes.into_iter().cycle() {
            opener.have(&mut from, take).unwrap();
            if opener.content().is_empty() {
                break;
            }
            came.extend_from_slice(opener.take(take));
        }
        prop_assert!(came == all);
    }

    #[test]
    fn a_changed_bit_or_a_cut_is_noticed_and_nothing_else_comes(
        sent in prop::collection::vec(1usize..40_000, 1..4),
        place: prop::sample::Index,
        bit in 0u8..8,
        cut: bool,
    ) {
        let (mut sealer, mut opener) = direction(Suite::Aes128Gcm);
        let (mut wire, mut all) = (Vec::new(), Vec::new());
        for len in sent {
            let mut bytes: Vec<u8> = (0..len).map(|n| n as u8).collect();
            all.extend_from_slice(&bytes);
            sealer.send(&mut wire, &mut bytes).unwrap();
        }
        sealer.close(&mut wire, None).unwrap();
        let at = place.index(wire.len());
        if cut {
            wire.truncate(at);
        } else {
            wire[at] ^= 1 << bit;
        }
        let mut from = wire.as_slice();
        let mut came = Vec::new();
        let error = loop {
            let had = opener.have(&mut from, 1);
            came.extend_from_slice(opener.take(usize::MAX));
            if let Err(error) = had {
                break error;
            }
            // The end is behind all that was sent, and was hit then.
            prop_assert!(came.len() <= all.len() && !opener.is_over());
        };
        prop_assert!(all.starts_with(&came), "{}", error);
        prop_assert!(opener.error().is_some());
        prop_assert!(!cut || opener.error() == Some(Error::Truncated));
    }
}
