//! An interface's settings, by ioctls on a socket (netdevice(7)).

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;

use super::{Error, check};

/// Adds a port to a bridge (`linux/sockios.h`; not in libc).
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// An interface that is there.
pub(super) struct Link<'a> {
    name: &'a str,
    queues: u16,
    socket: UdpSocket,
}

/// `multi_queue ` where a tap of so many queues is made with it.
pub(super) fn multi_queue(queues: u16) -> &'static str {
    if queues > 1 { "multi_queue " } else { "" }
}

/// A request about `name`, which has been checked to be short enough.
pub(super) fn request(name: &str) -> libc::ifreq {
    // SAFETY: all zeros are a valid ifreq: arrays, integers and a pointer.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = &mut request.ifr_name[..libc::IFNAMSIZ - 1];
    for (to, from) in room.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// The name that the kernel left in a request.
pub(super) fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|&c| c as u8);
    String::from_utf8_lossy(&bytes.take_while(|&b| b != 0).collect::<Vec<_>>()).into_owned()
}

fn address(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data: [libc::c_char; 14] = [0; 14];
    // Port (2 bytes), then the address in wire order.
    for (to, from) in data[2..].iter_mut().zip(ip.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}

impl<'a> Link<'a> {
    pub(super) fn new(name: &'a str, queues: u16) -> Result<Self, Error> {
        // Addresses are set on a socket of their family; nothing is sent.
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(|source| Error::Io {
            name: name.to_owned(),
            what: "open a socket",
            source,
        })?;
        Ok(Self {
            name,
            queues,
            socket,
        })
    }

    /// Whether there is an interface of that name.
    pub(super) fn exists(name: &str) -> Result<bool, Error> {
        let link = Link::new(name, 1)?;
        Ok(link.call(libc::SIOCGIFINDEX, &mut request(name)).is_ok())
    }

    fn call(&self, code: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: every call here reads or writes one ifreq, which outlives it.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), code as libc::Ioctl, request) })
    }

    fn error(&self, what: &'static str, source: io::Error) -> Error {
        let name = self.name.to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Error::Denied {
                name,
                what,
                multi_queue: multi_queue(self.queues),
            },
            _ => Error::Io { name, what, source },
        }
    }

    pub(super) fn mtu(&self) -> Result<u16, Error> {
        let mut request = request(self.name);
        self.call(libc::SIOCGIFMTU, &mut request)
            .map_err(|e| self.error("read its MTU", e))?;
        // SAFETY: SIOCGIFMTU has filled this member in.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
    }

    pub(super) fn set_mtu(&self, mtu: u16) -> Result<(), Error> {
        let mut request = request(self.name);
        request.ifr_ifru.ifru_mtu = mtu.into();
        self.call(libc::SIOCSIFMTU, &mut request)
            .map_err(|e| self.error("set its MTU", e))
    }

    /// Brings the interface up, unless it is (which needs no privilege).
    pub(super) fn bring_up(&self) -> Result<(), Error> {
        let mut request = request(self.name);
        self.call(libc::SIOCGIFFLAGS, &mut request)
            .map_err(|e| self.error("read its flags", e))?;
        // SAFETY: SIOCGIFFLAGS has filled this member in.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let up = libc::IFF_UP as libc::c_short;
        if flags & up != 0 {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = flags | up;
        self.call(libc::SIOCSIFFLAGS, &mut request)
            .map_err(|e| self.error("bring it up", e))
    }

    /// Makes the interface a port of `bridge`, unless it is.
    pub(super) fn join(&self, bridge: &str) -> Result<(), Error> {
        let master = Path::new("/sys/class/net").join(self.name).join("master");
        let is_port = std::fs::read_link(master)
            .is_ok_and(|target| target.file_name().is_some_and(|name| name == bridge));
        if is_port {
            return Ok(());
        }
        let mut port = request(self.name);
        self.call(libc::SIOCGIFINDEX, &mut port)
            .map_err(|e| self.error("read its index", e))?;
        let mut request = request(bridge);
        // SAFETY: SIOCGIFINDEX has filled this member in.
        request.ifr_ifru.ifru_ifindex = unsafe { port.ifr_ifru.ifru_ifindex };
        self.call(SIOCBRADDIF, &mut request)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ENODEV | libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL) => {
                    Error::NoBridge(bridge.to_owned())
                }
                Some(libc::EBUSY) => Error::OtherBridge {
                    tap: self.name.to_owned(),
                    bridge: bridge.to_owned(),
                },
                _ => self.error("join its bridge", error),
            })
    }

    /// Gives the interface an address, unless it has it.
    pub(super) fn set_address(&self, ip: Ipv4Addr, prefix: u8) -> Result<(), Error> {
        // The caller has 1 to 32; Linux takes a mask in wire order.
        let mask = Ipv4Addr::from(u32::MAX << (32 - u32::from(prefix.clamp(1, 32))));
        let now = |code| {
            let mut request = request(self.name);
            self.call(code, &mut request).ok()?;
            // SAFETY: the call has filled this member in.
            let address = unsafe { request.ifr_ifru.ifru_addr };
            let [a, b, c, d, ..] = *address.sa_data.get(2..)? else {
                return None;
            };
            Some(Ipv4Addr::from([a, b, c, d].map(|byte| byte as u8)))
        };
        if now(libc::SIOCGIFADDR) == Some(ip) && now(libc::SIOCGIFNETMASK) == Some(mask) {
            return Ok(());
        }
        for (code, value) in [(libc::SIOCSIFADDR, ip), (libc::SIOCSIFNETMASK, mask)] {
            let mut request = request(self.name);
            request.ifr_ifru.ifru_addr = address(value);
            self.call(code, &mut request)
                .map_err(|e| self.error("set the node's address", e))?;
        }
        Ok(())
    }
}
