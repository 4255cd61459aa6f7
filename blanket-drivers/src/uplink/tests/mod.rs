use super::lab::Lab;
use super::selftest::wait;
use super::*;
use std::time::{Duration, Instant};

mod cache;
mod pairs;
mod set;
mod tap;
mod wire;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

/// Runs a test on a thread with network namespaces of its own.
pub(in crate::uplink) fn in_own_network(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: no memory is involved.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            let error = io::Error::last_os_error();
            println!("skipped, because there is no network namespace: {error}");
        } else {
            test();
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a test with a lab; says so where there cannot be one.
pub(in crate::uplink) fn in_lab(mtu: u32, cables: u8, test: impl FnOnce(&Lab) + Send + 'static) {
    in_own_network(move || match Lab::new(mtu, cables) {
        Ok(lab) => test(&lab),
        Err(error) => println!("skipped, because there is no veth pair: {error}"),
    });
}

/// An uplink at an end of a cable, if this kernel has it.
pub(in crate::uplink) fn end(
    lab: &Lab,
    kind: Kind,
    cable: u8,
    end: usize,
    v6: bool,
) -> Option<Box<dyn Uplink>> {
    match lab.open(kind, cable, end, v6) {
        Ok(uplink) => Some(uplink),
        Err(error @ (Error::Missing { .. } | Error::Denied { .. })) => {
            println!("skipped, because there is no {kind} uplink: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// All datagrams that come until there are `count`.
pub(in crate::uplink) fn receive(
    uplink: &mut dyn Uplink,
    count: usize,
) -> Vec<(Vec<u8>, SocketAddr)> {
    let deadline = Instant::now() + LIMIT;
    let mut room = vec![0; RX_BUFFER * 8];
    let mut got = Vec::new();
    while got.len() < count {
        let mut buffers: Vec<_> = room
            .chunks_exact_mut(RX_BUFFER)
            .map(RxBuffer::new)
            .collect();
        let came = uplink.rx(&mut buffers).unwrap();
        for buffer in &buffers[..came] {
            let packet = buffer.packet();
            got.extend(packet.iter().map(|bytes| (bytes.to_vec(), buffer.from)));
        }
        if came == 0 {
            let counters = uplink.counters();
            assert!(
                Instant::now() < deadline,
                "{} of {count}: {counters:?}",
                got.len()
            );
            wait(uplink.fd(), Duration::from_millis(100));
        }
    }
    got
}

/// Whether anything comes within a moment.
fn silent(uplink: &mut dyn Uplink) -> bool {
    let mut room = vec![0; RX_BUFFER];
    let until = Instant::now() + Duration::from_millis(50);
    while Instant::now() < until {
        if uplink.rx(&mut [RxBuffer::new(&mut room)]).unwrap() > 0 {
            return false;
        }
        wait(uplink.fd(), Duration::from_millis(10));
    }
    true
}

/// Sends all of it.
pub(in crate::uplink) fn send(uplink: &mut dyn Uplink, packets: &[TxPacket<'_>]) {
    let deadline = Instant::now() + LIMIT;
    let mut done = 0;
    while done < packets.len() {
        done += uplink.tx(&packets[done..]).unwrap();
        assert!(Instant::now() < deadline, "{:?}", uplink.counters());
    }
}

/// Has both ends find each other, so that nothing goes by the kernel any more.
pub(in crate::uplink) fn acquaint(near: &mut dyn Uplink, far: &mut dyn Uplink) {
    let (here, there) = (near.description().local, far.description().local);
    let deadline = Instant::now() + LIMIT;
    loop {
        let before = near.counters().tx_kernel + far.counters().tx_kernel;
        send(near, &[TxPacket::new(there, b"ping")]);
        receive(far, 1);
        send(far, &[TxPacket::new(here, b"pong")]);
        receive(near, 1);
        if near.counters().tx_kernel + far.counters().tx_kernel == before {
            return;
        }
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
}
