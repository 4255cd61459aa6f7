//! What is asked of the switch: checked, carried out by its worker, and kept.

use std::path::PathBuf;

use crate::api::types::{
    Attachment, ControllerSpec, Controllers, GroupStatus, Info, MacLine, Network, NetworkSpec,
    Peer, PeerSpec, PortSpec, PortStatus,
};
use crate::controllers;
use crate::directory::GROUPS;
use crate::flow::groups::{BadRule, Rule};
use crate::key;
use crate::port::{self, Port};

use crate::switch::saved::{self, Change, Saved};
use crate::switch::worker::{Handle, Stopped};
use crate::switch::{self, Switch};

mod moving;
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
    /// No rule.
    #[error(transparent)]
    Rule(#[from] BadRule),
    /// Controllers are not taken.
    #[error(transparent)]
    Controllers(#[from] controllers::Error),
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
    controllers: controllers::Set,
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
        let mut control = Self {
            controllers: controllers::Set::new(handle.clone()),
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
        for (name, rules) in control.saved.groups.clone() {
            control
                .order(move |switch| switch.add_group(&name, rules))
                .await??;
        }
        let ports = control.saved.ports.values();
        if ports.into_iter().any(|port| !port.groups.is_empty()) {
            control.order(Switch::adopt_connections).await?;
        }
        // Those whose guests come from others are made after those.
        let mut ports: Vec<_> = control.saved.ports.clone().into_iter().collect();
        ports.sort_by_key(|(name, _)| control.saved.arriving.contains_key(name));
        for (name, spec) in ports {
            let opened = control.open(&spec);
            if let Err(error) = &opened {
                tracing::warn!("port {name}: {error}");
            }
            let opened = opened.map_err(|error| error.to_string());
            let arrival = control.saved.arriving.get(&name).cloned();
            let made =
                control.order(move |switch| switch.restore_port(&name, spec, arrival, opened));
            made.await??;
        }
        control.restore_mirrors().await?;
        control.restore_vips().await?;
        for (network, spec) in control.saved.controllers.clone() {
            // What a network begins with depends on it.
            let (name, mode) = (network.clone(), spec.mode());
            let set = control.order(move |switch| switch.set_fail_mode(&name, mode));
            set.await??;
        }
        for network in control.saved.flows.keys() {
            control.replay(network).await?;
        }
        for (network, spec) in control.saved.controllers.clone() {
            control.controllers.set(&network, spec, false).await?;
        }
        Ok(control)
    }

    /// Does again what was done to a network's flows by command.
    async fn replay(&self, network: &str) -> Result<(), Error> {
        for change in self.saved.flows.get(network).cloned().unwrap_or_default() {
            let network = network.to_owned();
            let done = self.order(move |switch| match change {
                Change::Add(flow) => switch.add_flow(&network, &flow),
                Change::Remove(filter, strict) => {
                    switch.remove_flows(&network, &filter, strict).map(drop)
                }
            });
            if let Err(error) = done.await? {
                tracing::warn!("{error}");
            }
        }
        Ok(())
    }

    async fn order<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Switch) -> R + Send + 'static,
    ) -> Result<R, Stopped> {
        self.handle.with(act).await
    }

    /// What is behind a port.
    fn open(&self, spec: &PortSpec) -> Result<Box<dyn Port>, port::OpenError> {
        let port = port::open(&spec.attachment, self.mtu(spec))?;
        if let (Attachment::VhostUser(path), Some((user, group))) = (&spec.attachment, spec.owner) {
            let owned = std::os::unix::fs::chown(path, Some(user), Some(group));
            owned.map_err(|source| port::OpenError::Socket {
                path: path.clone(),
                source,
            })?;
        }
        Ok(port)
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
        if self.saved.controllers.remove(&key).is_some() {
            self.controllers.remove(&key).await?;
        }
        self.saved.networks.remove(&key);
        self.saved.flows.remove(&key);
        self.saved.write(&self.path)?;
        Ok(network)
    }

    /// How a network's controllers are.
    ///
    /// # Errors
    ///
    /// There is no such network, or it has none.
    pub async fn controllers(&self, network: String) -> Result<Controllers, Error> {
        self.known(&network)?;
        Ok(self.controllers.get(&network).await?)
    }

    /// Gives a network these controllers, and no others.
    ///
    /// # Errors
    ///
    /// There is no such network, or something is wrong with one of them; then
    /// there are those that there were.
    pub async fn put_controllers(
        &mut self,
        network: String,
        spec: ControllerSpec,
    ) -> Result<Controllers, Error> {
        self.known(&network)?;
        self.controllers.set(&network, spec.clone(), true).await?;
        self.saved.controllers.insert(network.clone(), spec);
        self.saved.write(&self.path)?;
        self.controllers(network).await
    }

    /// Leaves a network's controllers, and forgets their flows and meters; which
    /// they were.
    ///
    /// # Errors
    ///
    /// There is no such network, or it has none.
    pub async fn remove_controllers(&mut self, network: String) -> Result<ControllerSpec, Error> {
        self.known(&network)?;
        let spec = self.controllers.remove(&network).await?;
        let name = network.clone();
        self.order(move |switch| switch.reset_flows(&name))
            .await??;
        self.replay(&network).await?;
        self.saved.controllers.remove(&network);
        self.saved.write(&self.path)?;
        Ok(spec)
    }

    fn known(&self, network: &str) -> Result<(), Error> {
        if self.saved.networks.contains_key(network) {
            Ok(())
        } else {
            Err(switch::Error::NoNetwork(network.to_owned()).into())
        }
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
        self.known(&spec.network)?;
        if let Some(old) = self.saved.ports.get(&name) {
            let same = *old == spec;
            let ports = self.ports().await?;
            let port = ports.into_iter().find(|port| port.name == name);
            return match port {
                Some(port) if same && port.down.is_none() => Ok(port),
                _ => Err(switch::Error::Exists(name).into()),
            };
        }
        self.known_groups(&spec.groups)?;
        let (key, kept) = (name.clone(), spec.clone());
        let port = self.open(&spec)?;
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
        self.saved.arriving.remove(&key);
        self.saved.write(&self.path)?;
        Ok(status)
    }

    /// Puts a port into groups, and out of all others; without any, all passes.
    ///
    /// # Errors
    ///
    /// There is no such port or group, or there are too many.
    pub async fn put_port_groups(
        &mut self,
        name: String,
        groups: Vec<String>,
    ) -> Result<PortStatus, Error> {
        self.known_groups(&groups)?;
        let (key, kept) = (name.clone(), groups.clone());
        self.order(move |switch| switch.set_port_groups(&key, groups))
            .await??;
        if let Some(spec) = self.saved.ports.get_mut(&name) {
            spec.groups = kept;
        }
        self.saved.write(&self.path)?;
        let mut ports = self.ports().await?.into_iter();
        let port = ports.find(|port| port.name == name);
        Ok(port.ok_or(switch::Error::NoPort(name))?)
    }

    /// Groups that ports can be put into.
    fn known_groups(&self, groups: &[String]) -> Result<(), Error> {
        if groups.len() > GROUPS {
            return Err(switch::Error::TooMany(GROUPS, "groups of a port").into());
        }
        let unknown = |name: &&String| !self.saved.groups.contains_key(*name);
        match groups.iter().find(unknown) {
            Some(name) => Err(switch::Error::NoGroup(name.clone()).into()),
            None => Ok(()),
        }
    }

    /// All security groups.
    ///
    /// # Errors
    ///
    /// The switch has stopped.
    pub async fn groups(&self) -> Result<Vec<GroupStatus>, Error> {
        Ok(self.order(|switch| switch.groups()).await?)
    }

    /// Makes a security group with rules.
    ///
    /// # Errors
    ///
    /// There is one of that name, or a rule makes no sense.
    pub async fn add_group(&mut self, name: String, rules: Vec<Rule>) -> Result<(), Error> {
        check_name(&name)?;
        rules.iter().try_for_each(Rule::check)?;
        let (key, kept) = (name.clone(), rules.clone());
        self.order(move |switch| switch.add_group(&name, rules))
            .await??;
        self.saved.groups.insert(key, kept);
        Ok(self.saved.write(&self.path)?)
    }

    /// Removes a security group; with `force` even if ports are in it, which
    /// are closed then.
    ///
    /// # Errors
    ///
    /// There is none, or ports are in it.
    pub async fn remove_group(&mut self, name: String, force: bool) -> Result<(), Error> {
        let key = name.clone();
        self.order(move |switch| switch.remove_group(&name, force))
            .await??;
        self.saved.groups.remove(&key);
        Ok(self.saved.write(&self.path)?)
    }

    /// Adds a rule to a security group.
    ///
    /// # Errors
    ///
    /// There is no such group, or the rule makes no sense.
    pub async fn add_rule(&mut self, group: String, rule: Rule) -> Result<(), Error> {
        rule.check()?;
        let (key, kept) = (group.clone(), rule.clone());
        self.order(move |switch| switch.add_rule(&group, rule))
            .await??;
        let rules = self.saved.groups.entry(key).or_default();
        if !rules.contains(&kept) {
            rules.push(kept);
        }
        Ok(self.saved.write(&self.path)?)
    }

    /// Removes a rule from a security group.
    ///
    /// # Errors
    ///
    /// There is no such group, or it has no such rule.
    pub async fn remove_rule(&mut self, group: String, rule: Rule) -> Result<(), Error> {
        let (key, gone) = (group.clone(), rule.clone());
        self.order(move |switch| switch.remove_rule(&group, &rule))
            .await??;
        let rules = self.saved.groups.entry(key).or_default();
        rules.retain(|kept| *kept != gone);
        Ok(self.saved.write(&self.path)?)
    }
}
