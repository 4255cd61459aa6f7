//! VMs' ports of this node's switch: `--net network=NAME`.
//!
//! A port is there from before its VM's monitor starts until that has ended. It
//! is called like the VM, and is known by its socket.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use blanket_drivers::mac::MacAddress;
use blanket_overlay::api::moving::{Arrival, Offer, Whereabouts};
use blanket_overlay::api::types::{
    Attachment, GroupStatus, Info, Network, NetworkSpec, Peer, PortSpec, PortStatus,
};
use blanket_overlay::bridge::{Mode, PortConfig};
use blanket_overlay::frame::Mac;
use blanket_vmm::config::{NetConfig, VmConfig};
use hyper::Method;

use crate::cluster::parcel;
use crate::failure::failure;
use crate::home::{Home, VmDir};
use crate::name::VmName;
use crate::switch::ask;

/// Where a VM comes from that has been running already.
pub(crate) enum Origins<'a> {
    /// Another monitor on this node.
    Here(&'a VmName),
    /// Another node, whose switch has these ports.
    There(&'a [parcel::Port]),
}

/// What an interface's port is called.
fn port_name(vm: &VmName, index: usize) -> String {
    match index {
        0 => vm.to_string(),
        more => format!("{vm}.net{more}"),
    }
}

/// The interfaces that are on networks, by number.
fn on_networks(config: &VmConfig) -> impl Iterator<Item = (usize, &str, &NetConfig)> {
    let nets = config.net.iter().enumerate();
    nets.filter_map(|(index, net)| Some((index, net.network.as_deref()?, net)))
}

/// Gives the interfaces on networks their sockets, and addresses to those that
/// have none.
///
/// # Errors
/// There are no random numbers.
pub(crate) fn settle(config: &mut VmConfig, vm: &VmDir) -> Result<()> {
    let nets = config.net.iter_mut().enumerate();
    for (index, net) in nets.filter(|(_, net)| net.network.is_some()) {
        net.vhost_user = Some(vm.net_socket(index));
        if net.mac.is_none() {
            let mut random = [0; 6];
            let got = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
            anyhow::ensure!(got == random.len(), "the system has no random bytes");
            net.mac = Some(MacAddress::local(random));
        }
    }
    Ok(())
}

/// Tells new guests what fits their networks.
///
/// # Errors
/// There is no switch, or no such network.
pub(crate) fn set_mtus(home: &Home, config: &mut VmConfig) -> Result<()> {
    if on_networks(config).next().is_none() {
        return Ok(());
    }
    let networks = networks(home)?;
    for net in &mut config.net {
        if let Some(name) = &net.network {
            let network = network(&networks, name)?;
            net.mtu = net.mtu.or(Some(network.spec.mtu));
        }
    }
    Ok(())
}

fn networks(home: &Home) -> Result<Vec<Network>> {
    ask(home, Method::GET, "/networks", None::<&()>)
}

fn network<'a>(networks: &'a [Network], name: &str) -> Result<&'a Network> {
    let found = networks.iter().find(|network| network.name == name);
    found.ok_or_else(|| {
        let names: Vec<_> = networks.iter().map(|it| it.name.as_str()).collect();
        let known = match names[..] {
            [] => "there are none".to_owned(),
            _ => format!("there are: {}", names.join(", ")),
        };
        failure(
            format!("there is no network '{name}' on this node's switch ({known})"),
            format!("make it: blanket net create {name}"),
        )
    })
}

fn ports(home: &Home) -> Result<Vec<PortStatus>> {
    ask(home, Method::GET, "/ports", None::<&()>)
}

fn path(name: &str) -> String {
    format!("/ports/{name}")
}

/// Whom a monitor becomes that root starts, unless it is told.
const NOBODY: (u32, u32) = (65534, 65534);

/// Whom the monitor becomes, if not another one.
fn becomes(user: Option<&str>) -> Result<Option<(u32, u32)>> {
    let root = rustix::process::geteuid().is_root();
    match user {
        Some(user) => owner(user).map(Some),
        None => Ok(root.then_some(NOBODY)),
    }
}

