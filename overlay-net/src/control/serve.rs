//! What is asked of virtual addresses.

use std::time::SystemTime;

use super::{Control, Error, check_name};
use crate::api::services::{BackendChange, Vip, VipBackend, VipSpec};
use crate::frame::Mac;
use crate::switch::{self, Switch};

/// Seconds since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

impl Control {
    /// All virtual addresses.
    ///
    /// # Errors
    ///
    /// The switch has stopped.
    pub async fn vips(&self) -> Result<Vec<Vip>, Error> {
        Ok(self.order(Switch::vips).await?)
    }

    /// Makes a virtual address, or changes its servers.
    ///
    /// # Errors
    ///
    /// There is no such network, another one has the address, or it cannot be.
    pub async fn put_vip(&mut self, name: String, spec: VipSpec) -> Result<Vip, Error> {
        check_name(&name)?;
        let (key, kept) = (name.clone(), spec.clone());
        let vip = self
            .order(move |switch| switch.add_vip(&name, spec, false))
            .await??;
        self.saved.vips.insert(key, kept);
        self.saved.write(&self.path)?;
        Ok(vip)
    }

    /// Removes a virtual address.
    ///
    /// # Errors
    ///
    /// There is none.
    pub async fn remove_vip(&mut self, name: String) -> Result<Vip, Error> {
        let key = name.clone();
        let vip = self.order(move |switch| switch.remove_vip(&name)).await??;
        self.saved.vips.remove(&key);
        self.saved.write(&self.path)?;
        Ok(vip)
    }

    async fn backend(&self, name: &str, backend: String) -> Result<(VipSpec, Mac), Error> {
        let missing = || switch::Error::NoVip(name.to_owned());
        let spec = self.saved.vips.get(name).cloned().ok_or_else(missing)?;
        let mac = self.order(move |switch| switch.station_of(&backend));
        Ok((spec, mac.await??))
    }

    /// Adds a server, gives it another weight, or has it get no new
    /// connections.
    ///
    /// # Errors
    ///
    /// There is no such virtual address or port, or that is no server.
    pub async fn put_backend(
        &mut self,
        name: String,
        backend: String,
        change: BackendChange,
    ) -> Result<Vip, Error> {
        let (mut spec, mac) = self.backend(&name, backend.clone()).await?;
        let its = spec.backends.iter_mut().find(|its| its.mac == mac);
        match its {
            Some(its) => {
                its.weight = change.weight.unwrap_or(its.weight);
                // It goes on draining since when it began to.
                its.draining = change.drain.then(|| its.draining.unwrap_or_else(now));
            }
            None if change.drain => return Err(Error::NoBackend(backend, name)),
            None => spec.backends.push(VipBackend {
                mac,
                weight: change.weight.unwrap_or_else(VipBackend::usual_weight),
                draining: None,
            }),
        }
        self.put_vip(name, spec).await
    }

    /// Removes a server.
    ///
    /// # Errors
    ///
    /// There is no such virtual address, or no such server of it.
    pub async fn remove_backend(&mut self, name: String, backend: String) -> Result<Vip, Error> {
        let (mut spec, mac) = self.backend(&name, backend.clone()).await?;
        let before = spec.backends.len();
        spec.backends.retain(|its| its.mac != mac);
        if spec.backends.len() == before {
            return Err(Error::NoBackend(backend, name));
        }
        self.put_vip(name, spec).await
    }

    /// Brings the virtual addresses back that were saved.
    pub(super) async fn restore_vips(&self) -> Result<(), Error> {
        for (name, spec) in self.saved.vips.clone() {
            let since = spec.backends.iter().filter_map(|its| its.draining).max();
            let draining = since.is_some_and(|since| now() < since.saturating_add(spec.drain));
            let added = self
                .order(move |switch| switch.add_vip(&name, spec, draining))
                .await?;
            if let Err(error) = added {
                tracing::warn!("{error}");
            }
        }
        Ok(())
    }
}
