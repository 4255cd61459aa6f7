//! `blanket net`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use blanket_overlay::api::types::{
    Attachment, Confinement, FlowFilter, Info, MacLine, Network, NetworkSpec, Peer, PeerSpec,
    PortSpec, PortStatus, Seccomp, Traffic,
};
use blanket_overlay::bridge::{Mode, PortConfig};
use blanket_overlay::frame::{Mac, Vni};
use hyper::Method;
use sha2::{Digest, Sha256};

mod capture;
mod foreign;
mod mirror;
mod options;
mod ping;
mod top;
mod vip;

use super::{print, print_json};
use crate::home::Home;
use crate::switch::{ask, fetch};
use crate::table;

mod controller;
mod group;

/// Networks that span nodes, and the ports of this node's switch.
#[derive(clap::Subcommand)]
pub(crate) enum Args {
    /// Make a network on this node. Networks of the same name (or VNI) on other nodes are the same
    /// network.
    Create(CreateArgs),
    /// Remove a network without ports from this node.
    Rm(NameArgs),
    /// List networks.
    Ls(ListArgs),
    /// Attach a port to a network.
    Attach(AttachArgs),
    /// Change a port's options.
    Set(options::SetArgs),
    /// Take a port away.
    Detach(NameArgs),
    /// List ports, and what went through them.
    Port(ListArgs),
    /// Other nodes' switches.
    #[command(subcommand)]
    Peer(PeerArgs),
    /// List the addresses that are known in a network, as `bridge fdb` does.
    Mac(MacArgs),
    /// The flow table of a network: what happens to its frames, as `ovs-ofctl` users know it.
    #[command(subcommand)]
    Flow(FlowArgs),
    /// The OpenFlow controllers of a network, as `ovs-vsctl set-controller` users know them.
    #[command(subcommand)]
    Controller(controller::ControllerArgs),
    /// Security groups: which connections the ports in them may have.
    #[command(subcommand)]
    Group(group::GroupArgs),
    /// Tell which flows a packet would hit, like in_port=a,tcp,nw_dst=10.0.0.1,tp_dst=80.
    Trace(TraceArgs),
    /// Show the frames of a port or network, as `tcpdump` does, or write them to a file for it.
    Capture(capture::CaptureArgs),
    /// Copies of a port's or network's frames at another port.
    #[command(subcommand)]
    Mirror(mirror::MirrorArgs),
    /// One address for many servers, which answer directly.
    #[command(subcommand)]
    Vip(vip::VipArgs),
    /// Live rates of ports and peers, the busiest first.
    Top(top::TopArgs),
    /// Ping another node's switch through its tunnel, or an address in a network, as arping does.
    Ping(ping::PingArgs),
    /// All figures of the switch, as Prometheus reads them.
    Metrics,
    /// Describe this node's switch.
    Info(ListArgs),
}

#[derive(clap::Subcommand)]
pub(crate) enum PeerArgs {
    /// Add the switch of another node, which has to add this one; or, without encryption, somebody
    /// else's VXLAN or Geneve tunnel.
    Add(PeerAddArgs),
    /// Remove the switch of another node.
    Rm(NameArgs),
    /// List the switches of other nodes, and how they are reached.
    Ls(ListArgs),
}

#[derive(clap::Args)]
pub(crate) struct PeerAddArgs {
    /// Its name on this node.
    name: String,
    /// Its public key, as `blanket net info` shows it there.
    #[arg(long, required_unless_present_any = ["vxlan", "geneve"])]
    key: Option<String>,
    /// Where it listens; none if it is behind a translating router: then it calls.
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        value_delimiter = ',',
        requires = "key"
    )]
    endpoint: Vec<SocketAddr>,
    #[command(flatten)]
    foreign: foreign::ForeignArgs,
}

#[derive(clap::Subcommand)]
pub(crate) enum FlowArgs {
    /// Add flows, like priority=100,ip,nw_dst=10.0.0.0/8,actions=output:a
    Add {
        /// The network.
        network: String,
        /// Flows; ports by their names or numbers.
        #[arg(required = true)]
        flows: Vec<String>,
    },
    /// Remove flows.
    Del {
        /// The network.
        network: String,
        /// Those that match this, like ip,nw_dst=10.0.0.0/8; all without it.
        #[arg(default_value = "")]
        filter: String,
        /// Only the one with exactly this match and priority.
        #[arg(long)]
        strict: bool,
    },
    /// List flows, with how many packets and bytes each has had.
    Ls {
        /// The network.
        network: String,
        #[command(flatten)]
        list: ListArgs,
    },
}

#[derive(clap::Args)]
pub(crate) struct TraceArgs {
    /// The network.
    network: String,
    /// The packet.
    packet: String,
}

