//! The same core scenario on a machine of each provider: it boots, is what it claims to be, runs
//! a guest with network and disk, and what the guest sees is the same everywhere.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod grants;
mod view;

use blanket_system_tests::{Vm, on_node, payload, provider};
use blanket_testbed::{
    Accelerator, Behavior, Client, Disk, Event, Node, NodeBuilder, Provider, inspection,
};
use serde_json::Value;

/// What a machine of a provider has to look like.
struct Expected {
    /// Driver of the network card.
    card: &'static str,
    /// The first disk.
    disk: &'static str,
    /// Of the network card.
    mtu: u32,
    /// File of `/sys` and what it says about the provider.
    sign: (&'static str, &'static str),
    /// What `blanket provider` says: provider and platform.
    told: (&'static str, &'static str),
    /// The machine's identity as the metadata service tells it.
    identity: Option<&'static str>,
}

/// Boots a machine, checks that it is the provider's, and runs a guest on it.
fn core_scenario(which: Provider, expected: &Expected) {
    on_node(
        || describe(which),
        |node| {
            looks_like(node, expected);
            let vm = Vm::linux(
                node,
                "same",
                "blanket.ip=10.9.0.2/24",
                &format!(
                    "--machine hvm --memory 256M --disk path=/dev/{},serial=disk-0 \
                     --net tap,host_ip=10.9.0.1/24,mac=52:54:00:09:00:02",
                    expected.disk
                ),
            )
            .unwrap();
            let guest = vm.guest().unwrap();
            let written = network_and_disk_work(node, &guest);
            view::is_the_same_everywhere(which, &guest);
            drop(guest);
            let stopped = vm.blanket("stop", "--timeout 60").unwrap();
            assert!(stopped.status.success(), "{stopped}");
            let ended = vm.ended().unwrap();
            assert!(ended.contains("powered off"), "{ended}");
            // What the guest has written is on the provider's disk.
            let read = format!(
                "mount -t ext4 -o ro /dev/{} /mnt && sha256sum </mnt/file && umount /mnt",
                expected.disk
            );
            assert_eq!(node.sh(read).text().unwrap(), written);
        },
    );
}

fn describe(which: Provider) -> NodeBuilder {
    provider(&format!("{which:?}").to_lowercase())
        .unwrap()
        .cpus(1)
        .provider(which)
        .disk(Disk::scratch(inspection().unwrap()))
}

fn looks_like(node: &Node, expected: &Expected) {
    let (file, text) = expected.sign;
    // Some cards take seconds to find their link.
    let script = format!(
        "until grep -qs 1 /sys/class/net/eth0/carrier; do sleep 0.1; done; basename $(readlink /sys/class/net/eth0/device/driver); cat /sys/class/net/eth0/mtu; \
         [ -b /dev/{} ]; cat {file}",
        expected.disk
    );
    let said = node.sh(script).text().unwrap();
    let card = expected.card;
    assert_eq!(said, format!("{card}\n{}\n{text}\n", expected.mtu));

    let report = report(node);
    let (provider, platform) = expected.told;
    assert_eq!(report["provider"], provider, "{report}");
    assert_eq!(report["platform"], platform, "{report}");
    assert_eq!(expected.identity.is_some(), node.metadata().is_some());
    if let Some(identity) = expected.identity {
        assert_eq!(report["metadata"]["state"], "answered", "{report}");
        assert_eq!(report["instance"]["id"], identity, "{report}");
        assert_eq!(report["instance"]["addresses"][0], "10.0.0.10", "{report}");
    }
    volume_is_told(node, expected);
}

/// `blanket store` finds the disk, by the right driver, and tells where it is if that can be told.
fn volume_is_told(node: &Node, expected: &Expected) {
    let text = node.sh("blanket store --json --no-test").text().unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    let all = all.as_array().unwrap();
    let volume = all.iter().find(|it| it["name"] == expected.disk);
    let volume = volume.unwrap_or_else(|| panic!("no {}: {text}", expected.disk));
    let drivers = match &expected.disk[..2] {
        "vd" => &["virtio_blk"][..],
        "nv" => &["nvme"],
        "xv" => &["vbd", "xen_blkfront"],
        _ => &["vmw_pvscsi", "virtio_scsi", "hv_storvsc"],
    };
    let driver = volume["driver"].as_str().unwrap_or_default();
    assert!(drivers.contains(&driver), "{volume}");
    // QEMU's volumes have no cloud's names.
    let place = match expected.told.0 {
        "bare-metal" => "local",
        _ => "unknown",
    };
    assert_eq!(volume["place"], place, "{volume}");
    assert!(volume["size"].as_u64() > Some(0), "{volume}");
    assert_eq!(volume["limits"]["logical_block"], 512, "{volume}");
    assert_eq!(volume["uses"], serde_json::json!([]), "{volume}");
}

