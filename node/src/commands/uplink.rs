//! `blanket uplink`.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use blanket_drivers::uplink::{Cache, Interface, Kind, Measured, Record, interfaces};
use serde::Serialize;

use super::{print, print_json};
use crate::failure::{describe, failure};
use crate::home::Home;
use crate::table;
use crate::up::usable;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this interface, instead of all that are up and have an address.
    #[arg(long, value_name = "IF")]
    interface: Option<String>,
    /// Measure anew, also what has been measured before (two seconds each).
    #[arg(long)]
    retest: bool,
    /// Use this kind from now on, whatever was measured; `auto` undoes it.
    #[arg(long = "use", value_name = "KIND", requires = "interface", value_parser = parse_wish)]
    wish: Option<Wish>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What `--use` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wish(Option<Kind>);

fn parse_wish(text: &str) -> Result<Wish, String> {
    let kinds = Kind::OF_INTERFACES;
    if text == "auto" {
        return Ok(Wish(None));
    }
    let kind = kinds.into_iter().find(|kind| kind.name() == text);
    kind.map(|kind| Wish(Some(kind)))
        .ok_or_else(|| format!("one of auto, {}", kinds.map(Kind::name).join(", ")))
}

/// An interface as `--json` shows it.
#[derive(Serialize)]
struct Shown<'a> {
    interface: &'a str,
    driver: &'a str,
    mtu: usize,
    address: IpAddr,
    /// Measured before, not now.
    cached: bool,
    uses: Kind,
    reason: String,
    kinds: &'a [Measured],
}