#[derive(clap::Args)]
pub(crate) struct MacArgs {
    /// The network.
    network: String,
    #[command(flatten)]
    list: ListArgs,
}

#[derive(clap::Args)]
pub(crate) struct ListArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct NameArgs {
    /// Its name on this node.
    name: String,
}

#[derive(clap::Args)]
pub(crate) struct CreateArgs {
    /// Its name on this node.
    name: String,
    /// Its identifier between nodes, 1 to 16777215; made of the name if none is given.
    #[arg(long)]
    vni: Option<Vni>,
    /// Bytes of an IP packet at most, in all of it.
    #[arg(long, default_value_t = NetworkSpec::usual_mtu(), value_parser = clap::value_parser!(u16).range(576..))]
    mtu: u16,
}

#[derive(clap::Args)]
pub(crate) struct AttachArgs {
    /// The network.
    network: String,
    /// The port's name.
    port: String,
    #[command(flatten)]
    to: To,
    /// The VLAN of its frames without a tag.
    #[arg(long, value_name = "VID", value_parser = clap::value_parser!(u16).range(1..4095))]
    vlan: Option<u16>,
    /// VLANs that may come and go with their tags, like 10,20.
    #[arg(long, value_name = "VIDS", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..4095))]
    trunk: Vec<u16>,
    /// These addresses are attached to it: nobody else can have them.
    #[arg(long, value_name = "MACS", value_delimiter = ',')]
    mac: Vec<Mac>,
    /// IP addresses of the first attached address: the switch answers who asks for them.
    #[arg(
        long,
        value_name = "ADDRESSES",
        value_delimiter = ',',
        requires = "mac"
    )]
    ip: Vec<IpAddr>,
    /// It may send from its attached addresses only.
    #[arg(long, requires = "mac")]
    guard: bool,
    /// It only talks to ports that are not isolated.
    #[arg(long)]
    isolated: bool,
    /// The security groups that it is in; without any, it is not filtered.
    #[arg(long, value_name = "GROUPS", value_delimiter = ',')]
    group: Vec<String>,
    #[command(flatten)]
    options: options::PortOptions,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct To {
    /// A TAP interface, made if it is not there.
    #[arg(long, value_name = "NAME")]
    tap: Option<String>,
    /// A vhost-user front end (of a VM, or of another program), which connects to this socket.
    #[arg(long, value_name = "SOCKET")]
    vhost_user: Option<PathBuf>,
}

impl AttachArgs {
    fn spec(&self) -> Result<PortSpec> {
        let tap = self.to.tap.clone().map(Attachment::Tap);
        let vhost_user = self
            .to
            .vhost_user
            .as_ref()
            .map(std::path::absolute)
            .transpose()?;
        let attachment = tap.or(vhost_user.map(Attachment::VhostUser));
        let mut bridge = PortConfig {
            vlan: options::vlan(self.vlan, &self.trunk),
            macs: self.mac.clone(),
            ips: self.ip.clone(),
            guard: self.guard,
            isolated: self.isolated,
            ..PortConfig::default()
        };
        self.options.apply(&mut bridge)?;
        Ok(PortSpec {
            network: self.network.clone(),
            attachment: attachment.context("clap sees to it that there is one")?,
            bridge,
            groups: self.group.clone(),
            owner: None,
        })
    }
}

/// The identifier of a network that is only known by name: the same everywhere.
fn vni_of(name: &str) -> Vni {
    let digest = Sha256::digest(name);
    let number = u32::from_be_bytes([0, digest[0], digest[1], digest[2]]);
    Vni::new(number.max(1)).unwrap_or_default()
}

