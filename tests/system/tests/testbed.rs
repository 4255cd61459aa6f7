//! The testbed itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fs;
use std::time::Duration;

use blanket_system_tests::on_node;
use blanket_testbed::client::{Client, Error};
use blanket_testbed::{
    Behavior, Disk, Event, GUEST_PAGE, GuestImages, Hardware, Network, Node, NodeBuilder, Provider,
    Smbios, guest, tools,
};

/// Generous: guests run under emulated hardware virtualization.
const GUEST_LIMIT: Duration = Duration::from_secs(240);

#[test]
fn a_node_boots_answers_and_has_kvm() {
    let node = Node::builder("a").cpus(2).boot().unwrap();
    eprintln!(
        "the node took commands after {:.1} s",
        node.boot_time().as_secs_f32()
    );
    assert_eq!(node.command("hostname").text().unwrap(), "a\n");
    assert_eq!(
        node.sh("[ -c /dev/kvm ] && echo yes").text().unwrap(),
        "yes\n"
    );
    // A VM is there before anybody starts one, and so before the second processor was started.
    assert_eq!(node.command("nproc").text().unwrap(), "2\n");
    let held = node.sh(
        "cat /run/held; ls -l /proc/$(pidof blanket-agent | tr ' ' '\n' | while \
                        read p; do grep -qz hold /proc/$p/cmdline && echo $p; done)/fd",
    );
    let held = held.text().unwrap();
    assert!(
        held.starts_with("held\n") && held.contains("kvm-vm"),
        "{held}"
    );
    node.shutdown().unwrap();
}

#[test]
fn files_make_the_round_trip_and_injected_ones_are_there_from_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let (from, back) = (folder.path().join("from"), folder.path().join("back"));
    let bytes: Vec<u8> = (0..5_000_000u32)
        .map(|n| (n.wrapping_mul(n) >> 9) as u8)
        .collect();
    fs::write(&from, &bytes).unwrap();
    let node = Node::builder("a")
        .inject(&from, "/opt/injected")
        .boot()
        .unwrap();

    node.put(&from, "/tmp/copied").unwrap();
    node.sh("cmp /opt/injected /tmp/copied").text().unwrap();
    node.get("/tmp/copied", &back).unwrap();
    assert!(fs::read(&back).unwrap() == bytes);
}

#[test]
fn a_command_that_times_out_is_ended_and_the_node_goes_on() {
    let node = Node::builder("a").boot().unwrap();
    let result = node
        .sh("echo begun; sleep 1000")
        .timeout(Duration::from_secs(2))
        .run();
    match result {
        Err(Error::TimedOut { output, .. }) => assert_eq!(output.stdout, b"begun\n"),
        other => panic!("{other:?}"),
    }
    let left = node.sh("pgrep -f 'sleep 100[0]' | wc -l").text().unwrap();
    assert_eq!(left, "0\n");
}

#[test]
fn two_nodes_see_latency_and_partition_change_while_they_run() {
    let network = Network::new(1).unwrap();
    let boot = |name: &str, address: &str| {
        Node::builder(name)
            .nic_with_address(&network, address)
            .boot()
            .unwrap()
    };
    let (a, _b) = std::thread::scope(|scope| {
        let b = scope.spawn(|| boot("b", "10.0.0.2/24"));
        (boot("a", "10.0.0.1/24"), b.join().unwrap())
    });
    // The least round trip in milliseconds, if any ping is answered.
    let ping = || {
        let output = a.sh("ping -c 5 -i 0.2 -W 2 10.0.0.2").run().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let times = text
            .lines()
            .find_map(|line| line.strip_prefix("rtt min/avg/max/mdev = "));
        times
            .and_then(|times| times.split('/').next())
            .map(|least| least.parse::<f64>().unwrap())
    };
    let near = ping().expect("no ping is answered");
    network.set_latency("a", "b", Duration::from_millis(50));
    let far = ping().expect("no ping is answered with latency");
    assert!(
        far >= 100.0 && far > near,
        "least round trip: {near} ms, then {far} ms"
    );
    network.partition("a", "b");
    assert_eq!(ping(), None);
    network.heal("a", "b");
    assert!(ping().is_some());
}

