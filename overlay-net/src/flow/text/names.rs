//! Fields' names, and how their values are written.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::flow::fields::{self, Field, TCP_FLAGS, ct_state, fragment, mac_of, of_mac};
use crate::frame::key::{ethertype, protocol};

/// How a field's value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Decimal,
    Hex,
    Port,
    Mac,
    Ipv4,
    Ipv6,
    Flags(&'static [(&'static str, u8)]),
    Fragment,
}

/// Protocols, as they are named in matches.
pub(super) const PROTOCOLS: [(&str, u16, Option<u8>); 13] = [
    ("icmp6", ethertype::IPV6, Some(protocol::ICMPV6)),
    ("tcp6", ethertype::IPV6, Some(protocol::TCP)),
    ("udp6", ethertype::IPV6, Some(protocol::UDP)),
    ("sctp6", ethertype::IPV6, Some(protocol::SCTP)),
    ("icmp", ethertype::IPV4, Some(protocol::ICMP)),
    ("tcp", ethertype::IPV4, Some(protocol::TCP)),
    ("udp", ethertype::IPV4, Some(protocol::UDP)),
    ("sctp", ethertype::IPV4, Some(protocol::SCTP)),
    ("ip", ethertype::IPV4, None),
    ("ipv4", ethertype::IPV4, None),
    ("ipv6", ethertype::IPV6, None),
    ("arp", ethertype::ARP, None),
    ("rarp", ethertype::RARP, None),
];

/// Which fragments `nw_frag` names: value, mask.
pub(super) const FRAGMENTS: [(&str, u8, u8); 5] = [
    ("no", 0, 3),
    ("yes", fragment::ANY, fragment::ANY),
    ("first", fragment::ANY, 3),
    ("later", 3, 3),
    ("not_later", 0, fragment::LATER),
];

impl Field {
    /// Its name in actions and errors.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.names()[0]
    }

    /// Its name in matches.
    pub(super) fn in_match(self) -> &'static str {
        let names = self.names();
        names.get(1).unwrap_or(&names[0])
    }

    /// All its names: as actions set it, as matches print it, others.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::InPort => &["in_port"],
            Self::Vni => &["tun_id", "tun_id", "vni", "tunnel_id"],
            Self::Metadata => &["metadata"],
            Self::EthDst => &["eth_dst", "dl_dst"],
            Self::EthSrc => &["eth_src", "dl_src"],
            Self::EthType => &["eth_type", "dl_type"],
            Self::VlanTci => &["vlan_tci"],
            Self::VlanVid => &["vlan_vid", "vlan_vid"],
            Self::VlanPcp => &["vlan_pcp", "dl_vlan_pcp"],
            Self::InnerTci => &["inner_tci"],
            Self::IpProto => &["ip_proto", "nw_proto"],
            Self::IpDscp => &["ip_dscp", "ip_dscp"],
            Self::IpEcn => &["nw_ecn", "nw_ecn", "ip_ecn"],
            Self::Ttl => &["nw_ttl", "nw_ttl", "ip_ttl"],
            Self::Fragment => &["nw_frag", "nw_frag", "ip_frag"],
            Self::Ipv4Src => &["ip_src", "nw_src", "ipv4_src"],
            Self::Ipv4Dst => &["ip_dst", "nw_dst", "ipv4_dst"],
            Self::Ipv6Src => &["ipv6_src"],
            Self::Ipv6Dst => &["ipv6_dst"],
            Self::ArpSpa => &["arp_spa"],
            Self::ArpTpa => &["arp_tpa"],
            Self::ArpSha => &["arp_sha"],
            Self::ArpTha => &["arp_tha"],
            Self::ArpOp => &["arp_op"],
            Self::TcpSrc => &["tcp_src", "tp_src"],
            Self::TcpDst => &["tcp_dst", "tp_dst"],
            Self::TcpFlags => &["tcp_flags"],
            Self::UdpSrc => &["udp_src", "tp_src"],
            Self::UdpDst => &["udp_dst", "tp_dst"],
            Self::SctpSrc => &["sctp_src", "tp_src"],
            Self::SctpDst => &["sctp_dst", "tp_dst"],
            Self::IcmpType => &["icmp_type", "icmp_type", "icmpv4_type", "tp_src"],
            Self::IcmpCode => &["icmp_code", "icmp_code", "icmpv4_code", "tp_dst"],
            Self::Icmp6Type => &["icmpv6_type", "icmp_type", "tp_src"],
            Self::Icmp6Code => &["icmpv6_code", "icmp_code", "tp_dst"],
            Self::NdTarget => &["nd_target"],
            Self::CtState => &["ct_state"],
        }
    }

    /// Those that a name may mean: which one, depends on the protocol.
    pub(super) fn named(name: &str) -> impl Iterator<Item = Self> + '_ {
        let public = |field: &Self| *field != Self::InnerTci;
        Self::ALL
            .into_iter()
            .filter(public)
            .filter(move |field| field.names().contains(&name))
    }

    pub(super) fn form(self) -> Form {
        match self {
            Self::InPort => Form::Port,
            Self::EthDst | Self::EthSrc | Self::ArpSha | Self::ArpTha => Form::Mac,
            Self::Ipv4Src | Self::Ipv4Dst | Self::ArpSpa | Self::ArpTpa => Form::Ipv4,
            Self::Ipv6Src | Self::Ipv6Dst | Self::NdTarget => Form::Ipv6,
            Self::CtState => Form::Flags(&ct_state::NAMES),
            Self::TcpFlags => Form::Flags(&TCP_FLAGS),
            Self::Fragment => Form::Fragment,
            Self::Vni | Self::Metadata | Self::EthType | Self::VlanTci | Self::VlanVid => Form::Hex,
            _ => Form::Decimal,
        }
    }
}