/// Makes the directory of the ports' sockets, in which nobody sees more than
/// is his.
fn make_folder(socket: &Path) -> Result<()> {
    let Some(folder) = socket.parent() else {
        return Ok(());
    };
    let context = || format!("cannot make {}", folder.display());
    fs::create_dir_all(folder).with_context(context)?;
    let mode = fs::Permissions::from_mode(0o711);
    fs::set_permissions(folder, mode).with_context(context)
}

/// The numbers of a user and a group, as `--user` has them.
fn owner(user: &str) -> Result<(u32, u32)> {
    let (user, group) = user.split_once(':').unwrap_or((user, user));
    let number = |text: &str| {
        text.parse()
            .with_context(|| format!("'{text}' is no number of a user or group"))
    };
    Ok((number(user)?, number(group)?))
}

/// The security groups that are there.
fn groups(home: &Home) -> Result<BTreeSet<String>> {
    let all: Vec<GroupStatus> = ask(home, Method::GET, "/groups", None::<&()>)?;
    let there = all.into_iter().filter(|group| group.rules.is_some());
    Ok(there.map(|group| group.name).collect())
}

/// The security groups that an interface is in.
fn groups_of(net: &NetConfig) -> impl Iterator<Item = &str> {
    net.group.iter().flat_map(|groups| groups.split('+'))
}

/// Whether the groups of a new VM are there: it would have no connections.
fn check_groups(home: &Home, config: &VmConfig) -> Result<()> {
    let wanted = on_networks(config).flat_map(|(.., net)| groups_of(net));
    let mut wanted = wanted.peekable();
    if wanted.peek().is_none() {
        return Ok(());
    }
    let known = groups(home)?;
    for name in wanted {
        if !known.contains(name) {
            return Err(failure(
                format!("there is no security group '{name}' on this node's switch"),
                format!("make it: blanket net group create {name}"),
            ));
        }
    }
    Ok(())
}

fn spec(vm: &VmDir, index: usize, net: &NetConfig, user: Option<&str>) -> Result<PortSpec> {
    let mac = net
        .mac
        .context("an interface on a network has an address")?;
    let mac: Mac = mac.to_string().parse().map_err(anyhow::Error::msg)?;
    let ips = net.ip.iter().flat_map(|ips| ips.split('+')).map(|ip| {
        ip.parse::<IpAddr>().map_err(|_| {
            failure(
                format!("'{ip}' is no IP address"),
                "write ip=10.0.0.5, or several as ip=10.0.0.5+fd00::5",
            )
        })
    });
    Ok(PortSpec {
        network: net.network.clone().unwrap_or_default(),
        attachment: Attachment::VhostUser(vm.net_socket(index)),
        bridge: PortConfig {
            vlan: Mode::Access {
                vlan: net.vlan.unwrap_or(0),
            },
            macs: vec![mac],
            ips: ips.collect::<Result<_>>()?,
            guard: net.guard,
            ..PortConfig::default()
        },
        groups: groups_of(net).map(str::to_owned).collect(),
        owner: becomes(user)?,
    })
}

