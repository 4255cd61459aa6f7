use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blanket_drivers::mac::MacAddress;
use blanket_drivers::tap::{Spec, Tap};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::testing::until;
use crate::worker::Worker;
use crate::xen::EventChannels;
use crate::xen::bus::{Backend, Context, Error};
use crate::xen::netif::{Netif, state};
use crate::xen::testing::Events;

const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);

/// A frontend, and all that its backend works with.
struct Bench {
    front: Front,
    channels: Arc<Events>,
    context: Context,
    faults: Arc<AtomicUsize>,
}

impl Bench {
    fn new() -> Self {
        let front = Front::new();
        let channels = Arc::new(Events::default());
        let faults = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&faults);
        let worker = Worker::spawn("netif", Box::new(|| Ok(()))).unwrap();
        let context = Context {
            memory: front.guest.ram.clone(),
            grants: Arc::clone(&front.guest.grants),
            events: Arc::clone(&channels) as Arc<dyn EventChannels>,
            workers: vec![worker].into(),
            fault: Arc::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
            }),
        };
        Self {
            front,
            channels,
            context,
            faults,
        }
    }

    /// Sends a request for the node's address and waits for the answer.
    fn ask(&mut self) {
        let request = arp_request();
        self.front.write(DATA + 99, 0, &request);
        self.front.slot(DATA + 99, 0, request.len() as u16, 0);
        let (tx, rx) = (self.front.tx.publish(), self.front.offer(DATA..DATA + 20));
        assert!(tx || rx);
        self.channels.send(7);
        let deadline = Instant::now() + Duration::from_secs(20);
        // The node may also send of its own accord (IPv6 discovery).
        loop {
            assert!(Instant::now() < deadline);
            let Some(slot) = self.front.received() else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            let page = u16::from_le_bytes([slot[0], slot[1]]);
            let got = self.front.read(u32::from(page), 42);
            self.front.offer(u32::from(page)..u32::from(page) + 1);
            if got[..6] == MAC.0 && got[12..14] == [8, 6] {
                assert_eq!(got[28..32], [10, 9, 8, 1]);
                break;
            }
        }
        // The answer may be here before it is known that the request was taken.
        let mut sent = None;
        until("end of the request", || {
            sent = self.front.sent();
            sent.is_some()
        });
        assert_eq!(sent, Some(((DATA + 99) as u16, 0)));
        until("notification", || self.channels.notified() > 0);
    }
}

/// A broadcast ARP request for 10.9.8.1 from 10.9.8.2.
fn arp_request() -> Vec<u8> {
    let mut packet = vec![0xff; 6];
    packet.extend(MAC.0);
    packet.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    packet.extend(MAC.0);
    packet.extend([10, 9, 8, 2, 0, 0, 0, 0, 0, 0, 10, 9, 8, 1]);
    packet.resize(60, 0);
    packet
}

/// The nodes that Linux writes for one queue.
fn nodes() -> HashMap<String, String> {
    [
        ("tx-ring-ref", "1"),
        ("rx-ring-ref", "2"),
        ("event-channel", "7"),
        ("request-rx-copy", "1"),
        ("feature-rx-notify", "1"),
        ("feature-sg", "1"),
        ("feature-gso-tcpv4", "1"),
        ("feature-gso-tcpv6", "1"),
        ("feature-ipv6-csum-offload", "1"),
    ]
    .map(|(node, value)| (node.to_owned(), value.to_owned()))
    .into()
}

fn with(changes: &[(&str, Option<&str>)]) -> HashMap<String, String> {
    let mut nodes = nodes();
    for (node, value) in changes {
        match value {
            Some(value) => nodes.insert((*node).to_owned(), (*value).to_owned()),
            None => nodes.remove(*node),
        };
    }
    nodes
}

fn read(nodes: &HashMap<String, String>, most: usize) -> Result<state::State, Error> {
    state::read(&|node| nodes.get(node).cloned(), most)
}

