//! What flows match on and set: a frame's key, flattened into a few words, and
//! where in them each field lies.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::{BitAnd, BitAndAssign, BitOr, BitOrAssign};

use crate::frame::key::{ethertype, protocol};
use crate::frame::{Arp, Key, Mac, PortId, Tag, Vni};

/// Words of a flattened key.
pub const WORDS: usize = 12;

/// A key as words, so that a match is a mask and a comparison.
///
/// Fields that no frame has together share their place: an ARP packet's
/// addresses lie where IP's do, its operation where ports do. Each match on
/// them names the protocol, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flat(pub [u64; WORDS]);

/// A VLAN tag is there (the place of a tag's drop-eligible bit).
pub const TAGGED: u16 = 0x1000;

/// What is known of a frame's connection (`ct_state`).
pub mod ct_state {
    /// The first frame of a connection.
    pub const NEW: u8 = 1;
    /// Of a connection that was committed.
    pub const ESTABLISHED: u8 = 2;
    /// About a connection: an ICMP error.
    pub const RELATED: u8 = 4;
    /// Opposite to the connection's first frame.
    pub const REPLY: u8 = 8;
    /// Fits no connection, and cannot begin one.
    pub const INVALID: u8 = 0x10;
    /// The connection has been looked up.
    pub const TRACKED: u8 = 0x20;

    /// Their names.
    pub const NAMES: [(&str, u8); 6] = [
        ("new", NEW),
        ("est", ESTABLISHED),
        ("rel", RELATED),
        ("rpl", REPLY),
        ("inv", INVALID),
        ("trk", TRACKED),
    ];
}

/// TCP flags' names.
pub const TCP_FLAGS: [(&str, u8); 8] = [
    ("fin", 1),
    ("syn", 2),
    ("rst", 4),
    ("psh", 8),
    ("ack", 16),
    ("urg", 32),
    ("ece", 64),
    ("cwr", 128),
];

/// What a fragment is, as `nw_frag` matches it.
pub mod fragment {
    /// Any fragment.
    pub const ANY: u8 = 1;
    /// Not the first.
    pub const LATER: u8 = 2;
}

/// A field of [`Flat`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Field {
    /// The port that it came in at.
    InPort,
    /// Its network.
    Vni,
    /// What entries handed on.
    Metadata,
    /// Destination.
    EthDst,
    /// Source.
    EthSrc,
    /// What follows the tags.
    EthType,
    /// The outer tag whole: priority, [`TAGGED`], VLAN. 0: there is none.
    VlanTci,
    /// The outer tag's VLAN and [`TAGGED`].
    VlanVid,
    /// The outer tag's priority.
    VlanPcp,
    /// The inner tag, as the outer.
    InnerTci,
    /// IP's protocol.
    IpProto,
    /// Differentiated services (6 bits).
    IpDscp,
    /// Congestion (2 bits).
    IpEcn,
    /// Time to live.
    Ttl,
    /// [`fragment`].
    Fragment,
    /// IPv4 source.
    Ipv4Src,
    /// IPv4 destination.
    Ipv4Dst,
    /// IPv6 source.
    Ipv6Src,
    /// IPv6 destination.
    Ipv6Dst,
    /// The sender's IPv4 address.
    ArpSpa,
    /// The target's IPv4 address.
    ArpTpa,
    /// The sender's MAC address.
    ArpSha,
    /// The target's MAC address.
    ArpTha,
    /// 1: who has, 2: is at.
    ArpOp,
    /// TCP source port.
    TcpSrc,
    /// TCP destination port.
    TcpDst,
    /// TCP's flags.
    TcpFlags,
    /// UDP source port.
    UdpSrc,
    /// UDP destination port.
    UdpDst,
    /// SCTP source port.
    SctpSrc,
    /// SCTP destination port.
    SctpDst,
    /// ICMP's type.
    IcmpType,
    /// ICMP's code.
    IcmpCode,
    /// ICMPv6's type.
    Icmp6Type,
    /// ICMPv6's code.
    Icmp6Code,
    /// A neighbour's address.
    NdTarget,
    /// [`ct_state`].
    CtState,
}

/// What a frame must be to have a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Every frame has it.
    Nothing,
    /// An outer tag.
    Vlan,
    /// IP of either version.
    Ip,
    /// This ethertype.
    Ethertype(u16),
    /// ARP or RARP.
    Arp,
    /// IP with this protocol.
    Protocol(u8),
    /// IPv4 or IPv6 with this protocol.
    Over(u16, u8),
    /// An ICMPv6 solicitation or advertisement of a neighbour.
    Neighbour,
}

