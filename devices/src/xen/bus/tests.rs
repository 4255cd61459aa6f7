use std::sync::Mutex;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::char;
use crate::lifecycle::Lifecycle;
use crate::virtio::testing::until;
use crate::xen::console::SharedPage;
use crate::xen::control::Shutdown;
use crate::xen::store::testing::StoreClient;
use crate::xen::testing::{Events, Guest};

const STORE: SharedPage = SharedPage {
    address: 0x1000,
    port: 1,
};
const CONSOLE: SharedPage = SharedPage {
    address: 0x2000,
    port: 2,
};
const PAGES: SharedPages = SharedPages {
    store: STORE,
    console: CONSOLE,
};

/// What a test device was told, in order.
type Log = Arc<Mutex<Vec<String>>>;

/// Where a test device leaves its handlers' way to report a broken ring.
type FaultSlot = Arc<Mutex<Option<Arc<dyn Fn() + Send + Sync>>>>;

/// A device that notes what it is told and accepts any ring but 13.
struct Fake {
    index: u32,
    name: String,
    log: Log,
    ring: Option<String>,
    fault: FaultSlot,
}

impl Fake {
    fn note(&self, what: &str) {
        self.log.lock().unwrap().push(what.to_owned());
    }
}

impl Backend for Fake {
    fn kind(&self) -> &'static str {
        "vif"
    }
    fn index(&self) -> u32 {
        self.index
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn offer(&self) -> Vec<(String, String)> {
        vec![("feature-sg".into(), "1".into())]
    }
    fn frontend(&self) -> Vec<(String, String)> {
        vec![("mac".into(), "02:00:00:00:00:01".into())]
    }
    fn connect(
        &mut self,
        frontend: &dyn Fn(&str) -> Option<String>,
        context: &Context,
    ) -> Result<Vec<(String, String)>, Error> {
        let value = frontend("ring-ref");
        if value.is_none() || value.as_deref() == Some("13") {
            let node = "ring-ref".to_owned();
            return Err(Error::Node { node, value });
        }
        self.note("connect");
        self.ring = value;
        *self.fault.lock().unwrap() = Some(Arc::clone(&context.fault));
        Ok(vec![("info".into(), "7".into())])
    }
    fn disconnect(&mut self) {
        if self.ring.take().is_some() {
            self.note("disconnect");
        }
    }
    fn pause(&mut self) -> Result<(), LifecycleError> {
        self.note("pause");
        Ok(())
    }
    fn resume(&mut self) -> Result<(), LifecycleError> {
        self.note("resume");
        Ok(())
    }
    fn halt(&mut self) {
        self.note("halt");
    }
    fn save(&self) -> Result<SavedState, LifecycleError> {
        SavedState::pack("fake", 1, &self.ring)
    }
    fn restore(&mut self, state: &SavedState, _: &Context) -> Result<(), LifecycleError> {
        self.ring = state.unpack("fake", 1)?;
        self.note("restore");
        Ok(())
    }
    fn metrics(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// A bus with one device, and the guest's driver.
struct Rig {
    bus: XenBus,
    client: StoreClient,
    /// The store's.
    port: u32,
    events: Arc<Events>,
    log: Log,
    fault: FaultSlot,
}

const FRONT: &str = "device/vif/0";
const BACK: &str = "/local/domain/0/backend/vif/1/0";

impl Rig {
    fn unstarted(guest: &Guest) -> Self {
        let events = Arc::new(Events::default());
        let log = Log::default();
        let fault = Arc::default();
        let backend = Fake {
            index: 0,
            name: "net0".into(),
            log: Arc::clone(&log),
            ring: None,
            fault: Arc::clone(&fault),
        };
        let bus = XenBus::new(Parts {
            domain: Domain {
                name: "guest".into(),
                uuid: "0000-1111".into(),
                memory: 512 << 20,
                cpus: 4,
            },
            memory: guest.ram.clone(),
            grants: Arc::clone(&guest.grants),
            events: events.clone(),
            workers: [Worker::spawn("worker", Box::new(|| Ok(()))).unwrap()].into(),
            backends: vec![Box::new(backend)],
            console: CharPort::open(&char::Spec::default()).unwrap(),
            setup: Box::new(|| Ok(())),
        });
        Self {
            bus: bus.unwrap(),
            client: StoreClient::new(guest.ram.clone(), GuestAddress(STORE.address)),
            port: STORE.port,
            events,
            log,
            fault,
        }
    }

    fn new() -> Self {
        let mut rig = Self::unstarted(&Guest::new(16));
        rig.bus.attach(PAGES).unwrap();
        rig.bus.start().unwrap();
        rig
    }

    /// The answer to a request, or its error.
    fn ask(&mut self, kind: u32, transaction: u32, payload: &str) -> Result<String, String> {
        let request = self.client.request(kind, transaction, payload.as_bytes());
        let mut answer = None;
        until("answer", || {
            if self.client.send() || self.client.receive() {
                self.events.send(self.port);
            }
            answer = self.client.answer(request);
            answer.is_some()
        });
        let (kind, _, payload) = answer.unwrap();
        let text = String::from_utf8(payload).unwrap();
        if kind == 16 { Err(text) } else { Ok(text) }
    }

    fn read(&mut self, node: &str) -> Result<String, String> {
        self.ask(2, 0, &format!("{node}\0"))
    }

    fn write(&mut self, node: &str, value: &str) {
        self.ask(11, 0, &format!("{node}\0{value}")).unwrap();
    }

    fn set_front(&mut self, state: State) {
        self.write(&format!("{FRONT}/state"), &(state as u8).to_string());
    }

    fn wait_back(&mut self, state: State) {
        until("state of the backend", || {
            self.read(&format!("{BACK}/state")).unwrap() == (state as u8).to_string()
        });
    }

    /// The driver sets itself up, as Linux's does.
    fn connect(&mut self) {
        self.wait_back(State::InitWait);
        let id = self.ask(6, 0, "\0").unwrap();
        let id = id.trim_end_matches('\0').parse().unwrap();
        self.ask(11, id, &format!("{FRONT}/ring-ref\x0099"))
            .unwrap();
        self.ask(7, id, "T\0").unwrap();
        self.set_front(State::Connected);
        self.wait_back(State::Connected);
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    fn told(&mut self, event: &str) -> bool {
        self.client.receive();
        self.events.send(self.port);
        self.client.events().iter().any(|(path, _)| path == event)
    }
}

#[test]
fn a_guest_finds_its_directory_as_xl_writes_it() {
    let mut rig = Rig::new();
    for (node, value) in [
        ("vm", "/vm/0000-1111"),
        ("/vm/0000-1111/uuid", "0000-1111"),
        ("name", "guest"),
        ("domid", "1"),
        ("memory/target", "524288"),
        ("memory/static-max", "524288"),
        ("cpu/3/availability", "online"),
        ("control/shutdown", ""),
        ("console/ring-ref", "2"),
        ("console/port", "2"),
        ("store/ring-ref", "1"),
        ("device/vif/0/backend", BACK),
        ("device/vif/0/backend-id", "0"),
        ("device/vif/0/mac", "02:00:00:00:00:01"),
        ("device/vif/0/state", "1"),
        ("/local/domain/0/backend/vif/1/0/state", "2"),
        (
            "/local/domain/0/backend/vif/1/0/frontend",
            "/local/domain/1/device/vif/0",
        ),
        ("/local/domain/0/backend/vif/1/0/frontend-id", "1"),
        ("/local/domain/0/backend/vif/1/0/online", "1"),
        ("/local/domain/0/backend/vif/1/0/feature-sg", "1"),
    ] {
        assert_eq!(rig.read(node).as_deref(), Ok(value), "{node}");
    }
    assert_eq!(rig.ask(1, 0, "device\0").unwrap(), "vif\0");
    for own in [
        "data/x",
        "control/feature-poweroff",
        "error/device/vif/0/error",
    ] {
        rig.write(own, "1");
    }
    for foreign in [
        "name",
        "memory/target",
        "cpu/0/availability",
        "device/new",
        "/local/domain/0/backend/vif/1/0/state",
        "/tool/x",
    ] {
        let refused = rig.ask(11, 0, &format!("{foreign}\x001"));
        assert_eq!(refused, Err("EACCES\0".into()), "{foreign}");
    }
}

#[test]
fn a_guest_that_is_called_something_else_hears_of_it() {
    let mut rig = Rig::new();
    rig.ask(4, 0, "name\0here\0").unwrap();
    // A watch begins with its node.
    until("watch", || rig.told("name"));
    rig.bus.set_name("web-2").unwrap();
    until("news", || rig.told("name"));
    for node in ["name", "/vm/0000-1111/name"] {
        assert_eq!(rig.read(node).as_deref(), Ok("web-2"), "{node}");
    }
    // Its own word for it is not the monitor's.
    assert!(rig.ask(11, 0, "name\0other").is_err());
    // From a saved store it has the name of that, until it is told.
    rig.bus.pause().unwrap();
    let saved = rig.bus.save().unwrap();
    rig.bus.set_name("web-3").unwrap();
    rig.bus.restore(&saved).unwrap();
    rig.bus.set_name("web-4").unwrap();
    rig.bus.resume().unwrap();
    assert_eq!(rig.read("name").as_deref(), Ok("web-4"));
    // A guest that starts anew finds it, too.
    rig.bus.pause().unwrap();
    rig.bus.reset().unwrap();
    let inner = rig.bus.shared.lock();
    let name = read(&inner.store, crate::xen::store::HOME, "name");
    assert_eq!(name.as_deref(), Some("web-4"));
}

#[test]
fn a_driver_connects_closes_and_connects_again() {
    let mut rig = Rig::new();
    rig.connect();
    assert_eq!(rig.read(&format!("{BACK}/info")).unwrap(), "7");
    for state in [State::Closing, State::Closed] {
        rig.set_front(state);
        rig.wait_back(state);
    }
    rig.set_front(State::Initialising);
    rig.connect();
    // A kernel that was started by another knows nothing of the old setup.
    rig.set_front(State::Initialising);
    rig.connect();
    // And one that removes its directory has no device.
    rig.ask(13, 0, &format!("{FRONT}\0")).unwrap();
    rig.wait_back(State::Closed);
    assert_eq!(
        rig.log()[1..],
        [
            "connect",
            "disconnect",
            "connect",
            "disconnect",
            "connect",
            "disconnect"
        ]
    );
}

#[test]
fn a_setup_that_is_refused_and_a_broken_ring_close_the_device_until_it_starts_anew() {
    let mut rig = Rig::new();
    rig.write(&format!("{FRONT}/ring-ref"), "13");
    rig.set_front(State::Connected);
    rig.wait_back(State::Closing);
    rig.set_front(State::Closed);
    rig.wait_back(State::Closed);
    rig.set_front(State::Initialising);
    rig.connect();
    let fault = rig.fault.lock().unwrap().take().unwrap();
    fault();
    rig.wait_back(State::Closing);
    assert_eq!(rig.log()[1..], ["connect", "disconnect"]);
    let metrics = rig.bus.metrics();
    let device = &metrics.iter().find(|m| m.0 == "net0").unwrap().1;
    assert!(device.contains(&("faults", 2)), "{device:?}");
    assert!(device.contains(&("connections", 1)), "{device:?}");
}

#[test]
fn a_paused_bus_touches_nothing_and_goes_on_where_it_was() {
    let mut rig = Rig::new();
    rig.connect();
    rig.bus.pause().unwrap();
    let request = rig.client.request(2, 0, b"name\0");
    rig.client.send();
    rig.events.send(STORE.port);
    std::thread::sleep(Duration::from_millis(20));
    assert!(!rig.client.receive());
    rig.bus.resume().unwrap();
    until("answer", || {
        rig.client.receive();
        rig.client.answer(request).is_some()
    });
    assert_eq!(rig.log(), ["resume", "connect", "pause", "resume"]);
}

#[test]
fn another_bus_goes_on_from_the_saved_state_and_tells_the_driver() {
    let guest = Guest::new(16);
    let mut old = Rig::unstarted(&guest);
    old.bus.attach(PAGES).unwrap();
    old.bus.start().unwrap();
    old.connect();
    old.ask(4, 0, &format!("{BACK}/state\0token\0")).unwrap();
    until("first event", || old.told(&format!("{BACK}/state")));
    old.write("data/mine", "kept");
    old.bus.pause().unwrap();
    let request = old.client.request(2, 0, b"data/mine\0");
    old.client.send();
    let state = old.bus.save().unwrap();
    old.bus.halt();

    let mut new = Rig::unstarted(&guest);
    new.client = old.client;
    new.bus.restore(&state).unwrap();
    assert_eq!(new.events.bound(), [STORE.port, CONSOLE.port]);
    new.bus.start().unwrap();
    let mut kept = None;
    until("answer", || {
        new.client.receive();
        kept = new.client.answer(request);
        kept.is_some()
    });
    assert_eq!(kept.unwrap().2, b"kept");
    until("news of the backend", || new.told(&format!("{BACK}/state")));
    assert_eq!(new.read(&format!("{BACK}/state")).unwrap(), "4");
    new.set_front(State::Closing);
    new.wait_back(State::Closing);
    assert_eq!(new.log(), ["restore", "resume", "disconnect"]);
}

#[test]
fn a_reset_bus_serves_the_next_kernel_from_the_start() {
    let mut rig = Rig::new();
    rig.connect();
    rig.write("data/old", "1");
    rig.bus.pause().unwrap();
    rig.bus.reset().unwrap();
    assert!(rig.events.bound().is_empty());
    rig.client.reset();
    rig.bus.attach(PAGES).unwrap();
    rig.bus.resume().unwrap();
    assert_eq!(rig.read("data/old"), Err("ENOENT\0".into()));
    rig.connect();
    rig.bus.halt();
    assert_eq!(
        rig.log(),
        [
            "resume",
            "connect",
            "pause",
            "disconnect",
            "resume",
            "connect",
            "disconnect",
            "halt"
        ]
    );
}

#[test]
fn a_guest_that_suspended_itself_starts_its_devices_anew_in_another_bus() {
    let guest = Guest::new(16);
    let mut old = Rig::unstarted(&guest);
    old.bus.attach(PAGES).unwrap();
    old.bus.start().unwrap();
    old.connect();
    old.ask(4, 0, &format!("{BACK}/state\0token\0")).unwrap();
    until("first event", || old.told(&format!("{BACK}/state")));
    old.write("data/mine", "kept");
    old.bus.pause().unwrap();
    let state = old.bus.save().unwrap();
    old.bus.halt();

    let mut new = Rig::unstarted(&guest);
    let pages = new.bus.restore_renewed(&state, 5, 6).unwrap();
    let renewed = |page: SharedPage, port| SharedPage { port, ..page };
    let expected = SharedPages {
        store: renewed(STORE, 5),
        console: renewed(CONSOLE, 6),
    };
    assert_eq!(pages, expected);
    assert_eq!(new.events.bound(), [5, 6]);
    new.bus.start().unwrap();
    new.client.reset();
    new.port = 5;
    assert_eq!(new.read("data/mine").unwrap(), "kept");
    assert_eq!(new.read("store/port").unwrap(), "5");
    assert_eq!(new.read(&format!("{FRONT}/state")).unwrap(), "1");
    assert_eq!(new.bus.metrics()[0].1[1], ("watches", 0));
    new.connect();
    assert_eq!(new.log(), ["resume", "connect"]);
}

#[test]
fn a_running_bus_is_not_saved_or_attached() {
    let mut rig = Rig::new();
    assert!(rig.bus.save().is_err());
    assert!(rig.bus.reset().is_err());
}

#[test]
fn the_guest_is_asked_to_shut_down_and_takes_it() {
    let mut rig = Rig::new();
    let control = rig.bus.control();
    assert!(!control.can(Shutdown::PowerOff));
    rig.write("control/feature-poweroff", "1");
    assert!(control.can(Shutdown::PowerOff));
    rig.ask(4, 0, "control/shutdown\0token\0").unwrap();
    until("first event", || rig.told("control/shutdown"));
    for (how, word) in [
        (Shutdown::PowerOff, "poweroff"),
        (Shutdown::Reboot, "reboot"),
        (Shutdown::Halt, "halt"),
        (Shutdown::Suspend, "suspend"),
    ] {
        control.shut_down(how).unwrap();
        until("event", || rig.told("control/shutdown"));
        assert_eq!(rig.read("control/shutdown").unwrap(), word);
        rig.write("control/shutdown", "");
    }
    control.sysrq('h').unwrap();
    assert_eq!(rig.read("control/sysrq").unwrap(), "h");
    rig.write("control/sysrq", "\0");
    assert!(control.sysrq('/').is_err());
}

#[test]
fn memory_and_cpus_are_asked_for_within_the_machines_bounds() {
    let mut rig = Rig::new();
    let control = rig.bus.control();
    rig.ask(4, 0, "memory/target\0token\0").unwrap();
    until("first event", || rig.told("memory/target"));
    assert_eq!(control.memory(), 512 << 20);
    control.set_memory(256 << 20).unwrap();
    until("event", || rig.told("memory/target"));
    assert_eq!(rig.read("memory/target").unwrap(), "262144");
    assert_eq!(control.memory(), 256 << 20);
    for bad in [0, 1 << 20, (512 << 20) + 1] {
        assert!(control.set_memory(bad).is_err(), "{bad}");
    }
    assert_eq!(control.cpus(), 4);
    control.set_cpus(2).unwrap();
    assert_eq!(control.cpus(), 2);
    assert_eq!(rig.read("cpu/1/availability").unwrap(), "online");
    assert_eq!(rig.read("cpu/2/availability").unwrap(), "offline");
    assert!(control.set_cpus(0).is_err());
    assert!(control.set_cpus(5).is_err());
}

#[test]
fn pages_that_are_not_the_guests_are_refused() {
    let mut rig = Rig::unstarted(&Guest::new(16));
    for pages in [
        SharedPages {
            store: SharedPage {
                address: 1 << 40,
                ..STORE
            },
            ..PAGES
        },
        SharedPages {
            store: SharedPage {
                port: 1000,
                ..STORE
            },
            ..PAGES
        },
    ] {
        assert!(rig.bus.attach(pages).is_err());
        assert!(rig.events.bound().is_empty());
    }
    rig.bus.attach(PAGES).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn no_order_of_states_connects_twice_or_disconnects_what_is_not_connected(
        states in proptest::collection::vec(0u8..10, 1..30),
    ) {
        let mut rig = Rig::new();
        rig.write(&format!("{FRONT}/ring-ref"), "99");
        for state in states {
            rig.write(&format!("{FRONT}/state"), &state.to_string());
        }
        rig.set_front(State::Initialising);
        rig.connect();
        let log = rig.log();
        for (i, told) in log[1..].iter().enumerate() {
            prop_assert_eq!(told, ["connect", "disconnect"][i % 2]);
        }
    }
}