/// Makes a VM's ports.
///
/// # Errors
/// There is no switch, or no such network, or an address is somebody else's.
/// There is no port then.
pub(crate) fn plug(
    home: &Home,
    vm: &VmDir,
    config: &VmConfig,
    user: Option<&str>,
    from: Option<&Origins<'_>>,
) -> Result<()> {
    if on_networks(config).next().is_none() {
        return Ok(());
    }
    let networks = networks(home)?;
    if from.is_none() {
        check_groups(home, config)?;
    }
    // What an earlier VM of that name has left.
    unplug(home, vm, config);
    let before = match from {
        Some(Origins::Here(_)) => ports(home)?,
        _ => Vec::new(),
    };
    for (index, name, net) in on_networks(config) {
        let network = network(&networks, name)?;
        let mut spec = spec(vm, index, net, user)?;
        make_folder(&vm.net_socket(index))?;
        let arrival = match from {
            None => None,
            Some(Origins::Here(old)) => {
                let old = port_name(old, index);
                let same = |port: &&PortStatus| port.name == old && port.spec.network == name;
                before.iter().find(same).map(|port| {
                    // As it is by now.
                    spec.bridge.clone_from(&port.spec.bridge);
                    spec.groups.clone_from(&port.spec.groups);
                    Arrival {
                        spec: spec.clone(),
                        from: Whereabouts::Port(port.name.clone()),
                        epoch: 0,
                    }
                })
            }
            Some(Origins::There(ports)) => {
                let same =
                    |port: &&parcel::Port| port.index == index && port.spec.vni == network.spec.vni;
                ports.iter().find(same).map(|port| {
                    spec.bridge.clone_from(&port.bridge);
                    spec.groups.clone_from(&port.groups);
                    Arrival {
                        spec: spec.clone(),
                        from: Whereabouts::Peer(port.key.clone()),
                        epoch: port.epoch,
                    }
                })
            }
        };
        let port = port_name(&vm.name, index);
        let made: Result<PortStatus> = match arrival {
            Some(arrival) => {
                let path = format!("{}/arrival", path(&port));
                ask(home, Method::PUT, &path, Some(&arrival))
            }
            None => ask(home, Method::PUT, &path(&port), Some(&spec)),
        };
        if let Err(error) = made {
            unplug(home, vm, config);
            return Err(error.context(format!("network '{name}'")));
        }
    }
    Ok(())
}

/// Removes a VM's ports, as far as they are there.
pub(crate) fn unplug(home: &Home, vm: &VmDir, config: &VmConfig) {
    if on_networks(config).next().is_none() {
        return;
    }
    let Ok(ports) = ports(home) else {
        // Without a switch there are none.
        return;
    };
    for (index, ..) in on_networks(config) {
        let its = Attachment::VhostUser(vm.net_socket(index));
        let is_its = |port: &&PortStatus| port.spec.attachment == its;
        if let Some(port) = ports.iter().find(is_its) {
            let gone: Result<PortStatus> =
                ask(home, Method::DELETE, &path(&port.name), None::<&()>);
            if let Err(error) = gone {
                eprintln!("[{}: its port is left: {error:#}]", vm.name);
            }
        }
        // Of a port that is no more.
        let _ = fs::remove_file(vm.net_socket(index));
    }
}

/// The same of a VM as it was started.
pub(crate) fn unplug_all(home: &Home, vm: &VmDir) {
    let text = fs::read_to_string(vm.config()).unwrap_or_default();
    if let Ok(config) = toml::from_str(&text) {
        unplug(home, vm, &config);
    }
}

/// What another node needs to know of a VM's ports here, if it is configured
/// like this there.
///
/// # Errors
/// A port is not there, or the switch has no way to others.
pub(crate) fn offers(
    home: &Home,
    vm: &VmDir,
    config: &VmConfig,
    there: &VmConfig,
) -> Result<Vec<parcel::Port>> {
    let mut offers = Vec::new();
    for (index, network, _) in on_networks(config) {
        let other = there.net.get(index).and_then(|net| net.network.as_deref());
        if other != Some(network) {
            continue;
        }
        let path = format!("{}/departure", path(&port_name(&vm.name, index)));
        let offer: Offer = ask(home, Method::GET, &path, None::<&()>)?;
        let key = offer.key.ok_or_else(|| {
            failure(
                "this node's switch has no way to others",
                "start it with --listen ADDRESS:PORT and --interface NAME",
            )
        })?;
        offers.push(parcel::Port {
            index,
            network: network.to_owned(),
            spec: offer.network,
            key,
            epoch: offer.epoch,
            bridge: offer.bridge,
            groups: offer.groups,
            rules: offer.rules,
        });
    }
    Ok(offers)
}