impl Field {
    /// All there are.
    pub const ALL: [Self; 37] = [
        Self::InPort,
        Self::Vni,
        Self::Metadata,
        Self::EthDst,
        Self::EthSrc,
        Self::EthType,
        Self::VlanTci,
        Self::VlanVid,
        Self::VlanPcp,
        Self::InnerTci,
        Self::IpProto,
        Self::IpDscp,
        Self::IpEcn,
        Self::Ttl,
        Self::Fragment,
        Self::Ipv4Src,
        Self::Ipv4Dst,
        Self::Ipv6Src,
        Self::Ipv6Dst,
        Self::ArpSpa,
        Self::ArpTpa,
        Self::ArpSha,
        Self::ArpTha,
        Self::ArpOp,
        Self::TcpSrc,
        Self::TcpDst,
        Self::TcpFlags,
        Self::UdpSrc,
        Self::UdpDst,
        Self::SctpSrc,
        Self::SctpDst,
        Self::IcmpType,
        Self::IcmpCode,
        Self::Icmp6Type,
        Self::Icmp6Code,
        Self::NdTarget,
        Self::CtState,
    ];

    /// Its word, its lowest bit in it, and its bits. What has more than 64 lies
    /// in two words, the upper half first.
    const fn place(self) -> (usize, u32, u32) {
        match self {
            Self::InPort => (0, 0, 32),
            Self::Vni => (0, 32, 32),
            Self::EthDst => (1, 0, 48),
            Self::EthType => (1, 48, 16),
            Self::EthSrc => (2, 0, 48),
            Self::VlanTci => (2, 48, 16),
            Self::VlanVid => (2, 48, 13),
            Self::VlanPcp => (2, 61, 3),
            Self::InnerTci => (3, 0, 16),
            Self::IpProto => (3, 16, 8),
            Self::IpEcn => (3, 24, 2),
            Self::IpDscp => (3, 26, 6),
            Self::Ttl => (3, 32, 8),
            Self::Fragment => (3, 40, 2),
            Self::TcpFlags => (3, 48, 16),
            Self::TcpSrc
            | Self::UdpSrc
            | Self::SctpSrc
            | Self::IcmpType
            | Self::Icmp6Type
            | Self::ArpOp => (4, 0, 16),
            Self::TcpDst | Self::UdpDst | Self::SctpDst | Self::IcmpCode | Self::Icmp6Code => {
                (4, 16, 16)
            }
            Self::CtState => (4, 32, 8),
            Self::Ipv4Src | Self::ArpSpa => (6, 0, 32),
            Self::Ipv6Src => (5, 0, 128),
            Self::Ipv4Dst | Self::ArpTpa => (8, 0, 32),
            Self::Ipv6Dst => (7, 0, 128),
            Self::ArpSha => (9, 0, 48),
            Self::ArpTha => (10, 0, 48),
            Self::NdTarget => (9, 0, 128),
            Self::Metadata => (11, 0, 64),
        }
    }

    /// How many bits it has.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::Vni => 24,
            Self::TcpFlags => 12,
            Self::IcmpType | Self::IcmpCode | Self::Icmp6Type | Self::Icmp6Code => 8,
            _ => self.place().2,
        }
    }

    /// All its bits.
    #[must_use]
    pub const fn all(self) -> u128 {
        u128::MAX >> (128 - self.bits())
    }

    /// The mask of a match on its value: all bits of its place.
    const fn exact(self) -> u128 {
        u128::MAX >> (128 - self.place().2)
    }

    /// What a frame must be to have it.
    #[must_use]
    pub const fn needs(self) -> Needs {
        match self {
            Self::VlanPcp => Needs::Vlan,
            Self::IpProto | Self::IpDscp | Self::IpEcn | Self::Ttl | Self::Fragment => Needs::Ip,
            Self::Ipv4Src | Self::Ipv4Dst => Needs::Ethertype(ethertype::IPV4),
            Self::Ipv6Src | Self::Ipv6Dst => Needs::Ethertype(ethertype::IPV6),
            Self::ArpSpa | Self::ArpTpa | Self::ArpSha | Self::ArpTha | Self::ArpOp => Needs::Arp,
            Self::TcpSrc | Self::TcpDst | Self::TcpFlags => Needs::Protocol(protocol::TCP),
            Self::UdpSrc | Self::UdpDst => Needs::Protocol(protocol::UDP),
            Self::SctpSrc | Self::SctpDst => Needs::Protocol(protocol::SCTP),
            Self::IcmpType | Self::IcmpCode => Needs::Over(ethertype::IPV4, protocol::ICMP),
            Self::Icmp6Type | Self::Icmp6Code => Needs::Over(ethertype::IPV6, protocol::ICMPV6),
            Self::NdTarget => Needs::Neighbour,
            _ => Needs::Nothing,
        }
    }

    /// Whether a match may look at a part of its bits.
    #[must_use]
    pub const fn is_maskable(self) -> bool {
        !matches!(
            self,
            Self::InPort
                | Self::EthType
                | Self::VlanPcp
                | Self::IpProto
                | Self::IpDscp
                | Self::IpEcn
                | Self::Ttl
                | Self::ArpOp
                | Self::IcmpType
                | Self::IcmpCode
                | Self::Icmp6Type
                | Self::Icmp6Code
        )
    }

    /// Whether an action may set it. A frame's network may not be: frames never
    /// go from one to another. SCTP's checksum is over the whole packet, so its
    /// ports stay.
    #[must_use]
    pub const fn is_settable(self) -> bool {
        !matches!(
            self,
            Self::InPort
                | Self::Vni
                | Self::EthType
                | Self::VlanTci
                | Self::InnerTci
                | Self::IpProto
                | Self::Fragment
                | Self::TcpFlags
                | Self::SctpSrc
                | Self::SctpDst
                | Self::CtState
        )
    }
}

