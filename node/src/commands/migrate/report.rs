//! What is told of a migration, while it goes and afterwards.

use blanket_migration::{Phase, Status};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::cluster::names::NodeName;
use crate::name::VmName;

/// How it went.
#[derive(Serialize)]
pub(super) struct Report {
    /// What the VM is called now.
    pub(super) name: VmName,
    /// The node that it is on, if not this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) node: Option<NodeName>,
    /// Files here whose content is there now.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) left: Vec<std::path::PathBuf>,
    #[serde(flatten)]
    pub(super) status: Status,
}

impl Report {
    /// For people.
    pub(super) fn text(&self) -> String {
        let ms = |us: u64| us as f64 / 1000.0;
        let Report {
            name,
            node,
            left,
            status,
        } = self;
        let place = node.as_ref().map(|node| format!(" on {node}"));
        let mut text = format!(
            "'{name}' {}{}: {:.0} MiB in {} rounds and {:.1} ms, of which it stood still {:.1} ms:\n",
            match status.paused {
                true => "is paused, as it was,",
                false => "runs",
            },
            place.unwrap_or_default(),
            mib(status.bytes),
            status.rounds.len(),
            ms(status.total_us),
            ms(status.downtime_us),
        );
        for step in &status.pause {
            text += &format!("  {:<16}{:>8.2} ms\n", step.step, ms(step.us));
        }
        if status.disks_same > 0 {
            text += &format!(
                "{:.0} MiB of its disks were there already\n",
                mib(status.disks_same)
            );
        }
        if let Some(following) = &status.following {
            text += &format!(
                "{:.0} MiB of memory followed, and were there {:.1} ms after it had been stopped; it had to wait for some {} times\n",
                mib(following.missing),
                ms(following.us),
                following.faults,
            );
        }
        if let Some(following) = &status.following_disks {
            text += &format!(
                "{:.0} MiB of its disks followed, and were there {:.1} ms after it had been stopped; it had to wait for some {} times\n",
                mib(following.missing),
                ms(following.us),
                following.faults,
            );
        }
        let packed = &status.packed;
        for (what, before, after) in [
            (
                "were compressed to",
                packed.compressed,
                packed.compressed_to,
            ),
            (
                "had been sent before: what had changed was",
                packed.changed,
                packed.changed_to,
            ),
        ] {
            if before > 0 {
                text += &format!(
                    "{:.1} MiB of memory {what} {:.1} MiB\n",
                    mib(before),
                    mib(after)
                );
            }
        }
        if status.throttle > 0 {
            text += &format!(
                "it wrote too fast, and was slowed down by {} % in the end\n",
                status.throttle
            );
        }
        if let Some(reason) = &status.unable {
            text += &format!("memory could not have followed it: {reason}\n");
        }
        if status.forwarded > 0 {
            text += &format!(
                "{} frames that came here meanwhile were sent on\n",
                status.forwarded
            );
        }
        for path in left {
            text += &format!(
                "its disk {} is still here: delete it if you do not need it\n",
                path.display()
            );
        }
        text
    }
}

/// The progress on the terminal.
pub(crate) struct Shown {
    bar: Option<ProgressBar>,
}

impl Shown {
    pub(crate) fn new(wanted: bool) -> Self {
        // Hidden where the output is no terminal.
        let bar = wanted.then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg}");
            ProgressBar::new_spinner()
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        });
        Self { bar }
    }

    pub(crate) fn show(&mut self, status: &Status) {
        if let Some(bar) = &self.bar {
            bar.set_message(line(status));
            bar.tick();
        }
    }

    pub(crate) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

pub(super) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn line(status: &Status) -> String {
    let phase = match status.phase {
        Phase::Waiting => "waiting for the new monitor",
        Phase::Disks => {
            return format!(
                "copying disks: {:.0} of {:.0} MiB looked at, {:.0} MiB sent; the guest writes {:.0} MiB/s",
                mib(status.disks_sent + status.disks_same),
                mib(status.disks),
                mib(status.bytes),
                mib(status.dirty_rate),
            );
        }
        Phase::Following => {
            let parts = [
                (&status.following, "memory"),
                (&status.following_disks, "disks"),
            ];
            let parts = parts.iter().filter_map(|(following, what)| {
                let following = following.as_ref()?;
                Some(format!(
                    "{what}: {:.0} of {:.0} MiB to go, it had to wait for some {} times",
                    mib(following.left),
                    mib(following.missing),
                    following.faults,
                ))
            });
            let parts: Vec<_> = parts.collect();
            return format!("it runs there, more follows: {}", parts.join("; "));
        }
        Phase::Replicating => {
            let all = status.replication.clone().unwrap_or_default();
            return match all.waits {
                Some(reason) => format!("no point can be made: {reason}"),
                None => format!(
                    "point {} of {:.1} s ago: {:.1} MiB, the guest stood still for {:.1} ms",
                    all.points,
                    all.age_ms as f64 / 1e3,
                    mib(all.bytes),
                    all.pause_us as f64 / 1e3,
                ),
            };
        }
        Phase::Copying => "copying memory",
        Phase::Switching | Phase::Handed => "switching over",
        Phase::Moved => "moved",
        Phase::Measured => "measured",
        Phase::Failed => "not moved",
    };
    let slowed = match status.throttle {
        0 => String::new(),
        percent => format!(" and is slowed down by {percent} %"),
    };
    format!(
        "{phase}: round {}, {:.0} MiB sent, {:.0} MiB to go; the guest writes {:.0} MiB/s{slowed}, it would stand still for {:.1} ms",
        status.rounds.len() + 1,
        mib(status.bytes),
        mib(status.left),
        mib(status.dirty_rate),
        status.expected_downtime_us as f64 / 1000.0,
    )
}
