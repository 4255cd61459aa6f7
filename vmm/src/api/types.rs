//! The JSON bodies of the monitor's API, shared by its server and its clients.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `PUT /vm` | [`VmConfig`] | [`VmInfo`]: the machine is built, not started |
//! | `GET /vm` | | [`VmInfo`], or 404 before the machine is built |
//! | `POST /vm/ACTION` | | [`VmInfo`] after the [`Action`] |
//! | `GET /vm/snapshot` | | the [stream](crate::snapshot::stream) of a VM's snapshot; one that runs goes on after a moment, or is refused with 409 |
//! | `PUT /vm/migration` | [`Request`](crate::migrate::Request) | the [`VmConfig`] that the destination's machine is to have: the VM leaves when a destination comes to the monitor's migration socket |
//! | `GET /vm/migration` | | [`Status`](blanket_migration::Status) |
//! | `DELETE /vm/migration` | | [`Status`](blanket_migration::Status): it ends soon, unless the guest has been handed over |
//! | `PUT /vm/target` | [`Target`] | [`VmInfo`] with it |
//! | `PUT /vm/sysrq` | [`SysRq`] | [`VmInfo`] after the key |
//! | `GET /metrics` | | [`Metrics`] |
//!
//! Whatever fails is answered with a 4xx or 5xx status and a [`Problem`].

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{ByteSize, CpuChoice, MacAddress, VmConfig};

/// Path of the VM: `PUT` builds it, `GET` describes it.
pub const VM_PATH: &str = "/vm";

/// Path of the counters.
pub const METRICS_PATH: &str = "/metrics";

/// Path of what the guest is asked to use: `PUT` changes it.
pub const TARGET_PATH: &str = "/vm/target";

/// Path of the VM's snapshot.
pub const SNAPSHOT_PATH: &str = "/vm/snapshot";

/// Path of the VM's migration: `PUT` begins it, `DELETE` cancels it.
pub const MIGRATION_PATH: &str = "/vm/migration";

/// Path of the guest's SysRq key: `PUT` presses it.
pub const SYSRQ_PATH: &str = "/vm/sysrq";

/// A SysRq key of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SysRq {
    /// The letter or digit.
    pub key: char,
}

/// How much of what it has a guest is asked to use. It follows when it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Memory; what is over, its balloon gives back to the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// vCPUs, from the first one on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
}

/// What can be done to a VM, by `POST` to [`Action::path`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Starts a created VM.
    Boot,
    /// Stops the vCPUs and brings the devices to rest.
    Pause,
    /// Lets a paused VM run on.
    Resume,
    /// Starts the guest again from its kernel, as the reset button does.
    Reset,
    /// Asks the guest to suspend itself; the VM is [`VmState::Suspended`] once
    /// it has.
    Suspend,
    /// Presses the ACPI power button: the guest shuts itself down.
    Shutdown,
    /// Ends the VM at once, without asking the guest.
    Poweroff,
}

impl Action {
    /// Every action.
    pub const ALL: [Self; 7] = [
        Self::Boot,
        Self::Pause,
        Self::Resume,
        Self::Reset,
        Self::Suspend,
        Self::Shutdown,
        Self::Poweroff,
    ];

    /// The path to `POST` to.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::Boot => "/vm/boot",
            Self::Pause => "/vm/pause",
            Self::Resume => "/vm/resume",
            Self::Reset => "/vm/reset",
            Self::Suspend => "/vm/suspend",
            Self::Shutdown => "/vm/shutdown",
            Self::Poweroff => "/vm/poweroff",
        }
    }
}

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Built, never started.
    Created,
    /// The vCPUs run.
    Running,
    /// The vCPUs are stopped and the devices at rest.
    Paused,
    /// The guest has suspended itself; all is at rest, as when paused.
    Suspended,
    /// The guest is off; the monitor is about to exit.
    Stopped,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::Stopped => "stopped",
        })
    }
}

/// Which machine the guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// The guest's kernel runs in hardware virtualization.
    #[default]
    Hvm,
    /// The guest's kernel runs in ring 3 and speaks the Xen PV ABI.
    Pv,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Hvm => "hvm",
            Self::Pv => "pv",
        })
    }
}

