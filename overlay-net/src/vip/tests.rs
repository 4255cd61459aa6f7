//! Who gets which connections.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::frame::key::protocol;

fn mac(number: u32) -> Mac {
    let [a, b, c, d] = number.to_be_bytes();
    Mac([2, 0, a, b, c, d])
}

fn config(weights: &[(u32, u32)]) -> ServiceConfig {
    let backend = |(number, weight): &(u32, u32)| Backend {
        mac: mac(*number),
        weight: *weight,
    };
    ServiceConfig {
        mac: mac(0xffff),
        backends: weights.iter().map(backend).collect(),
        tokens: 16_384,
        sticky: false,
        drain: Duration::from_secs(60),
    }
}

fn even(servers: std::ops::Range<u32>) -> ServiceConfig {
    config(&servers.map(|number| (number, 1)).collect::<Vec<_>>())
}

fn key(client: u32, port: u16, flags: u8) -> Key {
    Key {
        vni: Vni::new(7).expect("24 bits"),
        ip: Some((client.to_be_bytes().into(), [10, 0, 0, 100].into())),
        protocol: protocol::TCP,
        ports: Some((port, 80)),
        tcp_flags: flags,
        ..Key::default()
    }
}

const SYN: u8 = 2;
const ACK: u8 = 16;

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn chosen(service: &Service, now: u64, client: u32) -> Mac {
    let key = key(client, 1000, SYN);
    service.choose(at(now), &key).expect("a server").backend
}

#[test]
fn connections_are_shared_by_weight() {
    let service = Service::new(config(&[(1, 1), (2, 2), (3, 5)])).expect("sound");
    let mut counts = HashMap::new();
    for client in 0..80_000 {
        *counts.entry(chosen(&service, 0, client)).or_insert(0) += 1;
    }
    for (server, share) in [(1, 10_000), (2, 20_000), (3, 50_000)] {
        let count: i32 = counts[&mac(server)];
        assert!((count - share).abs() < share / 10, "{server}: {count}");
    }
    let tokens: usize = service.shares().iter().map(|(_, tokens)| tokens).sum();
    assert_eq!(tokens, 16_384);
}

#[test]
fn every_node_comes_to_the_same_table_whatever_came_before() {
    let fresh = Service::new(even(0..20)).expect("sound");
    let mut changed = Service::new(even(5..9)).expect("sound");
    changed.set(at(1), even(3..50)).expect("sound");
    changed.set_health(at(2), mac(7), false);
    let mut backwards = even(0..20);
    backwards.backends.reverse();
    changed.set(at(3), backwards).expect("sound");
    changed.set_health(at(4), mac(7), true);
    for client in 0..10_000 {
        assert_eq!(chosen(&fresh, 5, client), chosen(&changed, 5, client));
    }
    // The table is the same on every machine and in every version: packets of
    // one connection may meet several.
    let first: Vec<u32> = (0..8)
        .map(|client| {
            let [_, _, a, b, c, d] = chosen(&fresh, 5, client).0;
            u32::from_be_bytes([a, b, c, d])
        })
        .collect();
    assert_eq!(first, FIRST);
}

const FIRST: [u32; 8] = [10, 7, 10, 5, 19, 12, 19, 4];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_server_that_comes_or_goes_moves_its_own_connections_only(
        servers in 2..100_u32,
        which: prop::sample::Index,
    ) {
        let before = Service::new(even(0..servers)).expect("sound");
        let gone = which.index(servers as usize) as u32;
        let mut after = before.clone();
        let mut config = even(0..servers);
        config.backends.retain(|backend| backend.mac != mac(gone));
        after.set(at(1), config).expect("sound");
        let mut moved = 0;
        for client in 0..20_000 {
            let (was, is) = (chosen(&before, 0, client), chosen(&after, 1, client));
            if was != is {
                prop_assert_eq!(was, mac(gone));
                moved += 1;
            }
        }
        let share = 20_000 / servers;
        prop_assert!((share / 2..=share * 2).contains(&moved), "{} of {}", moved, share);
    }
}

