//! A backend's end of an event channel.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::EventChannels;

/// An event channel that a backend has bound. Dropping it frees the end.
pub(crate) struct Channel {
    events: Arc<dyn EventChannels>,
    port: u32,
    kick: EventFd,
}

impl Channel {
    /// Binds `port`, the guest's end.
    ///
    /// # Errors
    /// There is no eventfd, or the port is not the guest's to offer.
    pub(crate) fn bind(events: &Arc<dyn EventChannels>, port: u32) -> io::Result<Self> {
        let kick = EventFd::new(EFD_NONBLOCK)?;
        events.bind(port, &kick)?;
        Ok(Self {
            events: Arc::clone(events),
            port,
            kick,
        })
    }

    /// The guest's end.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Readable when the guest has sent.
    pub(crate) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Clears [`Channel::kick`]; to be called before the ring is looked at.
    pub(crate) fn take(&self) {
        // An empty eventfd (EAGAIN) is no news.
        let _ = self.kick.read();
    }

    /// Makes the owner look at its ring again, as if the guest had sent.
    pub(crate) fn wake(&self) {
        if let Err(error) = self.kick.write(1) {
            tracing::error!(port = self.port, %error, "a backend cannot be woken");
        }
    }

    /// Notifies the guest.
    pub(crate) fn notify(&self) {
        self.events.notify(self.port);
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.events.unbind(self.port);
    }
}
