//! How much streams between nodes carry.

use std::time::Instant;

use super::*;

/// Bytes of each connection.
const BYTES: u64 = 256 << 20;

/// Sends on each of these connections at once, and waits until the other side
/// has confirmed that all has come; bytes in a second.
async fn rate<S, F>(count: usize, open: impl Fn() -> F) -> f64
where
    S: AsyncReadExt + AsyncWriteExt + Unpin + Send + 'static,
    F: Future<Output = S>,
{
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(open().await);
    }
    let start = Instant::now();
    let sending = streams.into_iter().map(|mut stream| {
        tokio::spawn(async move {
            let piece = vec![0x5a; 256 << 10];
            for _ in 0..BYTES / (256 << 10) {
                stream.write_all(&piece).await.unwrap();
            }
            stream.shutdown().await.unwrap();
            assert_eq!(stream.read_u64().await.unwrap(), BYTES);
        })
    });
    for sent in sending.collect::<Vec<_>>() {
        sent.await.unwrap();
    }
    (BYTES * count as u64) as f64 / start.elapsed().as_secs_f64()
}

/// Reads to the end, and says how much it was.
async fn sink(mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin) {
    let mut buffer = vec![0; 256 << 10];
    let mut all = 0;
    loop {
        match stream.read(&mut buffer).await.unwrap() {
            0 => break,
            n => all += n as u64,
        }
    }
    stream.write_u64(all).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures; see docs/nodes.md"]
async fn streams_carry_all_that_raw_tcp_carries_at_this_rate() {
    let (a, b) = pair().await;
    let raw = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = raw.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = raw.accept().await {
            tokio::spawn(sink(stream));
        }
    });
    let socket = b.dir.path().join("sink.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(sink(stream));
        }
    });
    let _offer = b.node.offer(service("sink"), socket).unwrap();
    for count in [1, 4] {
        let tcp = rate(count, || async { TcpStream::connect(at).await.unwrap() }).await;
        println!("{count} raw TCP: {:.0} MB/s", tcp / 1e6);
        for carriage in [Carriage::Plain, Carriage::Tls] {
            let local = a.dir.path().join("to-b.sock");
            let to = name("b");
            let _forward = a
                .node
                .forward(&local, to, service("sink"), carriage)
                .unwrap();
            let open = || async { UnixStream::connect(&local).await.unwrap() };
            let carried = rate(count, open).await;
            println!(
                "{count} {carriage:?}: {:.0} MB/s, {:.0} % of raw TCP",
                carried / 1e6,
                carried / tcp * 100.0
            );
        }
    }
}
