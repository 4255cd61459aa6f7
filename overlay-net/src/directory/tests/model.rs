//! Whatever happened before: when all can talk again, all know where each
//! station is, and a frame for it gets there from everywhere.

use super::sim::{Net, Sim, id};
use super::*;

const NODES: usize = 6;
const STATIONS: u32 = 8;

struct World {
    sim: Sim,
    /// Where each station really is, and its epoch, which moves with it.
    truth: Vec<Option<(usize, u64)>>,
}

impl World {
    fn millis(&self) -> u64 {
        self.sim.now.as_millis() as u64
    }

    fn claim(&mut self, at: usize, number: u32, after: u64) {
        let now = self.sim.now;
        let directory = &mut self.sim.nodes[at].directory;
        let version = directory
            .claim(now, key(number), station(number), after)
            .expect("room");
        self.truth[number as usize] = Some((at, version.epoch));
    }

    fn step(&mut self) {
        let now = self.sim.now;
        let number = self.sim.random.below(STATIONS.into()) as u32;
        let at = self.sim.random.below(NODES as u64) as usize;
        let place = self.truth[number as usize];
        match (self.sim.random.below(20), place) {
            (0..=4, None) => {
                let after = self.millis();
                self.claim(at, number, after);
            }
            (0..=7, Some((from, epoch))) if from != at && self.sim.reaches(from, at) => {
                self.claim(at, number, epoch);
                // Now and then the source does not get to say so.
                if self.sim.random.below(4) > 0 {
                    let directory = &mut self.sim.nodes[from].directory;
                    directory.hand_over(now, &key(number), id(at));
                } else {
                    self.restart(from);
                }
            }
            (8..=9, Some((from, _))) => {
                self.sim.nodes[from].directory.withdraw(now, &key(number));
                self.truth[number as usize] = None;
            }
            (10..=12, _) => {
                for at in 0..NODES {
                    self.sim.parts[at] = self.sim.random.below(3);
                }
            }
            (13, _) => self.sim.parts = vec![0; NODES],
            (14, _) => self.restart(at),
            _ => {}
        }
        let pause = self.sim.random.below(400);
        self.sim.run(now + Duration::from_millis(pause));
    }

    /// A node forgets all but what is attached to it.
    fn restart(&mut self, at: usize) {
        self.sim.nodes[at] = Sim::node(at, NODES);
        for number in 0..STATIONS {
            if let Some((place, _)) = self.truth[number as usize]
                && place == at
            {
                self.claim(at, number, 0);
            }
        }
    }

    /// How a frame that is sent at `from` goes.
    fn walk(&self, from: usize, number: u32) -> Option<usize> {
        let mut at = from;
        for _ in 0..NODES {
            match self.sim.nodes[at].directory.located(&key(number)) {
                Some(found) => at = found.node.0 as usize - 1,
                None => {
                    let record = self.sim.nodes[at].directory.get(&key(number))?;
                    return record.value.is_some().then_some(at);
                }
            }
        }
        panic!("a frame for station {number} goes round");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn no_black_hole_and_no_loop_outlives_a_partition(seed: u64, steps in 10..120_usize) {
        let net = Net { loss: 20, double: 10, delay: (1, 200) };
        let mut world = World {
            sim: Sim::new(NODES, seed, net),
            truth: vec![None; STATIONS as usize],
        };
        for _ in 0..steps {
            world.step();
        }
        world.sim.parts = vec![0; NODES];
        for at in 0..NODES {
            for peer in (0..NODES).filter(|peer| *peer != at) {
                world.sim.nodes[at].gossip.up(id(peer));
            }
        }
        let healed = world.sim.now;
        world.sim.run(healed + Duration::from_secs(90));
        for number in 0..STATIONS {
            let place = world.truth[number as usize].map(|(at, _)| at);
            for from in 0..NODES {
                prop_assert_eq!(world.walk(from, number), place, "station {} from {}", number, from);
            }
        }
        let root = world.sim.nodes[0].directory.root();
        for node in &world.sim.nodes {
            prop_assert_eq!(node.directory.root(), root);
        }
    }

    /// A frame that is sent after a guest never comes back to where it was,
    /// whatever the nodes on its way know.
    #[test]
    fn no_loop_even_while_nodes_disagree(seed: u64, moves in 1..30_usize) {
        let net = Net { loss: 50, double: 10, delay: (1, 2000) };
        let mut world = World {
            sim: Sim::new(NODES, seed, net),
            truth: vec![None; STATIONS as usize],
        };
        world.claim(0, 0, 0);
        for _ in 0..moves {
            let now = world.sim.now;
            let at = world.sim.random.below(NODES as u64) as usize;
            if let Some((from, epoch)) = world.truth[0]
                && from != at
            {
                world.claim(at, 0, epoch);
                world.sim.nodes[from].directory.hand_over(now, &key(0), id(at));
            }
            let pause = world.sim.random.below(100);
            world.sim.run(now + Duration::from_millis(pause));
            let place = world.truth[0].map(|(at, _)| at);
            for from in 0..NODES {
                // Who has never heard of it floods; everybody else's frames
                // arrive.
                if world.sim.nodes[from].directory.get(&key(0)).is_some() {
                    prop_assert_eq!(world.walk(from, 0), place);
                }
            }
        }
    }
}
