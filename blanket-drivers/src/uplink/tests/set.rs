//! Several uplinks as one, of which some die.

use super::*;

fn specs(cables: u8, end: usize) -> Vec<(Kind, Spec)> {
    let spec = |cable| {
        let local = SocketAddr::new(Lab::address(cable, end, false), lab::PORT);
        (Kind::Udp, Spec::new(&Lab::name(cable, end), local))
    };
    (0..cables).map(spec).collect()
}

fn set_up(name: &str, up: bool) {
    let index = netlink::interface(name).unwrap().index;
    netlink::Netlink::open().unwrap().set_up(index, up).unwrap();
}

/// Calls `check` until all of the members have the health that is expected.
fn wait_for(set: &mut Uplinks, expected: &[Health]) {
    let deadline = Instant::now() + LIMIT;
    loop {
        set.check();
        let now: Vec<_> = set.members().map(|(_, health)| health.clone()).collect();
        if now == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{now:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn sent(set: &Uplinks) -> Vec<u64> {
    set.members()
        .map(|(uplink, _)| uplink.counters().tx.datagrams)
        .collect()
}

/// Sends one datagram of each of 64 flows towards the far end of cable 0; with
/// its own interface the kernel takes whichever the uplink is bound to.
fn spread(set: &mut Uplinks, cables: u8) {
    for flow in 0..64 {
        // Each uplink reaches only what is at its own cable: address them all.
        for cable in 0..cables {
            let to = SocketAddr::new(Lab::address(cable, 1, false), lab::PORT);
            set.tx(flow, &[TxPacket::new(to, b"flow")]);
        }
    }
}

#[test]
fn flows_are_spread_and_each_stays_where_it_is() {
    in_lab(1500, 2, |lab| {
        lab.enter(0).unwrap();
        let mut set = Uplinks::open(&specs(2, 0)).unwrap();
        assert!(set.refused().is_empty());
        assert_eq!(set.payload(), 1472);
        let mut last = None;
        for _ in 0..3 {
            let before = sent(&set);
            spread(&mut set, 2);
            let after = sent(&set);
            let share: Vec<_> = before.iter().zip(&after).map(|(a, b)| b - a).collect();
            assert!(share.iter().all(|share| *share > 0), "{share:?}");
            assert!(last.is_none_or(|last| last == share));
            last = Some(share);
        }
    });
}

#[test]
fn of_two_nics_the_dead_one_is_named_and_the_other_carries_all() {
    in_lab(1500, 2, |lab| {
        lab.enter(1).unwrap();
        set_up("up1x1", false);
        lab.enter(0).unwrap();
        let mut set = Uplinks::open(&specs(2, 0)).unwrap();
        assert_eq!(set.members().count(), 1);
        let (_, spec, error) = &set.refused()[0];
        assert_eq!(spec.interface, "up0x1");
        assert!(error.to_string().contains("without a carrier"), "{error}");
        let to = SocketAddr::new(Lab::address(0, 1, false), lab::PORT);
        for flow in 0..64 {
            assert_eq!(set.tx(flow, &[TxPacket::new(to, b"x")]), 1);
        }
        assert_eq!(sent(&set), [64]);
    });
}

#[test]
fn a_nic_that_loses_its_carrier_is_left_and_taken_again() {
    in_lab(1500, 2, |lab| {
        lab.enter(0).unwrap();
        let mut set = Uplinks::open(&specs(2, 0)).unwrap();
        lab.enter(1).unwrap();
        set_up("up1x1", false);
        wait_for(&mut set, &[Health::Good, Health::NoCarrier]);
        let before = sent(&set);
        let to = SocketAddr::new(Lab::address(0, 1, false), lab::PORT);
        for flow in 0..64 {
            assert_eq!(set.tx(flow, &[TxPacket::new(to, b"x")]), 1);
        }
        let after = sent(&set);
        assert_eq!((after[0] - before[0], after[1] - before[1]), (64, 0));
        set_up("up1x1", true);
        wait_for(&mut set, &[Health::Good, Health::Good]);
        lab.enter(0).unwrap();
        set_up("up0", false);
        wait_for(&mut set, &[Health::Down, Health::Good]);
    });
}

#[test]
fn a_nic_that_swallows_everything_is_found_out_while_the_other_receives() {
    in_lab(1500, 2, |lab| {
        lab.enter(0).unwrap();
        let mut set = Uplinks::open(&specs(2, 0)).unwrap();
        lab.enter(1).unwrap();
        // At the far end of cable 1 nobody answers; the link is up all the same.
        let mut far = lab.open(Kind::Udp, 0, 1, false).unwrap();
        let here = SocketAddr::new(Lab::address(0, 0, false), lab::PORT);
        let mut room = vec![0; RX_BUFFER * 4];
        let deadline = Instant::now() + LIMIT;
        loop {
            spread(&mut set, 2);
            send(&mut *far, &[TxPacket::new(here, b"answer")]);
            let mut buffers: Vec<_> = room
                .chunks_exact_mut(RX_BUFFER)
                .map(RxBuffer::new)
                .collect();
            wait(set.fd(), Duration::from_millis(10));
            set.rx(&mut buffers);
            let changed = set.check();
            if let Some((which, health)) = changed.first() {
                assert_eq!(
                    (which.interface.as_str(), health),
                    ("up0x1", &Health::Silent)
                );
                break;
            }
            assert!(Instant::now() < deadline, "{:?}", sent(&set));
        }
        let before = sent(&set)[1];
        spread(&mut set, 2);
        assert_eq!(sent(&set)[1], before);
    });
}

#[test]
fn without_any_uplink_the_error_has_every_reason() {
    in_lab(1500, 1, |lab| {
        lab.enter(0).unwrap();
        let mut specs = specs(1, 0);
        specs[0].1.interface = "eth7".to_owned();
        let told = Uplinks::open(&specs).err().unwrap().to_string();
        assert!(told.contains("eth7"), "{told}");
        assert!(Uplinks::open(&[]).is_err());
    });
}

#[test]
fn what_starts_is_what_was_measured_or_wanted_and_udp_where_that_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    in_lab(1500, 2, move |lab| {
        lab.enter(0).unwrap();
        let cache = Cache::new(&path);
        let wanted = [Kind::AfPacket, Kind::AfXdp];
        for (cable, wanted) in (0..).zip(wanted) {
            let address = Lab::address(cable, 0, false);
            let record = cache.record(&Lab::name(cable, 0), address, false);
            let (mut record, _) = record.unwrap();
            record.wanted = Some(wanted);
            cache.store(&record).unwrap();
        }
        // An interface takes one XDP program: the second uplink is refused.
        let Some(_holder) = end(lab, Kind::AfXdp, 1, 0, false) else {
            return;
        };
        lab.enter(0).unwrap();
        let set = Uplinks::start(&cache, 7).unwrap();
        let mut kinds: Vec<_> = set
            .members()
            .map(|(uplink, _)| {
                (
                    uplink.description().interface.clone(),
                    uplink.description().kind,
                )
            })
            .collect();
        kinds.sort();
        assert_eq!(
            kinds,
            [
                ("up0".to_owned(), Kind::AfPacket),
                ("up0x1".to_owned(), Kind::Udp)
            ]
        );
        let (kind, spec, error) = &set.refused()[0];
        assert_eq!((*kind, spec.interface.as_str()), (Kind::AfXdp, "up0x1"));
        assert!(matches!(error, Error::Busy { .. }), "{error}");
    });
}
