//! What is asked of the switch: checked, carried out by its worker, and kept.

use std::path::PathBuf;

use crate::api::types::{
    Info, MacLine, Network, NetworkSpec, Peer, PeerSpec, PortSpec, PortStatus,
};
use crate::key;
use crate::port::{self, Port};
use crate::switch::saved::{self, Change, Saved};
use crate::switch::worker::{Handle, Stopped};
use crate::switch::{self, Switch};

mod observe;
mod serve;

/// Why something was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The switch refused it.
    #[error(transparent)]
    Switch(#[from] switch::Error),
    /// There is no such port to be had.
    #[error(transparent)]
    Port(#[from] port::OpenError),
    /// It would be forgotten.
    #[error(transparent)]
    Save(#[from] saved::Error),
    /// There is no switch any more.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// There is no such server.
    #[error("`{0}` is no server of `{1}`; blanket net vip ls shows those that there are")]
    NoBackend(String, String),
    /// No public key.
    #[error("{0}")]
    Key(String),
    /// A name that cannot be one.
    #[error(
        "`{0}` is no name: use 1 to 63 letters, digits, `-`, `_` or `.`, the first a letter or digit"
    )]
    Name(String),
}

/// The switch as its API sees it.
pub struct Control {
    handle: Handle,
    saved: Saved,
    path: PathBuf,
}

fn check_name(name: &str) -> Result<(), Error> {
    let fits = (1..=63).contains(&name.len());
    let sound = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let begins = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if fits && begins && name.bytes().all(sound) {
        Ok(())
    } else {
        Err(Error::Name(name.to_owned()))
    }
}

impl Control {
    /// Brings the switch to what was saved, and keeps in the same file what it
    /// is told from now on. A port that cannot be had now stays, and is down.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or contradicts itself.
    pub async fn restore(handle: Handle, path: PathBuf) -> Result<Self, Error> {
        let saved = Saved::read(&path)?;
        let control = Self {
            handle,
            saved,
            path,
        };
        for (name, spec) in control.saved.networks.clone() {
            control
                .order(move |switch| switch.add_network(&name, spec))
                .await??;
        }
        for (name, spec) in control.saved.peers.clone() {
            let added = control.add_peer(name, spec).await;
            if let Err(error) = added {
                tracing::warn!("{error}");
            }
        }
        for (name, spec) in control.saved.ports.clone() {
            let opened = port::open(&spec.attachment, control.mtu(&spec));
            if let Err(error) = &opened {
                tracing::warn!("port {name}: {error}");
            }
            let opened = opened.map_err(|error| error.to_string());
            control
                .order(move |switch| switch.add_port(&name, spec, opened))
                .await??;
        }
        control.restore_mirrors().await?;
        control.restore_vips().await?;
        for (network, changes) in control.saved.flows.clone() {
            for change in changes {
                let network = network.clone();
                let done = control.order(move |switch| match change {
                    Change::Add(flow) => switch.add_flow(&network, &flow),
                    Change::Remove(filter, strict) => {
                        switch.remove_flows(&network, &filter, strict).map(drop)
                    }
                });
                if let Err(error) = done.await? {
                    tracing::warn!("{error}");
                }
            }
        }
        Ok(control)
    }

