//! Keeps this node's switch joined to those of all other nodes of the cluster:
//! their keys come over the connections that nodes have already settled who
//! they are on.
//!
//! What people have told the switch of stays as it is.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use blanket_overlay::api::types::{Info, Peer, PeerSpec};
use hyper::Method;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::Node;
use crate::cluster::members::Member;
use crate::home::Home;
use crate::switch;

/// How often others are asked.
const LOOK: Duration = Duration::from_secs(5);

/// Addresses of one switch that are believed.
const MOST_ENDPOINTS: usize = 8;

/// What a node tells of its switch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Card {
    /// Its public key; none: it has no way to others, or there is none.
    key: Option<String>,
    /// Where it listens.
    #[serde(default)]
    endpoints: Vec<SocketAddr>,
}

impl Node {
    /// What others are told of this node's switch.
    pub(super) async fn card(&self) -> Card {
        let info: Result<Info> = get(&self.home, "/switch").await;
        info.map_or_else(
            |_| Card::default(),
            |info| Card {
                key: info.key,
                endpoints: info.endpoints,
            },
        )
    }
}

async fn get<A: serde::de::DeserializeOwned>(home: &Home, path: &str) -> Result<A> {
    switch::call(home, Method::GET, path, None::<&()>).await
}

/// What a switch is told of another node's.
fn spec_of(member: &Member, card: Card) -> Option<PeerSpec> {
    let key = card.key?;
    let mut endpoints: Vec<SocketAddr> = Vec::new();
    // Where other nodes reach it, which may be another place than it knows.
    let outside: Option<SocketAddr> = member.address.to_string().parse().ok();
    let outside: Option<IpAddr> = outside.map(|address| address.ip());
    let ports = card.endpoints.iter().map(SocketAddr::port);
    let seen = outside.into_iter().flat_map(|ip| {
        let ports = ports.clone();
        ports.map(move |port| SocketAddr::new(ip, port))
    });
    let own = card.endpoints.iter().copied();
    for endpoint in own.filter(|own| !own.ip().is_unspecified()).chain(seen) {
        if !endpoints.contains(&endpoint) && endpoints.len() < MOST_ENDPOINTS {
            endpoints.push(endpoint);
        }
    }
    Some(PeerSpec {
        key,
        endpoints,
        member: true,
        foreign: None,
    })
}

/// What is to be done: peers to be added or changed, and to be removed. Of a
/// member that has not answered, nothing is known, and nothing changes.
fn plan(
    peers: &[(String, PeerSpec)],
    members: &BTreeMap<String, Option<PeerSpec>>,
) -> (Vec<(String, PeerSpec)>, Vec<String>) {
    let gone = peers
        .iter()
        .filter(|(name, spec)| spec.member && !members.contains_key(name));
    let gone = gone.map(|(name, _)| name.clone()).collect();
    let mut wanted = Vec::new();
    for (name, spec) in members {
        let Some(spec) = spec else { continue };
        let stays = |(other, known): &(String, PeerSpec)| match known.member {
            true => other == name && known == spec,
            false => other == name || known.key == spec.key,
        };
        if !peers.iter().any(stays) {
            wanted.push((name.clone(), spec.clone()));
        }
    }
    (wanted, gone)
}