pub(crate) fn uplink(home: &Home, args: &Args) -> Result<ExitCode> {
    let cache = Cache::new(&home.uplinks());
    let mut code = ExitCode::SUCCESS;
    let mut found = Vec::new();
    for interface in candidates(args.interface.as_deref())? {
        let Some(address) = interface.addresses.first().copied() else {
            return Err(failure(
                format!("interface '{}' has no address", interface.name),
                format!("ip addr add ADDRESS/PREFIX dev {}", interface.name),
            ));
        };
        match one(&cache, args, &interface.name, address) {
            Ok((record, cached)) => found.push((record, address, cached)),
            Err(error) => {
                eprintln!("{}", describe(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    if args.json {
        let all = found.iter();
        let all = all.map(|(record, address, cached)| shown(record, *address, *cached));
        print_json(&all.collect::<Vec<_>>())?;
    } else {
        let all = found.iter();
        let all = all.map(|(record, address, cached)| render(record, *address, *cached));
        print(&all.collect::<Vec<_>>().join("\n"))?;
    }
    Ok(code)
}

/// The interface that is named, or all that can be uplinks.
fn candidates(name: Option<&str>) -> Result<Vec<Interface>> {
    let all = interfaces()?;
    let names: Vec<_> = all.iter().map(|it| it.name.clone()).collect();
    let found: Vec<_> = match name {
        Some(name) => all.into_iter().filter(|it| it.name == name).collect(),
        None => usable(all).collect(),
    };
    if found.is_empty() {
        let what = match name {
            Some(name) => format!("there is no interface '{name}'"),
            None => "no interface is up and has an address".to_owned(),
        };
        let remedy = match (name, names.is_empty()) {
            (_, true) => "there are none at all; see `ip link`".to_owned(),
            (Some(_), _) => format!("use one of: {}", names.join(", ")),
            (None, _) => format!("set one up: {}", names.join(", ")),
        };
        return Err(failure(what, remedy));
    }
    Ok(found)
}

/// What is known of an interface, measured now if need be.
fn one(cache: &Cache, args: &Args, interface: &str, address: IpAddr) -> Result<(Record, bool)> {
    let (mut record, cached) = cache.record(interface, address, args.retest)?;
    if let Some(Wish(wanted)) = args.wish {
        record.wanted = wanted;
        cache.store(&record).context("cannot keep what is wanted")?;
    }
    Ok((record, cached))
}

fn reason(record: &Record) -> String {
    match record.wanted {
        Some(_) => format!(
            "--use says so ({} was chosen: {})",
            record.report.chosen, record.report.reason
        ),
        None => record.report.reason.clone(),
    }
}

fn shown(record: &Record, address: IpAddr, cached: bool) -> Shown<'_> {
    Shown {
        interface: &record.key.interface,
        driver: &record.key.driver,
        mtu: record.key.mtu,
        address,
        cached,
        uses: record.kind(),
        reason: reason(record),
        kinds: &record.report.kinds,
    }
}

fn render(record: &Record, address: IpAddr, cached: bool) -> String {
    let key = &record.key;
    let head = [
        "KIND",
        "MODE",
        "BULK",
        "CPU",
        "SMALL",
        "ROUND TRIP",
        "SCORE",
    ];
    let mut rows = vec![head.map(String::from).to_vec()];
    let mut obstacles = String::new();
    for kind in &record.report.kinds {
        let figure = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let it = kind.figures;
        rows.push(vec![
            kind.kind.to_string(),
            figure(kind.mode.clone()),
            figure(it.map(|it| format!("{:.1} Gb/s", it.bulk_gbps))),
            figure(it.map(|it| format!("{:.2} s/GB", it.cpu_s_per_gb))),
            figure(it.map(|it| format!("{:.0} k/s", it.small_kpps))),
            figure(it.map(|it| format!("{:.0} us", it.round_trip_us))),
            figure(it.map(|_| format!("{:.2}", kind.score))),
        ]);
        if let Some(obstacle) = &kind.obstacle {
            obstacles.push_str(&format!("{}: {obstacle}\n", kind.kind));
        }
    }
    format!(
        "{} {address} (driver {}, MTU {}{})\n{}{obstacles}uses {}: {}\n",
        key.interface,
        key.driver,
        key.mtu,
        if cached { ", measured before" } else { "" },
        table::render(&rows),
        record.kind(),
        reason(record),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(wanted: Option<Kind>) -> Record {
        let json = serde_json::json!({
            "key": {"interface": "eth0", "driver": "virtio_net", "mtu": 1500,
                "kernel": "6.1", "version": 1},
            "report": {
                "kinds": [
                    {"kind": "udp", "mode": "GSO, GRO", "obstacle": null, "score": 1.0,
                        "figures": {"bulk_gbps": 20.96, "cpu_s_per_gb": 0.31,
                            "small_kpps": 402.4, "round_trip_us": 27.2}},
                    {"kind": "af_xdp", "mode": null, "figures": null, "score": 0.0,
                        "obstacle": "not in this kernel"},
                ],
                "chosen": "udp",
                "reason": "it is the only one that could be measured",
            },
            "wanted": wanted,
        });
        Record::parse(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn what_was_measured_what_cannot_be_used_and_what_is_used_are_all_told() {
        let text = render(&record(None), "10.0.0.5".parse().unwrap(), true);
        assert_eq!(
            text,
            "eth0 10.0.0.5 (driver virtio_net, MTU 1500, measured before)\n\
             KIND    MODE      BULK       CPU        SMALL    ROUND TRIP  SCORE\n\
             udp     GSO, GRO  21.0 Gb/s  0.31 s/GB  402 k/s  27 us       1.00\n\
             af_xdp  -         -          -          -        -           -\n\
             af_xdp: not in this kernel\n\
             uses udp: it is the only one that could be measured\n"
        );
    }

    #[test]
    fn what_the_user_wants_goes_before_what_was_measured() {
        let wanted = record(Some(Kind::AfPacket));
        let json = shown(&wanted, "10.0.0.5".parse().unwrap(), false);
        assert_eq!(json.uses, Kind::AfPacket);
        assert!(json.reason.contains("--use"), "{}", json.reason);
        assert!(json.reason.contains("udp was chosen"), "{}", json.reason);
    }

    #[test]
    fn a_wish_is_a_kind_or_auto() {
        assert_eq!(parse_wish("auto"), Ok(Wish(None)));
        assert_eq!(parse_wish("af_xdp"), Ok(Wish(Some(Kind::AfXdp))));
        let told = parse_wish("tap").unwrap_err();
        assert!(told.contains("auto, udp, af_xdp, af_packet"), "{told}");
    }
}