    async fn order<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Switch) -> R + Send + 'static,
    ) -> Result<R, Stopped> {
        self.handle.with(act).await
    }

    fn mtu(&self, spec: &PortSpec) -> Option<u16> {
        let network = self.saved.networks.get(&spec.network)?;
        let its = u16::try_from(spec.bridge.mtu).unwrap_or(u16::MAX);
        Some(network.mtu.min(its))
    }

    /// Describes the switch.
    ///
    /// # Errors
    ///
    /// It has stopped.
    pub async fn info(&self) -> Result<Info, Error> {
        Ok(self.order(|switch| switch.info()).await?)
    }

    /// All networks.
    ///
    /// # Errors
    ///
    /// It has stopped.
    pub async fn networks(&self) -> Result<Vec<Network>, Error> {
        Ok(self.order(|switch| switch.networks()).await?)
    }

    /// Makes a network, or changes its MTU.
    ///
    /// # Errors
    ///
    /// Another one has its VNI; or what there is has another VNI.
    pub async fn put_network(&mut self, name: String, spec: NetworkSpec) -> Result<Network, Error> {
        check_name(&name)?;
        let (key, kept) = (name.clone(), spec.clone());
        let network = self
            .order(move |switch| switch.add_network(&name, spec))
            .await??;
        self.saved.networks.insert(key, kept);
        self.saved.write(&self.path)?;
        Ok(network)
    }

    /// Removes a network.
    ///
    /// # Errors
    ///
    /// There is none, or it has ports.
    pub async fn remove_network(&mut self, name: String) -> Result<Network, Error> {
        let key = name.clone();
        let network = self
            .order(move |switch| switch.remove_network(&name))
            .await??;
        self.saved.networks.remove(&key);
        self.saved.flows.remove(&key);
        self.saved.write(&self.path)?;
        Ok(network)
    }

    /// A network's flows, a line each.
    ///
    /// # Errors
    ///
    /// There is no such network.
    pub async fn flows(&self, network: String) -> Result<Vec<String>, Error> {
        Ok(self
            .order(move |switch| switch.dump_flows(&network))
            .await??)
    }

    /// Adds flows to a network: all, or none but those before the first that
    /// is wrong.
    ///
    /// # Errors
    ///
    /// There is no such network, or one is no flow.
    pub async fn add_flows(&mut self, network: String, flows: Vec<String>) -> Result<(), Error> {
        let mut added = Ok(());
        for flow in flows {
            let (name, kept) = (network.clone(), flow.clone());
            added = self
                .order(move |switch| switch.add_flow(&name, &flow))
                .await?;
            if added.is_err() {
                break;
            }
            let saved = self.saved.flows.entry(network.clone()).or_default();
            saved.push(Change::Add(kept));
        }
        self.saved.write(&self.path)?;
        added?;
        Ok(())
    }

    /// Removes flows of a network; how many there were.
    ///
    /// # Errors
    ///
    /// There is no such network, or that is no filter.
    pub async fn remove_flows(
        &mut self,
        network: String,
        filter: String,
        strict: bool,
    ) -> Result<usize, Error> {
        let (name, kept) = (network.clone(), filter.clone());
        let gone = self
            .order(move |switch| switch.remove_flows(&name, &filter, strict))
            .await??;
        let saved = self.saved.flows.entry(network).or_default();
        if kept.trim().is_empty() {
            saved.clear();
        }
        saved.push(Change::Remove(kept, strict));
        self.saved.write(&self.path)?;
        Ok(gone)
    }

    /// Which flows a packet would hit, as text.
    ///
    /// # Errors
    ///
    /// There is no such network, or that is no packet.
    pub async fn trace(&self, network: String, packet: String) -> Result<String, Error> {
        Ok(self
            .order(move |switch| switch.trace(&network, &packet))
            .await??)
    }

    /// The addresses that are known in a network.
    ///
    /// # Errors
    ///
    /// There is no such network.
    pub async fn macs(&self, network: String) -> Result<Vec<MacLine>, Error> {
        Ok(self.order(move |switch| switch.macs(&network)).await??)
    }

    /// All other switches.
    ///
    /// # Errors
    ///
    /// There are no tunnels here.
    pub async fn peers(&self) -> Result<Vec<Peer>, Error> {
        Ok(self.order(Switch::peers).await??)
    }

    /// Adds another node's switch, or changes where it is.
    ///
    /// # Errors
    ///
    /// There are no tunnels here, or that is no key, or this node's or another
    /// peer's.
    pub async fn put_peer(&mut self, name: String, spec: PeerSpec) -> Result<Peer, Error> {
        check_name(&name)?;
        let (key, kept) = (name.clone(), spec.clone());
        let peer = self.add_peer(name, spec).await?;
        self.saved.peers.insert(key, kept);
        self.saved.write(&self.path)?;
        Ok(peer)
    }

    async fn add_peer(&self, name: String, spec: PeerSpec) -> Result<Peer, Error> {
        if let Some(foreign) = &spec.foreign {
            let kind = foreign.kind.name();
            tracing::warn!(
                "peer {name} is {kind}: what goes to it and comes from it is NOT ENCRYPTED"
            );
            let added = self.order(move |switch| switch.add_foreign(&name, &spec));
            return Ok(added.await??);
        }
        let public = key::parse(&spec.key).map_err(Error::Key)?;
        let added = self.order(move |switch| switch.add_peer(&name, public, spec));
        Ok(added.await??)
    }

    /// Removes another node's switch.
    ///
    /// # Errors
    ///
    /// There is none.
    pub async fn remove_peer(&mut self, name: String) -> Result<Peer, Error> {
        let key = name.clone();
        let peer = self
            .order(move |switch| switch.remove_peer(&name))
            .await??;
        self.saved.peers.remove(&key);
        self.saved.write(&self.path)?;
        Ok(peer)
    }

    /// All ports.
    ///
    /// # Errors
    ///
    /// It has stopped.
    pub async fn ports(&self) -> Result<Vec<PortStatus>, Error> {
        Ok(self.order(|switch| switch.ports()).await?)
    }

    /// Makes a port; nothing if there is just that one already.
    ///
    /// # Errors
    ///
    /// There is no such network, another port of that name, or what is to be
    /// behind the port cannot be had.
    pub async fn put_port(&mut self, name: String, spec: PortSpec) -> Result<PortStatus, Error> {
        check_name(&name)?;
        if !self.saved.networks.contains_key(&spec.network) {
            return Err(switch::Error::NoNetwork(spec.network).into());
        }
        if let Some(old) = self.saved.ports.get(&name) {
            let same = *old == spec;
            let ports = self.ports().await?;
            let port = ports.into_iter().find(|port| port.name == name);
            return match port {
                Some(port) if same && port.down.is_none() => Ok(port),
                _ => Err(switch::Error::Exists(name).into()),
            };
        }
        let (key, kept) = (name.clone(), spec.clone());
        let port: Box<dyn Port> = port::open(&spec.attachment, self.mtu(&spec))?;
        let status = self
            .order(move |switch| switch.add_port(&name, spec, Ok(port)))
            .await??;
        self.saved.ports.insert(key, kept);
        self.saved.write(&self.path)?;
        Ok(status)
    }

    /// Removes a port.
    ///
    /// # Errors
    ///
    /// There is none.
    pub async fn remove_port(&mut self, name: String) -> Result<PortStatus, Error> {
        let key = name.clone();
        let status = self
            .order(move |switch| switch.remove_port(&name))
            .await??;
        self.saved.ports.remove(&key);
        self.saved.write(&self.path)?;
        Ok(status)
    }
}