impl Flat {
    /// A frame's.
    #[must_use]
    pub fn of(key: &Key) -> Self {
        let mac = |mac: Mac| {
            mac.0
                .iter()
                .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        };
        let tci = |tag: Option<Tag>| tag.map_or(0, |tag| u64::from(tag.tci | TAGGED));
        let mut flat = [0; WORDS];
        flat[0] = u64::from(key.port.0) | u64::from(key.vni.number()) << 32;
        flat[1] = mac(key.dst) | u64::from(key.ethertype) << 48;
        flat[2] = mac(key.src) | tci(key.tags[0]) << 48;
        let fragment = match key.fragment {
            None => 0,
            Some(false) => fragment::ANY,
            Some(true) => fragment::ANY | fragment::LATER,
        };
        flat[3] = tci(key.tags[1])
            | u64::from(key.protocol) << 16
            | u64::from(key.tos) << 24
            | u64::from(key.ttl) << 32
            | u64::from(fragment) << 40
            | u64::from(key.tcp_flags) << 48;
        if let Some((src, dst)) = key.ports {
            flat[4] = u64::from(src) | u64::from(dst) << 16;
        }
        if let Some((src, dst)) = key.ip {
            [flat[5], flat[6]] = address(src);
            [flat[7], flat[8]] = address(dst);
        }
        if let Some(arp) = key.arp {
            flat[4] = u64::from(arp.op);
            flat[9] = mac(arp.sender.0);
            flat[10] = mac(arp.target.0);
        }
        if let Some(target) = key.nd_target {
            [flat[9], flat[10]] = address(target.into());
        }
        Self(flat)
    }

    /// The frame's key that it was made of. A tag's ethertype is 802.1Q, where
    /// there are two, the outer's 802.1ad.
    #[must_use]
    pub fn to_key(&self) -> Key {
        let get = |field| self.get(field);
        let mac = |field| mac_of(get(field));
        let ethertype = get(Field::EthType) as u16;
        let proto = get(Field::IpProto) as u8;
        let tag = |field, tpid| {
            let tci = get(field) as u16;
            (tci & TAGGED != 0).then_some(Tag {
                tpid,
                tci: tci & !TAGGED,
            })
        };
        let inner = tag(Field::InnerTci, ethertype::VLAN);
        let outer = if inner.is_some() {
            ethertype::SERVICE_VLAN
        } else {
            ethertype::VLAN
        };
        let v4 = |field| Ipv4Addr::from(get(field) as u32);
        let is_arp = matches!(ethertype, ethertype::ARP | ethertype::RARP);
        let arp = is_arp.then(|| Arp {
            op: get(Field::ArpOp) as u16,
            sender: (mac(Field::ArpSha), v4(Field::ArpSpa)),
            target: (mac(Field::ArpTha), v4(Field::ArpTpa)),
        });
        let is_ip = matches!(ethertype, ethertype::IPV4 | ethertype::IPV6);
        let fragment = get(Field::Fragment) as u8;
        let fragment = (fragment & fragment::ANY != 0).then_some(fragment & fragment::LATER != 0);
        let has_ports = matches!(
            proto,
            protocol::TCP | protocol::UDP | protocol::SCTP | protocol::ICMP | protocol::ICMPV6
        );
        let ports = (get(Field::TcpSrc) as u16, get(Field::TcpDst) as u16);
        let neighbour = proto == protocol::ICMPV6 && matches!(ports.0, 135 | 136);
        Key {
            port: PortId(get(Field::InPort) as u32),
            vni: Vni::new(get(Field::Vni) as u32).unwrap_or_default(),
            dst: mac(Field::EthDst),
            src: mac(Field::EthSrc),
            tags: [tag(Field::VlanTci, outer), inner],
            ethertype,
            ip: match ethertype {
                ethertype::IPV6 => Some((
                    Ipv6Addr::from(get(Field::Ipv6Src)).into(),
                    Ipv6Addr::from(get(Field::Ipv6Dst)).into(),
                )),
                _ if is_ip || is_arp => {
                    Some((v4(Field::Ipv4Src).into(), v4(Field::Ipv4Dst).into()))
                }
                _ => None,
            },
            protocol: proto,
            tos: (get(Field::IpDscp) << 2 | get(Field::IpEcn)) as u8,
            ttl: get(Field::Ttl) as u8,
            fragment,
            ports: (is_ip && has_ports && fragment != Some(true)).then_some(ports),
            tcp_flags: get(Field::TcpFlags) as u8,
            arp,
            nd_target: (is_ip && neighbour).then(|| Ipv6Addr::from(get(Field::NdTarget))),
        }
    }