/// Whether a VM with these ports can come to this node; the key of its switch.
///
/// # Errors
/// It cannot: why, and what to do.
pub(crate) fn can_come(home: &Home, ports: &[parcel::Port]) -> Result<Option<String>> {
    if ports.is_empty() {
        return Ok(None);
    }
    let info: Info = ask(home, Method::GET, "/switch", None::<&()>)?;
    let peers: Vec<Peer> = ask(home, Method::GET, "/peers", None::<&()>)?;
    let key = info.key.ok_or_else(|| {
        failure(
            "the switch there has no way to others",
            "start it there with --listen ADDRESS:PORT and --interface NAME",
        )
    })?;
    let networks = networks(home)?;
    for port in ports {
        let is_joined = |peer: &Peer| peer.spec.key == port.key && peer.status.connected;
        if !peers.iter().any(is_joined) {
            return Err(failure(
                "there is no tunnel between the two nodes' switches",
                "see blanket net peer ls on both; blanket net peer add joins them, where blanketd does not",
            ));
        }
        local_name(&networks, port)?;
    }
    Ok(Some(key))
}

/// What a network is called here; none: it is not here yet.
fn local_name<'a>(networks: &'a [Network], port: &parcel::Port) -> Result<Option<&'a str>> {
    let is_it = |it: &&Network| it.spec.vni == port.spec.vni;
    if let Some(network) = networks.iter().find(is_it) {
        return Ok(Some(&network.name));
    }
    match networks.iter().find(|it| it.name == port.network) {
        Some(other) => Err(failure(
            format!(
                "the network '{}' there is VNI {}, and here VNI {}",
                port.network, other.spec.vni, port.spec.vni
            ),
            format!(
                "give VNI {} another name there: blanket net create NAME --vni {0}",
                port.spec.vni
            ),
        )),
        None => Ok(None),
    }
}

/// Makes the networks and the security groups of a VM that comes, as far as they
/// are not here, and has its configuration say what the networks are called
/// here.
///
/// # Errors
/// There is another one of that name.
pub(crate) fn make_networks(
    home: &Home,
    ports: &[parcel::Port],
    config: &mut VmConfig,
) -> Result<()> {
    if ports.is_empty() {
        return Ok(());
    }
    let known = groups(home)?;
    let rules: BTreeMap<_, _> = ports.iter().flat_map(|port| &port.rules).collect();
    for (name, rules) in rules {
        if !known.contains(name) {
            let () = ask(home, Method::PUT, &format!("/groups/{name}"), Some(rules))?;
        }
    }
    let networks = networks(home)?;
    let mut made: BTreeMap<&str, &NetworkSpec> = BTreeMap::new();
    for port in ports {
        let name = match local_name(&networks, port)? {
            Some(name) => name.to_owned(),
            None => {
                if made.insert(&port.network, &port.spec).is_none() {
                    let path = format!("/networks/{}", port.network);
                    let _: Network = ask(home, Method::PUT, &path, Some(&port.spec))?;
                }
                port.network.clone()
            }
        };
        if let Some(net) = config.net.get_mut(port.index) {
            net.network = Some(name);
        }
    }
    Ok(())
}

/// A VM's ports whose guest is to leave for another node. When this is dropped
/// before the guest has left, it stays.
pub(crate) struct Leaving<'a> {
    home: &'a Home,
    ports: Vec<String>,
}

impl<'a> Leaving<'a> {
    /// Frames follow the guest from the moment in which it stops here.
    ///
    /// # Errors
    /// There is no tunnel to the other node's switch, which has this key.
    pub(crate) fn begin(
        home: &'a Home,
        vm: &VmDir,
        ports: &[parcel::Port],
        key: &str,
    ) -> Result<Self> {
        let mut leaving = Self {
            home,
            ports: Vec::new(),
        };
        for port in ports {
            let name = port_name(&vm.name, port.index);
            let to = Whereabouts::Peer(key.to_owned());
            let path = format!("{}/departure", path(&name));
            let () = ask(home, Method::PUT, &path, Some(&to))?;
            leaving.ports.push(name);
        }
        Ok(leaving)
    }

    /// The guest has left, or that is not known.
    pub(crate) fn has_left(mut self) {
        self.ports.clear();
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        for name in &self.ports {
            let path = format!("{}/departure", path(name));
            let stays: Result<()> = ask(self.home, Method::DELETE, &path, None::<&()>);
            if let Err(error) = stays {
                eprintln!("[port {name}: {error:#}]");
            }
        }
    }
}

