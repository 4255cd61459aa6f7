//! Two network namespaces and a cable between them, to try uplinks on.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};

use super::netlink::{Netlink, interface};
use super::{Error, Kind, Spec, Uplink, check, open};

/// The interface at either end.
pub(super) const NAMES: [&str; 2] = ["up0", "up1"];

/// What is opened at the two ends is tied to them, not to this: a socket stays
/// in the namespace that it was made in. The calling thread ends in the second
/// namespace and should end soon.
pub(super) struct Lab {
    ends: [File; 2],
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Lab { what, source }
}

impl Lab {
    /// Makes the namespaces, and joins them by `cables` veth pairs.
    pub(super) fn new(mtu: u32, cables: u8) -> Result<Self, Error> {
        let lab = Self {
            ends: [Self::namespace()?, Self::namespace()?],
        };
        for cable in 0..cables {
            lab.cable(mtu, cable)?;
        }
        Ok(lab)
    }

    /// Moves the thread to a new namespace.
    fn namespace() -> Result<File, Error> {
        // SAFETY: no memory is involved, and the thread is our own.
        check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map_err(failed("network namespace"))?;
        File::open("/proc/thread-self/ns/net").map_err(failed("network namespace"))
    }

    /// Moves the thread to an end.
    pub(super) fn enter(&self, end: usize) -> Result<(), Error> {
        // SAFETY: as in `namespace`.
        check(unsafe { libc::setns(self.ends[end].as_raw_fd(), libc::CLONE_NEWNET) })
            .map(drop)
            .map_err(failed("network namespace"))
    }

    /// The name of a cable's end.
    pub(super) fn name(cable: u8, end: usize) -> String {
        match cable {
            0 => NAMES[end].to_owned(),
            n => format!("{}x{n}", NAMES[end]),
        }
    }

    /// The address of a cable's end.
    pub(super) fn address(cable: u8, end: usize, v6: bool) -> IpAddr {
        let host = end as u8 + 1;
        if v6 {
            Ipv6Addr::new(0xfd00, 0, 0, cable.into(), 0, 0, 0, host.into()).into()
        } else {
            // 192.0.2.0/24 is for documentation: nobody's.
            Ipv4Addr::new(192, 0, 2, cable * 16 + host).into()
        }
    }

    fn cable(&self, mtu: u32, cable: u8) -> Result<(), Error> {
        self.enter(0)?;
        let mut peer = LinkMessage::default();
        peer.attributes = vec![
            LinkAttribute::IfName(Self::name(cable, 1)),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::NetNsFd(self.ends[1].as_raw_fd()),
        ];
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(Self::name(cable, 0)),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        Netlink::open()?
            .change(
                RouteNetlinkMessage::NewLink(link),
                NLM_F_CREATE | NLM_F_EXCL,
            )
            .map_err(failed("veth pair"))?;
        for end in [0, 1] {
            self.enter(end)?;
            let netlink = Netlink::open()?;
            let index = interface(&Self::name(cable, end))?.index;
            netlink.set_up(index, true).map_err(failed("veth pair"))?;
            for (v6, prefix) in [(false, 28), (true, 64)] {
                let address = Self::address(cable, end, v6);
                match netlink.add_address(index, address, prefix) {
                    Ok(()) => (),
                    // A kernel may be without IPv6.
                    Err(_) if v6 => (),
                    Err(error) => return Err(failed("address on a veth pair")(error)),
                }
            }
        }
        Ok(())
    }

    /// Opens an uplink at an end of a cable.
    pub(super) fn open(
        &self,
        kind: Kind,
        cable: u8,
        end: usize,
        v6: bool,
    ) -> Result<Box<dyn Uplink>, Error> {
        self.enter(end)?;
        let local = SocketAddr::new(Self::address(cable, end, v6), PORT);
        open(kind, &Spec::new(&Self::name(cable, end), local))
    }
}

/// The port at both ends.
pub(super) const PORT: u16 = 4789;