#[test]
fn what_linux_writes_is_understood() {
    let state = read(&nodes(), 4).unwrap();
    assert_eq!(state.features, ALL);
    let [queue] = &state.queues[..] else {
        panic!("{state:?}")
    };
    assert_eq!((queue.tx.reference, queue.rx.reference), (1, 2));
    assert_eq!((queue.tx.port, queue.rx.port), (7, 7));

    let mut several = with(&[
        ("multi-queue-num-queues", Some("2")),
        ("tx-ring-ref", None),
        ("rx-ring-ref", None),
        ("event-channel", None),
    ]);
    for (i, ports) in [(0, ["7", "8"]), (1, ["9", "10"])] {
        let mut put = |node: &str, value: &str| {
            several.insert(format!("queue-{i}/{node}"), value.to_owned());
        };
        put("tx-ring-ref", "1");
        put("rx-ring-ref", "2");
        put("event-channel-tx", ports[0]);
        put("event-channel-rx", ports[1]);
    }
    let state = read(&several, 2).unwrap();
    assert_eq!(state.queues.len(), 2);
    assert_eq!((state.queues[1].tx.port, state.queues[1].rx.port), (9, 10));
    assert!(read(&several, 1).is_err());
    several.remove("queue-1/rx-ring-ref");
    let error = read(&several, 2).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the frontend's node 'queue-1/rx-ring-ref' is missing"
    );
}

#[test]
fn a_frontend_gets_no_more_than_it_takes() {
    let features = |changes: &[_]| read(&with(changes), 1).unwrap().features;
    let plain = Features {
        sg: true,
        ..Features::default()
    };
    assert_eq!(features(&[("feature-no-csum-offload", Some("1"))]), plain);
    assert_eq!(features(&[("feature-ipv6-csum-offload", None)]), plain);
    let sums = Features {
        checksum: true,
        ..Features::default()
    };
    assert_eq!(features(&[("feature-sg", Some("0"))]), sums);
    let four = Features { gso6: false, ..ALL };
    assert_eq!(features(&[("feature-gso-tcpv6", None)]), four);
}

#[test]
fn nodes_that_make_no_sense_are_refused() {
    for (node, value) in [
        ("tx-ring-ref", Some("x")),
        ("rx-ring-ref", None),
        ("event-channel", Some("-1")),
        ("event-channel", None),
        ("request-rx-copy", None),
        ("request-rx-copy", Some("0")),
        ("feature-rx-notify", None),
        ("feature-sg", Some("")),
        ("multi-queue-num-queues", Some("0")),
        ("multi-queue-num-queues", Some("2")),
        ("multi-queue-num-queues", Some("4294967297")),
    ] {
        let error = read(&with(&[(node, value)]), 1).unwrap_err().to_string();
        assert!(error.contains(node), "{node}: {error}");
    }
}

/// Runs a test with a TAP in a network namespace that its thread takes along.
fn with_tap(queues: u16, test: impl FnOnce(Tap) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: no memory is involved.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            let error = io::Error::last_os_error();
            println!("skipped, because there is no network namespace: {error}");
            return;
        }
        match Tap::open(&Spec {
            name: Some("t0".into()),
            host_ip: Some((Ipv4Addr::new(10, 9, 8, 1), 24)),
            queues,
            ..Spec::default()
        }) {
            Ok(tap) => test(tap),
            Err(error) => println!("skipped, because there is no tap: {error}"),
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn connect(netif: &mut Netif, bench: &Bench) -> Result<Vec<(String, String)>, Error> {
    let nodes = nodes();
    netif.connect(&|node| nodes.get(node).cloned(), &bench.context)
}

#[test]
fn a_request_through_the_rings_is_answered_by_the_node_also_after_a_restore() {
    with_tap(1, |tap| {
        let mut netif = Netif::new(0, "net0", tap, MAC, Some(1400)).unwrap();
        let mut bench = Bench::new();
        connect(&mut netif, &bench).unwrap();
        assert_eq!(bench.channels.bound(), [7]);
        assert!(netif.save().is_err());
        bench.ask();

        netif.pause().unwrap();
        // Handed over while nobody looks: not lost.
        let request = arp_request();
        bench.front.write(DATA + 98, 0, &request);
        bench.front.slot(DATA + 98, 0, request.len() as u16, 0);
        bench.front.tx.publish();
        let saved = netif.save().unwrap();
        netif.disconnect();
        assert!(bench.channels.bound().is_empty());
        assert!(!bench.front.guest.in_use(TX_PAGE));

        netif.restore(&saved, &bench.context).unwrap();
        assert_eq!(netif.save().unwrap(), saved);
        assert!(bench.front.sent().is_none());
        netif.resume().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while bench.front.sent() != Some(((DATA + 98) as u16, 0)) {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        bench.ask();
        let counter = |netif: &Netif, name: &str| {
            let counters = netif.metrics();
            counters.iter().find(|(n, _)| *n == name).unwrap().1
        };
        assert_eq!(counter(&netif, "tx_packets"), 3);
        netif.halt();
        // Each page was mapped for its own request and no longer.
        let maps = counter(&netif, "grant_maps");
        assert!(maps >= 3 + counter(&netif, "rx_packets"));
        assert_eq!(counter(&netif, "grant_unmaps"), maps);
        assert_eq!(counter(&netif, "grant_hits"), 0);
        assert!(bench.channels.bound().is_empty());
        assert_eq!(bench.faults.load(Ordering::SeqCst), 0);
    });
}

#[test]
fn a_broken_ring_is_reported_once_and_then_left_alone() {
    with_tap(1, |tap| {
        let mut netif = Netif::new(0, "net0", tap, MAC, None).unwrap();
        let bench = Bench::new();
        connect(&mut netif, &bench).unwrap();
        bench.front.tx.claim(9999);
        let deadline = Instant::now() + Duration::from_secs(20);
        while bench.faults.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < deadline);
            bench.channels.send(7);
            std::thread::sleep(Duration::from_millis(1));
        }
        for _ in 0..20 {
            bench.channels.send(7);
            std::thread::sleep(Duration::from_millis(1));
        }
        netif.disconnect();
        assert_eq!(bench.faults.load(Ordering::SeqCst), 1);
        assert!(!bench.front.guest.in_use(TX_PAGE));
        assert!(!bench.front.guest.in_use(RX_PAGE));
    });
}

