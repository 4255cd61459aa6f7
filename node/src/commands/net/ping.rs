//! `blanket net ping`.

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use blanket_overlay::api::observe::{PingSpec, Pong};
use hyper::Method;
use tokio::signal::unix::{SignalKind, signal};

use super::print;
use crate::home::Home;
use crate::switch::{call, runtime};

#[derive(clap::Args)]
pub(crate) struct PingArgs {
    /// A peer: its switch is pinged, through the tunnel. With an address: a network.
    of: String,
    /// An address in the network: who has it is asked for it, as arping does.
    address: Option<IpAddr>,
    /// End after so many.
    #[arg(short, long)]
    count: Option<u64>,
    /// Seconds from one to the next.
    #[arg(short, long, default_value_t = 1.0)]
    interval: f64,
    /// Seconds to wait for an answer.
    #[arg(short = 'W', long, default_value_t = 1.0)]
    timeout: f64,
    /// Bytes to a peer.
    #[arg(short, long, default_value_t = 56)]
    size: usize,
    /// The VLAN of the address.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..4095))]
    vlan: u16,
}

/// Round trips in milliseconds, and how many were tried.
#[derive(Default)]
struct Sums {
    sent: u64,
    trips: Vec<f64>,
}

impl Sums {
    /// As `ping` sums up.
    fn text(&self, of: &str, time: Duration) -> String {
        let (sent, received) = (self.sent, self.trips.len());
        let lost = 100.0 * (sent as f64 - received as f64) / (sent.max(1) as f64);
        let mut text = format!(
            "\n--- {of} ping statistics ---\n\
             {sent} sent, {received} received, {lost:.0}% loss, time {}ms\n",
            time.as_millis()
        );
        if received > 0 {
            let n = received as f64;
            let mean = self.trips.iter().sum::<f64>() / n;
            let square = self.trips.iter().map(|trip| trip * trip).sum::<f64>() / n;
            let least = self.trips.iter().copied().fold(f64::INFINITY, f64::min);
            let most = self.trips.iter().copied().fold(0.0, f64::max);
            let deviation = (square - mean * mean).max(0.0).sqrt();
            text.push_str(&format!(
                "rtt min/avg/max/mdev = {least:.3}/{mean:.3}/{most:.3}/{deviation:.3} ms\n"
            ));
        }
        text
    }
}

fn seconds(number: f64, least: f64) -> Result<Duration> {
    if !(least..=3600.0).contains(&number) {
        bail!("seconds: from {least} to 3600");
    }
    Ok(Duration::from_secs_f64(number))
}

pub(super) fn ping(home: &Home, args: &PingArgs) -> Result<ExitCode> {
    let (interval, timeout) = (
        seconds(args.interval, 0.001)?,
        seconds(args.timeout, 0.001)?,
    );
    let (peer, network) = match args.address {
        None => (Some(args.of.clone()), None),
        Some(_) => (None, Some(args.of.clone())),
    };
    let spec = PingSpec {
        peer,
        network,
        address: args.address,
        vlan: args.vlan,
        bytes: args.size,
        timeout_ms: timeout.as_millis() as u64,
    };
    let of = match args.address {
        None => args.of.clone(),
        Some(address) => address.to_string(),
    };
    let begun = Instant::now();
    let mut sums = Sums::default();
    runtime()?.block_on(run(home, args, &spec, interval, &mut sums))?;
    print(&sums.text(&of, begun.elapsed()))?;
    Ok(if sums.trips.is_empty() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

async fn run(
    home: &Home,
    args: &PingArgs,
    spec: &PingSpec,
    interval: Duration,
    sums: &mut Sums,
) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut turns = tokio::time::interval(interval);
    while args.count.is_none_or(|count| sums.sent < count) {
        tokio::select! {
            _ = turns.tick() => {}
            _ = interrupt.recv() => return Ok(()),
        }
        let asked = call::<Option<Pong>>(home, Method::POST, "/ping", Some(spec));
        let pong = tokio::select! {
            pong = asked => pong?,
            _ = interrupt.recv() => return Ok(()),
        };
        sums.sent += 1;
        let number = sums.sent;
        let Some(pong) = pong else {
            print(&format!("no answer: seq={number}\n"))?;
            continue;
        };
        let trip = pong.nanos as f64 / 1e6;
        sums.trips.push(trip);
        let from = match (pong.mac, spec.address) {
            (Some(mac), Some(address)) => format!("{address} is at {mac}"),
            _ => format!("{} bytes from {}", args.size, args.of),
        };
        print(&format!("{from}: seq={number} time={trip:.3} ms\n"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_as_ping_has_them() {
        let sums = Sums {
            sent: 4,
            trips: vec![1.0, 2.0, 3.0],
        };
        let text = sums.text("n2", Duration::from_millis(3001));
        assert!(
            text.contains("4 sent, 3 received, 25% loss, time 3001ms"),
            "{text}"
        );
        assert!(
            text.contains("min/avg/max/mdev = 1.000/2.000/3.000/0.816"),
            "{text}"
        );
        let none = Sums::default().text("n2", Duration::ZERO);
        assert!(!none.contains("rtt") && !none.contains("NaN"), "{none}");
    }
}