pub(crate) fn net(home: &Home, args: &Args) -> Result<ExitCode> {
    match args {
        Args::Create(args) => {
            let spec = NetworkSpec {
                vni: args.vni.unwrap_or_else(|| vni_of(&args.name)),
                mtu: args.mtu,
            };
            let path = format!("/networks/{}", args.name);
            let made: Network = ask(home, Method::PUT, &path, Some(&spec))?;
            print(&format!("{} is VNI {}\n", made.name, made.spec.vni))?;
        }
        Args::Rm(args) => {
            let path = format!("/networks/{}", args.name);
            let _: Network = ask(home, Method::DELETE, &path, None::<&()>)?;
        }
        Args::Ls(args) => {
            let networks: Vec<Network> = ask(home, Method::GET, "/networks", None::<&()>)?;
            show(args, &networks, |networks| network_rows(networks))?;
        }
        Args::Attach(args) => {
            let spec = args.spec()?;
            let path = format!("/ports/{}", args.port);
            let made: PortStatus = ask(home, Method::PUT, &path, Some(&spec))?;
            print(&format!("{} is port {}\n", made.name, made.id))?;
        }
        Args::Set(args) => options::set_port(home, args)?,
        Args::Detach(args) => {
            let path = format!("/ports/{}", args.name);
            let _: PortStatus = ask(home, Method::DELETE, &path, None::<&()>)?;
        }
        Args::Port(args) => {
            let ports: Vec<PortStatus> = ask(home, Method::GET, "/ports", None::<&()>)?;
            show(args, &ports, |ports| port_rows(ports))?;
        }
        Args::Peer(PeerArgs::Add(args)) => {
            let spec = match args.foreign.spec() {
                Some(spec) => foreign::warned(&args.name, spec),
                None => PeerSpec {
                    key: args.key.clone().unwrap_or_default(),
                    endpoints: args.endpoint.clone(),
                    member: false,
                    foreign: None,
                },
            };
            let path = format!("/peers/{}", args.name);
            let _: Peer = ask(home, Method::PUT, &path, Some(&spec))?;
        }
        Args::Peer(PeerArgs::Rm(args)) => {
            let path = format!("/peers/{}", args.name);
            let _: Peer = ask(home, Method::DELETE, &path, None::<&()>)?;
        }
        Args::Peer(PeerArgs::Ls(args)) => {
            let peers: Vec<Peer> = ask(home, Method::GET, "/peers", None::<&()>)?;
            show(args, &peers, |peers| peer_rows(peers))?;
        }
        Args::Mac(args) => {
            let path = format!("/networks/{}/macs", args.network);
            let macs: Vec<MacLine> = ask(home, Method::GET, &path, None::<&()>)?;
            show(&args.list, &macs, |macs| mac_rows(macs))?;
        }
        Args::Flow(args) => flow(home, args)?,
        Args::Group(args) => group::group(home, args)?,
        Args::Controller(args) => controller::controller(home, args)?,
        Args::Trace(args) => {
            let path = format!("/networks/{}/trace", args.network);
            let text: String = ask(home, Method::POST, &path, Some(&args.packet))?;
            print(&text)?;
        }
        Args::Capture(args) => return capture::capture(home, args),
        Args::Mirror(args) => mirror::mirror(home, args)?,
        Args::Vip(args) => vip::vip(home, args)?,
        Args::Top(args) => top::top(home, args)?,
        Args::Ping(args) => return ping::ping(home, args),
        Args::Metrics => print(&fetch(home, "/metrics")?)?,
        Args::Info(args) => {
            let info: Info = ask(home, Method::GET, "/switch", None::<&()>)?;
            show(args, &info, info_rows)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn flow(home: &Home, args: &FlowArgs) -> Result<()> {
    let path = |network: &str| format!("/networks/{network}/flows");
    match args {
        FlowArgs::Add { network, flows } => {
            let () = ask(home, Method::POST, &path(network), Some(flows))?;
        }
        FlowArgs::Del {
            network,
            filter,
            strict,
        } => {
            let filter = FlowFilter {
                filter: filter.clone(),
                strict: *strict,
            };
            let gone: usize = ask(home, Method::DELETE, &path(network), Some(&filter))?;
            print(&format!("{gone} removed\n"))?;
        }
        FlowArgs::Ls { network, list } => {
            let flows: Vec<String> = ask(home, Method::GET, &path(network), None::<&()>)?;
            show(list, &flows, |flows| {
                flows.iter().map(|flow| vec![flow.clone()]).collect()
            })?;
        }
    }
    Ok(())
}

/// Prints a value as JSON, or as a table.
fn show<T: serde::Serialize + ?Sized>(
    args: &ListArgs,
    value: &T,
    rows: impl FnOnce(&T) -> Vec<Vec<String>>,
) -> Result<()> {
    if args.json {
        print_json(&value)
    } else {
        print(&table::render(&rows(value)))
    }
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

fn network_rows(networks: &[Network]) -> Vec<Vec<String>> {
    let mut rows = vec![row(["NAME", "VNI", "MTU", "PORTS", "MACS"])];
    rows.extend(networks.iter().map(|network| {
        vec![
            network.name.clone(),
            network.spec.vni.to_string(),
            network.spec.mtu.to_string(),
            network.ports.to_string(),
            network.macs.to_string(),
        ]
    }));
    rows
}

fn traffic(traffic: Traffic) -> String {
    format!("{} / {}", traffic.frames, table::bytes(traffic.bytes))
}

fn port_rows(ports: &[PortStatus]) -> Vec<Vec<String>> {
    let mut rows = vec![row([
        "PORT", "NO", "NETWORK", "TO", "VLAN", "IN", "OUT", "DROPPED", "OPTIONS", "STATE",
    ])];
    rows.extend(ports.iter().map(|port| {
        let spec = &port.spec;
        let to = match &spec.attachment {
            Attachment::Tap(tap) => format!("tap {tap}"),
            Attachment::VhostUser(path) => format!("vhost-user {}", path.display()),
        };
        vec![
            port.name.clone(),
            port.id.to_string(),
            spec.network.clone(),
            to,
            vlans(&spec.bridge.vlan),
            traffic(port.rx),
            traffic(port.tx),
            port.drops.total().to_string(),
            options::words(&spec.bridge),
            match (&port.down, &port.moving) {
                (Some(reason), _) => format!("down: {reason}"),
                (None, Some(moving)) => moving.clone(),
                (None, None) => "up".to_owned(),
            },
        ]
    }));
    rows
}

/// A port's VLANs, in a word.
fn vlans(mode: &Mode) -> String {
    let list = |vlans: &[u16]| {
        let texts: Vec<_> = vlans.iter().map(u16::to_string).collect();
        if texts.is_empty() {
            "all".to_owned()
        } else {
            texts.join(",")
        }
    };
    match mode {
        Mode::Access { vlan: 0 } => "-".to_owned(),
        Mode::Access { vlan } => vlan.to_string(),
        Mode::Trunk { vlans, .. } => format!("trunk {}", list(vlans)),
        Mode::Customer { service, .. } => format!("qinq {service}"),
        Mode::Provider { .. } => "qinq trunk".to_owned(),
    }
}

fn peer_rows(peers: &[Peer]) -> Vec<Vec<String>> {
    let mut rows = vec![row([
        "PEER", "STATE", "ADDRESS", "RTT", "LOSS", "IN", "OUT", "CIPHER",
    ])];
    rows.extend(peers.iter().map(|peer| {
        let status = &peer.status;
        let path = status
            .paths
            .iter()
            .find(|path| path.up)
            .or(status.paths.first());
        let rtt = path.and_then(|path| path.rtt_us);
        let stats = status.stats;
        let none = || "-".to_owned();
        vec![
            peer.name.clone(),
            foreign::state(peer),
            path.map_or_else(none, |path| path.remote.to_string()),
            rtt.map_or_else(none, |rtt| format!("{:.2} ms", rtt as f64 / 1000.0)),
            path.map_or_else(none, |path| format!("{:.1} %", path.loss * 100.0)),
            traffic(Traffic {
                frames: stats.frames_in,
                bytes: stats.bytes_in,
            }),
            traffic(Traffic {
                frames: stats.frames_out,
                bytes: stats.bytes_out,
            }),
            foreign::cipher(peer).unwrap_or_else(none),
        ]
    }));
    rows
}

fn mac_rows(macs: &[MacLine]) -> Vec<Vec<String>> {
    let mut rows = vec![row(["MAC", "VLAN", "AT", "WHY", "AGE"])];
    rows.extend(macs.iter().map(|line| {
        let at = match (&line.port, &line.peer) {
            (Some(port), _) => format!("port {port}"),
            (None, Some(peer)) => format!("peer {peer}"),
            (None, None) => "-".to_owned(),
        };
        vec![
            line.mac.to_string(),
            if line.vlan == 0 {
                "-".to_owned()
            } else {
                (line.vlan & 0xfff).to_string()
            },
            at,
            format!("{:?}", line.origin).to_lowercase(),
            line.age
                .map_or("-".to_owned(), |age| table::duration(age * 1000)),
        ]
    }));
    rows
}

fn confinement_rows(is: &Confinement) -> [Vec<String>; 3] {
    let seccomp = match is.seccomp {
        Seccomp::On => "on",
        Seccomp::Log => "log",
        Seccomp::Off => "off",
    };
    let capabilities = match is.capabilities.join(" ") {
        none if none.is_empty() => "-".to_owned(),
        some => some,
    };
    let landlock = is.landlock.map_or_else(
        || "not in this kernel".to_owned(),
        |abi| format!("ABI {abi}"),
    );
    [
        row(["seccomp", seccomp]),
        row(["capabilities", &capabilities]),
        row(["landlock", &landlock]),
    ]
}

fn info_rows(info: &Info) -> Vec<Vec<String>> {
    let mut rows = vec![
        row(["version", &info.version]),
        row(["process", &info.pid.to_string()]),
        row(["networks", &info.networks.to_string()]),
        row(["ports", &info.ports.to_string()]),
    ];
    for uplink in &info.uplinks {
        rows.push(row(["uplink", uplink]));
    }
    if let Some(key) = &info.key {
        rows.push(row(["key", key]));
    }
    rows.extend(confinement_rows(&info.confinement));
    for (reason, count) in info.drops.iter() {
        rows.push(row([&format!("dropped, {reason}"), &count.to_string()]));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_networks_identifier_is_made_of_its_name() {
        assert_eq!(vni_of("blue"), vni_of("blue"));
        assert_ne!(vni_of("blue"), vni_of("red"));
    }
}
