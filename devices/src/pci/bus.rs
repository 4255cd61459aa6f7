//! The bus: which function answers an access.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::config::{BAR0, COMMAND, ConfigSpace, Identity};

/// Functions on the bus: slots 0 to 31, function 0 each.
pub const SLOTS: usize = 32;
/// Bytes of ECAM for one bus.
pub const ECAM_SIZE: u64 = 1 << 20;

/// A PCI function with at most one memory BAR.
pub trait Function: Send {
    /// The guest is about to read `len` bytes of configuration space: bring
    /// what changes by reading up to date.
    fn before_read_config(&mut self, offset: usize, len: usize) {
        let _ = (offset, len);
    }
    /// Reads configuration space.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Writes configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]);
    /// The range that its BAR answers now: (address, length).
    fn window(&self) -> Option<(u64, u64)>;
    /// The bus tells whether the window that the function now claims is its
    /// own (within the bus's memory and no other's): doorbells follow it.
    fn window_moved(&mut self, granted: bool);
    /// Reads from the BAR.
    fn read_bar(&mut self, offset: u64, data: &mut [u8]);
    /// Writes to the BAR.
    fn write_bar(&mut self, offset: u64, data: &[u8]);
}

/// A function as the bus and its owner share it.
pub type SharedFunction = Arc<Mutex<dyn Function>>;

/// Locks a function. A vCPU that panicked while it held the lock has ended the
/// process (panics abort), so poison cannot be seen.
fn lock(function: &SharedFunction) -> MutexGuard<'_, dyn Function + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Route {
    start: u64,
    end: u64,
    slot: usize,
}

/// Bus 0 of segment 0.
pub struct PciBus {
    functions: Vec<SharedFunction>,
    /// Who answers where, kept in step with the BARs.
    routes: RwLock<Vec<Route>>,
    /// The memory that BARs may lie in.
    window: (u64, u64),
    /// The last value written to port 0xcf8.
    address_port: Mutex<u32>,
}

/// The bridge between CPU and bus; it does nothing but be there.
struct HostBridge(ConfigSpace);

impl Function for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn window(&self) -> Option<(u64, u64)> {
        None
    }
    fn window_moved(&mut self, _: bool) {}
    fn read_bar(&mut self, _: u64, _: &mut [u8]) {}
    fn write_bar(&mut self, _: u64, _: &[u8]) {}
}

