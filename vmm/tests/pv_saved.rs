//! A pv machine that is saved in the midst of its kernel's start goes on in
//! another machine.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blanket_testbed::{Kernel, KernelFlavor};
use blanket_vmm::config::{ByteSize, CharConfig, MachineChoice, VmConfig};
use blanket_vmm::machine::Machine as _;
use blanket_vmm::pv::{Machine, Parts};
use blanket_vmm::vcpu::{Event, EventSink};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

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
    let parts = Parts::open(config).unwrap();
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

#[test]
fn a_kernel_that_is_saved_in_its_start_goes_on_in_another_machine() {
    if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        println!("skipped, because /dev/kvm cannot be used: {error}");
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
