//! What nodes tell each other, as bytes.
//!
//! Numbers are in network byte order.
//!
//! | bytes | what |
//! |---|---|
//! | 1 | version of this format: 1 |
//! | 1 | kind: 1 push, 2 acknowledgement, 3 root, 4 buckets, 5 want, 6 records, 7 same |
//! | 8 | push, acknowledgement: its number; root: the hash of all |
//! | 128 x 8 | buckets: their hashes |
//! | 16 | want: one bit for each bucket, the lowest for the first |
//! | ... | push, records: records up to the end |
//!
//! A record:
//!
//! | bytes | what |
//! |---|---|
//! | 1 | 0 station, 1 member, 2 node; +16 gone, +32 attached, +64 isolated, +128 in groups |
//! | 3 + 2 + 6 | station: VNI, VLAN (highest bit: 802.1ad), address |
//! | 3 + 8 | member: VNI, node |
//! | 8 | node |
//! | 8 + 8 | version: epoch, node |
//! | 4 | gone: for how many seconds |
//! | 32 | node: its public key |
//! | 1 | station, node, not gone: how many addresses follow |
//! | 1 + 4 or 16 | each address: 4 or 6, then it |
//! | 2 | node, after each address: its port |
//! | 1 | in groups: how many follow |
//! | 8 | each group: the first bytes of its name's BLAKE3 hash |

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use thiserror::Error;

use crate::bridge::Vlan;
use crate::frame::{Mac, Vni};

use super::{ADDRESSES, BUCKETS, GROUPS, GroupId, GroupList, Key, NodeId, Record, Value, Version};

/// The version of the format.
const FORMAT: u8 = 1;
/// Bytes of a message at most: it fits one packet everywhere.
pub const MESSAGE: usize = 1200;

const GONE: u8 = 16;
const ATTACHED: u8 = 32;
const ISOLATED: u8 = 64;
const GROUPED: u8 = 128;

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Wrong {
    /// It is cut off.
    #[error("the message is cut off")]
    Short,
    /// It is longer than messages are, or goes on after its end.
    #[error("the message is too long")]
    Long,
    /// Another version of the format.
    #[error("the message is of version {0}, this node speaks {FORMAT}: update the older node")]
    Format(u8),
    /// No known kind of message or record, or a value that nothing has.
    #[error("the message has an unknown kind, or a value out of range")]
    Value,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Records that are new; to be acknowledged.
    Push(u64, Vec<(Record, Duration)>),
    /// A push arrived.
    Ack(u64),
    /// The hash of all.
    Root(u64),
    /// The hashes of all parts.
    Buckets(Box<[u64; BUCKETS]>),
    /// Parts that are wanted.
    Want(u128),
    /// Records of such parts, and ones that are newer than what was told.
    Records(Vec<(Record, Duration)>),
    /// The hash of all is the same here.
    Same,
}

pub(super) fn put_key(to: &mut Vec<u8>, key: &Key) {
    match key {
        Key::Station(vni, vlan, mac) => {
            to.extend(&vni.number().to_be_bytes()[1..]);
            to.extend(vlan.number().to_be_bytes());
            to.extend(mac.0);
        }
        Key::Member(vni, node) => {
            to.extend(&vni.number().to_be_bytes()[1..]);
            to.extend(node.0.to_be_bytes());
        }
        Key::Node(node) => to.extend(node.0.to_be_bytes()),
    }
}

fn put_ip(to: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            to.push(4);
            to.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            to.push(6);
            to.extend(ip.octets());
        }
    }
}

