//! How a machine's disks are.

use std::path::Path;
use std::sync::Arc;

use blanket_devices::virtio::blk::Metrics;
use blanket_drivers::store::Image;

use crate::api::types::DeviceInfo;
use crate::vcpu::{Event, EventSink};

/// What is known of a disk's image while it is in use.
pub(crate) struct Health {
    device: String,
    counters: Arc<Metrics>,
    volumes: Vec<(u32, u32)>,
}

impl Health {
    /// Of a disk of the name `device` on block devices with these numbers. `events` is told when
    /// it is full.
    pub(crate) fn new(
        device: &str,
        volumes: Vec<(u32, u32)>,
        counters: Arc<Metrics>,
        events: &EventSink,
    ) -> Self {
        let events = Arc::clone(events);
        counters.when_full(move || events(Event::DiskFull));
        Self {
            device: device.to_owned(),
            counters,
            volumes,
        }
    }

    /// Whether a write waits for room.
    pub(crate) fn waits_for_room(&self) -> bool {
        self.counters.held() > 0
    }

    /// Adds what is wrong to the description of the disk.
    pub(crate) fn tell(&self, described: &mut [DeviceInfo]) {
        let own = described.iter_mut().find(|it| it.name == self.device);
        if let Some(info) = own {
            info.trouble = self.missing().or_else(|| self.counters.trouble());
        }
    }

    /// A volume that has been taken away while it was in use. Its number stays
    /// taken until it is closed.
    fn missing(&self) -> Option<String> {
        let all = Path::new("/sys/dev/block");
        // A container may not show them.
        let is_there = |(major, minor): &(u32, u32)| {
            !all.exists() || all.join(format!("{major}:{minor}")).exists()
        };
        let (major, minor) = self.volumes.iter().find(|number| !is_there(number))?;
        Some(format!(
            "its volume (device {major}:{minor}) is gone: what was flushed is on it; attach it again and start the VM anew"
        ))
    }
}

/// The name of the engine that serves an image.
pub(crate) fn engine(image: &Image) -> String {
    image.engine().name().to_owned()
}
