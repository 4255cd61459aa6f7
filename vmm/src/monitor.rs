//! The life of the one VM of this process.
//!
//! ```text
//!            create()           boot()            pause()
//!   (none) ───────────▶ created ──────▶ running ◀────────▶ paused
//!                          │               │      resume()    │
//!                          └───────────────┼──────────────────┘
//!                    poweroff(), the guest's own poweroff, a failure
//!                                          ▼
//!                                       stopped ──▶ the process exits
//! ```
//!
//! `reset()` leads from running or paused to running. A guest that suspends
//! itself brings its VM from running to suspended, which is a pause that the
//! guest knows of; `resume()` leads from there to running too.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Weak};
use std::time::Instant;

use blanket_memory::GuestRam;
use blanket_memory::uffd::Uffd;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::api::types::{self, Action, Metrics, Problem, Target, VmInfo, VmState};
use crate::config::{HugePages, MachineChoice, OnReboot, VmConfig};
use crate::jail::privileges::{self, User};
use crate::jail::{Class, seccomp};
use crate::machine::{Ahead, Given, Machine, Parts, setup};
use crate::migrate::{HandOver, Migrator, Order};
use crate::snapshot::pager::{Live, Pager, WorkingSet};
use crate::snapshot::{self, Head, Pieces, Regions, Snapshot, Touched};
use crate::timeline::Timeline;
use crate::vcpu::{Event, EventSink};

mod migration;

