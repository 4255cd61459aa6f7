//! What a gateway that translates addresses does to frames (RFC 3022, basic NAT).

use std::net::Ipv4Addr;

const ETHERNET: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];

/// Of a node: what it takes for its address, and what others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Translation {
    pub(super) inside: Ipv4Addr,
    pub(super) outside: Ipv4Addr,
}

/// Where addresses are in a frame: of the sender and the receiver.
struct Places {
    sender: usize,
    receiver: usize,
    arp: bool,
}

fn places(frame: &[u8]) -> Option<Places> {
    let kind = frame.get(12..ETHERNET)?;
    let arp = kind == ARP;
    let (sender, receiver, end) = match arp {
        true => (ETHERNET + 14, ETHERNET + 24, ETHERNET + 28),
        false => (ETHERNET + 12, ETHERNET + 16, ETHERNET + 20),
    };
    (arp || kind == IPV4)
        .then_some(())
        .filter(|()| frame.len() >= end)?;
    Some(Places {
        sender,
        receiver,
        arp,
    })
}

impl Translation {
    /// A frame leaves the node.
    pub(super) fn out(self, frame: &mut [u8]) {
        if let Some(places) = places(frame) {
            replace(frame, places.sender, self.inside, self.outside, places.arp);
        }
    }

    /// A frame is for the node, or for all. False: it is for the address that only the node knows,
    /// and does not get there.
    pub(super) fn into(self, frame: &mut [u8]) -> bool {
        let Some(places) = places(frame) else {
            return true;
        };
        let at = places.receiver..places.receiver + 4;
        if frame[at] == self.inside.octets() {
            return false;
        }
        replace(
            frame,
            places.receiver,
            self.outside,
            self.inside,
            places.arp,
        );
        true
    }
}

/// Replaces an address where it is `from`, and corrects the checksums over it.
fn replace(frame: &mut [u8], at: usize, from: Ipv4Addr, to: Ipv4Addr, arp: bool) {
    if frame[at..at + 4] != from.octets() {
        return;
    }
    frame[at..at + 4].copy_from_slice(&to.octets());
    if arp {
        return;
    }
    correct(frame, ETHERNET + 10, from, to);
    let first = u16::from_be_bytes([frame[ETHERNET + 6], frame[ETHERNET + 7]]) & 0x1fff == 0;
    let inner = ETHERNET + usize::from(frame[ETHERNET] & 0xf) * 4;
    match frame[ETHERNET + 9] {
        6 if first => correct(frame, inner + 16, from, to),
        // Without a checksum, it stays so.
        17 if first && frame.get(inner + 6..inner + 8) != Some(&[0, 0]) => {
            correct(frame, inner + 6, from, to);
        }
        _ => {}
    }
}

/// Corrects a checksum for a changed address (RFC 1624, equation 3).
fn correct(frame: &mut [u8], at: usize, from: Ipv4Addr, to: Ipv4Addr) {
    let Some(field) = frame.get_mut(at..at + 2) else {
        return;
    };
    let words = |address: Ipv4Addr| {
        let [a, b, c, d] = address.octets();
        [[a, b], [c, d]].map(u16::from_be_bytes)
    };
    let mut sum = u32::from(!u16::from_be_bytes([field[0], field[1]]));
    for (old, new) in words(from).into_iter().zip(words(to)) {
        sum += u32::from(!old) + u32::from(new);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    field.copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAT: Translation = Translation {
        inside: Ipv4Addr::new(10, 1, 0, 2),
        outside: Ipv4Addr::new(203, 0, 113, 250),
    };

    fn sum(bytes: &[u8], start: u32) -> u16 {
        let words = bytes
            .chunks(2)
            .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
        let mut sum = start + words.sum::<u32>();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    /// A UDP datagram from one to the other, with its checksums.
    fn datagram(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend(IPV4);
        frame.extend([0x45, 0, 0, 31, 0, 1, 0, 0, 64, 17, 0, 0]);
        frame.extend(from.octets());
        frame.extend(to.octets());
        frame.extend([0x12, 0xb6, 0x12, 0xb6, 0, 11, 0, 0, 1, 2, 3]);
        let header = sum(&frame[14..34], 0).to_be_bytes();
        frame[24..26].copy_from_slice(&header);
        let pseudo = sum(&frame[26..34], 17 + 11);
        let whole = sum(&frame[34..], u32::from(!pseudo)).to_be_bytes();
        frame[40..42].copy_from_slice(&whole);
        frame
    }

    #[test]
    fn datagrams_have_another_sender_and_right_checksums_and_answers_get_back() {
        let peer = Ipv4Addr::new(10, 1, 0, 1);
        let mut frame = datagram(NAT.inside, peer);
        NAT.out(&mut frame);
        assert_eq!(frame, datagram(NAT.outside, peer));
        let mut answer = datagram(peer, NAT.outside);
        assert!(NAT.into(&mut answer));
        assert_eq!(answer, datagram(peer, NAT.inside));
        // The address that the node thinks it has is nobody's any more.
        assert!(!NAT.into(&mut datagram(peer, NAT.inside)));
        // Others' frames are left alone.
        let mut other = datagram(peer, Ipv4Addr::new(10, 1, 0, 3));
        let before = other.clone();
        NAT.out(&mut other);
        assert!(NAT.into(&mut other));
        assert_eq!(other, before);
    }

    #[test]
    fn questions_for_the_new_address_are_answered_and_short_frames_left_alone() {
        let mut question = vec![0xff; 12];
        question.extend(ARP);
        question.extend([0, 1, 8, 0, 6, 4, 0, 1, 2, 2, 2, 2, 2, 2, 10, 1, 0, 1]);
        question.extend([0; 6]);
        question.extend(NAT.outside.octets());
        assert!(NAT.into(&mut question));
        assert_eq!(question[38..42], NAT.inside.octets());
        for len in 0..question.len() {
            let mut short = question[..len].to_vec();
            NAT.out(&mut short);
            assert!(NAT.into(&mut short));
            assert_eq!(short, question[..len]);
        }
    }
}
