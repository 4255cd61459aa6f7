//! `blanket net group`.

use std::net::IpAddr;

use anyhow::{Result, bail};
use blanket_overlay::api::types::{Direction, GroupRemoval, GroupStatus, PortStatus, Remote, Rule};
use hyper::Method;

use super::{ListArgs, row, show};
use crate::home::Home;
use crate::switch::ask;

#[derive(clap::Subcommand)]
pub(crate) enum GroupArgs {
    /// Make a security group. Its ports may begin connections, and get none, until it has rules.
    Create {
        /// Its name: the same group on all nodes that have one of that name.
        name: String,
        /// Without the rule that lets its ports begin connections.
        #[arg(long)]
        empty: bool,
    },
    /// Remove a security group.
    Rm {
        /// Its name.
        name: String,
        /// Even if ports are in it: then they are closed.
        #[arg(long)]
        force: bool,
    },
    /// List security groups, with their rules and ports.
    Ls(ListArgs),
    /// Put a port into groups, and out of all others; without any, it is not filtered any more.
    Set {
        /// The port.
        port: String,
        /// The groups.
        groups: Vec<String>,
    },
    /// What a group lets through.
    #[command(subcommand)]
    Rule(RuleArgs),
}

#[derive(clap::Subcommand)]
pub(crate) enum RuleArgs {
    /// Add a rule: connections that begin like this pass, with their answers.
    Add(Match),
    /// Remove the rule that was added with the same options.
    Del(Match),
}

#[derive(clap::Args)]
pub(crate) struct Match {
    /// The group.
    group: String,
    /// Connections to the group's ports: so it is if nothing is said.
    #[arg(long, conflicts_with = "egress")]
    ingress: bool,
    /// Connections from the group's ports.
    #[arg(long)]
    egress: bool,
    /// tcp, udp, sctp, icmp, icmpv6, or a number; all if nothing is said.
    #[arg(long, value_parser = protocol)]
    protocol: Option<u8>,
    /// Destination port, or the first and the last, like 80 or 8000:8099.
    #[arg(long, value_name = "PORT[:PORT]", value_parser = ports, requires = "protocol")]
    dst_port: Option<(u16, u16)>,
    /// Only with these addresses, like 10.0.0.0/8.
    #[arg(long, value_name = "PREFIX", value_parser = prefix, conflicts_with = "remote_group")]
    remote_ip: Option<(IpAddr, u8)>,
    /// Only with members of this group.
    #[arg(long, value_name = "GROUP")]
    remote_group: Option<String>,
}

const PROTOCOLS: [(&str, u8); 5] = [
    ("icmp", 1),
    ("tcp", 6),
    ("udp", 17),
    ("icmpv6", 58),
    ("sctp", 132),
];

fn protocol(text: &str) -> Result<u8, String> {
    let named = PROTOCOLS.iter().find(|(name, _)| *name == text);
    let number = named.map(|(_, number)| *number).or(text.parse().ok());
    number.ok_or_else(|| "tcp, udp, sctp, icmp, icmpv6, or a number up to 255".to_owned())
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let (first, last) = text
        .split_once(':')
        .or(text.split_once('-'))
        .unwrap_or((text, text));
    let ports = first.parse().ok().zip(last.parse().ok());
    ports.ok_or_else(|| "a port, or the first and the last, like 8000:8099".to_owned())
}

fn prefix(text: &str) -> Result<(IpAddr, u8), String> {
    let whole = |address: IpAddr| if address.is_ipv4() { 32 } else { 128 };
    let parsed = match text.split_once('/') {
        None => text.parse().ok().map(|address| (address, whole(address))),
        Some((address, bits)) => address.parse().ok().zip(bits.parse().ok()),
    };
    let sound = parsed.filter(|(address, bits)| *bits <= whole(*address));
    sound.ok_or_else(|| "addresses, like 10.0.0.0/8 or fd00::/64".to_owned())
}

impl Match {
    fn rule(&self) -> Rule {
        Rule {
            direction: if self.egress {
                Direction::Out
            } else {
                Direction::In
            },
            protocol: self.protocol,
            ports: self.dst_port,
            remote: match (&self.remote_ip, &self.remote_group) {
                (Some((address, prefix)), _) => Remote::Network {
                    address: *address,
                    prefix: *prefix,
                },
                (None, Some(group)) => Remote::Group(group.clone()),
                (None, None) => Remote::Any,
            },
        }
    }
}

