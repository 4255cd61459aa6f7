//! What a frontend has set up: its nodes in the xenstore.

use serde::{Deserialize, Serialize};

use crate::xen::bus::Error;

/// Largest ring: 8 pages have room for as many requests as a store takes.
pub(super) const MAX_RING_PAGE_ORDER: u32 = 3;

/// `XEN_IO_PROTO_ABI_X86_64`: how the rings' entries are laid out.
const PROTOCOL: &str = "x86_64-abi";

/// The frontend's choices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Setup {
    /// It uses the same pages again and again.
    pub(super) persistent: bool,
    /// By queue.
    pub(super) rings: Vec<RingSetup>,
}

/// A ring's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RingSetup {
    /// The grants of its pages.
    pub(super) references: Vec<u32>,
    /// Its event channel.
    pub(super) port: u32,
}

/// Reads the frontend's nodes, for a backend with `max_queues` queues.
///
/// # Errors
/// A node is missing, malformed or beyond what was offered.
pub(super) fn read(
    frontend: &dyn Fn(&str) -> Option<String>,
    max_queues: usize,
) -> Result<Setup, Error> {
    let wrong = |node: &str, value: Option<String>| Error::Node {
        node: node.to_owned(),
        value,
    };
    if let Some(protocol) = frontend("protocol").filter(|protocol| protocol != PROTOCOL) {
        return Err(wrong("protocol", Some(protocol)));
    }
    let queues = optional(frontend, "multi-queue-num-queues")?.unwrap_or(1);
    let count = usize::try_from(queues).unwrap_or(usize::MAX);
    if count == 0 || count > max_queues {
        return Err(wrong("multi-queue-num-queues", Some(queues.to_string())));
    }
    let order = optional(frontend, "ring-page-order")?.unwrap_or(0);
    if order > MAX_RING_PAGE_ORDER {
        return Err(wrong("ring-page-order", Some(order.to_string())));
    }
    let rings = (0..count)
        .map(|queue| match count {
            1 => ring(frontend, "", order),
            _ => ring(frontend, &format!("queue-{queue}/"), order),
        })
        .collect::<Result<_, _>>()?;
    Ok(Setup {
        persistent: optional(frontend, "feature-persistent")? == Some(1),
        rings,
    })
}

fn ring(
    frontend: &dyn Fn(&str) -> Option<String>,
    directory: &str,
    order: u32,
) -> Result<RingSetup, Error> {
    let node = |name: &str| required(frontend, &format!("{directory}{name}"));
    let single = format!("{directory}ring-ref");
    let references = if order == 0 && frontend(&single).is_some() {
        vec![node("ring-ref")?]
    } else {
        (0..1u32 << order)
            .map(|page| node(&format!("ring-ref{page}")))
            .collect::<Result<_, _>>()?
    };
    Ok(RingSetup {
        references,
        port: node("event-channel")?,
    })
}

fn optional(frontend: &dyn Fn(&str) -> Option<String>, node: &str) -> Result<Option<u32>, Error> {
    let Some(value) = frontend(node) else {
        return Ok(None);
    };
    value.trim().parse().map(Some).map_err(|_| Error::Node {
        node: node.to_owned(),
        value: Some(value),
    })
}

fn required(frontend: &dyn Fn(&str) -> Option<String>, node: &str) -> Result<u32, Error> {
    optional(frontend, node)?.ok_or_else(|| Error::Node {
        node: node.to_owned(),
        value: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn setup(nodes: &[(&str, &str)]) -> Result<Setup, Error> {
        let nodes = nodes.to_vec();
        let value = move |name: &str| {
            let found = nodes.iter().find(|(node, _)| *node == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        read(&value, 2)
    }

    #[test]
    fn one_ring_is_in_the_frontends_directory() {
        let one = [("ring-ref", "8"), ("event-channel", "15")];
        let expected = Setup {
            persistent: false,
            rings: vec![RingSetup {
                references: vec![8],
                port: 15,
            }],
        };
        assert_eq!(setup(&one).unwrap(), expected);
        let with_order = [
            ("ring-ref0", "8"),
            ("event-channel", "15"),
            ("ring-page-order", "0"),
            ("multi-queue-num-queues", "1"),
            ("protocol", "x86_64-abi"),
            ("feature-persistent", "0"),
        ];
        assert_eq!(setup(&with_order).unwrap(), expected);
    }

    #[test]
    fn several_rings_of_several_pages_have_directories_of_their_own() {
        let nodes = [
            ("multi-queue-num-queues", "2"),
            ("ring-page-order", "1"),
            ("feature-persistent", "1"),
            ("queue-0/ring-ref0", "8"),
            ("queue-0/ring-ref1", "9"),
            ("queue-0/event-channel", "15"),
            ("queue-1/ring-ref0", "10"),
            ("queue-1/ring-ref1", "11"),
            ("queue-1/event-channel", "16"),
        ];
        let setup = setup(&nodes).unwrap();
        assert!(setup.persistent);
        assert_eq!(setup.rings[0].references, [8, 9]);
        assert_eq!(setup.rings[1].references, [10, 11]);
        assert_eq!((setup.rings[0].port, setup.rings[1].port), (15, 16));
    }

    #[test]
    fn a_missing_or_impossible_node_is_named() {
        let mut nodes = vec![("ring-ref", "8")];
        let error = |nodes: &[_]| setup(nodes).unwrap_err().to_string();
        assert!(error(&nodes).contains("event-channel"));
        nodes.push(("event-channel", "-1"));
        assert!(error(&nodes).contains("\"-1\""));
        nodes[1].1 = "3";
        assert!(setup(&nodes).is_ok());
        for (node, value) in [
            ("multi-queue-num-queues", "0"),
            ("multi-queue-num-queues", "3"),
            ("multi-queue-num-queues", "4294967296"),
            ("ring-page-order", "4"),
            ("ring-page-order", "1"),
            ("protocol", "x86_32-abi"),
            ("feature-persistent", "yes"),
        ] {
            nodes.push((node, value));
            assert!(setup(&nodes).is_err(), "{node} {value}");
            nodes.pop();
        }
    }

    proptest! {
        #[test]
        fn any_values_give_bounded_rings_or_an_error(
            values in prop::collection::vec("[0-9]{0,3}|[0-9]{9,12}|\\PC{0,4}", 4),
        ) {
            let read = read(
                &|name| {
                    Some(match name {
                        "multi-queue-num-queues" => values[0].clone(),
                        "ring-page-order" => values[1].clone(),
                        "protocol" | "feature-persistent" => return None,
                        "event-channel" => values[2].clone(),
                        _ => values[3].clone(),
                    })
                },
                4,
            );
            if let Ok(setup) = read {
                prop_assert!((1..=4).contains(&setup.rings.len()));
                prop_assert!(setup.rings.iter().all(|ring| ring.references.len() <= 8));
            }
        }
    }
}
