//! A pv machine that is saved goes on in another machine: in the midst of its
//! kernel's start, or under load, whether its guest is told or not.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blanket_devices::lifecycle::SavedState;
use blanket_testbed::{BootImages, Kernel, KernelFlavor};
use blanket_vmm::config::{ByteSize, CharConfig, MachineChoice, VmConfig};
use blanket_vmm::machine::Machine as _;
use blanket_vmm::pv::{Machine, Parts};
use blanket_vmm::vcpu::{Event, EventSink};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// Without a root file system the kernel's start ends with these words.
const LAST_WORDS: &str = "Unable to mount root fs";
const FIRST_WORDS: &str = "Linux version";

fn config(kernel: &Kernel, log: &Path) -> VmConfig {
    VmConfig {
        machine: Some(MachineChoice::Pv),
        kernel: Some(kernel.vmlinuz()),
        memory: Some(ByteSize(128 << 20)),
        cmdline: Some("console=hvc0 panic=-1".to_owned()),
        console: Some(CharConfig {
            log: Some(log.to_owned()),
            ..CharConfig::default()
        }),
        ..VmConfig::default()
    }
}

fn build(config: &VmConfig) -> (Machine, Receiver<Event>) {
    let (events, receiver) = channel();
    let events = Mutex::new(events);
    let sink: EventSink = Arc::new(move |event| {
        let _ = events.lock().unwrap().send(event);
    });
    let parts = Parts::open(config, Default::default()).unwrap();
    (Machine::build(config, parts, &sink).unwrap(), receiver)
}

fn wait_for(log: &Path, words: &str) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        let text = std::fs::read(log).unwrap_or_default();
        if String::from_utf8_lossy(&text).contains(words) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

fn copy_memory(from: &Machine, to: &Machine) {
    for (from, to) in from.memory().iter().zip(to.memory().iter()) {
        assert_eq!(from.len(), to.len());
        // SAFETY: both are mappings of that length, of machines that are at rest.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.len() as usize);
        }
    }
}

fn kvm_is_there() -> bool {
    let opened = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = &opened {
        println!("skipped, because /dev/kvm cannot be used: {error}");
    }
    opened.is_ok()
}

#[test]
fn a_kernel_that_is_saved_in_its_start_goes_on_in_another_machine() {
    if !kvm_is_there() {
        return;
    }
    let kernel = Kernel::get(KernelFlavor::Cloud).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (first_log, second_log) = (folder.path().join("first"), folder.path().join("second"));

    let (mut first, _events) = build(&config(&kernel, &first_log));
    first.load().unwrap();
    first.start().unwrap();
    assert!(wait_for(&first_log, FIRST_WORDS));
    first.pause().unwrap();
    let state = first.save().unwrap();

    let (mut second, events) = build(&config(&kernel, &second_log));
    copy_memory(&first, &second);
    first.halt();
    second.restore(&state).unwrap();
    second.resume().unwrap();
    assert!(wait_for(&second_log, LAST_WORDS));
    let ending = events.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(
        matches!(ending, Event::Reset | Event::Failed(_)),
        "{ending:?}"
    );
    second.halt();
    let text = std::fs::read_to_string(&second_log).unwrap();
    assert!(!text.contains(FIRST_WORDS), "it began anew");
}

/// What a guest does on two vCPUs: one computes, the other writes to its disk,
/// reads back and compares. It says so at each round.
const LOAD: &str = "export PATH=/usr/bin:/usr/sbin; busybox mount -t proc p /proc; \
    mount -t devtmpfs d /dev; mount -t sysfs s /sys; modprobe xen_blkfront; mount -t tmpfs t /tmp; \
    until [ -b /dev/xvda ]; do sleep 0.1; done; echo begin; \
    while :; do :; done & \
    i=0; while :; do i=$((i+1)); at=$((i%16*32)); seq $i $((i+30000)) | head -c 131072 > /tmp/a; \
    dd if=/tmp/a of=/dev/xvda bs=4k seek=$at conv=fsync,notrunc 2>/tmp/e || cat /tmp/e; \
    echo 3 >/proc/sys/vm/drop_caches; \
    dd if=/dev/xvda bs=4k skip=$at count=32 2>/tmp/e | cmp - /tmp/a || echo wrong $i; \
    echo round $i; done";

