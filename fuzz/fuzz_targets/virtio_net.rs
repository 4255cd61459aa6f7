//! virtio-net's queues, two pairs and the control queue, on a TAP in a network
//! namespace of its own: no ring, chain, frame, command, move or reset hurts
//! the device, and a driver that behaves sends and receives afterwards.
//!
//! It needs /dev/net/tun and the right to make a network namespace.
#![no_main]

use std::cell::RefCell;

use blanket_devices::virtio::net::Net;
use blanket_drivers::mac::MacAddress;
use blanket_drivers::tap::{HEADER_LEN, Spec, Tap};
use blanket_fuzz::bench::Bench;
use blanket_fuzz::guest::Session;
use blanket_fuzz::packet::{PacketSocket, isolate};
use libfuzzer_sys::fuzz_target;

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
/// Features (virtio 1.2, 5.1.3): merged buffers, control queue, more pairs.
const MRG_RXBUF: u64 = 1 << 15;

thread_local! {
    /// A TAP takes long to make: all runs share it.
    static NET: RefCell<Option<(Net, PacketSocket)>> = const { RefCell::new(None) };
}

fn make() -> (Net, PacketSocket) {
    let spec = Spec {
        name: Some("fuzz0".to_owned()),
        queues: 2,
        ..Spec::default()
    };
    let tap = Tap::open(&spec).unwrap_or_else(|error| give_up(&error));
    let outside = PacketSocket::open(tap.name()).unwrap_or_else(|error| give_up(&error));
    let net = Net::new("net0", tap, MAC, Some(1500)).expect("an interface");
    (net, outside)
}

/// Tells why it cannot run here, in the words of all tests.
fn give_up(error: &dyn std::fmt::Display) -> ! {
    println!(
        "skipped, because there is no TAP in a network namespace of its own ({error}); \
         run it as root, or allow unprivileged user namespaces and /dev/net/tun"
    );
    // SAFETY: ends the process at once. (The engine takes an ordinary exit for
    // a crash.)
    unsafe { libc::_exit(0) }
}

fn frame(last: u8) -> Vec<u8> {
    let mut frame = MAC.0.to_vec();
    // From a neighbour, of an experimental kind (IEEE 802).
    frame.extend([2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    frame.resize(60, last);
    frame
}

fuzz_target!(
    init: {
        // Before the fuzzing engine starts threads.
        if let Err(error) = isolate() {
            give_up(&error);
        }
    },
    |session: Session| {
        NET.with_borrow_mut(|net| {
            let (device, outside) = net.get_or_insert_with(make);
            run(&session, device, outside);
        });
    }
);

fn run(session: &Session, device: &mut Net, outside: &PacketSocket) {
    let mut bench = Bench::new(device);
    bench.run(session, |bytes| outside.send(bytes));
    outside.drain();

    bench.behave(session.features);
    // The header is all zeros: nothing is left to do.
    let (len, _) = bench.ask(1, &[&[0; HEADER_LEN], &frame(7)], &[]);
    assert_eq!(len, 0);
    assert_eq!(outside.receive(), Some(frame(7)));
    let place = bench.post(0, &[], &[2048]);
    outside.send(&frame(9));
    let (len, bytes) = bench.answer(0, place);
    assert_eq!(len as usize, HEADER_LEN + 60);
    assert_eq!(bytes[HEADER_LEN..][..60], frame(9));
    if session.features & MRG_RXBUF != 0 {
        assert_eq!(bytes[10..12], [1, 0]);
    }
    bench.finish();
}
