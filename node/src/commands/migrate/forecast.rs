//! What a migration would be like.

use anyhow::Result;
use blanket_migration::{Forecast, Phase};
use blanket_vmm::migrate::Request;
use serde::Serialize;

use super::report::mib;
use super::{LOOK, Outcome};
use crate::cluster::names::NodeName;
use crate::home::VmDir;
use crate::table::render;

/// What a migration would be like.
#[derive(Serialize)]
pub(super) struct Foreseen {
    /// The node that has a place for the VM, if it is not this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<NodeName>,
    /// Bytes of memory that are other than zeros.
    memory: u64,
    /// Bytes that its disks take here.
    disks: u64,
    /// Bytes per second that the guest writes.
    dirty_rate: u64,
    /// For each link that was thought of.
    links: Vec<Forecast>,
}

impl Foreseen {
    /// For people.
    pub(super) fn text(&self) -> String {
        let place = self
            .node
            .as_ref()
            .map(|node| format!("{node} has a place for it. "));
        let mut text = format!(
            "{}{:.0} MiB of memory and {:.0} MiB of disks; the guest writes {:.1} MiB/s\n",
            place.unwrap_or_default(),
            mib(self.memory),
            mib(self.disks),
            mib(self.dirty_rate)
        );
        let mut rows = vec![
            ["LINK", "SENT", "TIME", "STANDS STILL"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for link in &self.links {
            let more = if link.converges {
                ""
            } else {
                ": more than it may"
            };
            rows.push(vec![
                format!("{:.0} Mb/s", link.bandwidth as f64 * 8.0 / 1e6),
                format!("{:.0} MiB", mib(link.bytes)),
                format!("{:.1} s", link.total_ms as f64 / 1e3),
                format!("{} ms{more}", link.downtime_ms),
            ]);
        }
        text += &render(&rows);
        text
    }
}

/// Links that are thought of where nobody says what the link has: bytes per second.
const LINKS: [u64; 3] = [12_500_000, 125_000_000, 1_250_000_000];

/// Has the monitor measure, and tells what a migration would be like.
pub(super) fn forecast(
    source: &VmDir,
    request: &Request,
    node: Option<NodeName>,
    disks: u64,
) -> Result<Outcome> {
    let client = source.live_client()?;
    client.migrate(request)?;
    let status = loop {
        let status = client.migration()?;
        match status.phase {
            Phase::Measured => break status,
            Phase::Failed => anyhow::bail!(status.error.unwrap_or_default()),
            _ => std::thread::sleep(LOOK),
        }
    };
    let links = match request.options.bandwidth {
        0 => LINKS.to_vec(),
        limit => vec![limit],
    };
    let of = |link| Forecast::of(&status, disks, link, &request.options);
    Ok(Outcome::Foreseen(Foreseen {
        node,
        memory: status.used,
        disks,
        dirty_rate: status.dirty_rate,
        links: links.into_iter().map(of).collect(),
    }))
}