/// Machines for one guest, one after the other, with one disk.
struct Moves {
    folder: tempfile::TempDir,
    images: BootImages,
    machines: usize,
}

/// One of them.
struct Stage {
    machine: Machine,
    events: Receiver<Event>,
    log: PathBuf,
}

/// What is carried from one to the next.
struct Carried {
    state: SavedState,
    memory: Vec<Vec<u8>>,
}

impl Moves {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk = std::fs::File::create(folder.path().join("disk")).unwrap();
        disk.set_len(16 << 20).unwrap();
        Self {
            folder,
            images: BootImages::get(KernelFlavor::Cloud).unwrap(),
            machines: 0,
        }
    }

    fn config(&self, log: &Path) -> VmConfig {
        let disk = self.folder.path().join("disk");
        VmConfig {
            machine: Some(MachineChoice::Pv),
            kernel: Some(self.images.vmlinuz.clone()),
            initrd: Some(self.images.initrd.clone()),
            memory: Some(ByteSize(192 << 20)),
            cpus: Some(2),
            cmdline: Some(format!(
                "console=hvc0 loglevel=4 panic=-1 rdinit=/bin/sh -- -c \"{LOAD}\""
            )),
            console: Some(CharConfig {
                log: Some(log.to_owned()),
                ..CharConfig::default()
            }),
            disk: vec![toml::from_str(&format!("path = {disk:?}")).unwrap()],
            ..VmConfig::default()
        }
    }

    fn stage(&mut self) -> Stage {
        self.machines += 1;
        let log = self.folder.path().join(format!("log{}", self.machines));
        let (machine, events) = build(&self.config(&log));
        Stage {
            machine,
            events,
            log,
        }
    }

    /// A machine in which the guest starts.
    fn start(&mut self) -> Stage {
        let mut stage = self.stage();
        stage.machine.load().unwrap();
        stage.machine.start().unwrap();
        stage
    }

    /// Another one, in which it goes on.
    fn go_on(&mut self, carried: &Carried) -> Stage {
        let mut stage = self.stage();
        stage.machine.check(&carried.state).unwrap();
        for (to, from) in stage.machine.memory().iter().zip(&carried.memory) {
            assert_eq!(to.len() as usize, from.len());
            to.write_slice(from, MemoryRegionAddress(0)).unwrap();
        }
        stage.machine.restore(&carried.state).unwrap();
        assert!(!stage.machine.is_suspended());
        stage.machine.resume().unwrap();
        stage
    }
}