/// What `blanket provider` says.
fn report(node: &Node) -> Value {
    let report = node.sh("blanket provider --json").text().unwrap();
    serde_json::from_str(&report).unwrap()
}

/// Node and guest reach each other; the guest reads back from its disk what it wrote, once its
/// caches are empty. Returns the checksum.
fn network_and_disk_work(node: &Node, guest: &Client) -> String {
    guest.sh("ping -c 3 -i 0.2 -W 10 10.9.0.1").text().unwrap();
    node.sh("ping -c 3 -i 0.2 -W 10 10.9.0.2").text().unwrap();
    disk_works(guest, "vda")
}

/// What is written to a disk is read back once the caches are empty. Returns its checksum.
fn disk_works(machine: &Client, disk: &str) -> String {
    let script = format!(
        "mkdir -p /mnt && mount -t ext4 /dev/{disk} /mnt && \
         dd if=/dev/urandom of=/run/file bs=1M count=4 && cp /run/file /mnt && \
         umount /mnt && echo 3 >/proc/sys/vm/drop_caches && \
         mount -t ext4 -o ro /dev/{disk} /mnt && cmp /run/file /mnt/file && umount /mnt && \
         sha256sum </run/file"
    );
    machine.sh(script).text().unwrap()
}

#[test]
fn ec2_nitro_runs_the_same_guest() {
    core_scenario(
        Provider::Ec2Nitro,
        &Expected {
            card: "virtio_net",
            disk: "nvme0n1",
            mtu: 9001,
            sign: ("/sys/class/dmi/id/sys_vendor", "Amazon EC2"),
            told: ("ec2", "nitro"),
            identity: Some("i-0af01c0123456789a"),
        },
    );
}

#[test]
fn gce_runs_the_same_guest() {
    core_scenario(
        Provider::Gce,
        &Expected {
            card: "virtio_net",
            disk: "sda",
            mtu: 1460,
            sign: ("/sys/class/dmi/id/product_name", "Google Compute Engine"),
            told: ("gce", "kvm"),
            identity: Some("4520031799277581759"),
        },
    );
}

#[test]
fn azure_runs_the_same_guest() {
    core_scenario(
        Provider::Azure,
        &Expected {
            card: "e1000e",
            disk: "nvme0n1",
            mtu: 1500,
            sign: (
                "/sys/class/dmi/id/chassis_asset_tag",
                "7783-7084-3265-9085-8269-3286-77",
            ),
            told: ("azure", "hyper-v"),
            identity: Some("02aab8a4-74ef-476e-8182-f6d2ba4166a6"),
        },
    );
}

#[test]
fn openstack_runs_the_same_guest() {
    // Emulated, it is a cloud that emulates.
    let platform = match Accelerator::probe() {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg",
    };
    core_scenario(
        Provider::OpenStack,
        &Expected {
            card: "virtio_net",
            disk: "vda",
            mtu: 1450,
            sign: ("/sys/class/dmi/id/product_name", "OpenStack Nova"),
            told: ("openstack", platform),
            identity: Some("d8e02d56-2648-49a3-bf97-6be8f1204f38"),
        },
    );
}

#[test]
fn vmware_runs_the_same_guest() {
    core_scenario(
        Provider::Vmware,
        &Expected {
            card: "vmxnet3",
            disk: "sda",
            mtu: 1500,
            sign: ("/sys/class/dmi/id/sys_vendor", "VMware, Inc."),
            told: ("vmware", "vmware"),
            identity: None,
        },
    );
}

