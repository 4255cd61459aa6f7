//! The VM on its way to another monitor, or from one.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blanket_devices::lifecycle::SavedState;
use blanket_migration::wire::{decode, encode};
use blanket_migration::{Destination, Disks, Status};
use serde::{Deserialize, Serialize};

use super::{Ending, Error, Monitor, Vm};
use crate::api::types::VmState;
use crate::config::VmConfig;
use crate::migrate::{self, Departure, Frames, HandOver, Offered, Order, Tracked, What};

/// What is handed over of a guest whose memory is there.
#[derive(Serialize, Deserialize)]
struct Handed {
    /// Its machine's.
    state: SavedState,
    /// It was paused, and stays so.
    paused: bool,
}

impl Monitor {
    /// Lets a guest's destination come to `listener`.
    pub fn set_exit(&mut self, listener: UnixListener) {
        self.exit = Some(Arc::new(listener));
    }

    /// Has the guest leave for the destination that comes next; the
    /// configuration that its machine has to have.
    ///
    /// # Errors
    /// It has not been started, or cannot be moved.
    pub fn depart(&mut self, request: migrate::Request) -> Result<VmConfig, Error> {
        let Some(listener) = self.exit.clone() else {
            let text = "its monitor was started without --migration-socket";
            return Err(Error::Unmovable(text.to_owned()));
        };
        let vm = self.vm()?;
        let states = match request.replicate_ms {
            // A point stops a guest that runs, for a moment.
            Some(_) => &[VmState::Running][..],
            None => &[VmState::Running, VmState::Paused],
        };
        vm.expect(states, "be migrated")?;
        if vm.state == VmState::Paused && vm.machine.waits_for_room() {
            const WHY: &str = "a disk of its has no room here for what it writes: make some first";
            return Err(Error::Unmovable(WHY.to_owned()));
        }
        if vm.live.strong_count() > 0 {
            return Err(Error::Saving);
        }
        vm.is_not_migrated()?;
        vm.is_not_saved()?;
        vm.at_rest = vm.state == VmState::Paused;
        if let Some(interval) = request.replicate_ms {
            let departure = Departure {
                listener,
                machine: Vec::new(),
                descriptors: Vec::new(),
                disks: vm.devices.contents(),
                frames: Frames::default(),
                brakes: Arc::new([]),
                options: request.options,
            };
            let interval = Duration::from_millis(interval);
            vm.migrator.replicate(vm.memory(), departure, interval);
            return Ok(vm.settled_config());
        }
        let files = request.hand_over || request.shared_disks;
        let checked = vm.devices.check(files);
        checked.map_err(Error::Unmovable)?;
        if let Ok(pager) = &vm.pager {
            let complete = pager.complete();
            complete.map_err(|error| Error::Unmovable(format!("its memory: {error}")))?;
        }
        let config = vm.settled_config();
        if request.dry_run {
            let disks = match files {
                true => Arc::new([]) as Arc<Disks>,
                false => vm.devices.contents(),
            };
            vm.migrator.measure(vm.memory(), disks);
            return Ok(config);
        }
        let likeness = vm.machine.likeness()?;
        vm.devices.share(request.shared_disks);
        let devices = request.hand_over.then_some(&vm.devices);
        let shared = request.shared_disks;
        let offered = Offered::new(config.clone(), likeness, devices, shared);
        let departure = Departure {
            listener,
            machine: encode(&offered).map_err(|error| Error::Unmovable(error.to_string()))?,
            descriptors: devices.map(HandOver::descriptors).unwrap_or_default(),
            disks: match files {
                true => Arc::new([]),
                false => vm.devices.contents(),
            },
            frames: match devices {
                // The taps go along.
                Some(_) => Frames::default(),
                None => vm.devices.frames(),
            },
            brakes: vm.machine.brakes().into(),
            options: request.options,
        };
        vm.migrator.depart(vm.memory(), departure);
        Ok(config)
    }

    /// How far the migration is, or how it went.
    ///
    /// # Errors
    /// There is no VM.
    pub fn migration(&mut self) -> Result<Status, Error> {
        let vm = self.vm()?;
        let mut status = vm.migrator.progress().status();
        status.dirty_by = Some(vm.dirty_by().to_owned());
        status.paused = vm.at_rest;
        Ok(status)
    }

    /// Ends the migration, if the guest has not been handed over.
    ///
    /// # Errors
    /// There is no VM.
    pub fn cancel_migration(&mut self) -> Result<Status, Error> {
        let vm = self.vm()?;
        vm.migrator.progress().cancel();
        Ok(vm.migrator.progress().status())
    }

