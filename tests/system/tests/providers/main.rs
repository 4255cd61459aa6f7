//! The same core scenario on a machine of each provider: it boots, is what it claims to be, runs
//! a guest with network and disk, and what the guest sees is the same everywhere.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod view;

use blanket_system_tests::{Vm, on_node, provider, strip_notes};
use blanket_testbed::{Client, Disk, Node, Provider, inspection};

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
    /// Asks the metadata service for the machine's identity, and the answer.
    identity: Option<(&'static str, &'static str)>,
}

/// Boots a machine, checks that it is the provider's, and runs a guest on it.
fn core_scenario(which: Provider, expected: &Expected) {
    on_node(
        || describe(which),
        |node| {
            looks_like(node, expected);
            // The nested virtualization of an emulated Xen loses the switch to long mode that
            // follows a PVH entry, so the kernel starts in it.
            strip_notes(node, "/payload/guest/vmlinux").unwrap();
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

fn describe(which: Provider) -> blanket_testbed::NodeBuilder {
    provider(&format!("{which:?}").to_lowercase())
        .unwrap()
        .cpus(1)
        .provider(which)
        .disk(Disk::scratch(inspection().unwrap()))
}

fn looks_like(node: &Node, expected: &Expected) {
    let (file, text) = expected.sign;
    let script = format!(
        "basename $(readlink /sys/class/net/eth0/device/driver); cat /sys/class/net/eth0/mtu; \
         [ -b /dev/{} ]; cat {file}",
        expected.disk
    );
    let said = node.sh(script).text().unwrap();
    assert_eq!(
        said,
        format!("{}\n{}\n{text}\n", expected.card, expected.mtu)
    );
    assert_eq!(expected.identity.is_some(), node.metadata().is_some());
    if let Some((question, answer)) = expected.identity {
        let said = node.sh(question).text().unwrap();
        assert_eq!(said.trim(), answer);
    }
}

/// Node and guest reach each other; the guest reads back from its disk what it wrote, once its
/// caches are empty. Returns the checksum.
fn network_and_disk_work(node: &Node, guest: &Client) -> String {
    guest.sh("ping -c 3 -i 0.2 -W 10 10.9.0.1").text().unwrap();
    node.sh("ping -c 3 -i 0.2 -W 10 10.9.0.2").text().unwrap();
    let script = "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && \
                  dd if=/dev/urandom of=/run/file bs=1M count=4 && cp /run/file /mnt && \
                  umount /mnt && echo 3 >/proc/sys/vm/drop_caches && \
                  mount -t ext4 -o ro /dev/vda /mnt && cmp /run/file /mnt/file && umount /mnt && \
                  sha256sum </run/file";
    guest.sh(script).text().unwrap()
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
            identity: Some((
                "token=$(curl -sfX PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
                 http://169.254.169.254/latest/api/token) && \
                 curl -sfH \"X-aws-ec2-metadata-token: $token\" \
                 http://169.254.169.254/latest/meta-data/instance-id",
                "i-0af01c0123456789a",
            )),
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
            identity: Some((
                "curl -sfH 'Metadata-Flavor: Google' \
                 http://169.254.169.254/computeMetadata/v1/instance/id",
                "4520031799277581759",
            )),
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
            identity: Some((
                "curl -sfH 'Metadata: true' 'http://169.254.169.254/metadata/instance/compute/vmId\
                 ?api-version=2021-02-01&format=text'",
                "02aab8a4-74ef-476e-8182-f6d2ba4166a6",
            )),
        },
    );
}

#[test]
fn openstack_runs_the_same_guest() {
    core_scenario(
        Provider::OpenStack,
        &Expected {
            card: "virtio_net",
            disk: "vda",
            mtu: 1450,
            sign: ("/sys/class/dmi/id/product_name", "OpenStack Nova"),
            identity: Some((
                "curl -sf http://169.254.169.254/openstack/latest/meta_data.json | \
                 sed 's/.*\"uuid\":\"\\([^\"]*\\).*/\\1/'",
                "d8e02d56-2648-49a3-bf97-6be8f1204f38",
            )),
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
            identity: None,
        },
    );
}

#[test]
fn a_pvh_guest_of_xen_runs_the_same_guest() {
    core_scenario(
        Provider::Xen,
        &Expected {
            card: "vif",
            disk: "xvda",
            mtu: 1500,
            sign: ("/sys/hypervisor/guest_type", "PVH"),
            identity: None,
        },
    );
}