pub(super) fn group(home: &Home, args: &GroupArgs) -> Result<()> {
    let path = |name: &str| format!("/groups/{name}");
    let rules = |name: &str| format!("/groups/{name}/rules");
    match args {
        GroupArgs::Create { name, empty } => {
            let out = Rule {
                direction: Direction::Out,
                protocol: None,
                ports: None,
                remote: Remote::Any,
            };
            let rules = if *empty { vec![] } else { vec![out] };
            ask(home, Method::PUT, &path(name), Some(&rules))
        }
        GroupArgs::Rm { name, force } => {
            let removal = GroupRemoval { force: *force };
            ask(home, Method::DELETE, &path(name), Some(&removal))
        }
        GroupArgs::Ls(list) => {
            let groups: Vec<GroupStatus> = ask(home, Method::GET, "/groups", None::<&()>)?;
            show(list, &groups, |groups| rows(groups))
        }
        GroupArgs::Set { port, groups } => {
            let path = format!("/ports/{port}/groups");
            let _: PortStatus = ask(home, Method::PUT, &path, Some(groups))?;
            Ok(())
        }
        GroupArgs::Rule(RuleArgs::Add(rule)) => {
            if rule.protocol.is_none() && rule.remote_ip.is_none() && rule.remote_group.is_none() {
                // Too much to be let through by leaving words out.
                bail!(
                    "a rule without --protocol, --remote-ip and --remote-group lets everything \
                     through; say --remote-ip 0.0.0.0/0 (or ::/0) if that is wanted"
                );
            }
            ask(home, Method::POST, &rules(&rule.group), Some(&rule.rule()))
        }
        GroupArgs::Rule(RuleArgs::Del(rule)) => ask(
            home,
            Method::DELETE,
            &rules(&rule.group),
            Some(&rule.rule()),
        ),
    }
}

/// A rule, as the options that make it.
fn options(rule: &Rule) -> String {
    let mut text = match rule.direction {
        Direction::In => "--ingress".to_owned(),
        Direction::Out => "--egress".to_owned(),
    };
    if let Some(number) = rule.protocol {
        let named = PROTOCOLS.iter().find(|(_, its)| *its == number);
        let name = named.map_or_else(|| number.to_string(), |(name, _)| (*name).to_owned());
        text += &format!(" --protocol {name}");
    }
    match rule.ports {
        Some((first, last)) if first == last => text += &format!(" --dst-port {first}"),
        Some((first, last)) => text += &format!(" --dst-port {first}:{last}"),
        None => {}
    }
    match &rule.remote {
        Remote::Any => {}
        Remote::Network { address, prefix } => text += &format!(" --remote-ip {address}/{prefix}"),
        Remote::Group(name) => text += &format!(" --remote-group {name}"),
    }
    text
}

fn rows(groups: &[GroupStatus]) -> Vec<Vec<String>> {
    let mut rows = vec![row(["GROUP", "PORTS", "RULES"])];
    for group in groups {
        let rules: Vec<String> = match &group.rules {
            None => vec!["not there: its ports are closed".to_owned()],
            Some(rules) if rules.is_empty() => vec!["-".to_owned()],
            Some(rules) => rules.iter().map(options).collect(),
        };
        for (index, rule) in rules.into_iter().enumerate() {
            let first = |text: String| if index == 0 { text } else { String::new() };
            let ports = if group.ports.is_empty() {
                "-".to_owned()
            } else {
                group.ports.join(",")
            };
            rows.push(vec![first(group.name.clone()), first(ports), rule]);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_written_as_cloud_users_know_them() {
        assert_eq!(protocol("tcp"), Ok(6));
        assert_eq!(protocol("47"), Ok(47));
        assert!(protocol("http").is_err() && protocol("256").is_err());
        assert_eq!(ports("80"), Ok((80, 80)));
        assert_eq!(ports("8000:8099"), Ok((8000, 8099)));
        assert_eq!(ports("8000-8099"), Ok((8000, 8099)));
        assert!(ports("80:").is_err() && ports("70000").is_err());
        let net = |text: &str| prefix(text).map(|(address, bits)| format!("{address}/{bits}"));
        assert_eq!(net("10.0.0.0/8").as_deref(), Ok("10.0.0.0/8"));
        assert_eq!(net("10.0.0.1").as_deref(), Ok("10.0.0.1/32"));
        assert_eq!(net("fd00::/64").as_deref(), Ok("fd00::/64"));
        assert!(net("10.0.0.0/33").is_err() && net("10.0.0").is_err());
        let rule = Rule {
            direction: Direction::In,
            protocol: Some(6),
            ports: Some((80, 81)),
            remote: Remote::Group("web".to_owned()),
        };
        assert_eq!(
            options(&rule),
            "--ingress --protocol tcp --dst-port 80:81 --remote-group web"
        );
    }
}