/// A point on the way from the monitor's start to the running guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootPhase {
    /// What was finished, like `memory` or `kernel loaded`.
    pub phase: String,
    /// When, in microseconds since the monitor's process started.
    pub at_us: u64,
}

/// A device of the guest and what it is tied to on the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Its name, unique in the VM and the same in [`Metrics`], like `net0`.
    pub name: String,
    /// What it is, like `virtio-net`.
    pub kind: String,
    /// Its PCI address, like `00:03.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Network: the tap on the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Network: the socket of its vhost-user backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<PathBuf>,
    /// Network: the guest's hardware address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Disk: the image or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Disk: its bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<u64>,
    /// Disk: the I/O engine that was chosen, like `io_uring`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// Disk: what is wrong with it, and the remedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// A VM as its monitor describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// The name given with `--id`.
    pub id: String,
    /// The monitor's version.
    pub version: String,
    /// Where it is in its life.
    pub state: VmState,
    /// The monitor's process.
    pub pid: u32,
    /// The machine that the guest sees.
    pub machine: Machine,
    /// The processor that the guest sees.
    pub cpu: CpuChoice,
    /// Why it is no better one, if nobody said which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_reason: Option<String>,
    /// Milliseconds since the guest was started; 0 if it was not.
    pub uptime_ms: u64,
    /// How the start went, in order of time.
    pub boot: Vec<BootPhase>,
    /// The guest's devices.
    pub devices: Vec<DeviceInfo>,
    /// Socket of the serial port, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_socket: Option<PathBuf>,
    /// Socket of the virtio console, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console_socket: Option<PathBuf>,
    /// What the guest is asked to use, where it can be asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// The configuration that it was built from.
    pub config: VmConfig,
}

/// Counters since the monitor's start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// Per device ([`DeviceInfo::name`]): counters by name.
    pub devices: BTreeMap<String, BTreeMap<String, u64>>,
    /// Per vCPU, in order: counters by name, like `exits_io`.
    pub vcpus: Vec<BTreeMap<String, u64>>,
    /// Memory of guest and monitor.
    pub memory: MemoryMetrics,
}

/// Memory figures in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMetrics {
    /// What the guest was given.
    pub guest: u64,
    /// How much of it is in the node's memory now.
    pub guest_resident: u64,
    /// The monitor's whole resident set, the guest's included.
    pub resident: u64,
}

/// Why a request was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What is wrong, in one line.
    pub error: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)?;
        match &self.remedy {
            Some(remedy) => write!(f, " ({remedy})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_is_read_back_as_it_was_written() {
        let info = VmInfo {
            id: "web".into(),
            version: "0.1.0".into(),
            state: VmState::Running,
            pid: 7,
            machine: Machine::Hvm,
            cpu: CpuChoice::V3,
            cpu_reason: None,
            uptime_ms: 12,
            boot: vec![BootPhase {
                phase: "memory".into(),
                at_us: 900,
            }],
            devices: vec![DeviceInfo {
                name: "net0".into(),
                kind: "virtio-net".into(),
                tap: Some("tap0".into()),
                mac: Some(MacAddress::local([2, 0, 0, 0, 0, 1])),
                ..DeviceInfo::default()
            }],
            serial_socket: Some("/run/x/serial.sock".into()),
            console_socket: None,
            target: None,
            config: VmConfig {
                kernel: Some("vmlinuz".into()),
                ..VmConfig::default()
            },
        };
        let text = serde_json::to_string(&info).unwrap();
        assert!(text.contains(r#""state":"running""#), "{text}");
        assert!(text.contains(r#""machine":"hvm""#), "{text}");
        assert_eq!(serde_json::from_str::<VmInfo>(&text).unwrap(), info);
    }

    #[test]
    fn a_problem_without_a_remedy_is_read() {
        let problem: Problem = serde_json::from_str(r#"{"error":"no"}"#).unwrap();
        assert_eq!(problem.to_string(), "no");
    }

    #[test]
    fn actions_have_paths_of_their_own() {
        for (i, a) in Action::ALL.iter().enumerate() {
            assert!(Action::ALL[..i].iter().all(|b| a.path() != b.path()));
        }
    }
}
