//! Options of ports, for `blanket net attach` and `blanket net set`.

use anyhow::{Context, Result, bail};
use blanket_overlay::api::types::PortStatus;
use blanket_overlay::bridge::{Mode, PortConfig, Rate};
use hyper::Method;

use crate::home::Home;
use crate::switch::ask;

/// Bytes of the largest frame: less at once, and it never gets through.
const LARGEST: u64 = 65_535 + 22;

/// The longest MTU: none of a port's own.
const NO_MTU: usize = 65_535;

/// A number, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limit(Option<u64>);

fn limit(text: &str, parse: impl Fn(&str) -> Option<u64>, like: &str) -> Result<Limit, String> {
    if text == "none" {
        return Ok(Limit(None));
    }
    let number = parse(text).filter(|number| *number > 0);
    let number = number.ok_or_else(|| format!("{like}, or none"));
    Ok(Limit(Some(number?)))
}

/// Bytes per second, as `tc` writes rates: bits with `bit` at the end, bytes with `bps`.
fn rate(text: &str) -> Result<Limit, String> {
    let parse = |text: &str| {
        let text = text.to_ascii_lowercase();
        let (number, bits) = match (text.strip_suffix("bit"), text.strip_suffix("bps")) {
            (Some(number), _) => (number, true),
            (None, Some(number)) => (number, false),
            (None, None) => (text.as_str(), true),
        };
        let (number, unit) = match number.chars().last()? {
            'k' => (&number[..number.len() - 1], 1e3),
            'm' => (&number[..number.len() - 1], 1e6),
            'g' => (&number[..number.len() - 1], 1e9),
            _ => (number, 1.0),
        };
        let number: f64 = number
            .parse()
            .ok()
            .filter(|it: &f64| it.is_finite() && *it > 0.0)?;
        let bytes = number * unit / if bits { 8.0 } else { 1.0 };
        Some(bytes as u64)
    };
    limit(
        text,
        parse,
        "a rate like 100mbit, 2.5gbit or 12mbps (bytes)",
    )
}

fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || "bytes, like 200000, 256k or 4m".to_owned();
    let (number, shift) = match text.to_ascii_lowercase().pop().ok_or_else(wrong)? {
        'k' => (&text[..text.len() - 1], 10),
        'm' => (&text[..text.len() - 1], 20),
        _ => (text, 0),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

fn frames(text: &str) -> Result<Limit, String> {
    limit(text, |text| text.parse().ok(), "frames per second")
}

fn mtu(text: &str) -> Result<Limit, String> {
    let parse = |text: &str| {
        let number = text.parse().ok();
        number.filter(|number| (576..=65_535).contains(number))
    };
    limit(text, parse, "576 to 65535")
}

#[derive(clap::Args)]
pub(crate) struct PortOptions {
    /// What it may send: 100mbit, 2gbit, or 12mbps (bytes), as for tc; none: no limit.
    #[arg(long, value_parser = rate)]
    rate: Option<Limit>,
    /// How many bytes it may send at once beyond its rate; a tenth of a second's without this.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    burst: Option<u64>,
    /// Frames to all per second that it may send, or none: no limit.
    #[arg(long, value_name = "FRAMES", value_parser = frames)]
    storm_broadcast: Option<Limit>,
    /// Frames to groups per second that it may send, or none.
    #[arg(long, value_name = "FRAMES", value_parser = frames)]
    storm_multicast: Option<Limit>,
    /// Frames per second to addresses that nobody knows, or none.
    #[arg(long, value_name = "FRAMES", value_parser = frames)]
    storm_unknown: Option<Limit>,
    /// Its share of the switch where there is not enough for all, compared with others'.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    weight: Option<u32>,
    /// Bytes of an IP packet at most, where that is less than in its network; none: as there.
    #[arg(long, value_parser = mtu)]
    mtu: Option<Limit>,
    /// TCP connections through it learn from their first packets what fits (MSS).
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    clamp_mss: Option<bool>,
    /// Addresses that are learned at it, at most.
    #[arg(long, value_name = "COUNT")]
    max_macs: Option<usize>,
    /// Frames of spanning tree, LACP and LLDP pass.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    link_local: Option<bool>,
    /// A multicast listener is alone on it: one that leaves is gone at once.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    fast_leave: Option<bool>,
    /// A customer's port (802.1ad): all its frames, tagged or not, are in this service VLAN.
    #[arg(long, value_name = "VID", conflicts_with_all = ["qinq_trunk", "vlan", "trunk"], value_parser = clap::value_parser!(u16).range(1..4095))]
    qinq: Option<u16>,
    /// A provider's port: these service VLANs by their 802.1ad tags, or all.
    #[arg(long, value_name = "VIDS|all", value_delimiter = ',', conflicts_with_all = ["vlan", "trunk"])]
    qinq_trunk: Vec<String>,
}

impl PortOptions {
    /// Sets what is given.
    pub(super) fn apply(&self, config: &mut PortConfig) -> Result<()> {
        if let Some(Limit(rate)) = self.rate {
            config.rate = rate.map(|per_second| Rate {
                per_second,
                burst: (per_second / 10).max(2 * LARGEST),
            });
        }
        if let Some(burst) = self.burst {
            let rate = config.rate.as_mut();
            rate.context("there is no rate (--rate) that the burst could be of")?
                .burst = burst;
            if burst < LARGEST {
                bail!("--burst: at least {LARGEST} bytes, or a large frame never gets through");
            }
        }
        let storm = &mut config.storm;
        for (given, limit) in [
            (self.storm_broadcast, &mut storm.broadcast),
            (self.storm_multicast, &mut storm.multicast),
            (self.storm_unknown, &mut storm.unknown),
        ] {
            if let Some(Limit(frames)) = given {
                *limit = frames.map(|per_second| Rate {
                    per_second,
                    burst: per_second.max(10),
                });
            }
        }
        if let Some(Limit(mtu)) = self.mtu {
            config.mtu = mtu.map_or(Ok(NO_MTU), usize::try_from)?;
        }
        set(&mut config.weight, self.weight);
        set(&mut config.clamp_mss, self.clamp_mss);
        set(&mut config.limit, self.max_macs);
        set(&mut config.link_local, self.link_local);
        set(&mut config.fast_leave, self.fast_leave);
        if let Some(service) = self.qinq {
            config.vlan = Mode::Customer { service };
        }
        if !self.qinq_trunk.is_empty() {
            let all = self.qinq_trunk.iter().any(|vid| vid == "all");
            let vids = self.qinq_trunk.iter().filter(|_| !all);
            let services: Result<Vec<u16>, _> = vids.map(|vid| vid.parse()).collect();
            let services = services.context("--qinq-trunk: VLANs like 100,200, or all")?;
            config.vlan = Mode::Provider { services };
        }
        Ok(())
    }
}

fn set<T: Copy>(to: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *to = given;
    }
}

