//! A directory in a file, for overlays whose stations stay where they are.
//!
//! ```toml
//! [[node]]
//! id = 1
//! key = "6f3c..."                      # 64 hexadecimal digits
//! endpoints = ["192.0.2.1:7400"]
//! networks = [100]
//!
//! [[station]]
//! vni = 100
//! mac = "02:00:00:00:00:01"
//! ips = ["10.0.0.1"]
//! node = 1
//! ```

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::Deserialize;
use thiserror::Error;

use crate::bridge::Vlan;
use crate::frame::{Mac, Vni};

use super::{ADDRESSES, Key, NodeId, Record, Value, Version};

/// Where records come from and go to, besides peers: a file, a store.
pub trait Source {
    /// Its error.
    type Error;

    /// The records that are there, if they are others than at the last call.
    ///
    /// # Errors
    ///
    /// Why they cannot be had; what was had before still holds.
    fn fetch(&mut self) -> Result<Option<Vec<Record>>, Self::Error>;

    /// Puts there what this node claims. A source that cannot be written to
    /// takes no notice.
    ///
    /// # Errors
    ///
    /// Why it cannot; to be tried again.
    fn publish(&mut self, records: &[Record]) -> Result<(), Self::Error>;
}

/// A file that is no directory.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is no TOML, or has other keys.
    #[error("the directory's file: {0}")]
    Toml(#[from] toml::de::Error),
    /// A value makes no sense.
    #[error("the directory's file: {0}")]
    Value(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    #[serde(default)]
    node: Vec<Node>,
    #[serde(default)]
    station: Vec<Station>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Node {
    id: NodeId,
    key: String,
    #[serde(default)]
    endpoints: Vec<SocketAddr>,
    #[serde(default)]
    networks: Vec<Vni>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Station {
    vni: Vni,
    /// 802.1Q.
    #[serde(default)]
    vlan: u16,
    /// 802.1ad, instead.
    service: Option<u16>,
    mac: Mac,
    #[serde(default)]
    ips: Vec<IpAddr>,
    node: NodeId,
    #[serde(default)]
    isolated: bool,
}

fn public(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    let mut key = [0; 32];
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in key.iter_mut().zip(digits.chunks(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16);
        *byte = (digit(0)? << 4 | digit(1)?) as u8;
    }
    Some(key)
}

/// Records from a file's text. They are older than any that a node makes.
///
/// # Errors
///
/// See [`FileError`].
pub(super) fn parse(text: &str) -> Result<Vec<Record>, FileError> {
    let text: Text = toml::from_str(text)?;
    let mut records = Vec::new();
    let mut put = |key, node, value| {
        records.push(Record {
            key,
            version: Version { epoch: 0, node },
            value: Some(value),
        });
    };
    for node in text.node {
        let wrong = || format!("node {}: its key is 64 hexadecimal digits", node.id);
        let public = public(&node.key).ok_or_else(|| FileError::Value(wrong()))?;
        if node.endpoints.len() > ADDRESSES {
            let wrong = format!("node {}: at most {ADDRESSES} endpoints", node.id);
            return Err(FileError::Value(wrong));
        }
        for vni in node.networks {
            put(Key::Member(vni, node.id), node.id, Value::Member);
        }
        let endpoints = node.endpoints;
        let value = Value::Node { public, endpoints };
        put(Key::Node(node.id), node.id, value);
    }
    for station in text.station {
        let mac = station.mac;
        let vlan = match station.service {
            Some(service) if station.vlan == 0 => Vlan::service(service),
            Some(_) => None,
            None => Vlan::new(station.vlan),
        };
        let wrong = || {
            format!(
                "station {mac}: its VLAN is 1 to {}, and only one",
                Vlan::MAX
            )
        };
        let vlan = vlan.ok_or_else(|| FileError::Value(wrong()))?;
        if !mac.is_station() || station.ips.len() > ADDRESSES {
            let wrong = format!("station {mac}: no group, and at most {ADDRESSES} IP addresses");
            return Err(FileError::Value(wrong));
        }
        let value = Value::Station {
            ips: station.ips,
            attached: true,
            isolated: station.isolated,
            groups: Vec::new(),
        };
        put(Key::Station(station.vni, vlan, mac), station.node, value);
    }
    Ok(records)
}

/// A file, read again when it has changed.
#[derive(Debug)]
pub struct StaticFile {
    path: PathBuf,
    last: Option<String>,
}

impl StaticFile {
    /// The file at `path`.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, last: None }
    }
}

impl Source for StaticFile {
    type Error = FileError;

    fn fetch(&mut self) -> Result<Option<Vec<Record>>, FileError> {
        let text = std::fs::read_to_string(&self.path).map_err(|error| FileError::Read {
            path: self.path.clone(),
            error,
        })?;
        if self.last.as_ref() == Some(&text) {
            return Ok(None);
        }
        let records = parse(&text)?;
        self.last = Some(text);
        Ok(Some(records))
    }

    fn publish(&mut self, _: &[Record]) -> Result<(), FileError> {
        Ok(())
    }
}