/// Why an action was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no VM yet.
    #[error("there is no VM yet: PUT its configuration to /vm first")]
    NoVm,
    /// There is one already.
    #[error("this process has its VM already: start another blanket-vmm")]
    Exists,
    /// The action makes no sense in this state.
    #[error("the VM is {state}: it cannot {action}")]
    State {
        /// Where it is.
        state: VmState,
        /// What was asked.
        action: &'static str,
    },
    /// The configuration cannot work.
    #[error(transparent)]
    Config(#[from] crate::config::Error),
    /// The machine cannot be built.
    #[error(transparent)]
    Build(#[from] crate::machine::Error),
    /// The guest cannot be asked for that.
    #[error(transparent)]
    Target(#[from] crate::machine::TargetError),
    /// The guest cannot be asked for that.
    #[error(transparent)]
    Request(#[from] crate::machine::RequestError),
    /// Its snapshot is being written.
    #[error("the VM's snapshot is being written: wait until it is, or end the command that does")]
    Saving,
    /// It cannot be saved while it runs.
    #[error("{0}: pause it first")]
    NotLive(String),
    /// The snapshot cannot be read.
    #[error("cannot restore from the snapshot: {0}")]
    Snapshot(#[from] snapshot::Error),
    /// The snapshot cannot be written.
    #[error("cannot make the snapshot: {0}")]
    Write(std::io::Error),
    /// It is on its way to another monitor, or from one.
    #[error("the VM is being migrated: wait until it is, or cancel that")]
    Migrating,
    /// A replica of its disks is kept.
    #[error("a replica of the VM's disks is kept up to date: end blanket replicate first")]
    Replicating,
    /// Its memory or its disks are on their way.
    #[error(
        "memory or disks of the VM are still on their way between two monitors, {} MiB: wait until all of it is there",
        .0.div_ceil(1 << 20)
    )]
    Following(u64),
    /// It cannot be migrated.
    #[error("the VM cannot be migrated: {0}")]
    Unmovable(String),
    /// The monitor cannot be confined.
    #[error("cannot confine the monitor: {0}")]
    Jail(std::io::Error),
    /// A device or vCPU failed the step.
    #[error(transparent)]
    Lifecycle(#[from] blanket_devices::lifecycle::Error),
}

impl From<&Error> for Problem {
    fn from(error: &Error) -> Self {
        Self {
            error: error.to_string(),
            remedy: None,
        }
    }
}

/// How the VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Powered off, by the guest or by request.
    PowerOff,
    /// The guest rebooted and `on_reboot` is `exit`.
    Reboot,
    /// It failed; the message says why.
    Failed(String),
    /// Its guest runs in another monitor.
    Moved,
}

/// What the monitor is to hear of.
pub struct Wishes {
    /// What guests did, for [`Monitor::handle`].
    pub events: UnboundedReceiver<Event>,
    /// What a migration wants, for [`Monitor::carry_out`].
    pub orders: UnboundedReceiver<Order>,
}

/// The VM of this process, if it has one yet.
pub struct Monitor {
    id: String,
    user: User,
    timeline: Timeline,
    vm: Option<Vm>,
    events: UnboundedSender<Event>,
    orders: UnboundedSender<Order>,
    /// Where a guest's destination comes.
    exit: Option<Arc<UnixListener>>,
    /// What the machine's VM will be.
    ahead: Option<Ahead>,
}

struct Vm {
    name: String,
    config: VmConfig,
    machine: Box<dyn Machine>,
    state: VmState,
    booted: Option<Instant>,
    /// Lives as long as its snapshot is being written.
    saving: Weak<()>,
    /// The same where it runs on meanwhile. The pager has this to do only.
    live: Weak<()>,
    /// Which pages of its memory have to be looked at.
    touched: Touched,
    /// What moves its memory while it runs, or why there is nothing.
    pager: Result<Arc<Pager>, String>,
    migrator: Migrator,
    devices: HandOver,
    /// Its taps are not those that its guest had where it came from.
    own_taps: bool,
    /// Its guest was paused when it left, or came: it stays so.
    at_rest: bool,
    /// It is another monitor's.
    moved: bool,
}

/// What the monitor sends of a snapshot.
pub enum Sending {
    /// Of a VM that rests until it is sent.
    Resting(Pieces),
    /// Of one that runs on. Another one can be begun when the second is gone.
    Live(Live, Arc<()>),
}

/// How a saved guest's memory comes back.
pub enum Loading {
    /// All of it, before the guest goes on.
    Eager,
    /// What was needed first the last time, then the rest when it is needed.
    Lazy(WorkingSet),
}

impl Monitor {
    /// A monitor without a VM, and what comes of it.
    #[must_use]
    pub fn new(id: String, user: User, timeline: Timeline) -> (Self, Wishes) {
        let (events, happened) = unbounded_channel();
        let (orders, ordered) = unbounded_channel();
        let wishes = Wishes {
            events: happened,
            orders: ordered,
        };
        let monitor = Self {
            id,
            user,
            timeline,
            vm: None,
            events,
            orders,
            exit: None,
            ahead: None,
        };
        (monitor, wishes)
    }

    /// The steps so far.
    pub fn timeline(&mut self) -> &mut Timeline {
        &mut self.timeline
    }

    /// Has the machine be built on a VM that is being made.
    pub fn set_ahead(&mut self, vm: Ahead) {
        self.ahead = Some(vm);
    }

    /// Builds the machine and confines this process for good.
    ///
    /// # Errors
    /// The configuration cannot work here. A process that is not confined yet
    /// may try another one.
    pub fn create(&mut self, config: VmConfig) -> Result<(), Error> {
        self.create_with(config, Given::default())
    }

    /// The same with devices that another monitor has given.
    ///
    /// # Errors
    /// As [`Monitor::create`].
    pub fn create_with(&mut self, config: VmConfig, given: Given) -> Result<(), Error> {
        if self.vm.is_some() {
            return Err(Error::Exists);
        }
        config.validate()?;
        let shared = given.shared;
        let ahead = self.ahead.take();
        let made = ahead.as_ref().map(Ahead::made);
        let parts = Parts::open(&config, given.with_vm(ahead))?;
        if let Some(at) = made.as_ref().and_then(|made| made.get()) {
            self.timeline.mark_at("VM made ahead", *at);
        }
        let mut devices = parts.hand_over().map_err(Error::Jail)?;
        devices.share(shared);
        let touched = Touched::open();
        let uffd = Uffd::open();
        self.timeline.mark("resources opened");
        privileges::drop_privileges(self.user).map_err(Error::Jail)?;
        let events = self.events.clone();
        let sink: EventSink = Arc::new(move |event| {
            // The receiver lives as long as the process serves.
            let _ = events.send(event);
        });
        let mut machine = parts.build(&config, &sink)?;
        machine.set_name(&self.id)?;
        let migrator = Migrator::spawn(self.orders.clone()).map_err(Error::Jail)?;
        self.timeline.mark("machine built");
        let cpu = machine.cpu();
        let reason = cpu.why.as_ref().map(ToString::to_string);
        tracing::info!(model = ?cpu.settled(), reason, "processor chosen");
        let pager = pager(&config, machine.memory(), uffd);
        seccomp::confine(Class::Main).map_err(Error::Jail)?;
        self.vm = Some(Vm {
            name: self.id.clone(),
            config,
            machine,
            state: VmState::Created,
            booted: None,
            saving: Weak::new(),
            live: Weak::new(),
            touched,
            pager,
            migrator,
            devices,
            own_taps: false,
            at_rest: false,
            moved: false,
        });
        Ok(())
    }

    fn vm(&mut self) -> Result<&mut Vm, Error> {
        self.vm.as_mut().ok_or(Error::NoVm)
    }

    /// Loads the kernel and starts the guest.
    ///
    /// # Errors
    /// The VM has been started, or its kernel cannot be loaded.
    pub fn boot(&mut self) -> Result<(), Error> {
        let vm = self.vm.as_mut().ok_or(Error::NoVm)?;
        vm.expect(&[VmState::Created], "be started")?;
        vm.machine.load()?;
        self.timeline.mark("kernel loaded");
        vm.machine.start()?;
        self.timeline.mark("vCPUs started");
        vm.booted = Some(Instant::now());
        vm.state = VmState::Running;
        Ok(())
    }

    /// Puts the saved guest into the machine, which has not been started: it is
    /// paused then.
    ///
    /// # Errors
    /// The snapshot is damaged, or of a machine or processor that differs.
    pub fn restore(&mut self, snapshot: &mut Snapshot, how: Loading) -> Result<(), Error> {
        let vm = self.vm.as_mut().ok_or(Error::NoVm)?;
        vm.expect(&[VmState::Created], "be restored")?;
        vm.machine.check(snapshot.state())?;
        match (&*snapshot, &vm.pager, how) {
            (Snapshot::File(reader), Ok(pager), Loading::Lazy(set)) => {
                if *reader.regions() != Regions::of(vm.machine.memory()) {
                    return Err(snapshot::Error::Memory.into());
                }
                let armed = pager.restore(Arc::clone(reader), set);
                armed.map_err(snapshot::Error::Io)?;
                self.timeline.mark("memory comes when needed");
            }
            _ => {
                snapshot.load(vm.machine.memory(), vm.touched.clone())?;
                self.timeline.mark("memory restored");
            }
        }
        vm.machine.restore(snapshot.state())?;
        vm.machine.set_name(&vm.name)?;
        vm.machine.new_generation()?;
        self.timeline.mark("machine restored");
        vm.booted = Some(Instant::now());
        vm.state = VmState::Paused;
        Ok(())
    }

    /// The snapshot of a VM: one at rest does not go on before it is sent; one
    /// that runs is held for a moment.
    ///
    /// # Errors
    /// It has not been started, cannot be saved while it runs, or its state
    /// cannot be had.
    pub fn snapshot(&mut self) -> Result<Sending, Error> {
        let name = self.id.clone();
        let vm = self.vm()?;
        vm.expect(&Vm::STARTED, "be saved")?;
        vm.is_not_migrated()?;
        if vm.live.strong_count() > 0 {
            return Err(Error::Saving);
        }
        if let Ok(pager) = &vm.pager {
            pager.complete().map_err(Error::Write)?;
        }
        let mut head = Head::new(name, vm.settled_config());
        head.suspended = vm.state == VmState::Suspended;
        let hold = Arc::new(());
        if vm.state == VmState::Running {
            let live = vm.begin_live(&head)?;
            vm.live = Arc::downgrade(&hold);
            return Ok(Sending::Live(live, hold));
        }
        vm.saving = Arc::downgrade(&hold);
        let state = vm.machine.save()?;
        let memory = vm.machine.memory().clone();
        let pieces = Pieces::new(&head, &state, memory, vm.touched.clone(), hold);
        pieces.map(Sending::Resting).map_err(Error::Write)
    }

    /// Carries out an action; the ending, if it ends the VM.
    ///
    /// # Errors
    /// It makes no sense in the VM's state, or failed.
    pub fn act(&mut self, action: Action) -> Result<Option<Ending>, Error> {
        if action == Action::Boot {
            return self.boot().map(|()| None);
        }
        let vm = self.vm()?;
        if action != Action::Poweroff {
            vm.is_not_migrated()?;
        } else if vm.moved
            && let Some(left) = vm.migrator.following()
        {
            return Err(Error::Following(left));
        }
        match action {
            Action::Boot => {}
            Action::Pause => {
                vm.expect(&[VmState::Running], "be paused")?;
                vm.machine.pause()?;
                vm.state = VmState::Paused;
            }
            Action::Resume => {
                vm.expect(&[VmState::Paused, VmState::Suspended], "be resumed")?;
                vm.is_not_saved()?;
                // Of a guest that came when its old monitor was dead.
                vm.devices.lock_shared();
                vm.machine.resume()?;
                vm.state = VmState::Running;
            }
            Action::Reset => {
                vm.expect(&Vm::STARTED, "be reset")?;
                vm.is_not_saved()?;
                vm.reset()?;
            }
            Action::Shutdown => {
                vm.expect(&[VmState::Running], "shut itself down")?;
                vm.machine.press_power_button()?;
            }
            Action::Suspend => {
                vm.expect(&[VmState::Running], "suspend itself")?;
                vm.machine.suspend()?;
            }
            Action::Poweroff => return Ok(Some(self.end(Ending::PowerOff))),
        }
        Ok(None)
    }

    /// Asks the guest to use so much of what it has.
    ///
    /// # Errors
    /// It has not been started, or cannot be asked for that.
    pub fn set_target(&mut self, target: &Target) -> Result<(), Error> {
        let vm = self.vm()?;
        vm.expect(&Vm::STARTED, "be asked")?;
        Ok(vm.machine.set_target(target)?)
    }

    /// Presses a SysRq key of the guest's.
    ///
    /// # Errors
    /// It does not run, or there is no such key.
    pub fn press_sysrq(&mut self, key: char) -> Result<(), Error> {
        let vm = self.vm()?;
        vm.expect(&[VmState::Running], "take keys")?;
        Ok(vm.machine.press_sysrq(key)?)
    }

    /// Handles what a vCPU's guest did; the ending, if it ends the VM.
    pub fn handle(&mut self, event: Event) -> Option<Ending> {
        let vm = self.vm.as_mut()?;
        match event {
            Event::PowerOff => Some(self.end(Ending::PowerOff)),
            Event::Failed(message) => Some(self.end(Ending::Failed(message))),
            Event::Suspended => match vm.suspended() {
                Ok(()) => None,
                Err(error) => Some(self.end(Ending::Failed(format!("suspend: {error}")))),
            },
            Event::DiskFull => match vm.full() {
                Ok(()) => None,
                Err(error) => Some(self.end(Ending::Failed(format!("full disk: {error}")))),
            },
            Event::Reset if vm.config.on_reboot.unwrap_or_default() == OnReboot::Exit => {
                Some(self.end(Ending::Reboot))
            }
            Event::Reset => match vm.reset() {
                Ok(()) => None,
                Err(error) => Some(self.end(Ending::Failed(format!("reset: {error}")))),
            },
        }
    }

    /// Ends the VM because somebody wants the process to end; unless memory is
    /// left in it that another monitor's guest needs.
    pub fn terminate(&mut self) -> Option<Ending> {
        if let Some(vm) = self.vm.as_ref().filter(|vm| vm.moved)
            && let Some(left) = vm.migrator.following()
        {
            tracing::warn!("it does not end yet: {}", Error::Following(left));
            return None;
        }
        Some(self.end(Ending::PowerOff))
    }

    /// Ends the VM: the devices flush and let go.
    pub fn end(&mut self, ending: Ending) -> Ending {
        if self.vm.as_ref().is_some_and(|vm| vm.moved) {
            return Ending::Moved;
        }
        if let Some(vm) = &mut self.vm
            && vm.state != VmState::Stopped
        {
            vm.machine.halt();
            vm.state = VmState::Stopped;
        }
        ending
    }

    /// The VM as the API describes it.
    ///
    /// # Errors
    /// There is none.
    pub fn info(&mut self) -> Result<VmInfo, Error> {
        let boot = self.timeline.phases().to_vec();
        let id = self.id.clone();
        let vm = self.vm()?;
        let socket = |char: &Option<crate::config::CharConfig>| {
            char.as_ref().and_then(|char| char.socket.clone())
        };
        Ok(VmInfo {
            id,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: vm.state,
            pid: std::process::id(),
            machine: vm.machine.kind(),
            cpu: vm.machine.cpu().settled(),
            cpu_reason: vm.machine.cpu().why.as_ref().map(ToString::to_string),
            uptime_ms: vm.booted.map_or(0, |booted| {
                u64::try_from(booted.elapsed().as_millis()).unwrap_or(u64::MAX)
            }),
            boot,
            devices: vm.machine.devices(),
            serial_socket: socket(&vm.config.serial),
            console_socket: socket(&vm.config.console),
            target: vm.machine.target(),
            config: vm.config.clone(),
        })
    }

    /// Its counters.
    ///
    /// # Errors
    /// There is no VM.
    pub fn metrics(&mut self) -> Result<Metrics, Error> {
        Ok(self.vm()?.machine.metrics())
    }
}

/// What moves memory while the guest runs, or why there is nothing.
fn pager(config: &VmConfig, ram: &GuestRam, uffd: io::Result<Uffd>) -> Result<Arc<Pager>, String> {
    let huge = [HugePages::Hugetlb2M, HugePages::Hugetlb1G].map(Some);
    if huge.contains(&config.hugepages) {
        return Err("the VM's memory is in huge pages".to_owned());
    }
    if ram.iter().any(|region| region.file_offset().is_some()) {
        return Err("the VM's memory is shared with other processes".to_owned());
    }
    let uffd = uffd.map_err(|error| format!("there is no userfaultfd ({error})"))?;
    let pager = Pager::spawn(uffd, ram, setup(Class::Pager));
    pager
        .map(Arc::new)
        .map_err(|error| format!("no pager: {error}"))
}

impl Vm {
    /// Holds the VM for a moment; its snapshot from there on.
    fn begin_live(&mut self, head: &Head) -> Result<Live, Error> {
        let not = |why: &str| Error::NotLive(why.to_owned());
        let pager = self.pager.as_ref().map_err(|why| not(why))?;
        if !pager.protects() {
            return Err(not("the kernel's userfaultfd cannot write-protect"));
        }
        if !self.touched.is_known() {
            return Err(not("/proc/self/pagemap cannot be read"));
        }
        let start = Instant::now();
        self.machine.pause()?;
        let state = self.machine.save();
        let live = state.map_err(Error::from).and_then(|state| {
            let start = Pieces::start(head, &state, self.machine.memory());
            let live = start.and_then(|start| pager.save(start, self.touched.clone()));
            live.map_err(Error::Write)
        });
        self.machine.resume()?;
        let mut live = live?;
        live.paused(start.elapsed()).map_err(Error::Write)?;
        Ok(live)
    }

    /// States in which there is a guest.
    const STARTED: [VmState; 3] = [VmState::Running, VmState::Paused, VmState::Suspended];

    fn expect(&self, states: &[VmState], action: &'static str) -> Result<(), Error> {
        if states.contains(&self.state) {
            return Ok(());
        }
        Err(Error::State {
            state: self.state,
            action,
        })
    }

    /// A disk has no room: the guest stops until there is some, as its time
    /// would run on. It may have been resumed since, with success.
    fn full(&mut self) -> Result<(), blanket_devices::lifecycle::Error> {
        if self.state == VmState::Running && self.machine.waits_for_room() {
            self.machine.pause()?;
            self.state = VmState::Paused;
        }
        Ok(())
    }

    /// Whether it is neither on its way to another monitor nor from one.
    fn is_not_migrated(&self) -> Result<(), Error> {
        match self.migrator.following() {
            Some(left) => Err(Error::Following(left)),
            None if self.migrator.is_replicating() => Err(Error::Replicating),
            None if self.migrator.is_busy() => Err(Error::Migrating),
            None => Ok(()),
        }
    }

    /// Whether the machine may go on.
    fn is_not_saved(&self) -> Result<(), Error> {
        match self.saving.strong_count() {
            0 => Ok(()),
            _ => Err(Error::Saving),
        }
    }

    /// The configuration with what was chosen for it: a guest that goes on
    /// elsewhere keeps its kind of machine, its processor and its addresses.
    fn settled_config(&self) -> VmConfig {
        let mut config = self.config.clone();
        config.machine = Some(match self.machine.kind() {
            types::Machine::Hvm => MachineChoice::Hvm,
            types::Machine::Pv => MachineChoice::Pv,
        });
        config.cpu = Some(self.machine.cpu().settled());
        let devices = self.machine.devices();
        let addresses = devices.iter().filter_map(|device| device.mac);
        for (net, address) in config.net.iter_mut().zip(addresses) {
            net.mac = Some(address);
        }
        config
    }

    /// The guest has suspended itself, if it has not been resumed since.
    fn suspended(&mut self) -> Result<(), Error> {
        if self.machine.is_suspended() {
            if self.state == VmState::Running {
                self.machine.pause()?;
            }
            self.state = VmState::Suspended;
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        if self.state == VmState::Running {
            self.machine.pause()?;
        }
        self.machine.reset()?;
        self.machine.resume()?;
        self.state = VmState::Running;
        Ok(())
    }
}
