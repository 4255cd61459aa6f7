//! One device: its two directories and the handshake over their `state`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::domain::{directory, write};
use super::{Backend, Context, Error};
use crate::xen::store::{Errno, HOME, Op, Path, Permissions, Store, Who};
use crate::xen::{BACKEND, GUEST};

/// How far one side is (`enum xenbus_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// No such node, or nonsense in it.
    Unknown = 0,
    /// The frontend starts.
    Initialising = 1,
    /// The backend has said what it offers.
    InitWait = 2,
    /// The frontend has set itself up.
    Initialised = 3,
    /// Requests flow.
    Connected = 4,
    /// It wants to end.
    Closing = 5,
    /// It has ended.
    Closed = 6,
    /// The frontend changes its setup; no frontend here does.
    Reconfiguring = 7,
    /// It has changed its setup.
    Reconfigured = 8,
}

impl State {
    fn parse(text: Option<&str>) -> Self {
        match text {
            Some("1") => Self::Initialising,
            Some("2") => Self::InitWait,
            Some("3") => Self::Initialised,
            Some("4") => Self::Connected,
            Some("5") => Self::Closing,
            Some("6") => Self::Closed,
            Some("7") => Self::Reconfiguring,
            Some("8") => Self::Reconfigured,
            _ => Self::Unknown,
        }
    }
}

/// A backend and its place in the xenstore.
pub(super) struct Device {
    pub(super) backend: Box<dyn Backend>,
    pub(super) context: Context,
    /// A handler found its ring broken.
    fault: Arc<AtomicBool>,
    /// The backend's state, as its node says.
    pub(super) state: State,
    /// The directories.
    front: String,
    back: String,
    /// How often it has been connected.
    pub(super) connections: u64,
    /// How often the guest's setup was refused or its ring was broken.
    pub(super) faults: u64,
}

impl Device {
    /// `context` is everybody's but for the fault, which calls `wake`.
    pub(super) fn new(
        backend: Box<dyn Backend>,
        mut context: Context,
        wake: Arc<dyn Fn() + Send + Sync>,
    ) -> Self {
        let fault = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&fault);
        context.fault = Arc::new(move || {
            flag.store(true, Ordering::Release);
            wake();
        });
        let (kind, index) = (backend.kind(), backend.index());
        Self {
            context,
            fault,
            state: State::Unknown,
            front: format!("{HOME}/device/{kind}/{index}"),
            back: format!("/local/domain/{BACKEND}/backend/{kind}/{GUEST}/{index}"),
            backend,
            connections: 0,
            faults: 0,
        }
    }

    /// Writes both directories for a frontend that has not started.
    pub(super) fn publish(&mut self, store: &mut Store) -> Result<(), Errno> {
        self.disconnect();
        for old in [&self.front, &self.back] {
            // Neither is there at first.
            let _ = store.set(&Op::Remove(Path::new(old)?));
        }
        directory(store, &self.front, Permissions::guest_owns())?;
        let front = [
            ("backend", self.back.clone()),
            ("backend-id", BACKEND.to_string()),
            ("state", (State::Initialising as u8).to_string()),
        ];
        for (node, value) in front {
            write(store, &format!("{}/{node}", self.front), &value)?;
        }
        for (node, value) in self.backend.frontend() {
            write(store, &format!("{}/{node}", self.front), &value)?;
        }
        directory(store, &self.back, Permissions::guest_reads())?;
        let back = [
            ("frontend", self.front.clone()),
            ("frontend-id", GUEST.to_string()),
            ("online", "1".into()),
            ("hotplug-status", "connected".into()),
        ];
        for (node, value) in back {
            write(store, &format!("{}/{node}", self.back), &value)?;
        }
        for (node, value) in self.backend.offer() {
            write(store, &format!("{}/{node}", self.back), &value)?;
        }
        self.set_state(store, State::InitWait)
    }

    /// Takes the directories as a restored store has them.
    pub(super) fn adopt(&mut self, store: &mut Store, state: State) -> Result<(), Errno> {
        self.state = state;
        match state {
            // Written again, the guest looks at it again: a network interface
            // then tells its neighbours where it is now.
            State::Connected => self.set_state(store, state),
            _ => Ok(()),
        }
    }

    fn set_state(&mut self, store: &mut Store, state: State) -> Result<(), Errno> {
        self.state = state;
        let value = (state as u8).to_string();
        write(store, &format!("{}/state", self.back), &value)
    }

    /// Whether a change of `path` is one of the frontend's state.
    pub(super) fn is_state(&self, path: &Path) -> bool {
        path.below(&self.front) == Some("state")
    }

    /// The frontend's state has changed: takes the backend where it belongs.
    pub(super) fn frontend_changed(&mut self, store: &mut Store) {
        let front = State::parse(read(store, &self.front, "state").as_deref());
        let next = match (front, self.state) {
            // A new kernel or driver; the old one may not have said good-bye.
            (State::Initialising, State::InitWait) => return,
            (State::Initialising, _) => State::InitWait,
            (State::Initialised | State::Connected, State::InitWait) => {
                self.connect(store);
                return;
            }
            (State::Closing, _) => State::Closing,
            (State::Closed | State::Unknown, _) => State::Closed,
            _ => return,
        };
        self.disconnect();
        self.move_to(store, next);
    }

    /// Closes the backend if a handler has found its ring broken.
    pub(super) fn check_fault(&mut self, store: &mut Store) {
        if self.fault.swap(false, Ordering::AcqRel) && self.state == State::Connected {
            tracing::warn!(device = self.backend.name(), "the guest's ring is broken");
            self.faults += 1;
            self.disconnect();
            self.move_to(store, State::Closing);
        }
    }

    fn move_to(&mut self, store: &mut Store, state: State) {
        if let Err(errno) = self.set_state(store, state) {
            tracing::error!(device = self.backend.name(), %errno, "its state cannot be told");
        }
    }

    fn connect(&mut self, store: &mut Store) {
        match self.try_connect(store) {
            Ok(()) => {
                self.connections += 1;
                self.move_to(store, State::Connected);
            }
            Err(error) => {
                tracing::warn!(device = self.backend.name(), %error, "the guest's setup is refused");
                self.faults += 1;
                self.disconnect();
                self.move_to(store, State::Closing);
            }
        }
    }

    fn try_connect(&mut self, store: &mut Store) -> Result<(), Error> {
        self.fault.store(false, Ordering::Release);
        let front = &self.front;
        let nodes = self
            .backend
            .connect(&|node| read(store, front, node), &self.context)?;
        for (node, value) in nodes {
            write(store, &format!("{}/{node}", self.back), &value)
                .map_err(|errno| Error::Refused(format!("its node '{node}': {errno}")))?;
        }
        Ok(())
    }

    /// Stops the backend's handlers, if there are any.
    pub(super) fn disconnect(&mut self) {
        self.backend.disconnect();
    }
}

/// The value of a node in `directory`.
pub(in crate::xen) fn read(store: &Store, directory: &str, node: &str) -> Option<String> {
    let path = Path::new(&format!("{directory}/{node}")).ok()?;
    let value = store.tree().read(Who::Toolstack, &path).ok()?;
    // Some writers end a value with a zero byte.
    let text = std::str::from_utf8(value).ok()?;
    Some(text.trim_end_matches('\0').to_owned())
}