pub(super) fn put_record(to: &mut Vec<u8>, record: &Record, age: Duration) {
    let kind = match record.key {
        Key::Station(..) => 0,
        Key::Member(..) => 1,
        Key::Node(_) => 2,
    };
    let flags = match &record.value {
        None => GONE,
        Some(Value::Station {
            attached,
            isolated,
            groups,
            ..
        }) => {
            let flag = |set: bool, flag: u8| if set { flag } else { 0 };
            flag(*attached, ATTACHED)
                | flag(*isolated, ISOLATED)
                | flag(!groups.is_empty(), GROUPED)
        }
        Some(_) => 0,
    };
    to.push(kind | flags);
    put_key(to, &record.key);
    to.extend(record.version.epoch.to_be_bytes());
    to.extend(record.version.node.0.to_be_bytes());
    match &record.value {
        None => {
            let seconds = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
            to.extend(seconds.to_be_bytes());
        }
        Some(Value::Member) => {}
        Some(Value::Station { ips, groups, .. }) => {
            to.push(ips.len().min(ADDRESSES) as u8);
            for ip in ips.iter().take(ADDRESSES) {
                put_ip(to, *ip);
            }
            if !groups.is_empty() {
                to.push(groups.len().min(GROUPS) as u8);
                for group in groups.iter().take(GROUPS) {
                    to.extend(group.0.to_be_bytes());
                }
            }
        }
        Some(Value::Node { public, endpoints }) => {
            to.extend(public);
            to.push(endpoints.len().min(ADDRESSES) as u8);
            for endpoint in endpoints.iter().take(ADDRESSES) {
                put_ip(to, endpoint.ip());
                to.extend(endpoint.port().to_be_bytes());
            }
        }
    }
}

impl Message {
    /// As bytes. Records beyond [`MESSAGE`] bytes: see [`pack`].
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut to = vec![FORMAT];
        match self {
            Self::Push(number, records) => {
                to.push(1);
                to.extend(number.to_be_bytes());
                for (record, age) in records {
                    put_record(&mut to, record, *age);
                }
            }
            Self::Ack(number) => {
                to.push(2);
                to.extend(number.to_be_bytes());
            }
            Self::Root(hash) => {
                to.push(3);
                to.extend(hash.to_be_bytes());
            }
            Self::Buckets(hashes) => {
                to.push(4);
                for hash in hashes.iter() {
                    to.extend(hash.to_be_bytes());
                }
            }
            Self::Want(bits) => {
                to.push(5);
                to.extend(bits.to_be_bytes());
            }
            Self::Records(records) => {
                to.push(6);
                for (record, age) in records {
                    put_record(&mut to, record, *age);
                }
            }
            Self::Same => to.push(7),
        }
        to
    }

    /// From bytes that a peer sent.
    ///
    /// # Errors
    ///
    /// See [`Wrong`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Wrong> {
        if bytes.len() > MESSAGE {
            return Err(Wrong::Long);
        }
        let mut from = Reader(bytes);
        match from.byte()? {
            FORMAT => {}
            other => return Err(Wrong::Format(other)),
        }
        let message = match from.byte()? {
            1 => Self::Push(from.long()?, from.records()?),
            2 => Self::Ack(from.long()?),
            3 => Self::Root(from.long()?),
            4 => {
                let mut hashes = Box::new([0; BUCKETS]);
                for hash in hashes.iter_mut() {
                    *hash = from.long()?;
                }
                Self::Buckets(hashes)
            }
            5 => Self::Want(u128::from_be_bytes(from.take()?)),
            6 => Self::Records(from.records()?),
            7 => Self::Same,
            _ => return Err(Wrong::Value),
        };
        if from.0.is_empty() {
            Ok(message)
        } else {
            Err(Wrong::Long)
        }
    }
}