async fn join_all(node: &Arc<Node>) -> Result<()> {
    // Without a switch there is nothing to do.
    let Ok(peers) = get::<Vec<Peer>>(&node.home, "/peers").await else {
        return Ok(());
    };
    let mut members = BTreeMap::new();
    if let Ok((trust, membership)) = node.joined() {
        if node.card().await.key.is_none() {
            return Ok(());
        }
        let mut asked = JoinSet::new();
        for member in membership.members.clone() {
            if member.name == *trust.name() {
                continue;
            }
            let node = Arc::clone(node);
            asked.spawn(async move {
                let card: Result<Card> =
                    node.ask(&member, Method::GET, "/switch", None::<&()>).await;
                let spec = card.ok().and_then(|card| spec_of(&member, card));
                (member.name.to_string(), spec)
            });
        }
        while let Some(answer) = asked.join_next().await {
            let (name, spec) = answer?;
            members.insert(name, spec);
        }
    }
    let peers: Vec<_> = peers.into_iter().map(|it| (it.name, it.spec)).collect();
    let (wanted, gone) = plan(&peers, &members);
    for name in gone {
        let path = format!("/peers/{name}");
        let _: Peer = switch::call(&node.home, Method::DELETE, &path, None::<&()>).await?;
        tracing::info!("the switch of {name}, which has left, is not joined any more");
    }
    for (name, spec) in wanted {
        let path = format!("/peers/{name}");
        let _: Peer = switch::call(&node.home, Method::PUT, &path, Some(&spec)).await?;
        tracing::info!("this node's switch is joined to that of {name}");
    }
    Ok(())
}

/// Does so for ever.
pub(super) async fn keep_joined(node: &Arc<Node>) {
    let mut changes = node.membership.subscribe();
    let mut told = String::new();
    loop {
        if let Err(error) = join_all(node).await {
            let text = format!("{error:#}");
            if text != told {
                tracing::warn!("the switch: {text}");
                told = text;
            }
        }
        // Whoever comes or goes is seen to at once.
        let _ = tokio::time::timeout(LOOK, changes.changed()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(address: &str) -> Member {
        Member {
            name: "beta".parse().unwrap(),
            id: crate::cluster::identity::NodeId::of(b"beta"),
            address: address.parse().unwrap(),
        }
    }

    fn spec(key: &str, member: bool) -> PeerSpec {
        PeerSpec {
            key: key.to_owned(),
            endpoints: vec!["10.0.0.2:4790".parse().unwrap()],
            member,
            foreign: None,
        }
    }

    fn peer(name: &str, key: &str, member: bool) -> (String, PeerSpec) {
        (name.to_owned(), spec(key, member))
    }

    #[test]
    fn a_switch_is_reached_where_it_listens_and_where_its_node_is() {
        let card = |listens: &str| Card {
            key: Some("k".to_owned()),
            endpoints: vec![listens.parse().unwrap()],
        };
        let endpoints = |address: &str, listens: &str| {
            let spec = spec_of(&member(address), card(listens)).unwrap();
            let texts = spec.endpoints.iter().map(ToString::to_string);
            texts.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(endpoints("10.0.0.2", "10.0.0.2:4790"), "10.0.0.2:4790");
        assert_eq!(
            endpoints("192.0.2.9", "10.0.0.2:4790"),
            "10.0.0.2:4790 192.0.2.9:4790"
        );
        assert_eq!(endpoints("10.0.0.2", "0.0.0.0:4790"), "10.0.0.2:4790");
        assert_eq!(endpoints("beta.example", "10.0.0.2:1"), "10.0.0.2:1");
        assert_eq!(spec_of(&member("10.0.0.2"), Card::default()), None);
    }

    #[test]
    fn members_come_and_go_and_what_people_have_told_stays() {
        let members = |list: &[(&str, Option<&str>)]| {
            let list = list.iter();
            list.map(|(name, key)| ((*name).to_owned(), key.map(|key| spec(key, true))))
                .collect::<BTreeMap<_, _>>()
        };
        let peers = [
            peer("a", "1", true),
            peer("b", "2", true),
            peer("c", "3", true),
            peer("mine", "4", false),
            peer("e", "9", false),
        ];
        let (wanted, gone) = plan(
            &peers,
            &members(&[
                ("a", Some("1")),
                ("b", Some("8")),
                ("d", Some("4")),
                ("e", Some("5")),
                ("f", Some("6")),
                ("g", None),
            ]),
        );
        let names: Vec<_> = wanted.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["b", "f"]);
        assert_eq!(gone, ["c"]);
        let (wanted, gone) = plan(&peers, &members(&[("a", None), ("b", None), ("c", None)]));
        assert!(wanted.is_empty() && gone.is_empty());
        assert_eq!(plan(&peers, &members(&[])).1, ["a", "b", "c"]);
    }
}
