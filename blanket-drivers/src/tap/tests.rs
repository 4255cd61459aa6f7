use super::*;
use proptest::prelude::*;
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn addresses_with_a_prefix_are_read() {
    assert_eq!(
        parse_host_ip("10.1.0.1/24").unwrap(),
        (Ipv4Addr::new(10, 1, 0, 1), 24)
    );
    assert_eq!(parse_host_ip("192.168.7.9/32").unwrap().1, 32);
}

#[test]
fn what_is_no_host_address_is_refused() {
    for bad in [
        "",
        "/",
        "10.1.0.1",
        "10.1.0.1/",
        "10.1.0.1/0",
        "10.1.0.1/33",
        "10.1.0.1/+8",
        "10.1.0/24",
        "10.1.0.1/24/24",
        "0.0.0.0/8",
        "224.0.0.1/4",
        "255.255.255.255/8",
        "fe80::1/64",
    ] {
        assert!(parse_host_ip(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn any_text_is_an_address_or_a_plain_error(text: String) {
        let _ = parse_host_ip(&text);
    }

    #[test]
    fn a_host_address_is_read_back(a in 1u8..224, b: u8, c: u8, d: u8, prefix in 1u8..=32) {
        let ip = Ipv4Addr::new(a, b, c, d);
        prop_assert_eq!(parse_host_ip(&format!("{ip}/{prefix}")).unwrap(), (ip, prefix));
    }

    #[test]
    fn a_name_is_kept_whole_or_refused(name in "\\PC{0,20}") {
        if check_name(&name).is_ok() {
            prop_assert_eq!(link::name_of(&link::request(&name)), name);
        }
    }
}

#[test]
fn names_that_linux_cannot_have_are_refused() {
    for bad in [
        "",
        ".",
        "..",
        "a/b",
        "a b",
        "tap%d",
        "a23456789012345 6",
        "a234567890123456",
    ] {
        assert!(matches!(check_name(bad), Err(Error::Name(_))), "{bad}");
    }
    assert!(check_name("a23456789012345").is_ok());
}

/// Runs a test with interfaces of its own, on a thread that takes its network
/// namespace along when it ends; says so where that is not permitted.
fn in_own_network(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: no memory is involved.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            let error = io::Error::last_os_error();
            println!("skipped, because there is no network namespace: {error}");
        } else if let Err(error) = File::open("/dev/net/tun") {
            println!("skipped, because /dev/net/tun cannot be opened: {error}");
        } else {
            test();
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("iproute2");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Waits until a tap that was dropped is gone: a command that another test is
/// about to start holds all descriptors until it is executed.
fn wait_gone(name: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while Link::exists(name).unwrap() {
        assert!(Instant::now() < deadline, "{name} is still there");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn spec(name: &str, queues: u16) -> Spec {
    Spec {
        name: Some(name.to_owned()),
        queues,
        ..Spec::default()
    }
}

#[test]
fn a_new_tap_is_up_with_its_mtu_and_address_and_gone_when_dropped() {
    in_own_network(|| {
        let tap = Tap::open(&Spec {
            mtu: Some(9000),
            host_ip: Some((Ipv4Addr::new(10, 9, 8, 1), 20)),
            ..spec("t0", 1)
        })
        .unwrap();
        assert_eq!((tap.name(), tap.mtu(), tap.queues().len()), ("t0", 9000, 1));
        assert!(tap.offloads().contains(Offloads::BASE));
        let shown = ip("addr show dev t0");
        assert!(shown.contains("mtu 9000"), "{shown}");
        assert!(shown.contains("10.9.8.1/20"), "{shown}");
        assert!(shown.contains(",UP"), "{shown}");
        drop(tap);
        wait_gone("t0");
    });
}

#[test]
fn the_kernel_names_a_tap_that_has_no_name() {
    in_own_network(|| {
        let one = Tap::open(&Spec {
            queues: 1,
            ..Spec::default()
        })
        .unwrap();
        let two = Tap::open(&Spec {
            queues: 1,
            ..Spec::default()
        })
        .unwrap();
        assert!(Link::exists(one.name()).unwrap());
        assert_ne!(one.name(), two.name());
    });
}

#[test]
fn a_tap_joins_a_bridge_once_and_no_other_afterwards() {
    in_own_network(|| {
        ip("link add br7 type bridge");
        ip("link add br8 type bridge");
        let with = |bridge: &str| Spec {
            bridge: Some(bridge.to_owned()),
            ..spec("t0", 1)
        };
        let missing = Tap::open(&with("br9")).unwrap_err();
        assert!(matches!(missing, Error::NoBridge(_)), "{missing}");
        wait_gone("t0");
        let tap = Tap::open(&with("br7")).unwrap();
        assert!(ip("link show dev t0").contains("master br7"));
        let other = Link::new(tap.name(), 1).unwrap().join("br8").unwrap_err();
        assert!(matches!(other, Error::OtherBridge { .. }), "{other}");
    });
}

#[test]
fn a_persistent_tap_is_used_and_keeps_its_mtu() {
    in_own_network(|| {
        ip("tuntap add t0 mode tap");
        ip("link set t0 mtu 1400");
        let tap = Tap::open(&Spec {
            mtu: Some(9000),
            ..spec("t0", 1)
        })
        .unwrap();
        assert_eq!(tap.mtu(), 1400);
        let busy = Tap::open(&spec("t0", 1)).unwrap_err();
        assert!(matches!(busy, Error::Busy(_)), "{busy}");
        drop(tap);
        assert!(Link::exists("t0").unwrap());
    });
}

#[test]
fn a_wrong_kind_of_interface_is_a_clear_error() {
    in_own_network(|| {
        ip("tuntap add single mode tap");
        ip("tuntap add many mode tap multi_queue");
        ip("link add br7 type bridge");
        for (name, queues) in [("single", 2), ("many", 1), ("br7", 1)] {
            let error = Tap::open(&spec(name, queues)).unwrap_err();
            assert!(matches!(error, Error::Kind { .. }), "{name}: {error}");
        }
        assert_eq!(Tap::open(&spec("many", 4)).unwrap().queues().len(), 4);
        assert!(matches!(Tap::open(&spec("x", 0)), Err(Error::Queues(0))));
    });
}

#[test]
fn without_the_right_to_it_the_error_tells_both_ways_out() {
    in_own_network(|| {
        // SAFETY: the call changes this thread's credentials only.
        let dropped = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) };
        assert_eq!(dropped, 0);
        let error = Tap::open(&spec("t0", 2)).unwrap_err();
        let told = error.to_string();
        match error {
            Error::Denied { .. } => {
                assert!(told.contains("CAP_NET_ADMIN"), "{told}");
                assert!(
                    told.contains("ip tuntap add t0 mode tap multi_queue user"),
                    "{told}"
                );
            }
            Error::DeviceDenied(_) => assert!(told.contains("chmod 0666"), "{told}"),
            _ => panic!("{told}"),
        }
    });
}

#[test]
fn detached_queues_get_nothing_and_can_be_attached_again() {
    in_own_network(|| {
        let tap = Tap::open(&spec("t0", 2)).unwrap();
        let queue = &tap.queues()[1];
        queue.set_attached(false).unwrap();
        assert!(queue.set_attached(false).is_err());
        let shown = ip("-d link show dev t0");
        assert!(shown.contains("numqueues 1 numdisabled 1"), "{shown}");
        queue.set_attached(true).unwrap();
        let shown = ip("-d link show dev t0");
        assert!(shown.contains("numqueues 2 numdisabled 0"), "{shown}");
        let mut frame = [0u8; 64];
        queue.drain();
        let read = io::Read::read(&mut &queue.file, &mut frame).unwrap_err();
        assert_eq!(read.kind(), io::ErrorKind::WouldBlock);
    });
}

#[test]
fn frames_that_are_put_come_before_those_of_the_tap() {
    let (tap, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    let queue = TapQueue::from(OwnedFd::from(tap));
    let read = || {
        let mut frame = [0u8; 100];
        let vectors = [IoVec::new(frame.as_mut_ptr(), frame.len())];
        // SAFETY: the vector is the array.
        let len = unsafe { queue.readv(&vectors) }.ok()?;
        Some(frame[..len].to_vec())
    };
    let is_ready = || {
        let mut poll = libc::pollfd {
            fd: queue.event(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: it is one entry, and outlives the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    };
    let frame = |n: u8| vec![n; 40];
    // Nothing is held before.
    assert!(!queue.put(&frame(0)));
    queue.hold().unwrap();
    far.send(&frame(3)).unwrap();
    assert!(read().is_none() && !is_ready());
    assert!(queue.put(&frame(1)) && queue.put(&frame(2)));
    assert!(!queue.put(&[0; HEADER_LEN - 1]));
    assert!(is_ready());
    assert_eq!(read(), Some(frame(1)));
    queue.release().unwrap();
    assert!(!queue.put(&frame(9)));
    for n in [2, 3] {
        assert!(is_ready());
        assert_eq!(read(), Some(frame(n)));
    }
    assert!(read().is_none() && !is_ready());
    far.send(&frame(4)).unwrap();
    assert!(is_ready());
    assert_eq!(read(), Some(frame(4)));
    // No more than there is room for.
    queue.hold().unwrap_or(());
    let large = vec![0; 1 << 20];
    let taken = (0..100).filter(|_| queue.put(&large)).count();
    assert!(taken < 20, "{taken}");
}

#[test]
fn a_guests_announcement_is_recognized() {
    let mac = MacAddress([2, 0, 0, 0, 0, 7]);
    let frame = [vec![0; HEADER_LEN], announcement(mac)].concat();
    assert!(announces(&frame, mac));
    assert!(!announces(&frame, MacAddress([2, 0, 0, 0, 0, 8])));
    assert!(!announces(&frame[..40], mac));
}