/// A field's value with its mask, as matches and actions write it.
pub(super) fn value(field: Field, value: u128, mask: u128) -> String {
    let whole = mask == field.all();
    let one = |bits: u128| match field.form() {
        Form::Decimal | Form::Port if whole => bits.to_string(),
        Form::Mac => mac_of(bits).to_string(),
        Form::Ipv4 => Ipv4Addr::from(bits as u32).to_string(),
        Form::Ipv6 => Ipv6Addr::from(bits).to_string(),
        _ => format!("{bits:#x}"),
    };
    let width = field.bits();
    match field.form() {
        Form::Fragment => {
            let known = |(_, bits, of): &&(&str, u8, u8)| {
                u128::from(*bits) == value && u128::from(*of) == mask
            };
            match FRAGMENTS.iter().find(known) {
                Some((name, ..)) => (*name).to_owned(),
                None => format!("{value:#x}/{mask:#x}"),
            }
        }
        Form::Flags(names) => flags(names, value, mask, whole),
        Form::Ipv4 | Form::Ipv6 if !whole => {
            let ones = (mask << (128 - width)).leading_ones();
            if mask.count_ones() == ones {
                format!("{}/{ones}", one(value))
            } else {
                format!("{}/{}", one(value), one(mask))
            }
        }
        _ if whole => one(value),
        _ => format!("{}/{}", one(value), one(mask)),
    }
}

fn flags(names: &[(&str, u8)], value: u128, mask: u128, whole: bool) -> String {
    let known: u128 = names.iter().map(|(_, bit)| u128::from(*bit)).sum();
    if mask & !known != 0 {
        return if whole {
            format!("{value:#x}")
        } else {
            format!("{value:#x}/{mask:#x}")
        };
    }
    let mut text = String::new();
    for (name, bit) in names {
        let bit = u128::from(*bit);
        if mask & bit != 0 {
            text.push(if value & bit != 0 { '+' } else { '-' });
            text.push_str(name);
        }
    }
    text
}

/// A number, in decimal or as `0x..`.
pub(super) fn number(text: &str) -> Option<u128> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with('+') => u128::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None if text.starts_with('+') => None,
        None => text.parse().ok(),
    }
}

/// Reads a field's value and mask, or says what was expected.
pub(super) fn read(
    field: Field,
    text: &str,
    ports: super::Names<'_>,
) -> Result<(u128, u128), &'static str> {
    let form = field.form();
    if let Form::Flags(names) = form
        && text.starts_with(['+', '-'])
    {
        return read_flags(names, text);
    }
    if form == Form::Fragment
        && let Some((_, value, mask)) = FRAGMENTS.iter().find(|(name, ..)| *name == text)
    {
        return Ok(((*value).into(), (*mask).into()));
    }
    let one = |text: &str| match form {
        Form::Mac => text
            .parse()
            .map(of_mac)
            .map_err(|_| "a MAC address, as 02:00:00:00:00:01"),
        Form::Ipv4 => text
            .parse::<Ipv4Addr>()
            .map(|ip| u32::from(ip).into())
            .map_err(|_| "an IPv4 address or network, as 10.0.0.0/8"),
        Form::Ipv6 => text
            .parse::<Ipv6Addr>()
            .map(u128::from)
            .map_err(|_| "an IPv6 address or network, as fd00::/8"),
        Form::Port => number(text)
            .or_else(|| ports(text.trim_matches('"')).map(|port| port.0.into()))
            .ok_or("a port's number or name"),
        Form::Fragment => number(text).ok_or("no, yes, first, later or not_later"),
        Form::Flags(_) => number(text).ok_or("flags, as +syn-ack, or a number"),
        Form::Decimal | Form::Hex => number(text).ok_or("a number"),
    };
    let Some((value, mask)) = text.split_once('/') else {
        return Ok((one(text)?, field.all()));
    };
    let bits = field.bits();
    let prefix = || mask.parse::<u32>().ok().filter(|len| *len <= bits);
    let mask = match (form, prefix()) {
        (Form::Ipv4 | Form::Ipv6, Some(0)) => 0,
        (Form::Ipv4 | Form::Ipv6, Some(len)) => field.all() & (u128::MAX << (bits - len)),
        _ => one(mask)?,
    };
    Ok((one(value)?, mask))
}

fn read_flags(
    names: &'static [(&'static str, u8)],
    mut text: &str,
) -> Result<(u128, u128), &'static str> {
    let expected = "flags, each with + or -, as +trk-new";
    let (mut value, mut mask) = (0, 0);
    while let Some(sign) = text.chars().next() {
        let rest = &text[sign.len_utf8()..];
        let end = rest.find(['+', '-']).unwrap_or(rest.len());
        let known = names.iter().find(|(name, _)| *name == &rest[..end]);
        let bit = known.map(|(_, bit)| u128::from(*bit));
        let bit = bit.filter(|_| matches!(sign, '+' | '-')).ok_or(expected)?;
        mask |= bit;
        if sign == '+' {
            value |= bit;
        } else {
            value &= !bit;
        }
        text = &rest[end..];
    }
    Ok((value, mask))
}

/// The mask of an outer tag's VLAN with the bit that says that it is there.
pub(super) const VID: u128 = 0x1fff;

/// That bit.
pub(super) const TAGGED: u128 = fields::TAGGED as u128;
