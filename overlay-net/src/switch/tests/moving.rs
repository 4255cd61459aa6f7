//! Guests that go from one port of a switch to another.

use super::*;
use crate::api::moving::Whereabouts;

const GUEST: Mac = Mac([2, 0, 0, 0, 0, 9]);

fn of_guest() -> PortSpec {
    PortSpec {
        bridge: PortConfig {
            macs: vec![GUEST],
            ..PortConfig::default()
        },
        ..spec("blue")
    }
}

/// The front end of a port begins or stops.
fn turn(switch: &mut Switch, port: &(PortId, Ends), down: bool) {
    port.1.lock().unwrap().down = down;
    switch.service(Some(port.0));
}

fn marks(port: &(PortId, Ends)) -> Vec<u8> {
    got(port).iter().map(|frame| frame[20]).collect()
}

/// A switch with a tenant, a guest, and the port that it will go to.
fn moving() -> (Switch, [(PortId, Ends); 3]) {
    let mut switch = switch();
    let tenant = plug(&mut switch, "tenant", "blue");
    let (wire, port) = end();
    let old = switch.add_port("web", of_guest(), Ok(port)).unwrap();
    let old = (old.id, wire);
    let (wire, port) = end();
    wire.lock().unwrap().down = true;
    let from = Whereabouts::Port("web".to_owned());
    let new = switch.expect("web2", of_guest(), (&from, 0), Ok(port));
    let new = (new.unwrap().id, wire);
    (switch, [tenant, old, new])
}

#[test]
fn all_that_is_sent_to_a_guest_that_moves_comes_once_and_in_order() {
    let (mut switch, [tenant, old, new]) = moving();
    put(&mut switch, &tenant, frame(1, GUEST));
    assert_eq!(marks(&old), [1]);
    turn(&mut switch, &old, true);
    let moving: Vec<_> = switch.ports().into_iter().map(|port| port.moving).collect();
    let told = [None, Some("gone to web2"), Some("coming from web")];
    assert_eq!(moving, told.map(|it| it.map(str::to_owned)));
    for mark in 2..=5 {
        put(&mut switch, &tenant, frame(mark, GUEST));
    }
    assert_eq!((marks(&old), marks(&new)), (vec![], vec![]));
    // It has no room for all of them yet.
    new.1.lock().unwrap().room = Some(2);
    turn(&mut switch, &new, false);
    put(&mut switch, &tenant, frame(6, GUEST));
    assert_eq!(marks(&new), [2, 3]);
    new.1.lock().unwrap().room = None;
    put(&mut switch, &tenant, frame(7, GUEST));
    assert_eq!(marks(&new), [4, 5, 6, 7]);
    switch.remove_port("web").unwrap();
    put(&mut switch, &tenant, frame(8, GUEST));
    assert_eq!(marks(&new), [8]);
    // What it sends is its own.
    let mut from = frame(9, Mac([2, 0, 0, 0, 0, 1]));
    from[6..12].copy_from_slice(&GUEST.0);
    put(&mut switch, &new, from);
    assert_eq!(got(&tenant).len(), 1);
}

#[test]
fn a_guest_that_stays_gets_what_was_sent_after_it() {
    for cancelled in [false, true] {
        let (mut switch, [tenant, old, _]) = moving();
        turn(&mut switch, &old, true);
        put(&mut switch, &tenant, frame(1, GUEST));
        if cancelled {
            turn(&mut switch, &old, false);
            switch.remove_port("web2").unwrap();
        } else {
            // Its monitor goes on once the other one is gone.
            switch.remove_port("web2").unwrap();
            turn(&mut switch, &old, false);
        }
        put(&mut switch, &tenant, frame(2, GUEST));
        switch.service(Some(tenant.0));
        let mut marks = marks(&old);
        marks.sort_unstable();
        assert_eq!(marks, [1, 2]);
        assert_eq!(switch.ports().len(), 2);
        assert!(switch.ports().iter().all(|port| port.moving.is_none()));
    }
}

#[test]
fn a_guest_whose_driver_does_not_run_has_come_when_others_say_so() {
    let (mut switch, [tenant, old, new]) = moving();
    turn(&mut switch, &old, true);
    put(&mut switch, &tenant, frame(1, GUEST));
    switch.arrived("web2").unwrap();
    new.1.lock().unwrap().down = false;
    put(&mut switch, &tenant, frame(2, GUEST));
    assert_eq!(marks(&new).last(), Some(&2));
    assert!(switch.stay("none").is_err());
    let none = Whereabouts::Peer("AAAA".to_owned());
    assert!(matches!(switch.leave("web2", &none), Err(Error::Apart(_))));
}