    /// Receives the guest of `source` in the machine, which has not been started.
    ///
    /// # Errors
    /// The machine is not like the source's: it has been told so.
    pub fn arrive(&mut self, source: Destination, offered: &Offered) -> Result<(), Error> {
        let vm = self.vm()?;
        if let Err(error) = vm.machine.is_like(&offered.likeness) {
            source.refuse(&error.to_string());
            return Err(error.into());
        }
        let disks = match offered.copies {
            true => vm.devices.contents(),
            false => Arc::new([]),
        };
        let frames = match offered.own_taps {
            true => vm.devices.frames(),
            false => Frames::default(),
        };
        if let Err(error) = frames.hold() {
            source.refuse(&error.to_string());
            return Err(Error::Unmovable(error.to_string()));
        }
        vm.own_taps = offered.own_taps;
        let (memory, pager) = (vm.memory(), vm.pager.clone());
        vm.migrator.arrive(memory, disks, pager, frames, source);
        Ok(())
    }

    /// Whether content of the disks of a guest that came is still on its way.
    #[must_use]
    pub fn awaits_disks(&self) -> bool {
        let vm = self.vm.as_ref();
        vm.is_some_and(|vm| !vm.moved && vm.migrator.awaits_disks())
    }

    /// Does what a migration wants; the ending, if that ends the process.
    pub fn carry_out(&mut self, order: Order) -> Option<Ending> {
        let ending = match order.what {
            What::End => Some(Ending::Moved),
            What::Fail(ref reason) => Some(Ending::Failed(reason.clone())),
            _ => None,
        };
        let done = self.vm().and_then(|vm| vm.carry_out(order.what));
        // Who does not wait for the answer is not there any more.
        let _ = order.answer.send(done.map_err(|error| error.to_string()));
        ending
    }
}

impl Vm {
    /// In which way KVM tells what its guest writes.
    fn dirty_by(&self) -> &'static str {
        match self.machine.rings() {
            Some(_) => "ring",
            None => "log",
        }
    }

    /// What the guest is in, with KVM's knowledge of it.
    fn memory(&self) -> Tracked {
        Tracked {
            ram: self.machine.memory().clone(),
            vm: self.machine.vm(),
            rings: self.machine.rings(),
            touched: self.touched.clone(),
            loggers: self.devices.loggers().to_vec(),
            logs: Vec::new(),
        }
    }

    /// Stops the guest if it runs; what is handed over of it.
    fn stop(&mut self) -> Result<Vec<u8>, Error> {
        if !self.at_rest {
            self.machine.pause()?;
            self.state = VmState::Paused;
        }
        let handed = Handed {
            state: self.machine.save()?,
            paused: self.at_rest,
        };
        let flushed = self.devices.flush_shared();
        flushed.map_err(|error| Error::Unmovable(format!("a disk: {error}")))?;
        encode(&handed).map_err(|error| Error::Unmovable(error.to_string()))
    }

    /// Has the guest run on, unless it had been paused.
    fn go_on(&mut self) -> Result<(), Error> {
        if !self.at_rest {
            self.machine.resume()?;
            self.state = VmState::Running;
        }
        Ok(())
    }

    fn carry_out(&mut self, what: What) -> Result<Vec<u8>, Error> {
        match what {
            What::Stop => {
                // It may have been paused meanwhile, for want of room.
                let state = match self.at_rest {
                    true => VmState::Paused,
                    false => VmState::Running,
                };
                self.expect(&[state], "be handed over")?;
                let handed = self.stop();
                if handed.is_err() {
                    self.go_on()?;
                }
                return handed;
            }
            What::Resume => self.go_on()?,
            What::Run => {
                self.devices.lock_shared();
                self.go_on()?;
                if self.own_taps {
                    self.devices.frames().forget();
                }
                self.devices.announce();
            }
            // Its devices are another's, too: nothing is flushed or let go.
            What::GiveUp => {
                self.moved = true;
                self.devices.unlock_shared();
                self.state = VmState::Stopped;
            }
            What::Restore(bytes) => {
                let handed: Handed =
                    decode(&bytes).map_err(|error| Error::Unmovable(error.to_string()))?;
                self.machine.check(&handed.state)?;
                self.machine.restore(&handed.state)?;
                self.machine.set_name(&self.name)?;
                self.at_rest = handed.paused;
                self.booted = Some(Instant::now());
                self.state = VmState::Paused;
            }
            What::End | What::Fail(_) => {}
        }
        Ok(Vec::new())
    }
}
