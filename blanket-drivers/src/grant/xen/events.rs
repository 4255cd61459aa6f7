//! Event channels: `/dev/xen/evtchn`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::ioctl::ioctl_with_ref;

use super::abi::{EVTCHN_BIND_INTERDOMAIN, EVTCHN_BIND_UNBOUND_PORT, EVTCHN_NOTIFY, EVTCHN_UNBIND};
use super::{Error, open};

/// This process's ends of event channels.
#[derive(Clone, Debug)]
pub struct EventChannels(Arc<File>);

impl EventChannels {
    /// Opens the driver.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn open() -> Result<Self, Error> {
        open("/dev/xen/evtchn", "xen_evtchn").map(Self)
    }

    /// A new port that `domain` may bind to.
    ///
    /// # Errors
    /// Xen has no more ports for this domain.
    pub fn offer(&self, domain: u16) -> Result<Port, Error> {
        self.bind(EVTCHN_BIND_UNBOUND_PORT(), &[u32::from(domain)])
    }

    /// Binds to `port`, which `domain` has made for this one.
    ///
    /// # Errors
    /// It is not offered, or somebody is bound to it already.
    pub fn connect(&self, domain: u16, port: u32) -> Result<Port, Error> {
        self.bind(EVTCHN_BIND_INTERDOMAIN(), &[u32::from(domain), port])
    }

    fn bind<const N: usize>(&self, call: libc::c_ulong, other: &[u32; N]) -> Result<Port, Error> {
        // SAFETY: the callers pass the driver what their call is defined with.
        let port = unsafe { ioctl_with_ref(&*self.0, call, other) };
        match u32::try_from(port) {
            Ok(number) => Ok(Port {
                driver: Arc::clone(&self.0),
                number,
            }),
            Err(_) => Err(Error::last("bind an event channel")),
        }
    }

    /// The next port that was notified, or none within `limit`. It is masked
    /// until [`Port::unmask`].
    ///
    /// # Errors
    /// The driver has lost events: open it again.
    pub fn wait(&self, limit: Duration) -> Result<Option<u32>, Error> {
        let what = "wait for an event";
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one valid entry.
        if unsafe { libc::poll(&raw mut poll, 1, limit) } < 0 {
            return Err(Error::last(what));
        }
        let mut port = [0; 4];
        match (&*self.0).read_exact(&mut port) {
            Ok(()) => Ok(Some(u32::from_ne_bytes(port))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(source) => Err(Error::System { what, source }),
        }
    }
}

impl AsFd for EventChannels {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An end of an event channel. Dropping it closes the channel.
#[derive(Debug)]
pub struct Port {
    driver: Arc<File>,
    number: u32,
}

impl Port {
    /// What [`EventChannels::wait`] calls it; of one that was offered, what the
    /// other domain connects to.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Notifies the other end.
    ///
    /// # Errors
    /// There is none.
    pub fn notify(&self) -> Result<(), Error> {
        // SAFETY: the driver reads the port's number.
        let done = unsafe { ioctl_with_ref(&*self.driver, EVTCHN_NOTIFY(), &self.number) };
        if done < 0 {
            return Err(Error::last("notify another domain"));
        }
        Ok(())
    }

    /// Lets notifications come again after [`EventChannels::wait`]: do this
    /// before looking for what they are about.
    ///
    /// # Errors
    /// The driver refuses it.
    pub fn unmask(&self) -> Result<(), Error> {
        let done = (&*self.driver).write_all(&self.number.to_ne_bytes());
        done.map_err(|source| Error::System {
            what: "unmask an event channel",
            source,
        })
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // SAFETY: the driver reads the port's number, which is this end's.
        unsafe { ioctl_with_ref(&*self.driver, EVTCHN_UNBIND(), &self.number) };
    }
}
