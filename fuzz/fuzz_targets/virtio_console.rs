//! virtio-console's queues with a client at its socket: no ring, chain, move or
//! reset hurts the device, and a driver that behaves reaches its client
//! afterwards, both ways.
#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use blanket_devices::char::{CharPort, Spec};
use blanket_devices::virtio::console::Console;
use blanket_fuzz::bench::Bench;
use blanket_fuzz::guest::Session;
use libfuzzer_sys::fuzz_target;

/// Where the console listens.
fn socket() -> PathBuf {
    let name = format!("blanket-fuzz-console-{}", std::process::id());
    std::env::temp_dir().join(name)
}

fn connect() -> UnixStream {
    let client = UnixStream::connect(socket()).expect("the console listens");
    client.set_nonblocking(true).expect("a socket");
    client
}

fuzz_target!(|session: Session| {
    let spec = Spec {
        socket: Some(socket()),
        ..Spec::default()
    };
    let port = CharPort::open(&spec).expect("a console");
    let mut device = Console::new("console0", port);
    let client = RefCell::new(connect());
    let mut bench = Bench::new(&mut device);
    bench.run(&session, |bytes| {
        let mut client = client.borrow_mut();
        if bytes.is_empty() {
            *client = connect();
            return;
        }
        // A console that is full takes no more, one that is gone nothing.
        let _ = client.write(bytes);
        let _ = client.read(&mut [0; 256]);
    });
    drop(client.into_inner());

    bench.behave(session.features);
    let (len, _) = bench.ask(1, &[b"out"], &[]);
    assert_eq!(len, 0);
    let mut client = connect();
    let place = bench.post(0, &[], &[8]);
    client.write_all(b"in").expect("a listening console");
    let (len, bytes) = bench.answer(0, place);
    assert_eq!((len, &bytes[..2]), (2, &b"in"[..]));
    // The client is shown what was said before it came.
    let mut heard = Vec::new();
    let _ = client.read_to_end(&mut heard);
    assert!(heard.ends_with(b"out"));
    bench.finish();
});