    /// A field's value.
    #[must_use]
    pub fn get(&self, field: Field) -> u128 {
        let (word, shift, bits) = field.place();
        if bits > 64 {
            return u128::from(self.0[word]) << 64 | u128::from(self.0[word + 1]);
        }
        u128::from(self.0[word] >> shift) & (u128::MAX >> (128 - bits))
    }

    /// Sets the bits of a field that are in `mask`.
    pub fn set(&mut self, field: Field, value: u128, mask: u128) {
        let (word, shift, bits) = field.place();
        let mut put = |word: usize, value: u64, mask: u64| {
            self.0[word] = (self.0[word] & !mask) | (value & mask);
        };
        if bits > 64 {
            put(word, (value >> 64) as u64, (mask >> 64) as u64);
            put(word + 1, value as u64, mask as u64);
        } else {
            let mask = mask & (u128::MAX >> (128 - bits));
            put(word, (value as u64) << shift, (mask as u64) << shift);
        }
    }

    /// The outer tag goes; the inner is the outer then.
    pub fn pop_tag(&mut self) {
        let inner = self.get(Field::InnerTci);
        self.set(Field::VlanTci, inner, u128::MAX);
        self.set(Field::InnerTci, 0, u128::MAX);
    }

    /// A tag, equal to the outer one, is put in front of it. Of three, the
    /// innermost is not looked at.
    pub fn push_tag(&mut self) {
        let outer = self.get(Field::VlanTci);
        self.set(Field::InnerTci, outer, u128::MAX);
        self.set(Field::VlanTci, outer | u128::from(TAGGED), u128::MAX);
    }

    /// Whether no bit is set.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
}

/// A field's exact mask, for [`super::Match`].
pub(super) const fn exact(field: Field) -> u128 {
    field.exact()
}

fn address(ip: IpAddr) -> [u64; 2] {
    match ip {
        IpAddr::V4(ip) => [0, u32::from(ip).into()],
        IpAddr::V6(ip) => {
            let bits = u128::from(ip);
            [(bits >> 64) as u64, bits as u64]
        }
    }
}

/// A MAC address from a field's value.
#[must_use]
pub fn mac_of(value: u128) -> Mac {
    let [.., a, b, c, d, e, f] = value.to_be_bytes();
    Mac([a, b, c, d, e, f])
}

/// A MAC address as a field's value.
#[must_use]
pub fn of_mac(mac: Mac) -> u128 {
    mac.0
        .iter()
        .fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

impl BitAnd for Flat {
    type Output = Self;

    fn bitand(mut self, mask: Self) -> Self {
        self &= mask;
        self
    }
}

impl BitAndAssign for Flat {
    fn bitand_assign(&mut self, mask: Self) {
        for (word, mask) in self.0.iter_mut().zip(mask.0) {
            *word &= mask;
        }
    }
}

impl BitOr for Flat {
    type Output = Self;

    fn bitor(mut self, other: Self) -> Self {
        self |= other;
        self
    }
}

impl BitOrAssign for Flat {
    fn bitor_assign(&mut self, other: Self) {
        for (word, other) in self.0.iter_mut().zip(other.0) {
            *word |= other;
        }
    }
}
