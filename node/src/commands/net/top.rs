//! `blanket net top`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use blanket_overlay::api::types::{Peer, PortStatus, Traffic};
use hyper::Method;
use serde::Serialize;

use super::{print, row};
use crate::home::Home;
use crate::switch::ask;
use crate::table;

#[derive(clap::Args)]
pub(crate) struct TopArgs {
    /// Seconds from one look to the next.
    #[arg(short, long, default_value_t = 1.0)]
    delay: f64,
    /// Show one interval, and end.
    #[arg(long)]
    once: bool,
    /// Print a line of JSON for each interval.
    #[arg(long)]
    json: bool,
}

/// What was counted at a port or a peer until now.
#[derive(Clone, Copy, Default)]
struct Counts {
    rx: Traffic,
    tx: Traffic,
    drops: u64,
}

/// What happened at one in a second.
#[derive(Serialize)]
struct Line {
    name: String,
    /// `port` or `peer`.
    kind: &'static str,
    network: Option<String>,
    in_frames_per_second: f64,
    in_bits_per_second: f64,
    out_frames_per_second: f64,
    out_bits_per_second: f64,
    drops_per_second: f64,
}

/// A port or a peer: peers after ports.
type Key = (bool, String);

struct Look {
    at: Instant,
    counts: BTreeMap<Key, (Counts, Option<String>)>,
}

fn look(home: &Home) -> Result<Look> {
    let ports: Vec<PortStatus> = ask(home, Method::GET, "/ports", None::<&()>)?;
    // Without tunnels, there are none.
    let peers: Vec<Peer> = ask(home, Method::GET, "/peers", None::<&()>).unwrap_or_default();
    let at = Instant::now();
    let ports = ports.into_iter().map(|port| {
        let counts = Counts {
            rx: port.rx,
            tx: port.tx,
            drops: port.drops.total(),
        };
        ((false, port.name), (counts, Some(port.spec.network)))
    });
    let peers = peers.into_iter().map(|peer| {
        let stats = peer.status.stats;
        let traffic = |frames, bytes| Traffic { frames, bytes };
        let counts = Counts {
            rx: traffic(stats.frames_in, stats.bytes_in),
            tx: traffic(stats.frames_out, stats.bytes_out),
            drops: peer.drops.total(),
        };
        ((true, peer.name), (counts, None))
    });
    let counts = ports.chain(peers).collect();
    Ok(Look { at, counts })
}

/// What happened between two looks; the busiest first.
fn lines(before: &Look, after: &Look) -> Vec<Line> {
    let seconds = after.at.duration_since(before.at).as_secs_f64().max(1e-3);
    // What was taken away and made again begins at 0.
    let rate = |after: u64, before: u64| after.saturating_sub(before) as f64 / seconds;
    let line = |(key, (now, network)): (&Key, &(Counts, Option<String>))| {
        let then = before
            .counts
            .get(key)
            .map_or_else(Counts::default, |it| it.0);
        Line {
            name: key.1.clone(),
            kind: if key.0 { "peer" } else { "port" },
            network: network.clone(),
            in_frames_per_second: rate(now.rx.frames, then.rx.frames),
            in_bits_per_second: 8.0 * rate(now.rx.bytes, then.rx.bytes),
            out_frames_per_second: rate(now.tx.frames, then.tx.frames),
            out_bits_per_second: 8.0 * rate(now.tx.bytes, then.tx.bytes),
            drops_per_second: rate(now.drops, then.drops),
        }
    };
    let mut lines: Vec<Line> = after.counts.iter().map(line).collect();
    let busy = |line: &Line| line.in_bits_per_second + line.out_bits_per_second;
    lines.sort_by(|a, b| busy(b).total_cmp(&busy(a)));
    lines
}

/// Bits or frames in a second, with a decimal unit.
fn figure(number: f64) -> String {
    let unit = [(1e9, "G"), (1e6, "M"), (1e3, "k")]
        .into_iter()
        .find(|(least, _)| number >= *least);
    match unit {
        Some((least, unit)) => format!("{:.2} {unit}", number / least),
        None => format!("{number:.0}"),
    }
}

fn rows(lines: &[Line]) -> Vec<Vec<String>> {
    let mut rows = vec![row([
        "NAME",
        "KIND",
        "NETWORK",
        "IN bit/s",
        "IN frames/s",
        "OUT bit/s",
        "OUT frames/s",
        "DROPS/s",
    ])];
    rows.extend(lines.iter().map(|line| {
        vec![
            line.name.clone(),
            line.kind.to_owned(),
            line.network.clone().unwrap_or_else(|| "-".to_owned()),
            figure(line.in_bits_per_second),
            figure(line.in_frames_per_second),
            figure(line.out_bits_per_second),
            figure(line.out_frames_per_second),
            figure(line.drops_per_second),
        ]
    }));
    rows
}

pub(super) fn top(home: &Home, args: &TopArgs) -> Result<()> {
    if !(0.01..=3600.0).contains(&args.delay) {
        bail!("seconds: from 0.01 to 3600");
    }
    let delay = Duration::from_secs_f64(args.delay);
    let clear = !args.once && !args.json && std::io::stdout().is_terminal();
    let mut before = look(home)?;
    loop {
        std::thread::sleep(delay);
        let after = look(home)?;
        let lines = lines(&before, &after);
        if args.json {
            print(&(serde_json::to_string(&lines)? + "\n"))?;
        } else {
            // To the top, and all below it away.
            let begin = if clear { "\x1b[H\x1b[2J" } else { "" };
            print(&format!("{begin}{}", table::render(&rows(&lines))))?;
        }
        if args.once {
            return Ok(());
        }
        before = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences_and_the_busiest_is_first() {
        let at = Instant::now();
        let look = |after: u64, bytes: &[(&str, u64)]| Look {
            at: at + Duration::from_secs(after),
            counts: bytes
                .iter()
                .map(|(name, bytes)| {
                    let rx = Traffic {
                        frames: bytes / 100,
                        bytes: *bytes,
                    };
                    let counts = Counts {
                        rx,
                        ..Counts::default()
                    };
                    ((false, (*name).to_owned()), (counts, None))
                })
                .collect(),
        };
        let lines = lines(
            &look(0, &[("a", 1000), ("b", 5000)]),
            &look(2, &[("a", 3000), ("b", 400), ("c", 600)]),
        );
        let rates: Vec<_> = lines
            .iter()
            .map(|line| {
                (
                    line.name.as_str(),
                    line.in_bits_per_second,
                    line.in_frames_per_second,
                )
            })
            .collect();
        assert_eq!(
            rates,
            [("a", 8000.0, 10.0), ("c", 2400.0, 3.0), ("b", 0.0, 0.0)]
        );
        assert_eq!(figure(1_234_567.0), "1.23 M");
        assert_eq!(figure(12.0), "12");
    }
}
