//! What a frontend has set up: read from its nodes, or from a saved state.

use serde::{Deserialize, Serialize};

use super::queue::Rings;
use super::vnet::Features;
use crate::xen::bus::Error;
use crate::xen::ring::Indices;

/// A connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) features: Features,
    /// At least one.
    pub(super) queues: Vec<QueueState>,
}

/// The rings of a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueState {
    pub(super) tx: RingState,
    pub(super) rx: RingState,
    /// Frames for the guest that it has not received.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) frames: Vec<Vec<u8>>,
}

/// One ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RingState {
    /// The grant of its page.
    pub(super) reference: u32,
    /// Its event channel; both rings of a queue may have the same.
    pub(super) port: u32,
    /// The backend's indices, unless the ring is new to it.
    pub(super) indices: Option<Indices>,
}

impl QueueState {
    /// The state of a queue at rest.
    pub(super) fn of(rings: &Rings) -> Self {
        let first = |references: Vec<u32>| references.first().copied().unwrap_or_default();
        Self {
            tx: RingState {
                reference: first(rings.tx.references()),
                port: rings.tx_channel.port(),
                indices: Some(rings.tx.indices()),
            },
            rx: RingState {
                reference: first(rings.rx.references()),
                port: rings.rx_channel.port(),
                indices: Some(rings.rx.indices()),
            },
            frames: Vec::new(),
        }
    }
}

/// The nodes of a frontend's directory.
struct Nodes<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Nodes<'_> {
    fn number(&self, node: &str) -> Result<u32, Error> {
        let value = (self.0)(node);
        let number = value.as_deref().and_then(|text| text.trim().parse().ok());
        number.ok_or_else(|| Error::Node {
            node: node.to_owned(),
            value,
        })
    }

    /// The value of a node that may be missing.
    fn number_or(&self, node: &str, default: u32) -> Result<u32, Error> {
        match (self.0)(node) {
            Some(_) => self.number(node),
            None => Ok(default),
        }
    }

    fn has(&self, feature: &str) -> Result<bool, Error> {
        Ok(self.number_or(feature, 0)? != 0)
    }

    /// A feature without which there is no connection.
    fn require(&self, feature: &str) -> Result<(), Error> {
        if self.has(feature)? {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "the frontend has no '{feature}': use a newer driver in the guest"
        )))
    }

    /// A queue whose nodes begin with `prefix`.
    fn queue(&self, prefix: &str) -> Result<QueueState, Error> {
        let node = |name: &str| format!("{prefix}{name}");
        let single = node("event-channel");
        let [tx, rx] = if (self.0)(&single).is_some() {
            [self.number(&single)?; 2]
        } else {
            let port = |direction| self.number(&node(&format!("event-channel-{direction}")));
            [port("tx")?, port("rx")?]
        };
        let ring = |name: &str, port| {
            Ok::<_, Error>(RingState {
                reference: self.number(&node(name))?,
                port,
                indices: None,
            })
        };
        Ok(QueueState {
            tx: ring("tx-ring-ref", tx)?,
            rx: ring("rx-ring-ref", rx)?,
            frames: Vec::new(),
        })
    }
}

/// Reads what the frontend has set up, with at most `most` queues.
///
/// # Errors
/// A node is missing or makes no sense, or the frontend is too old.
pub(super) fn read(frontend: &dyn Fn(&str) -> Option<String>, most: usize) -> Result<State, Error> {
    let nodes = Nodes(frontend);
    // Packets are copied into granted pages (the other way, flipping pages, is
    // long gone), and there is no polling for such pages.
    nodes.require("request-rx-copy")?;
    nodes.require("feature-rx-notify")?;
    let sg = nodes.has("feature-sg")?;
    let checksum =
        !nodes.has("feature-no-csum-offload")? && nodes.has("feature-ipv6-csum-offload")?;
    let gso = checksum && sg;
    let features = Features {
        sg,
        checksum,
        gso4: gso && nodes.has("feature-gso-tcpv4")?,
        gso6: gso && nodes.has("feature-gso-tcpv6")?,
    };
    let count = "multi-queue-num-queues";
    let queues = match nodes.number_or(count, 1)? {
        1 => vec![nodes.queue("")?],
        n if (2..=most).contains(&(n as usize)) => (0..n)
            .map(|i| nodes.queue(&format!("queue-{i}/")))
            .collect::<Result<_, _>>()?,
        _ => {
            return Err(Error::Node {
                node: count.to_owned(),
                value: frontend(count),
            });
        }
    };
    Ok(State { features, queues })
}
