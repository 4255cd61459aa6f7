//! Questions for addresses: ARP, and neighbour solicitation.

use std::net::{IpAddr, Ipv6Addr};

use super::answer::Made;
use crate::frame::key::{ethertype, protocol};
use crate::frame::{Head, Key, Mac};

/// The link-local address that is made of a MAC address (RFC 4291, A).
fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    let word = |high, low| u16::from_be_bytes([high, low]);
    let (one, two) = (word(a ^ 2, b), word(c, 0xff));
    Ipv6Addr::new(0xfe80, 0, 0, 0, one, two, word(0xfe, d), word(e, f))
}

/// Asks who has an IP address, for a station without one: whoever is `known`
/// to have it, or all.
#[must_use]
pub fn question(ip: IpAddr, from: Mac, known: Option<Mac>) -> Head {
    match ip {
        IpAddr::V4(ip) => {
            let dst = known.unwrap_or(Mac::BROADCAST);
            let mut made = Made::new(dst, from, ethertype::ARP);
            // From no address: nobody is told anything (RFC 5227).
            made.put(&[0, 1, 8, 0, 6, 4, 0, 1]);
            made.put(&from.0);
            made.put(&[0; 4]);
            made.put(&[0; 6]);
            made.put(&ip.octets());
            made.done()
        }
        IpAddr::V6(ip) => {
            let [.., a, b, c] = ip.octets();
            let group = Mac([0x33, 0x33, 0xff, a, b, c]);
            let solicited = u128::from(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0))
                | (u128::from(ip) & 0xff_ffff);
            let to = match known {
                Some(_) => ip,
                None => Ipv6Addr::from(solicited),
            };
            let mut made = Made::new(known.unwrap_or(group), from, ethertype::IPV6);
            made.icmp6(link_local(from), to);
            made.put(&[135, 0, 0, 0, 0, 0, 0, 0]);
            made.put(&ip.octets());
            // Where to answer.
            made.put(&[1, 1]);
            made.put(&from.0);
            made.icmp6_done()
        }
    }
}

/// Who says that he has which address, if a frame says so.
#[must_use]
pub fn answers(key: &Key) -> Option<(IpAddr, Mac)> {
    if let Some(arp) = key.arp {
        let is_answer = key.ethertype == ethertype::ARP && arp.op == 2;
        return is_answer.then_some((arp.sender.1.into(), arp.sender.0));
    }
    let advertises =
        key.protocol == protocol::ICMPV6 && key.ports == Some((136, 0)) && key.ttl == 255;
    let target = key.nd_target.filter(|_| advertises)?;
    Some((target.into(), key.src))
}

#[cfg(test)]
mod tests {
    use super::super::answer;
    use super::*;
    use crate::frame::{PortId, Vni, parse};

    #[test]
    fn a_question_is_one_and_its_answer_is_known() {
        let (me, other) = (Mac([6, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2]));
        for ip in ["10.0.0.2", "fd00::1:2"] {
            let ip: IpAddr = ip.parse().expect("an address");
            let key = |head: &Head| {
                let bytes = head.bytes();
                let parsed = parse(bytes, bytes.len(), PortId(1), Vni::default());
                parsed.expect("a frame").0
            };
            let asked = key(&question(ip, me, None));
            assert_eq!(answer::asked(&asked), Some(ip));
            assert_eq!(answers(&asked), None);
            let head = answer::answer(&asked, ip, other).expect("an answer");
            let answered = key(&head);
            assert_eq!(answers(&answered), Some((ip, other)));
            assert_eq!(answered.dst, me);
            assert_eq!(key(&question(ip, me, Some(other))).dst, other);
        }
    }
}
