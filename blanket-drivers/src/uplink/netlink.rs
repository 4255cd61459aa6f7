//! What the kernel knows of interfaces, routes and neighbours (rtnetlink(7)).

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

use super::{Error, check, wire};
use crate::mac::MacAddress;

/// A network interface of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its station, if it is an Ethernet.
    pub mac: Option<MacAddress>,
    /// Its MTU in bytes.
    pub mtu: usize,
    /// Its addresses, but for link-local ones.
    pub addresses: Vec<IpAddr>,
    /// Whether it is switched on.
    pub up: bool,
    /// Whether there is something at the other end of the cable.
    pub carrier: bool,
    /// Queues that packets come in by.
    pub queues: u32,
}

impl Interface {
    /// Payload in bytes of an unfragmented datagram to an address like `ip`.
    pub(super) fn payload(&self, ip: IpAddr) -> usize {
        let payload = self.mtu.saturating_sub(wire::overhead(ip));
        payload.min(super::MAX_TRAIN)
    }

    fn read(message: &LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut interface = Self {
            name: String::new(),
            index: message.header.index,
            mac: None,
            mtu: 0,
            addresses: Vec::new(),
            up: flags.contains(LinkFlags::Up),
            carrier: flags.contains(LinkFlags::LowerUp),
            queues: 1,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => interface.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => interface.mtu = *mtu as usize,
                LinkAttribute::NumRxQueues(count) => interface.queues = *count,
                LinkAttribute::Address(bytes)
                    if message.header.link_layer_type == LinkLayerType::Ether =>
                {
                    interface.mac = bytes.as_slice().try_into().ok().map(MacAddress);
                }
                _ => (),
            }
        }
        interface
    }
}

/// The interfaces of this network namespace but the loopback one.
///
/// # Errors
/// The kernel does not answer.
pub fn interfaces() -> Result<Vec<Interface>, Error> {
    let netlink = Netlink::open()?;
    let links = netlink
        .request(
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            NLM_F_DUMP,
        )
        .map_err(|source| asked("interfaces", source))?;
    let addresses = netlink
        .request(
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            NLM_F_DUMP,
        )
        .map_err(|source| asked("addresses", source))?;
    let mut interfaces: Vec<_> = links
        .iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link)
                if !link.header.flags.contains(LinkFlags::Loopback) =>
            {
                Some(Interface::read(link))
            }
            _ => None,
        })
        .collect();
    for message in addresses {
        let RouteNetlinkMessage::NewAddress(address) = message else {
            continue;
        };
        let index = address.header.index;
        let Some(interface) = interfaces.iter_mut().find(|it| it.index == index) else {
            continue;
        };
        interface.addresses.extend(own_address(&address));
    }
    Ok(interfaces)
}

fn asked(what: &'static str, source: io::Error) -> Error {
    Error::Netlink { what, source }
}

/// The node's side of an address; none for link-local ones.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            // Of a point-to-point link this is the near end.
            AddressAttribute::Local(ip) => found = Some(*ip),
            AddressAttribute::Address(ip) if found.is_none() => found = Some(*ip),
            _ => (),
        }
    }
    found.filter(|ip| match ip {
        IpAddr::V4(ip) => !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    })
}

/// The interface `name`.
pub(super) fn interface(name: &str) -> Result<Interface, Error> {
    interfaces()?
        .into_iter()
        .find(|interface| interface.name == name)
        .ok_or_else(|| Error::NoInterface(name.to_owned()))
}

/// The interface `name`, if it is up and has the address.
pub(super) fn usable(name: &str, address: IpAddr) -> Result<Interface, Error> {
    let interface = interface(name)?;
    let dead = |state, remedy: String| Error::Dead {
        interface: name.to_owned(),
        state,
        remedy,
    };
    if !interface.up {
        return Err(dead("down", format!("`ip link set {name} up`")));
    }
    if !interface.carrier {
        let remedy = "see to its cable, or to the network it is attached to";
        return Err(dead("without a carrier", remedy.to_owned()));
    }
    if !interface.addresses.contains(&address) {
        return Err(Error::NoAddress {
            interface: name.to_owned(),
            address,
        });
    }
    Ok(interface)
}

/// `SIOCETHTOOL` with `ETHTOOL_GDRVINFO` (`linux/ethtool.h`).
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    rest: [u8; 32 * 4 + 12 + 4 * 5],
}

/// The name of an interface's driver; `unknown` if it does not say.
pub(super) fn driver(name: &str) -> String {
    const ETHTOOL_GDRVINFO: u32 = 3;
    let unknown = || "unknown".to_owned();
    let Ok(socket) = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)) else {
        return unknown();
    };
    let mut info = DriverInfo {
        command: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        rest: [0; 160],
    };
    // SAFETY: zeros are a valid ifreq: arrays, integers and a pointer.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1]
        .iter_mut()
        .zip(name.bytes())
    {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut info).cast();
    // SAFETY: the kernel writes one ethtool_drvinfo, which `info` has the size
    // of, and both outlive the call.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCETHTOOL as libc::Ioctl,
            &raw mut request,
        )
    };
    if check(result).is_err() {
        return unknown();
    }
    let bytes: Vec<u8> = info.driver.into_iter().take_while(|b| *b != 0).collect();
    String::from_utf8(bytes).unwrap_or_else(|_| unknown())
}

/// Where a datagram goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NextHop {
    /// A station on the link. `verified`: the kernel knows that it is there.
    Station { mac: MacAddress, verified: bool },
    /// Not yet known, or not on this link: that is for the kernel.
    Kernel,
}