impl Stage {
    fn text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned()
    }

    /// The last round that the guest told of here.
    fn round(&self) -> u32 {
        let text = self.text();
        let mut rounds = text.lines().filter_map(|line| line.strip_prefix("round "));
        rounds
            .next_back()
            .map_or(0, |last| last.trim().parse().unwrap())
    }

    /// Waits for more rounds.
    fn works_on(&self) {
        let goal = self.round() + 5;
        let deadline = Instant::now() + Duration::from_secs(100);
        while self.round() < goal {
            assert!(Instant::now() < deadline, "it stays:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The guest suspends itself, and the machine is at rest.
    fn suspend(&mut self) {
        self.machine.suspend().unwrap();
        let event = self.events.recv_timeout(Duration::from_secs(60));
        assert_eq!(event, Ok(Event::Suspended), "{}", self.text());
        self.machine.pause().unwrap();
        assert!(self.machine.is_suspended());
    }

    /// Everything of a machine at rest, which ends.
    fn carry(mut self) -> (Carried, u32) {
        let state = self.machine.save().unwrap();
        let mut memory = Vec::new();
        for region in self.machine.memory().iter() {
            let mut bytes = vec![0; region.len() as usize];
            region
                .read_slice(&mut bytes, MemoryRegionAddress(0))
                .unwrap();
            memory.push(bytes);
        }
        self.machine.halt();
        self.is_content();
        (Carried { state, memory }, self.round())
    }

    /// The guest found nothing wrong.
    fn is_content(&self) {
        let text = self.text();
        for complaint in [
            "wrong",
            "error",
            "Call Trace",
            "BUG",
            "stall",
            "cmp:",
            "lockup",
        ] {
            assert!(!text.contains(complaint), "{complaint}:\n{text}");
        }
    }

    fn connections(&self) -> u64 {
        self.machine.metrics().devices["blk0"]["connections"]
    }
}

#[test]
fn a_guest_under_load_that_is_not_told_goes_on_with_its_rings_in_other_machines() {
    if !kvm_is_there() {
        return;
    }
    let mut moves = Moves::new();
    let mut stage = moves.start();
    for _ in 0..4 {
        stage.works_on();
        stage.machine.pause().unwrap();
        let (carried, round) = stage.carry();
        stage = moves.go_on(&carried);
        stage.works_on();
        assert!(stage.round() > round);
        assert!(!stage.text().contains("begin"), "it began anew");
        assert_eq!(stage.connections(), 0, "its driver has connected again");
    }
    stage.machine.halt();
    stage.is_content();
}

#[test]
fn a_guest_that_suspends_itself_goes_on_in_a_new_domain_or_as_it_was() {
    if !kvm_is_there() {
        return;
    }
    let mut moves = Moves::new();
    let mut stage = moves.start();
    for _ in 0..3 {
        stage.works_on();
        let connections = stage.connections();
        // Twice where it is: cancelled.
        for _ in 0..2 {
            stage.suspend();
            stage.machine.resume().unwrap();
            assert!(!stage.machine.is_suspended());
            stage.works_on();
        }
        assert_eq!(stage.connections(), connections);
        stage.suspend();
        let (carried, round) = stage.carry();
        stage = moves.go_on(&carried);
        stage.works_on();
        assert!(stage.round() > round);
        assert!(!stage.text().contains("begin"), "it began anew");
        assert_eq!(stage.connections(), 1, "its driver has not connected again");
    }
    stage.machine.pause().unwrap();
    // Not told, afterwards, works too.
    let (carried, _) = stage.carry();
    stage = moves.go_on(&carried);
    stage.works_on();
    stage.machine.halt();
    stage.is_content();
}

#[test]
fn a_saved_guest_is_refused_by_a_machine_that_differs_before_anything_is_touched() {
    if !kvm_is_there() {
        return;
    }
    let kernel = Kernel::get(KernelFlavor::Cloud).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let (mut saved, _events) = build(&config(&kernel, &log));
    saved.load().unwrap();
    let state = saved.save().unwrap();
    saved.check(&state).unwrap();
    saved.halt();
    let refused = |change: &dyn Fn(&mut VmConfig), why: &str| {
        let mut config = config(&kernel, &log);
        change(&mut config);
        let (mut other, _events) = build(&config);
        other.load().unwrap();
        // The clock stands still then.
        other.pause().unwrap();
        let before = other.save().unwrap();
        for error in [
            other.check(&state).unwrap_err(),
            other.restore(&state).unwrap_err(),
        ] {
            assert!(error.to_string().contains(why), "{error}");
        }
        assert!(other.save().unwrap() == before, "it was touched");
        other.halt();
    };
    refused(
        &|config| config.memory = Some(ByteSize(256 << 20)),
        "other memory",
    );
    refused(&|config| config.cpus = Some(2), "other vCPUs");
    refused(
        &|config| config.trust_guest_user = Some(true),
        "--trust-guest-user",
    );
    let newer = SavedState {
        version: state.version + 1,
        ..state.clone()
    };
    let (other, _events) = build(&config(&kernel, &log));
    let error = other.check(&newer).unwrap_err().to_string();
    assert!(error.contains("upgrade this node"), "{error}");
}