#[test]
fn bare_metal_runs_the_same_guest() {
    core_scenario(
        Provider::BareMetal,
        &Expected {
            card: "e1000e",
            disk: "nvme0n1",
            mtu: 1500,
            sign: ("/sys/class/dmi/id/product_name", "PowerEdge R6415"),
            told: ("bare-metal", "metal"),
            identity: None,
        },
    );
}

/// A disk and a card of Xen's carry what the node reads and writes.
fn disk_of_xen_works(node: &Node) {
    disk_works(node, "xvda");
    let dmesg = node.sh("dmesg | grep blkfront").text().unwrap();
    assert!(dmesg.contains("persistent grants: enabled"), "{dmesg}");
}

#[test]
fn a_pvh_guest_of_xen_with_nested_virtualization_runs_a_guest() {
    on_node(
        || describe(Provider::Xen).inject(payload("hello").unwrap(), "/hello"),
        |node| {
            looks_like(
                node,
                &Expected {
                    card: "vif",
                    disk: "xvda",
                    mtu: 1500,
                    sign: ("/sys/hypervisor/guest_type", "PVH"),
                    told: ("xen", "pvh"),
                    identity: None,
                },
            );
            disk_of_xen_works(node);
            node.sh("[ -c /dev/xen/gntdev ] && [ -c /dev/xen/gntalloc ] && [ -c /dev/xen/evtchn ]")
                .text()
                .unwrap();
            // Not a Linux: this Xen does not interrupt guests of guests.
            let flags = "--machine hvm --kernel /hello --memory 64M --disk /dev/xvda --net tap";
            let vm = Vm::run(node, "hello", flags).unwrap();
            let ended = vm.ended().unwrap();
            assert!(ended.contains("powered off"), "{ended}");
            let log = vm.blanket("logs", "").unwrap();
            let log = String::from_utf8_lossy(&log.stdout).into_owned();
            assert!(log.contains("hello from a guest"), "{log}");
        },
    );
}

#[test]
fn a_guest_of_xen_without_nested_virtualization_says_what_is_missing() {
    on_node(
        || describe(Provider::Ec2Xen),
        |node| {
            looks_like(
                node,
                &Expected {
                    card: "vif",
                    disk: "xvda",
                    mtu: 9001,
                    sign: ("/sys/hypervisor/guest_type", "PVH"),
                    told: ("ec2", "xen"),
                    identity: Some("i-0b22a22eec53b9321"),
                },
            );
            disk_of_xen_works(node);
            let run = node
                .sh("blanket run guest --kernel /payload/guest/vmlinuz")
                .run();
            let run = run.unwrap();
            let error = String::from_utf8_lossy(&run.stderr);
            assert!(
                !run.status.success() && error.contains("/dev/kvm"),
                "{error}"
            );
            let doctor = node.sh("blanket doctor").run().unwrap();
            let text = String::from_utf8_lossy(&doctor.stdout);
            assert!(text.contains("neither VMX nor SVM"), "{text}");
            let up = node.sh("blanket up").run().unwrap();
            let error = String::from_utf8_lossy(&up.stderr);
            assert!(!up.status.success(), "{up}");
            assert!(error.contains("cannot load kvm_pvm: "), "{error}");
            assert!(error.contains("nested virtualization"), "{error}");
        },
    );
}

#[test]
fn a_metadata_service_that_hangs_lies_or_talks_nonsense_is_named_and_not_believed() {
    on_node(
        || describe(Provider::Gce),
        |node| {
            let service = node.metadata().unwrap();
            service.announce(Some(Event::Preemption));
            let notices = report(node)["notices"].to_string();
            assert!(notices.contains("spot-termination"), "{notices}");
            for behavior in [
                Behavior::Hangs,
                Behavior::Trickles,
                Behavior::Refuses,
                Behavior::Garbage,
                Behavior::Lies,
            ] {
                service.behave(behavior);
                let report = report(node);
                assert_eq!(report["provider"], "gce", "{behavior:?}: {report}");
                assert_ne!(report["metadata"]["state"], "answered", "{behavior:?}");
                assert_ne!(report["metadata"]["problems"][0], Value::Null, "{report}");
                assert_eq!(report["instance"]["id"], Value::Null, "{behavior:?}");
            }
            service.behave(Behavior::Answers);
            assert_eq!(report(node)["metadata"]["state"], "answered");
        },
    );
}
