//! What those ask who watch.

use tokio::sync::oneshot;

use super::{Control, Error, check_name};
use crate::api::metrics::Figures;
use crate::api::observe::{CaptureSpec, Mirror, MirrorSpec, PingSpec, Pong};
use crate::api::types::PortStatus;
use crate::bridge::PortConfig;
use crate::switch::{Stream, Switch};

impl Control {
    /// Begins a capture.
    ///
    /// # Errors
    ///
    /// There is nothing of that name, that is no filter, or there are too many.
    pub async fn capture(&self, spec: CaptureSpec) -> Result<Stream, Error> {
        Ok(self.order(move |switch| switch.capture(&spec)).await??)
    }

    /// Ends a capture. False: it has ended.
    ///
    /// # Errors
    ///
    /// The switch has stopped.
    pub async fn end_capture(&self, id: u64) -> Result<bool, Error> {
        Ok(self.order(move |switch| switch.end_capture(id)).await?)
    }

    /// All figures.
    ///
    /// # Errors
    ///
    /// The switch has stopped.
    pub async fn figures(&self) -> Result<Figures, Error> {
        Ok(self.order(Switch::figures).await?)
    }

    /// Sends a ping; its number, and who is told of the answer.
    ///
    /// # Errors
    ///
    /// There is no such peer or network, or too many wait.
    pub async fn ping(&self, spec: PingSpec) -> Result<(u64, oneshot::Receiver<Pong>), Error> {
        Ok(self.order(move |switch| switch.ping(&spec)).await??)
    }

    /// Nobody waits for a ping any more.
    ///
    /// # Errors
    ///
    /// The switch has stopped.
    pub async fn end_ping(&self, number: u64) -> Result<(), Error> {
        Ok(self.order(move |switch| switch.end_ping(number)).await?)
    }

    /// All mirrors.
    ///
    /// # Errors
    ///
    /// The switch has stopped.
    pub async fn mirrors(&self) -> Result<Vec<Mirror>, Error> {
        Ok(self.order(|switch| switch.mirrors()).await?)
    }

    /// Adds a mirror, or changes it.
    ///
    /// # Errors
    ///
    /// What it is of or where it copies to is not there, or there are too many.
    pub async fn put_mirror(&mut self, name: String, spec: MirrorSpec) -> Result<Mirror, Error> {
        check_name(&name)?;
        let (key, kept) = (name.clone(), spec.clone());
        let mirror = self
            .order(move |switch| switch.add_mirror(&name, spec, false))
            .await??;
        self.saved.mirrors.insert(key, kept);
        self.saved.write(&self.path)?;
        Ok(mirror)
    }

    /// Changes how the bridge sees a port.
    ///
    /// # Errors
    ///
    /// There is no such port, or that cannot be.
    pub async fn set_port(
        &mut self,
        name: String,
        config: PortConfig,
    ) -> Result<PortStatus, Error> {
        let (key, kept) = (name.clone(), config.clone());
        let status = self
            .order(move |switch| switch.set_port(&name, config))
            .await??;
        if let Some(spec) = self.saved.ports.get_mut(&key) {
            spec.bridge = kept;
        }
        self.saved.write(&self.path)?;
        Ok(status)
    }

    /// Removes a mirror.
    ///
    /// # Errors
    ///
    /// There is none.
    pub async fn remove_mirror(&mut self, name: String) -> Result<Mirror, Error> {
        let key = name.clone();
        let mirror = self
            .order(move |switch| switch.remove_mirror(&name))
            .await??;
        self.saved.mirrors.remove(&key);
        self.saved.write(&self.path)?;
        Ok(mirror)
    }

    /// Brings the mirrors back that were saved.
    pub(super) async fn restore_mirrors(&self) -> Result<(), Error> {
        for (name, spec) in self.saved.mirrors.clone() {
            let added = self
                .order(move |switch| switch.add_mirror(&name, spec, true))
                .await?;
            if let Err(error) = added {
                tracing::warn!("{error}");
            }
        }
        Ok(())
    }
}