impl PciBus {
    /// A bus whose BARs lie in `start..end`, with a host bridge in slot 0.
    #[must_use]
    pub fn new(start: u64, end: u64) -> Self {
        // The bridge that Linux knows needs no driver: a generic one.
        let bridge = HostBridge(ConfigSpace::new(&Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_00_00,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        }));
        Self {
            functions: vec![Arc::new(Mutex::new(bridge))],
            routes: RwLock::default(),
            window: (start, end),
            address_port: Mutex::new(0),
        }
    }

    /// Puts a function into the next free slot and returns that.
    ///
    /// # Errors
    /// The bus is full.
    pub fn add(&mut self, function: SharedFunction) -> std::io::Result<usize> {
        if self.functions.len() == SLOTS {
            return Err(std::io::Error::other(format!(
                "the PCI bus is full: at most {} devices",
                SLOTS - 1
            )));
        }
        self.functions.push(function);
        self.reroute();
        Ok(self.functions.len() - 1)
    }

    /// Works out anew who answers where. Of two functions that claim the same
    /// address the one in the lower slot has it.
    pub fn reroute(&self) {
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        routes.clear();
        for (slot, function) in self.functions.iter().enumerate() {
            let mut function = lock(function);
            let granted = function.window().and_then(|(start, len)| {
                let end = start.checked_add(len)?;
                let free = routes.iter().all(|r| end <= r.start || r.end <= start);
                (start >= self.window.0 && end <= self.window.1 && free).then_some(Route {
                    start,
                    end,
                    slot,
                })
            });
            function.window_moved(granted.is_some());
            routes.extend(granted);
        }
    }

    fn function(&self, slot: usize) -> Option<&SharedFunction> {
        self.functions.get(slot)
    }

    /// A read from ECAM at `offset`; absent functions read as all ones.
    pub fn read_ecam(&self, offset: u64, data: &mut [u8]) {
        let (bdf, register) = (offset >> 12, (offset & 0xfff) as usize);
        match (bdf & 7, self.function((bdf >> 3) as usize)) {
            (0, Some(function)) => {
                let mut function = lock(function);
                function.before_read_config(register, data.len());
                function.read_config(register, data);
            }
            _ => data.fill(0xff),
        }
    }

    /// A write to ECAM at `offset`.
    pub fn write_ecam(&self, offset: u64, data: &[u8]) {
        let (bdf, register) = (offset >> 12, (offset & 0xfff) as usize);
        let (0, Some(function)) = (bdf & 7, self.function((bdf >> 3) as usize)) else {
            return;
        };
        lock(function).write_config(register, data);
        let end = register + data.len();
        let touches = |at: usize, len: usize| register < at + len && at < end;
        if touches(COMMAND, 2) || touches(BAR0, 8) {
            self.reroute();
        }
    }

    /// A read from port 0xcf8 + `offset` (0 to 7).
    pub fn read_port(&self, offset: u16, data: &mut [u8]) {
        match offset {
            0..4 => {
                let address = self.address_port().to_le_bytes();
                for (i, byte) in data.iter_mut().enumerate() {
                    *byte = *address.get(usize::from(offset) + i).unwrap_or(&0xff);
                }
            }
            _ => match self.ported(offset, data.len()) {
                Some(ecam) => self.read_ecam(ecam, data),
                None => data.fill(0xff),
            },
        }
    }

    /// A write to port 0xcf8 + `offset` (0 to 7).
    pub fn write_port(&self, offset: u16, data: &[u8]) {
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            *self
                .address_port
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = u32::from_le_bytes(address);
        } else if let Some(ecam) = self.ported(offset, data.len()) {
            self.write_ecam(ecam, data);
        }
    }

    fn address_port(&self) -> u32 {
        *self
            .address_port
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The ECAM offset behind an access of `len` bytes to the data port.
    fn ported(&self, offset: u16, len: usize) -> Option<u64> {
        let address = self.address_port();
        let within = usize::from(offset.checked_sub(4)?);
        let bus = (address >> 16) & 0xff;
        (address >> 31 == 1 && bus == 0 && within + len <= 4).then(|| {
            let bdf = u64::from((address >> 8) & 0xff);
            (bdf << 12) + u64::from(address & 0xfc) + within as u64
        })
    }

    fn route(&self, addr: u64) -> Option<(u64, &SharedFunction)> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let route = routes.iter().find(|r| (r.start..r.end).contains(&addr))?;
        Some((addr - route.start, &self.functions[route.slot]))
    }

    /// A read from the bus's memory; false if nobody answers.
    pub fn read_memory(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.route(addr) {
            Some((offset, function)) => {
                lock(function).read_bar(offset, data);
                true
            }
            None => false,
        }
    }

    /// A write to the bus's memory; false if nobody answers.
    pub fn write_memory(&self, addr: u64, data: &[u8]) -> bool {
        match self.route(addr) {
            Some((offset, function)) => {
                lock(function).write_bar(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch {
        config: ConfigSpace,
        bytes: [u8; 16],
        granted: bool,
    }

    impl Function for Scratch {
        fn read_config(&self, offset: usize, data: &mut [u8]) {
            self.config.read(offset, data);
        }
        fn write_config(&mut self, offset: usize, data: &[u8]) {
            self.config.write(offset, data);
        }
        fn window(&self) -> Option<(u64, u64)> {
            self.config.bar64().map(|base| (base, 16))
        }
        fn window_moved(&mut self, granted: bool) {
            self.granted = granted;
        }
        fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = self.bytes[offset as usize];
        }
        fn write_bar(&mut self, offset: u64, data: &[u8]) {
            self.bytes[offset as usize] = data[0];
        }
    }

    fn bus() -> (PciBus, Vec<Arc<Mutex<Scratch>>>) {
        let mut bus = PciBus::new(0xc000_0000, 0xc000_1000);
        let scratch: Vec<_> = (0..2u64)
            .map(|i| {
                let mut config = ConfigSpace::new(&Identity {
                    vendor: 1,
                    device: 2,
                    class: 0,
                    revision: 0,
                    subsystem_vendor: 0,
                    subsystem: 0,
                });
                config.set_bar64(0xc000_0000 + 16 * i, 16);
                config.enable_memory(true);
                let scratch = Arc::new(Mutex::new(Scratch {
                    config,
                    bytes: [0; 16],
                    granted: false,
                }));
                bus.add(scratch.clone()).unwrap();
                scratch
            })
            .collect();
        (bus, scratch)
    }

    #[test]
    fn memory_accesses_reach_the_function_whose_bar_it_is() {
        let (bus, scratch) = bus();
        assert!(bus.write_memory(0xc000_0013, &[7]));
        assert_eq!(scratch[1].lock().unwrap().bytes[3], 7);
        assert!(!bus.write_memory(0xc000_0020, &[7]));
    }

    #[test]
    fn a_bar_moves_but_not_out_of_the_window_nor_onto_another() {
        let (bus, scratch) = bus();
        let bar = |slot: u64| (slot << 15) + 0x10;
        bus.write_ecam(bar(2), &0xc000_0800u32.to_le_bytes());
        assert!(bus.write_memory(0xc000_0801, &[9]));
        bus.write_ecam(bar(2), &0xc000_0000u32.to_le_bytes());
        assert!(!scratch[1].lock().unwrap().granted, "slot 1 is there");
        bus.write_ecam(bar(2), &0xfee0_0000u32.to_le_bytes());
        assert!(!scratch[1].lock().unwrap().granted, "outside the window");
        assert!(!bus.write_memory(0xfee0_0000, &[1]));
        bus.write_ecam(bar(2), &0xc000_0010u32.to_le_bytes());
        assert!(scratch[1].lock().unwrap().granted);
    }

    #[test]
    fn ports_and_ecam_show_the_same_registers() {
        let (bus, _) = bus();
        let mut data = [0; 4];
        bus.write_port(0, &0x8000_0800u32.to_le_bytes());
        bus.read_port(4, &mut data);
        assert_eq!(data, [1, 0, 2, 0]);
        bus.read_port(6, &mut data[..2]);
        assert_eq!(data[..2], [2, 0]);
        bus.read_ecam(31 << 15, &mut data);
        assert_eq!(data, [0xff; 4], "an empty slot");
        bus.write_port(0, &[0xff; 4]);
        bus.read_port(7, &mut data);
        assert_eq!(data, [0xff; 4], "an access across the port's end");
    }
}