#[test]
fn connections_go_on_with_the_server_that_drains() {
    let mut service = Service::new(even(0..2)).expect("sound");
    let mut agents = [Agent::new(4096), Agent::new(4096)];
    // Which server a packet reaches, by way of the agents.
    let mut reach = |service: &Service, now: u64, key: &Key| {
        let mut choice = service.choose(at(now), key).expect("a server");
        for _ in 0..3 {
            let server = choice.backend;
            let number = usize::from(server.0[5]);
            let mux = service.choose(at(now), key).expect("a server");
            match agents[number].receive(at(now), key, server, mux) {
                Verdict::Deliver => return number,
                Verdict::SendOn(other) => choice.backend = other,
            }
        }
        panic!("it goes round");
    };
    let clients = 0..200;
    let old: Vec<usize> = clients
        .clone()
        .map(|client| reach(&service, 0, &key(client, 1000, SYN)))
        .collect();
    assert!(old.contains(&0) && old.contains(&1));

    service
        .set(at(10), config(&[(0, 0), (1, 1)]))
        .expect("sound");
    for (client, server) in clients.clone().zip(&old) {
        assert_eq!(reach(&service, 11, &key(client, 1000, ACK)), *server);
        assert_eq!(reach(&service, 11, &key(client, 2000, SYN)), 1);
        assert_eq!(reach(&service, 12, &key(client, 2000, ACK)), 1);
    }
    // The time is over.
    for client in clients.clone() {
        assert_eq!(reach(&service, 71, &key(client, 1000, ACK)), 1);
    }
    // It comes back: what is its own by the table returns, and what the other
    // has goes on with the other.
    service.set(at(80), even(0..2)).expect("sound");
    for client in clients {
        assert_eq!(reach(&service, 81, &key(client, 2000, ACK)), 1);
        let fresh = reach(&service, 81, &key(client, 3000, SYN));
        assert_eq!(reach(&service, 82, &key(client, 3000, ACK)), fresh);
    }
}

#[test]
fn a_server_that_is_sick_gets_nothing_and_one_that_is_alone_drains() {
    let mut service = Service::new(even(0..2)).expect("sound");
    service.set_health(at(1), mac(0), false);
    for client in 0..100 {
        let choice = service
            .choose(at(1), &key(client, 1, ACK))
            .expect("a server");
        assert_eq!((choice.backend, choice.before), (mac(1), None));
    }
    service
        .set(at(2), config(&[(0, 1), (1, 0)]))
        .expect("sound");
    let choice = service
        .choose(at(3), &key(1, 1, ACK))
        .expect("old ones go on");
    assert_eq!((choice.backend, choice.before), (mac(1), None));
    assert_eq!(service.choose(at(63), &key(1, 1, ACK)), None);
}

#[test]
fn services_are_found_and_bad_ones_refused() {
    let mut services = Services::default();
    let address = Address {
        vni: Vni::new(7).expect("24 bits"),
        ip: [10, 0, 0, 100].into(),
        protocol: protocol::TCP,
        port: 80,
    };
    services.set(at(0), address, even(0..3)).expect("sound");
    assert!(services.choose(at(0), &key(1, 2, SYN)).is_some());
    let mut other = key(1, 2, SYN);
    other.vni = Vni::new(8).expect("24 bits");
    assert!(services.choose(at(0), &other).is_none());
    let mut fragment = key(1, 2, SYN);
    fragment.fragment = Some(false);
    assert!(services.choose(at(0), &fragment).is_none());
    assert_eq!(services.mac_of(address.vni, address.ip), Some(mac(0xffff)));

    let mut few = even(0..100);
    few.tokens = 512;
    assert_eq!(services.set(at(0), address, few), Err(ServiceError::Few));
    let mut odd = even(0..3);
    odd.tokens = 1000;
    assert_eq!(services.set(at(0), address, odd), Err(ServiceError::Tokens));
    let twice = config(&[(1, 1), (1, 2)]);
    assert_eq!(
        services.set(at(0), address, twice),
        Err(ServiceError::Backend(mac(1)))
    );
    assert!(services.remove(&address));
    assert!(services.is_empty());

    let mut head = Head::of(&[7; 60]);
    rewrite(&mut head, mac(3));
    assert_eq!(head.bytes()[..7], [2, 0, 0, 0, 0, 3, 7]);
}

#[test]
fn clients_can_stay_with_one_server() {
    let mut sticky = even(0..10);
    sticky.sticky = true;
    let service = Service::new(sticky).expect("sound");
    for client in 0..100 {
        let first = service
            .choose(at(0), &key(client, 1, SYN))
            .map(|it| it.backend);
        for port in 2..50 {
            let next = service.choose(at(0), &key(client, port, SYN));
            assert_eq!(next.map(|it| it.backend), first);
        }
    }
}