#[test]
fn nodes_of_one_network_have_metadata_services_of_their_own_that_misbehave_when_told() {
    let network = Network::new(1).unwrap();
    let boot = |name: &str, provider: Provider, address: &str| {
        Node::builder(name)
            .provider(provider)
            .nic_with_address(&network, address)
            .boot()
            .unwrap()
    };
    let (google, nova) = std::thread::scope(|scope| {
        let google = scope.spawn(|| boot("google", Provider::Gce, "10.0.0.1/24"));
        let nova = boot("nova", Provider::OpenStack, "10.0.0.2/24");
        (google.join().unwrap(), nova)
    });
    google.sh("ping -c 3 -i 0.2 10.0.0.2").text().unwrap();
    let get = "curl -sS -m 8 -H 'Metadata-Flavor: Google' http://169.254.169.254";
    let tree = "/computeMetadata/v1/instance";
    let asked = |path: &str| google.sh(format!("{get}{tree}{path}")).run().unwrap();
    let text = |path: &str| String::from_utf8(asked(path).stdout).unwrap();
    assert_eq!(text("/network-interfaces/0/ip"), "10.0.0.1");
    assert_eq!(text("/network-interfaces/0/mtu"), "1460");
    let document = nova.sh(format!("{get}/openstack/latest/network_data.json"));
    assert!(
        document
            .text()
            .unwrap()
            .contains("\"ip_address\":\"10.0.0.2\"")
    );

    let service = google.metadata().unwrap();
    assert_eq!(service.requests().len(), 2);
    service.announce(Some(Event::Preemption));
    assert_eq!(text("/preempted"), "TRUE");
    // What curl ends with: a timeout, no answer, an answer that is no HTTP.
    for (behavior, statuses) in [
        (Behavior::Hangs, &[28][..]),
        (Behavior::Trickles, &[1, 28]),
        (Behavior::Refuses, &[52, 56]),
        (Behavior::Garbage, &[1]),
    ] {
        service.behave(behavior);
        let output = asked("/id");
        let status = output.status.code();
        assert!(
            status.is_some_and(|code| statuses.contains(&code)),
            "{behavior:?}: {output}"
        );
    }
    service.behave(Behavior::Lies);
    assert!(text("/id").starts_with("<html>"));
    service.behave(Behavior::Answers);
    assert_eq!(text("/name"), "google");
}

/// Boots a node of this hardware and looks which drivers its devices have.
fn check_hardware(hardware: Hardware, nic_driver: &str, disk: &str, disk_driver: &str) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(16 << 20).unwrap();
    let network = Network::new(1).unwrap();
    let node = Node::builder("a")
        .hardware(hardware)
        .smbios(Smbios {
            manufacturer: Some("Cloud, Inc.".to_owned()),
            product: Some("m1.large".to_owned()),
            chassis_asset: Some("asset-7".to_owned()),
            ..Smbios::default()
        })
        .disk(Disk::persistent(image.path()))
        .nic_with_address(&network, "10.0.0.1/24")
        .boot()
        .unwrap();
    let script = "basename $(readlink /sys/class/net/eth0/device/driver); cd /sys/class/dmi/id; \
                  cat sys_vendor product_name chassis_asset_tag";
    let expected = format!("{nic_driver}\nCloud, Inc.\nm1.large\nasset-7\n");
    assert_eq!(node.sh(script).text().unwrap(), expected);
    let address = node.sh("ip -4 -o address show dev eth0").text().unwrap();
    assert!(address.contains("10.0.0.1/24"), "{address}");

    let drivers = node.sh(format!(
        "cd -P /sys/block/{disk}/device; while [ $PWD != / ]; do readlink driver || :; cd ..; done"
    ));
    let drivers = drivers.text().unwrap();
    assert!(
        drivers.lines().any(|line| line.ends_with(disk_driver)),
        "{drivers}"
    );
    node.sh(format!("echo written | dd of=/dev/{disk} conv=fsync"))
        .text()
        .unwrap();
    drop(node);
    assert!(fs::read(image.path()).unwrap().starts_with(b"written\n"));
}