#[derive(clap::Args)]
pub(crate) struct SetArgs {
    /// The port.
    port: String,
    /// The VLAN of its frames without a tag; 0: none.
    #[arg(long, value_name = "VID", value_parser = clap::value_parser!(u16).range(0..4095))]
    vlan: Option<u16>,
    /// VLANs that may come and go with their tags, like 10,20.
    #[arg(long, value_name = "VIDS", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..4095))]
    trunk: Vec<u16>,
    /// It may send from its attached addresses only.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    guard: Option<bool>,
    /// It only talks to ports that are not isolated.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    isolated: Option<bool>,
    #[command(flatten)]
    options: PortOptions,
}

/// The VLANs of a port by `--vlan` and `--trunk`.
pub(super) fn vlan(vlan: Option<u16>, trunk: &[u16]) -> Mode {
    match (vlan, trunk) {
        (vlan, []) => Mode::Access {
            vlan: vlan.unwrap_or(0),
        },
        (native, vlans) => Mode::Trunk {
            vlans: vlans.to_vec(),
            native,
            double: false,
        },
    }
}

pub(super) fn set_port(home: &Home, args: &SetArgs) -> Result<()> {
    let ports: Vec<PortStatus> = ask(home, Method::GET, "/ports", None::<&()>)?;
    let port = ports.into_iter().find(|port| port.name == args.port);
    let port = port.with_context(|| {
        let name = &args.port;
        format!("there is no port `{name}`; blanket net port shows those that there are")
    })?;
    let mut config = port.spec.bridge;
    if args.vlan.is_some() || !args.trunk.is_empty() {
        config.vlan = vlan(args.vlan, &args.trunk);
    }
    set(&mut config.guard, args.guard);
    set(&mut config.isolated, args.isolated);
    args.options.apply(&mut config)?;
    let path = format!("/ports/{}/options", args.port);
    let _: PortStatus = ask(home, Method::PUT, &path, Some(&config))?;
    Ok(())
}

/// A port's options that are not as usual, in a word each.
pub(super) fn words(config: &PortConfig) -> String {
    let usual = PortConfig::default();
    let mut words = Vec::new();
    if let Some(rate) = config.rate {
        words.push(format!("rate {} kbit/s", rate.per_second / 125));
    }
    let storm = config.storm;
    for (name, limit) in [
        ("broadcast", storm.broadcast),
        ("multicast", storm.multicast),
        ("unknown", storm.unknown),
    ] {
        if let Some(limit) = limit {
            words.push(format!("{name} {}/s", limit.per_second));
        }
    }
    if config.weight != usual.weight {
        words.push(format!("weight {}", config.weight));
    }
    if config.mtu < NO_MTU {
        words.push(format!("mtu {}", config.mtu));
    }
    if config.limit != usual.limit {
        words.push(format!("{} macs", config.limit));
    }
    for (name, is) in [
        ("guard", config.guard),
        ("isolated", config.isolated),
        ("clamp-mss", config.clamp_mss),
        ("link-local", config.link_local),
        ("fast-leave", config.fast_leave),
    ] {
        if is {
            words.push(name.to_owned());
        }
    }
    if words.is_empty() {
        "-".to_owned()
    } else {
        words.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_tc_reads_them() {
        for (text, bytes) in [
            ("8000", 1000),
            ("100mbit", 12_500_000),
            ("2.5gbit", 312_500_000),
            ("12mbps", 12_000_000),
            ("64kbit", 8000),
        ] {
            assert_eq!(rate(text), Ok(Limit(Some(bytes))), "{text}");
        }
        assert_eq!(rate("none"), Ok(Limit(None)));
        for wrong in ["", "bit", "-1mbit", "0", "fast", "infbit", "nan", "é"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
        assert_eq!(bytes("256k"), Ok(262_144));
        for wrong in [
            "",
            "k",
            "é",
            "99999999999999999999",
            "18446744073709551615m",
        ] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
