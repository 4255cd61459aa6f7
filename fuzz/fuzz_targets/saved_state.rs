//! A saved state: whatever it holds, a device takes it over or refuses it, then
//! runs, and a reset afterwards brings it to the state in which it was built.
#![no_main]

use arbitrary::Arbitrary;
use blanket_devices::char::{CharPort, Spec};
use blanket_devices::legacy::power::Power;
use blanket_devices::legacy::serial::Serial;
use blanket_devices::lifecycle::{Lifecycle, SavedState};
use blanket_devices::pci::Function;
use blanket_devices::virtio::console::Console;
use blanket_devices::virtio::rng::Rng;
use blanket_fuzz::guest::ram;
use blanket_fuzz::machine::{disk, virtio, workers};
use libfuzzer_sys::fuzz_target;
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
}

fn port() -> CharPort {
    CharPort::open(&Spec::default()).expect("a port that leads nowhere")
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
        Kind::Rng => virtio(Box::new(Rng::new("rng0")), &ram(), 0),
        Kind::Console => virtio(Box::new(Console::new("console0", port())), &ram(), 0),
        Kind::Disk => virtio(Box::new(disk(64 << 10)), &ram(), 0),
    };
    attempt(&mut virtio, input);
    // What the bus would do with it now.
    virtio.window_moved(true);
});
