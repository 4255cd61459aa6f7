//! The life of the bus and all that is on it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::domain::{self, SharedPages};
use super::{Device, Inner, Service, State as XenbusState, XenBus, error};
use crate::lifecycle::{Error, Lifecycle, SavedState};
use crate::xen::store::{self, Store, connection};

const KIND: &str = "xenbus";
/// Version of [`State`].
const VERSION: u32 = 1;

/// A device's part.
#[derive(Debug, Serialize, Deserialize)]
struct DeviceRecord {
    kind: String,
    index: u32,
    state: XenbusState,
    backend: SavedState,
}

/// Everything that a snapshot carries.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    store: store::State,
    pages: Option<SharedPages>,
    connection: connection::State,
    console: SavedState,
    devices: Vec<DeviceRecord>,
}

impl XenBus {
    fn stop(&mut self) -> Result<(), Error> {
        match self.running.take() {
            Some(id) => self.thread.remove(id).map(drop).map_err(|e| error(&e)),
            None => Ok(()),
        }
    }

    fn run(&mut self) -> Result<(), Error> {
        if self.running.is_none() {
            let service = Box::new(Service(Arc::clone(&self.shared)));
            self.running = Some(self.thread.add(service).map_err(|e| error(&e))?);
        }
        Ok(())
    }

    /// Takes over the state of a guest that has suspended itself and goes on in
    /// a new domain: its frontends, its connection and its watches start anew,
    /// as Linux's do, over the pages that it shares already and these ports of
    /// [`crate::xen::BACKEND`]'s. What else is in the store stays. Returns the
    /// pages with their ports. As for [`Lifecycle::restore`], guest memory is
    /// restored already.
    ///
    /// # Errors
    /// The state is damaged, too new, or of a guest with other devices. The bus
    /// must be reset then.
    pub fn restore_renewed(
        &mut self,
        saved: &SavedState,
        store_port: u32,
        console_port: u32,
    ) -> Result<SharedPages, Error> {
        let state: State = saved.unpack(KIND, VERSION)?;
        let mut pages = state
            .pages
            .ok_or_else(|| error(&"the saved guest has no store"))?;
        pages.store.port = store_port;
        pages.console.port = console_port;
        self.reset()?;
        let mut store = Store::restore(state.store).map_err(|e| error(&e))?;
        store.forget_client();
        {
            let mut inner = self.shared.lock();
            inner.records(&state.devices)?;
            inner.store = store;
            inner.publish().map_err(|e| error(&e))?;
        }
        self.join(pages)?;
        self.console.rejoin(pages.console)?;
        Ok(pages)
    }

    fn restore_devices(&self, store: Store, records: &[DeviceRecord]) -> Result<(), Error> {
        let mut inner = self.shared.lock();
        let records = inner.records(records)?;
        inner.store = store;
        let inner = &mut *inner;
        for (device, record) in inner.devices.iter_mut().zip(records) {
            device.backend.restore(&record.backend, &device.context)?;
            device
                .adopt(&mut inner.store, record.state)
                .map_err(|e| error(&e))?;
        }
        Ok(())
    }
}

impl Inner {
    /// The devices' records, in their order.
    fn records<'a>(&self, records: &'a [DeviceRecord]) -> Result<Vec<&'a DeviceRecord>, Error> {
        if records.len() != self.devices.len() {
            return Err(error(&format!(
                "the state has {} devices, the machine {}",
                records.len(),
                self.devices.len()
            )));
        }
        let find = |device: &Device| {
            let (kind, index) = (device.backend.kind(), device.backend.index());
            records
                .iter()
                .find(|record| record.kind == kind && record.index == index)
                .ok_or_else(|| error(&format!("the state has no {kind} {index}")))
        };
        self.devices.iter().map(find).collect()
    }
}

impl Lifecycle for XenBus {
    fn start(&mut self) -> Result<(), Error> {
        self.resume()
    }

    fn pause(&mut self) -> Result<(), Error> {
        // First whoever could connect another.
        self.stop()?;
        self.console.park()?;
        let mut inner = self.shared.lock();
        inner
            .devices
            .iter_mut()
            .try_for_each(|device| device.backend.pause())
    }

    fn resume(&mut self) -> Result<(), Error> {
        let mut inner = self.shared.lock();
        for device in &mut inner.devices {
            device.backend.resume()?;
        }
        drop(inner);
        self.console.run()?;
        self.run()
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.console.detach()?;
        let mut inner = self.shared.lock();
        inner.link = None;
        inner.store = domain::store(&self.domain).map_err(|e| error(&e))?;
        inner.publish().map_err(|e| error(&e))
    }

    fn halt(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(%error, "halt");
        }
        self.console.halt();
        let mut inner = self.shared.lock();
        inner.link = None;
        for device in &mut inner.devices {
            device.disconnect();
            device.backend.halt();
        }
    }

    fn save(&self) -> Result<SavedState, Error> {
        if self.running.is_some() {
            return Err(error(&"it must be paused first"));
        }
        let inner = self.shared.lock();
        let devices = inner.devices.iter().map(|device| {
            Ok(DeviceRecord {
                kind: device.backend.kind().to_owned(),
                index: device.backend.index(),
                state: device.state,
                backend: device.backend.save()?,
            })
        });
        let link = inner.link.as_ref();
        let state = State {
            store: inner.store.save(),
            pages: link.map(|link| link.pages),
            connection: link.map_or_else(connection::State::default, |link| {
                link.connection.state().clone()
            }),
            console: self.console.save()?,
            devices: devices.collect::<Result<_, Error>>()?,
        };
        SavedState::pack(KIND, VERSION, &state)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), Error> {
        let state: State = saved.unpack(KIND, VERSION)?;
        self.reset()?;
        let store = Store::restore(state.store).map_err(|e| error(&e))?;
        self.restore_devices(store, &state.devices)?;
        if let Some(pages) = state.pages {
            let link = self.link(pages, state.connection)?;
            self.shared.lock().link = Some(link);
        }
        self.console.restore(&state.console)
    }
}