/// A socket to ask the kernel by.
pub(super) struct Netlink {
    socket: Socket,
    buffer: std::cell::RefCell<Vec<u8>>,
}

/// Bytes of the kernel's answers at once: what it sends in a dump at most.
const ANSWER: usize = 32 << 10;

impl Netlink {
    pub(super) fn open() -> Result<Self, Error> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            Ok(socket)
        };
        let socket = open().map_err(|source| asked("routing socket", source))?;
        Ok(Self {
            socket,
            buffer: std::cell::RefCell::new(vec![0; ANSWER]),
        })
    }

    /// Sends one request, and gathers all answers to it.
    pub(super) fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        while self.receive(flags, &mut answers)? {}
        Ok(answers)
    }

    /// Takes one datagram of answers; whether more are to come.
    fn receive(&self, flags: u16, answers: &mut Vec<RouteNetlinkMessage>) -> io::Result<bool> {
        let mut buffer = self.buffer.borrow_mut();
        let len = self.socket.recv(&mut &mut buffer[..], 0)?;
        let mut rest = buffer.get(..len).unwrap_or_default();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(io::Error::other)?;
            let step = (message.header.length as usize).next_multiple_of(4);
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(false),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(false),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                _ => (),
            }
            rest = rest.get(step..).unwrap_or_default();
        }
        // A dump and a change end with a message of their own.
        Ok(flags & (NLM_F_DUMP | NLM_F_ACK) != 0)
    }

    /// Changes something.
    pub(super) fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(message, NLM_F_ACK | flags).map(drop)
    }

    /// The flags `up` and `carrier` of an interface.
    pub(super) fn state(&self, index: u32) -> io::Result<(bool, bool)> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let answers = self.request(RouteNetlinkMessage::GetLink(message), 0)?;
        let flags = answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link.header.flags),
            _ => None,
        });
        let flags = flags.ok_or(io::ErrorKind::NotFound)?;
        let carrier = flags.contains(LinkFlags::LowerUp);
        Ok((flags.contains(LinkFlags::Up), carrier))
    }

    /// The first hop from `from` on the interface to `to`.
    pub(super) fn next_hop(&self, index: u32, from: IpAddr, to: IpAddr) -> NextHop {
        self.route(index, from, to)
            .ok()
            .flatten()
            .and_then(|gateway| self.neighbour(index, gateway).ok().flatten())
            .unwrap_or(NextHop::Kernel)
    }

    /// Whom to send to on the link so that it reaches `to`, by the kernel's
    /// routes; none if it does not leave by this interface.
    fn route(&self, index: u32, from: IpAddr, to: IpAddr) -> io::Result<Option<IpAddr>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(to);
        message.header.destination_prefix_length = prefix(to);
        message.header.source_prefix_length = prefix(from);
        message.attributes = vec![
            RouteAttribute::Destination(to.into()),
            RouteAttribute::Source(from.into()),
            RouteAttribute::Oif(index),
        ];
        let answers = self.request(RouteNetlinkMessage::GetRoute(message), 0)?;
        let Some(RouteNetlinkMessage::NewRoute(route)) = answers.into_iter().next() else {
            return Ok(None);
        };
        if route.header.kind != RouteType::Unicast
            || !route.attributes.contains(&RouteAttribute::Oif(index))
        {
            return Ok(None);
        }
        let mut hop = Some(to);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(ip)) => hop = Some((*ip).into()),
                RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => hop = Some((*ip).into()),
                // A gateway of the other family, or a tunnel of the kernel's.
                RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::Encap(_) => {
                    hop = None;
                }
                _ => (),
            }
        }
        Ok(hop)
    }

    /// The station of a neighbour, if the kernel has it.
    fn neighbour(&self, index: u32, ip: IpAddr) -> io::Result<Option<NextHop>> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(ip);
        message.header.ifindex = index;
        message.attributes = vec![NeighbourAttribute::Destination(neighbour_address(ip))];
        let answers = self.request(RouteNetlinkMessage::GetNeighbour(message), 0)?;
        let Some(RouteNetlinkMessage::NewNeighbour(entry)) = answers.into_iter().next() else {
            return Ok(None);
        };
        let verified = match entry.header.state {
            NeighbourState::Reachable
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Noarp
            | NeighbourState::Permanent => true,
            NeighbourState::Stale => false,
            _ => return Ok(None),
        };
        let mac = entry
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok(),
                _ => None,
            });
        Ok(mac.map(|mac| NextHop::Station {
            mac: MacAddress(mac),
            verified,
        }))
    }

    /// Tells the kernel for good where a neighbour is.
    pub(super) fn set_neighbour(&self, index: u32, ip: IpAddr, mac: MacAddress) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(ip);
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(neighbour_address(ip)),
            NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        ];
        self.change(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Gives an interface an address.
    pub(super) fn add_address(&self, index: u32, ip: IpAddr, prefix: u8) -> io::Result<()> {
        use netlink_packet_route::address::AddressHeaderFlags;
        let mut message = AddressMessage::default();
        message.header.family = family(ip);
        message.header.prefix_len = prefix;
        message.header.index = index;
        // Nobody else is on these links: no time is to be lost on asking.
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
        self.change(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Switches an interface on or off.
    pub(super) fn set_up(&self, index: u32, up: bool) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.change_mask = LinkFlags::Up;
        if up {
            message.header.flags = LinkFlags::Up;
        }
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

fn prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn neighbour_address(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }
}
