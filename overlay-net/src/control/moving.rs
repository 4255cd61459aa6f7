//! Guests that come and go.

use super::{Control, Error, check_name};
use crate::api::moving::{Arrival, Offer, Whereabouts};
use crate::api::types::PortStatus;
use crate::switch;

impl Control {
    /// What another switch needs to know of a port whose guest may come there.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub async fn offer(&self, name: String) -> Result<Offer, Error> {
        Ok(self.order(move |switch| switch.offer(&name)).await??)
    }

    /// A port's guest will go there. It is not kept: a switch that is started
    /// again knows nothing of it.
    ///
    /// # Errors
    ///
    /// There is no such port, or no tunnel.
    pub async fn leave(&mut self, name: String, to: Whereabouts) -> Result<(), Error> {
        Ok(self.order(move |switch| switch.leave(&name, &to)).await??)
    }

    /// It does not.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub async fn stay(&mut self, name: String) -> Result<(), Error> {
        Ok(self.order(move |switch| switch.stay(&name)).await??)
    }

    /// Makes a port whose guest is on its way here.
    ///
    /// # Errors
    ///
    /// As [`Control::put_port`]; or there is no tunnel.
    pub async fn expect(&mut self, name: String, arrival: Arrival) -> Result<PortStatus, Error> {
        check_name(&name)?;
        let spec = arrival.spec.clone();
        if !self.saved.networks.contains_key(&spec.network) {
            return Err(switch::Error::NoNetwork(spec.network).into());
        }
        if self.saved.ports.contains_key(&name) {
            return Err(switch::Error::Exists(name).into());
        }
        let port = self.open(&spec)?;
        let (key, kept) = (name.clone(), arrival.clone());
        let status = self
            .order(move |switch| {
                let from = (&arrival.from, arrival.epoch);
                switch.expect(&name, arrival.spec, from, Ok(port))
            })
            .await??;
        self.saved.arriving.insert(key.clone(), kept);
        self.saved.ports.insert(key, spec);
        self.saved.write(&self.path)?;
        Ok(status)
    }

    /// Its guest has come.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub async fn arrived(&mut self, name: String) -> Result<PortStatus, Error> {
        let key = name.clone();
        let status = self.order(move |switch| switch.arrived(&name)).await??;
        if self.saved.arriving.remove(&key).is_some() {
            self.saved.write(&self.path)?;
        }
        Ok(status)
    }
}
