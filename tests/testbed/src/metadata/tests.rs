//! The service as its clients see it.

use super::*;

impl State {
    /// The state of a service that nobody has asked yet.
    pub(super) fn example() -> Self {
        Self {
            instance: Instance {
                id: "i-1".to_owned(),
                name: "node".to_owned(),
                kind: "large".to_owned(),
                region: "here".to_owned(),
                zone: "here-a".to_owned(),
                address: "10.0.0.10".to_owned(),
                mac: "02:00:00:00:00:01".to_owned(),
                mtu: 1500,
            },
            ..Self::default()
        }
    }
}

/// A service, and a connection to it.
fn service(behavior: Behavior) -> (Metadata, UnixStream) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let metadata = Metadata::serve(Api::OpenStack, State::example().instance, &path).unwrap();
    metadata.behave(behavior);
    let stream = UnixStream::connect(&path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    (metadata, stream)
}

const GET: &[u8] = b"GET /openstack HTTP/1.1\r\n\r\n";

#[test]
fn a_connection_serves_several_requests_and_they_are_noted() {
    let (metadata, mut stream) = service(Behavior::Answers);
    let mut buffer = [0; 4096];
    for _ in 0..2 {
        stream.write_all(GET).unwrap();
        let len = stream.read(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..len]);
        assert!(
            text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("latest"),
            "{text}"
        );
    }
    assert_eq!(metadata.requests(), ["GET /openstack"; 2]);
}

#[test]
fn it_hangs_refuses_lies_and_talks_nonsense_when_told_to() {
    let read = |behavior| {
        let (_metadata, mut stream) = service(behavior);
        // Who refuses may have closed already.
        let _ = stream.write_all(GET);
        let mut bytes = Vec::new();
        let result = stream.take(100_000).read_to_end(&mut bytes);
        (result.map_err(|error| error.kind()), bytes)
    };
    let timeout = Err(io::ErrorKind::WouldBlock);
    assert_eq!(read(Behavior::Hangs), (timeout, Vec::new()));
    let (refused, nothing) = read(Behavior::Refuses);
    assert!(nothing.is_empty() && refused != timeout);
    let (_, garbage) = read(Behavior::Garbage);
    assert!(garbage.len() == 64 * 1024 && !garbage.starts_with(b"HTTP"));
    let (_, lies) = read(Behavior::Lies);
    assert!(lies.ends_with(b"</html>"));
}

#[test]
fn an_endless_answer_comes_byte_by_byte() {
    let (_metadata, mut stream) = service(Behavior::Trickles);
    stream.write_all(GET).unwrap();
    let mut buffer = [0; 16];
    assert_eq!(stream.read(&mut buffer).unwrap(), 1);
    assert_eq!(stream.read(&mut buffer).unwrap(), 1);
}