/// Puts records into as few messages as they fit in, each made of its records
/// by `make`.
pub(super) fn pack<'r>(
    records: impl Iterator<Item = (&'r Record, Duration)>,
    header: &mut dyn FnMut() -> Vec<u8>,
) -> Vec<Vec<u8>> {
    let mut messages: Vec<Vec<u8>> = Vec::new();
    let mut bytes = Vec::new();
    for (record, age) in records {
        bytes.clear();
        put_record(&mut bytes, record, age);
        match messages.last_mut() {
            Some(last) if last.len() + bytes.len() <= MESSAGE => last.extend(&bytes),
            _ => {
                let mut message = header();
                message.extend(&bytes);
                messages.push(message);
            }
        }
    }
    messages
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Wrong> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Wrong::Short)?;
        self.0 = rest;
        Ok(*first)
    }

    fn byte(&mut self) -> Result<u8, Wrong> {
        Ok(self.take::<1>()?[0])
    }

    fn long(&mut self) -> Result<u64, Wrong> {
        Ok(u64::from_be_bytes(self.take()?))
    }

    fn vni(&mut self) -> Result<Vni, Wrong> {
        let [a, b, c] = self.take()?;
        Vni::new(u32::from_be_bytes([0, a, b, c])).ok_or(Wrong::Value)
    }

    fn node(&mut self) -> Result<NodeId, Wrong> {
        Ok(NodeId(self.long()?))
    }

    fn ip(&mut self) -> Result<IpAddr, Wrong> {
        match self.byte()? {
            4 => Ok(self.take::<4>()?.into()),
            6 => Ok(self.take::<16>()?.into()),
            _ => Err(Wrong::Value),
        }
    }

    fn endpoint(&mut self) -> Result<SocketAddr, Wrong> {
        let ip = self.ip()?;
        Ok(SocketAddr::new(ip, u16::from_be_bytes(self.take()?)))
    }

    fn count(&mut self) -> Result<usize, Wrong> {
        let count = usize::from(self.byte()?);
        if count > ADDRESSES {
            return Err(Wrong::Value);
        }
        Ok(count)
    }

    fn groups(&mut self) -> Result<GroupList, Wrong> {
        let count = usize::from(self.byte()?);
        if !(1..=GROUPS).contains(&count) {
            return Err(Wrong::Value);
        }
        (0..count).map(|_| Ok(GroupId(self.long()?))).collect()
    }

    fn records(&mut self) -> Result<Vec<(Record, Duration)>, Wrong> {
        let mut records = Vec::new();
        while !self.0.is_empty() {
            records.push(self.record()?);
        }
        Ok(records)
    }

    fn record(&mut self) -> Result<(Record, Duration), Wrong> {
        let kind = self.byte()?;
        let gone = kind & GONE != 0;
        let (attached, isolated) = (kind & ATTACHED != 0, kind & ISOLATED != 0);
        let grouped = kind & GROUPED != 0;
        let kind = kind & !(GONE | ATTACHED | ISOLATED | GROUPED);
        if (gone || kind != 0) && (attached || isolated || grouped) {
            return Err(Wrong::Value);
        }
        let key = match kind {
            0 => {
                let vni = self.vni()?;
                let vlan = Vlan::from_number(u16::from_be_bytes(self.take()?));
                Key::Station(vni, vlan.ok_or(Wrong::Value)?, Mac(self.take()?))
            }
            1 => Key::Member(self.vni()?, self.node()?),
            2 => Key::Node(self.node()?),
            _ => return Err(Wrong::Value),
        };
        let version = Version {
            epoch: self.long()?,
            node: self.node()?,
        };
        let mut age = Duration::ZERO;
        let value = match key {
            _ if gone => {
                age = Duration::from_secs(u32::from_be_bytes(self.take()?).into());
                None
            }
            Key::Station(..) => {
                let count = self.count()?;
                let ips = (0..count).map(|_| self.ip()).collect::<Result<_, _>>()?;
                let groups = if grouped { self.groups()? } else { Vec::new() };
                Some(Value::Station {
                    ips,
                    attached,
                    isolated,
                    groups,
                })
            }
            Key::Member(..) => Some(Value::Member),
            Key::Node(_) => {
                let public = self.take()?;
                let count = self.count()?;
                let endpoints = (0..count).map(|_| self.endpoint());
                let endpoints = endpoints.collect::<Result<_, _>>()?;
                Some(Value::Node { public, endpoints })
            }
        };
        Ok((
            Record {
                key,
                version,
                value,
            },
            age,
        ))
    }
}
