//! `blanket info`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use blanket_vmm::api::types::{DeviceInfo, Metrics, VmInfo};
use blanket_vmm::config::{ByteSize, CharConfig, VmConfig};
use clap::ValueEnum;
use serde::Serialize;

use super::{print, print_json};
use crate::home::{Home, VmDir};
use crate::name::VmName;
use crate::table;
use crate::vm::{Status, Summary};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// VM.
    name: VmName,
    /// Print JSON, with all counters.
    #[arg(long)]
    json: bool,
}

/// What `blanket info --json` prints.
#[derive(Serialize)]
struct Info {
    #[serde(flatten)]
    summary: Summary,
    config: VmConfig,
    api_socket: PathBuf,
    monitor_log: PathBuf,
    /// From the monitor, while it lives.
    vm: Option<Box<VmInfo>>,
    metrics: Option<Metrics>,
}

pub(crate) fn info(home: &Home, args: &Args) -> Result<ExitCode> {
    let vm = home.existing(&args.name)?;
    let info = gather(&vm)?;
    if args.json {
        print_json(&info)?;
    } else {
        print(&table::render(&rows(&info)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn gather(vm: &VmDir) -> Result<Info> {
    let status = vm.status()?;
    let summary = Summary::of(vm, &status);
    let live = match status {
        Status::Alive { info, .. } => info,
        _ => None,
    };
    let metrics = match &live {
        Some(_) => vm.client()?.metrics().ok(),
        None => None,
    };
    let config = live
        .as_ref()
        .map(|info| info.config.clone())
        .or_else(|| vm.stored_config())
        .unwrap_or_default();
    Ok(Info {
        summary,
        config,
        api_socket: vm.api_socket(),
        monitor_log: vm.monitor_log(),
        vm: live,
        metrics,
    })
}

fn rows(info: &Info) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut row = |key: &str, value: String| rows.push(vec![format!("{key}:"), value]);
    let (summary, config) = (&info.summary, &info.config);
    row("name", summary.name.clone());
    row("state", summary.state.clone());
    if let Some(reason) = &summary.reason {
        row("reason", reason.clone());
    }
    row("machine", summary.describe_machine());
    if let Some(vm) = &info.vm {
        row("processor", describe_processor(vm));
    }
    row("cpus", config.cpus().to_string());
    row("memory", ByteSize(config.memory()).to_string());
    if let Some(metrics) = &info.metrics {
        let memory = metrics.memory;
        row(
            "resident",
            format!(
                "{}, of which the guest's {}",
                table::bytes(memory.resident),
                table::bytes(memory.guest_resident)
            ),
        );
    }
    if let Some(kernel) = &config.kernel {
        row("kernel", kernel.display().to_string());
    }
    row("command line", config.cmdline().to_owned());
    for (key, port) in [("serial", &config.serial), ("console", &config.console)] {
        if let Some(port) = port {
            row(key, describe_port(port));
        }
    }
    if let Some(vm) = &info.vm {
        row("pid", vm.pid.to_string());
        row("uptime", table::duration(vm.uptime_ms));
        for device in &vm.devices {
            row(&device.name, describe_device(device));
        }
        for phase in &vm.boot {
            let ms = phase.at_us / 1000;
            let us = phase.at_us % 1000;
            row("boot", format!("{ms:>6}.{us:03} ms  {}", phase.phase));
        }
    }
    rows
}

fn describe_processor(vm: &VmInfo) -> String {
    let model = vm.cpu.to_possible_value();
    let mut text = model.map_or_else(String::new, |value| value.get_name().to_owned());
    if let Some(reason) = &vm.cpu_reason {
        text.push_str(&format!(" ({reason})"));
    }
    text
}

fn describe_port(port: &CharConfig) -> String {
    let part = |key: &str, path: &Option<PathBuf>| {
        path.as_ref()
            .map(|path| format!("{key} {}", path.display()))
    };
    let parts: Vec<_> = [part("socket", &port.socket), part("log", &port.log)]
        .into_iter()
        .flatten()
        .collect();
    if parts.is_empty() {
        "off".into()
    } else {
        parts.join(", ")
    }
}

fn describe_device(device: &DeviceInfo) -> String {
    let mut text = device.kind.clone();
    let mut add = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            text.push_str(&format!(", {key} {value}"));
        }
    };
    add("at", device.address.clone());
    add("tap", device.tap.clone());
    let backend = device.vhost_user.as_ref();
    add("vhost-user", backend.map(|path| path.display().to_string()));
    add("mac", device.mac.map(|mac| mac.to_string()));
    add(
        "image",
        device.path.as_ref().map(|path| path.display().to_string()),
    );
    add("engine", device.engine.clone());
    if let Some(trouble) = &device.trouble {
        text.push_str(&format!("; trouble: {trouble}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_by_what_it_is_tied_to() {
        let device = DeviceInfo {
            name: "disk0".into(),
            kind: "virtio-blk".into(),
            path: Some("/images/web.img".into()),
            engine: Some("io_uring".into()),
            ..DeviceInfo::default()
        };
        assert_eq!(
            describe_device(&device),
            "virtio-blk, image /images/web.img, engine io_uring"
        );
        assert_eq!(describe_port(&CharConfig::default()), "off");
    }
}