#[test]
fn a_connection_that_fails_leaves_nothing_behind() {
    with_tap(2, |tap| {
        let mut netif = Netif::new(0, "net0", tap, MAC, None).unwrap();
        let bench = Bench::new();
        bench.channels.bind(9, &EventFd::new(0).unwrap()).unwrap();
        bench.front.guest.grant(3, 3);
        bench.front.guest.grant(4, 4);
        let mut nodes = with(&[("multi-queue-num-queues", Some("2"))]);
        for (i, [tx, rx, port]) in [["1", "2", "8"], ["3", "4", "9"]].iter().enumerate() {
            for (node, value) in [
                ("tx-ring-ref", tx),
                ("rx-ring-ref", rx),
                ("event-channel", port),
            ] {
                nodes.insert(format!("queue-{i}/{node}"), (*value).to_owned());
            }
        }
        // The second queue's port is taken.
        let connect =
            |netif: &mut Netif| netif.connect(&|node| nodes.get(node).cloned(), &bench.context);
        assert!(matches!(connect(&mut netif), Err(Error::Io(_))));
        assert_eq!(bench.channels.bound(), [9]);
        assert!((1..5).all(|page| !bench.front.guest.in_use(page)));
        bench.channels.unbind(9);
        connect(&mut netif).unwrap();
        assert_eq!(bench.channels.bound(), [8, 9]);
        // A node with fewer queues cannot take it over.
        netif.pause().unwrap();
        let saved = netif.save().unwrap();
        netif.disconnect();
        with_tap(1, move |tap| {
            let mut other = Netif::new(0, "net0", tap, MAC, None).unwrap();
            let error = other.restore(&saved, &Bench::new().context).unwrap_err();
            assert!(error.to_string().contains("2 queues"), "{error}");
        });
    });
}

#[test]
fn the_directories_say_what_there_is() {
    with_tap(3, |tap| {
        let netif = Netif::new(1, "net1", tap, MAC, Some(1400)).unwrap();
        let has = |nodes: Vec<(String, String)>, node: &str, value: &str| {
            nodes.contains(&(node.to_owned(), value.to_owned()))
        };
        assert!(has(netif.offer(), "multi-queue-max-queues", "3"));
        assert!(has(netif.offer(), "feature-rx-copy", "1"));
        assert!(has(netif.frontend(), "mac", "52:54:00:01:02:03"));
        assert!(has(netif.frontend(), "handle", "1"));
        assert!(has(netif.frontend(), "mtu", "1400"));
        assert_eq!(
            (netif.kind(), netif.index(), netif.name()),
            ("vif", 1, "net1")
        );
    });
}