#[test]
fn virtio_hardware_shows_its_devices() {
    check_hardware(Hardware::Virtio, "virtio_net", "vda", "virtio_blk");
}

#[test]
fn bare_metal_hardware_shows_its_devices() {
    check_hardware(Hardware::BareMetal, "e1000e", "nvme0n1", "nvme");
}

#[test]
fn vmware_hardware_shows_its_devices() {
    check_hardware(Hardware::Vmware, "vmxnet3", "sda", "vmw_pvscsi");
}

/// A QEMU in the node with what guests of the testbed need, and a file for its output.
const QEMU: &str = "qemu-system-x86_64 -accel kvm -cpu host -machine q35 -m 512 -nodefaults \
    -no-reboot -display none -serial file:/run/guest.log -device virtio-serial-pci \
    -kernel /payload/guest/vmlinux -initrd /payload/guest/initrd.cpio \
    -chardev socket,id=c,path=/run/guest.sock,server=on,wait=off -device virtconsole,chardev=c \
    -monitor unix:/run/monitor.sock,server=on,wait=off";

fn node_for_guests() -> NodeBuilder {
    Node::builder("host")
        .cpus(2)
        .memory_mib(2048)
        .payload(&GuestImages::get().unwrap().payload().unwrap())
        .payload(&tools().unwrap())
}

fn guest_of(node: &Node) -> Client {
    guest(node, "/run/guest.sock", GUEST_LIMIT).unwrap_or_else(|error| {
        panic!("{error}\n{}", node.sh("cat /run/*.log").text().unwrap());
    })
}

/// Presses the guest's power button and waits for its QEMU to end.
fn power_off(node: &Node, qemu: u32) {
    node.sh(format!(
        "(echo system_powerdown; sleep 2) | blanket-agent relay /run/monitor.sock >/dev/null; \
         while [ -e /proc/{qemu} ]; do sleep 0.2; done"
    ))
    .timeout(GUEST_LIMIT)
    .text()
    .unwrap();
}

#[test]
fn a_guest_without_disk_serves_commands_and_obeys_the_power_button() {
    on_node(node_for_guests, |node| {
        let qemu = node.sh(format!("exec {QEMU} -append 'console=ttyS0 quiet'"));
        let qemu = qemu.spawn("/run/qemu.log").unwrap();
        let guest = guest_of(node);
        assert_eq!(guest.command("hostname").text().unwrap(), "guest\n");
        let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n % 253) as u8).collect();
        guest.write("/tmp/file", 0o600, &bytes).unwrap();
        assert!(guest.read("/tmp/file").unwrap() == bytes);
        power_off(node, qemu);
    });
}

#[test]
#[ignore = "the hvm machine's own test boots the same disk"]
fn a_debian_guest_boots_from_its_disk_and_serves_its_page() {
    on_node(node_for_guests, |node| {
        node.sh(
            "ip tuntap add tap0 mode tap; ip address add 10.0.0.1/24 dev tap0; ip link set tap0 up",
        )
        .text()
        .unwrap();
        let qemu = node.sh(format!(
            "exec {QEMU} -drive if=virtio,format=raw,file=/payload/guest/disk.raw \
         -netdev tap,id=n,ifname=tap0,script=no,downscript=no \
         -device virtio-net-pci,netdev=n,romfile= \
         -append 'console=ttyS0 quiet root=/dev/vda blanket.ip=10.0.0.2/24'"
        ));
        let qemu = qemu.spawn("/run/qemu.log").unwrap();
        let guest = guest_of(node);
        let state = guest
            .sh("systemctl is-system-running --wait")
            .timeout(GUEST_LIMIT)
            .run()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&state.stdout), "running\n");
        eprintln!("{}", guest.sh("systemd-analyze").text().unwrap());
        assert_eq!(
            node.command("curl")
                .args(["-s", "http://10.0.0.2/"])
                .text()
                .unwrap(),
            GUEST_PAGE
        );
        power_off(node, qemu);
    });
}
