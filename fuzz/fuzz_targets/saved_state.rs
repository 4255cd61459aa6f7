//! A saved state: whatever it holds, a device takes it over or refuses it, then
//! runs, and a reset afterwards brings it to the state in which it was built.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use blanket_devices::char::{CharPort, Spec};
use blanket_devices::legacy::power::Power;
use blanket_devices::legacy::serial::Serial;
use blanket_devices::lifecycle::{Lifecycle, SavedState};
use blanket_devices::pci::Function;
use blanket_devices::virtio::console::Console;
use blanket_devices::virtio::rng::Rng;
use blanket_devices::xen::blkif::{Block, Options};
use blanket_devices::xen::bus::{Domain, Parts, XenBus};
use blanket_devices::xen::grant::GrantTable;
use blanket_drivers::store::{self, Engine, Format, Image};
use blanket_fuzz::file::MemFile;
use blanket_fuzz::guest::{RAM, ram};
use blanket_fuzz::machine::{disk, virtio, workers};
use blanket_fuzz::xen::Ports;
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Arbitrary, Debug)]
struct Input {
    device: Kind,
    /// Not a state of the device's at all.
    data: Option<Vec<u8>>,
    /// Bytes that differ from a state of the device's: place and value.
    changes: Vec<(u16, u8)>,
    /// The same for the model's own state within a virtio device's.
    inner: Vec<(u8, u8)>,
    version: u8,
}

#[derive(Arbitrary, Debug)]
enum Kind {
    Serial,
    Power,
    Rng,
    Console,
    Disk,
    XenBus,
}

fn port() -> CharPort {
    CharPort::open(&Spec::default()).expect("a port that leads nowhere")
}

/// The xenbus of a guest with a console and a disk, that has not started.
fn bus() -> XenBus {
    let options = Options {
        name: "blk0",
        position: 0,
        queues: 1,
        persistent: true,
    };
    let file = MemFile::new(&[], 64 << 10);
    let image = Image::open(&store::Spec {
        path: file.path(),
        readonly: false,
        format: Some(Format::Raw),
        direct: false,
        backing: false,
        engine: Engine::Auto,
        stripe: Vec::new(),
    });
    let block = Block::new(&options, image.expect("an image"), || Box::new(|| Ok(())));
    let memory = ram();
    let bus = XenBus::new(Parts {
        domain: Domain {
            name: "guest".into(),
            uuid: "0".into(),
            memory: RAM,
            cpus: 2,
        },
        grants: Arc::new(GrantTable::new(memory.clone(), GuestAddress(0), 1)),
        memory,
        events: Arc::new(Ports::default()),
        workers: workers(),
        backends: vec![Box::new(block.expect("a disk"))],
        console: port(),
        setup: Box::new(|| Ok(())),
    });
    bus.expect("a bus")
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

fn change<'a>(data: &mut [u8], changes: impl Iterator<Item = (usize, &'a u8)>) {
    let len = data.len();
    for (at, value) in changes {
        if let Some(byte) = data.get_mut(at % len.max(1)) {
            *byte = *value;
        }
    }
}

/// Changes the model's own state, which lies within the device's as bytes.
fn change_inner(data: &mut Vec<u8>, changes: &[(u8, u8)]) {
    let Ok(mut state) = ciborium::from_reader::<ciborium::Value, _>(data.as_slice()) else {
        return;
    };
    let field = |value: &mut ciborium::Value, name: &str| {
        let map = value.as_map_mut()?;
        let found = map.iter_mut().find(|(key, _)| key.as_text() == Some(name));
        found.map(|(_, value)| std::mem::replace(value, ciborium::Value::Null))
    };
    let Some(mut device) = field(&mut state, "device") else {
        return;
    };
    let Some(ciborium::Value::Array(mut bytes)) = field(&mut device, "data") else {
        return;
    };
    let len = bytes.len().max(1);
    for (at, value) in changes {
        if let Some(byte) = bytes.get_mut(usize::from(*at) % len) {
            *byte = (*value).into();
        }
    }
    put(&mut device, "data", ciborium::Value::Array(bytes));
    put(&mut state, "device", device);
    data.clear();
    ciborium::into_writer(&state, data).expect("a vector takes it");
}

fn put(value: &mut ciborium::Value, name: &str, new: ciborium::Value) {
    let map = value.as_map_mut().expect("a map");
    let found = map.iter_mut().find(|(key, _)| key.as_text() == Some(name));
    found.expect("a field").1 = new;
}

fn attempt(device: &mut dyn Lifecycle, input: Input) -> bool {
    device.start().expect("a start");
    device.pause().expect("a rest");
    let built = device.save().expect("a state to save");
    let mut data = built.data.clone();
    change_inner(&mut data, &input.inner);
    change(
        &mut data,
        input
            .changes
            .iter()
            .map(|(at, value)| ((*at).into(), value)),
    );
    let state = SavedState {
        version: u32::from(input.version),
        data: input.data.unwrap_or(data),
        ..built.clone()
    };
    let restored = device.restore(&state).is_ok();
    if restored {
        // It may run, and be saved again.
        device.resume().expect("a worker");
        device.pause().expect("a rest");
        device.save().expect("a state to save");
    }
    device.reset().expect("a reset");
    assert_eq!(device.save().expect("a state to save"), built);
    device.restore(&built).expect("its own state");
    device.resume().expect("a worker");
    device.halt();
    restored
}

fuzz_target!(|input: Input| {
    let mut virtio = match input.device {
        Kind::Power => {
            attempt(&mut Power::new(event()), input);
            return;
        }
        Kind::Serial => {
            let serial = Serial::new(port(), event(), workers());
            attempt(&mut serial.expect("a serial port"), input);
            return;
        }
        Kind::XenBus => {
            attempt(&mut bus(), input);
            return;
        }
        Kind::Rng => virtio(Box::new(Rng::new("rng0")), &ram(), 0),
        Kind::Console => virtio(Box::new(Console::new("console0", port())), &ram(), 0),
        Kind::Disk => virtio(Box::new(disk(64 << 10)), &ram(), 0),
    };
    attempt(&mut virtio, input);
    // What the bus would do with it now.
    virtio.window_moved(true);
});