/// The guest has come: its ports are like any other's.
pub(crate) fn arrived(home: &Home, vm: &VmDir, ports: &[parcel::Port]) {
    let names = ports.iter().map(|port| port_name(&vm.name, port.index));
    arrived_at(home, vm, names);
}

/// The same for a guest that has come from another monitor on this node.
pub(crate) fn arrived_here(home: &Home, vm: &VmDir, config: &VmConfig) {
    let names = on_networks(config).map(|(index, ..)| port_name(&vm.name, index));
    arrived_at(home, vm, names);
}

fn arrived_at(home: &Home, vm: &VmDir, names: impl Iterator<Item = String>) {
    for name in names {
        let path = format!("{}/arrival", path(&name));
        let settled: Result<PortStatus> = ask(home, Method::DELETE, &path, None::<&()>);
        if let Err(error) = settled {
            tracing::warn!("{}: port {name}: {error:#}", vm.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(dir: &Path) -> VmDir {
        let home = Home::locate(Some(dir)).unwrap();
        home.vm(&"web".parse().unwrap())
    }

    fn config(text: &str) -> VmConfig {
        VmConfig {
            net: vec![NetConfig::default(), toml::from_str(text).unwrap()],
            ..VmConfig::default()
        }
    }

    #[test]
    fn an_interface_on_a_network_gets_a_port_with_its_address() {
        let dir = tempfile::tempdir().unwrap();
        let vm = vm(dir.path());
        let mut config = config(
            "network = \"blue\"\nip = \"10.0.0.5+fd00::5\"\nvlan = 7\nguard = true\ngroup = \"web+db\"",
        );
        settle(&mut config, &vm).unwrap();
        assert_eq!(config.net[0], NetConfig::default());
        let net = config.net[1].clone();
        assert_eq!(net.vhost_user, Some(vm.net_socket(1)));
        assert!(net.mac.is_some_and(MacAddress::is_unicast));
        let mut again = config.clone();
        settle(&mut again, &vm).unwrap();
        assert_eq!(again, config);
        let made = spec(&vm, 1, &net, Some("7:8")).unwrap();
        assert_eq!(made.owner, Some((7, 8)));
        assert_eq!(made.bridge.ips.len(), 2);
        assert_eq!(made.groups, ["web", "db"]);
        assert_eq!(made.bridge.vlan, Mode::Access { vlan: 7 });
        assert_eq!(
            made.bridge.macs[0].to_string(),
            net.mac.unwrap().to_string()
        );
        assert_eq!(port_name(&vm.name, 1), "web.net1");
        let wrong = NetConfig {
            ip: Some("10.0.0".to_owned()),
            ..net
        };
        assert!(spec(&vm, 1, &wrong, None).is_err());
        assert!(owner("root").is_err());
    }

    #[test]
    fn a_network_that_comes_is_found_by_its_identifier_not_its_name() {
        let network = |name: &str, vni: &str| Network {
            name: name.to_owned(),
            spec: NetworkSpec {
                vni: vni.parse().unwrap(),
                mtu: 1500,
            },
            ports: 0,
            macs: 0,
        };
        let port = parcel::Port {
            index: 0,
            network: "blue".to_owned(),
            spec: network("blue", "5").spec,
            key: String::new(),
            epoch: 0,
            bridge: PortConfig::default(),
            groups: Vec::new(),
            rules: BTreeMap::new(),
        };
        let here = [network("azul", "5"), network("blue", "6")];
        assert_eq!(local_name(&here, &port).unwrap(), Some("azul"));
        assert_eq!(local_name(&[], &port).unwrap(), None);
        let error = local_name(&here[1..], &port).unwrap_err();
        assert!(crate::failure::describe(&error).contains("--vni 5"));
    }

    #[test]
    fn a_network_that_is_missing_is_told_with_what_to_do() {
        let error = network(&[], "blue").unwrap_err();
        let text = crate::failure::describe(&error);
        assert!(text.contains("blanket net create blue"), "{text}");
    }
}
