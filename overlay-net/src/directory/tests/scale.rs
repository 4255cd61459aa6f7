//! Many stations and many nodes.

use super::sim::{Net, Sim, id};
use super::*;

const GOOD: Net = Net {
    loss: 0,
    double: 0,
    delay: (1, 1),
};

/// All know `stations` stations of `nodes` nodes; messages and bytes per node.
fn spread(nodes: usize, stations: u32) -> (Sim, f64, f64) {
    let mut sim = Sim::new(nodes, 1, GOOD);
    // Comparing costs the same whatever there is; all is the same now.
    sim.run(Duration::from_millis(1500));
    let (messages, bytes) = (sim.messages, sim.bytes);
    for number in 0..stations {
        let at = number as usize % nodes;
        let directory = &mut sim.nodes[at].directory;
        directory
            .claim(sim.now, key(number), station(number), 0)
            .expect("room");
    }
    sim.run(sim.now + Duration::from_secs(1));
    for node in &sim.nodes {
        // Memory: as many records as stations, and nothing left from telling.
        assert_eq!(node.directory.iter().count(), stations as usize);
        assert_eq!(
            (node.directory.len(), node.gossip.waiting()),
            (stations as usize, 0)
        );
    }
    let per_node = |count: u64| count as f64 / nodes as f64;
    let messages = per_node(sim.messages - messages);
    let bytes = per_node(sim.bytes - bytes);
    (sim, messages, bytes)
}

#[test]
fn messages_and_bytes_grow_no_faster_than_linearly() {
    let (_, few, small) = spread(10, 1000);
    let (_, many, large) = spread(10, 10_000);
    assert!(
        many <= few * 10.0 && large <= small * 10.0,
        "{few} {many} {small} {large}"
    );
    let (sim, more, larger) = spread(100, 10_000);
    // Each node tells ten times as many others of a tenth of the stations, and
    // hears the same; acknowledgements come with each message.
    assert!(larger <= large * 2.0, "{large} {larger}");
    assert!(more <= many * 10.0, "{many} {more}");
    println!("10 nodes: {few} {small} and {many} {large}, 100 nodes: {more} {larger}");
    a_station_that_moved_is_known_everywhere_after_one_message_to_each(sim);
}

fn a_station_that_moved_is_known_everywhere_after_one_message_to_each(mut sim: Sim) {
    sim.run(sim.now + Duration::from_millis(100));
    let epoch = sim.nodes[4]
        .directory
        .get(&key(4))
        .expect("known")
        .version
        .epoch;
    let (now, before, bytes) = (sim.now, sim.messages, sim.bytes);
    let directory = &mut sim.nodes[50].directory;
    directory
        .claim(now, key(4), station(4), epoch)
        .expect("room");
    // A message takes a millisecond.
    sim.run(now + Duration::from_millis(2));
    for (at, node) in sim.nodes.iter().enumerate().filter(|(at, _)| *at != 50) {
        let found = node.directory.located(&key(4));
        assert_eq!(found.map(|it| it.node), Some(id(50)), "node {at}");
    }
    // And an acknowledgement from each; comparing goes on beside it.
    assert!(
        sim.messages - before <= 99 * 2 + 10,
        "{}",
        sim.messages - before
    );
    assert!(sim.bytes - bytes <= 99 * 70 + 2000, "{}", sim.bytes - bytes);
}

#[test]
fn a_node_that_comes_new_gets_all() {
    let (mut sim, _, _) = spread(5, 10_000);
    let (before, all) = (sim.bytes, sim.nodes[0].directory.len());
    sim.nodes[0] = Sim::node(0, 5);
    for number in (0..10_000).step_by(5) {
        let directory = &mut sim.nodes[0].directory;
        directory
            .claim(sim.now, key(number), station(number), 0)
            .expect("room");
    }
    sim.run(sim.now + Duration::from_secs(20));
    let root = sim.nodes[0].directory.root();
    for node in &sim.nodes {
        assert_eq!((node.directory.root(), node.directory.len()), (root, all));
    }
    // All of it from each of the four, and its own for them, a few times.
    let bytes = sim.bytes - before;
    assert!(bytes < 4 * 10_000 * 40 * 4, "{bytes}");
}
