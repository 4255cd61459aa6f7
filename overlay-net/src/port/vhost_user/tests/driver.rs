//! The other end: a front end and a driver, in memory of their own.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::super::VhostUser;
use crate::port::{BURST, Port};

/// Where the guest has its memory, and where the front end says that it has.
pub(super) const GUEST: u64 = 0x1_0000_0000;
pub(super) const USER: u64 = 0x7f00_0000_0000;
pub(super) const MEMORY: u64 = 4 << 20;
/// Entries of a ring.
pub(super) const SIZE: u16 = 64;
/// Where buffers begin.
pub(super) const BUFFERS: u64 = 1 << 20;

pub(super) const MERGE: u64 = 1 << 15;
pub(super) const EVENT: u64 = 1 << 29;
pub(super) const INDIRECT: u64 = 1 << 28;
pub(super) const VERSION_1: u64 = 1 << 32;
/// Checksums and TCP's segmentation, both ways.
pub(super) const OFFLOADS: u64 = 0x3 | 0b1_1000_0000 | 0b1_1000_0000_0000;
const PROTOCOL: u64 = 1 << 30;

pub(super) fn event() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "no {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A guest's memory.
pub(super) struct Ram {
    pub(super) file: File,
    map: *mut u8,
}

// SAFETY: plain memory.
unsafe impl Send for Ram {}

impl Ram {
    pub(super) fn new() -> Self {
        // SAFETY: a C string, and no flags that matter.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the descriptor is new.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(MEMORY).unwrap();
        // SAFETY: a new mapping.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert_ne!(map, libc::MAP_FAILED);
        Self {
            file,
            map: map.cast(),
        }
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at + bytes.len() as u64 <= MEMORY);
        // SAFETY: within the mapping.
        unsafe {
            let to = self.map.add(at as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    pub(super) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        assert!(at + len as u64 <= MEMORY);
        let mut bytes = vec![0; len];
        // SAFETY: within the mapping.
        unsafe {
            let from = self.map.add(at as usize);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len);
        }
        bytes
    }

    pub(super) fn word(&self, at: u64) -> &AtomicU16 {
        assert!(at + 2 <= MEMORY);
        // SAFETY: within the mapping, and tests ask for even places.
        unsafe { AtomicU16::from_ptr(self.map.add(at as usize).cast()) }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        unsafe { libc::munmap(self.map.cast(), MEMORY as usize) };
    }
}

/// A ring, seen by its driver.
pub(super) struct Queue {
    base: u64,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    next_descriptor: u16,
    available: u16,
    used: u16,
    event_idx: bool,
}

impl Queue {
    fn new(index: u64, features: u64) -> Self {
        Self {
            base: index * 0x1_0000,
            kick: event(),
            call: event(),
            next_descriptor: 0,
            available: 0,
            used: 0,
            event_idx: features & EVENT != 0,
        }
    }

    pub(super) fn descriptors(&self) -> u64 {
        self.base
    }

    pub(super) fn available_ring(&self) -> u64 {
        self.base + 0x4000
    }

    pub(super) fn used_ring(&self) -> u64 {
        self.base + 0x8000
    }

    fn table(&self, index: u64) -> u64 {
        self.base + 0xa000 + index * 0x100
    }

    pub(super) fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }

    /// Makes a chain of buffers (place in memory, length) available.
    pub(super) fn add(&mut self, ram: &Ram, buffers: &[(u64, u32)], write: bool, indirect: bool) {
        let write = if write { 2 } else { 0 };
        let head = self.next_descriptor % SIZE;
        let put = |table: u64, i: u16, link: u16| {
            let (addr, len) = buffers[usize::from(i)];
            let more = u16::from(usize::from(i) + 1 < buffers.len());
            let bytes = Self::descriptor(GUEST + addr, len, write | more, link);
            ram.write(table, &bytes);
        };
        let count = buffers.len() as u16;
        if indirect {
            let table = self.table(head.into());
            for i in 0..count {
                put(table + u64::from(i) * 16, i, i + 1);
            }
            let bytes = Self::descriptor(GUEST + table, u32::from(count) * 16, 4, 0);
            ram.write(self.descriptors() + u64::from(head) * 16, &bytes);
            self.next_descriptor += 1;
        } else {
            for i in 0..count {
                let at = (head + i) % SIZE;
                let table = self.descriptors() + u64::from(at) * 16;
                put(table, i, (at + 1) % SIZE);
            }
            self.next_descriptor += count;
        }
        let slot = self.available_ring() + 4 + 2 * u64::from(self.available % SIZE);
        ram.write(slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        let index = ram.word(self.available_ring() + 2);
        index.store(self.available, Ordering::Release);
    }

    /// Kicks if the device wants it; whether it did.
    pub(super) fn kick(&self, ram: &Ram) -> bool {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = ram.word(self.used_ring() + 4 + 8 * u64::from(SIZE));
            event.load(Ordering::SeqCst) == self.available.wrapping_sub(1)
        } else {
            ram.word(self.used_ring()).load(Ordering::SeqCst) & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
        wanted
    }

    /// The chains that came back, with the bytes written.
    pub(super) fn used(&mut self, ram: &Ram) -> Vec<(u32, u32)> {
        let mut all = Vec::new();
        while ram.word(self.used_ring() + 2).load(Ordering::Acquire) != self.used {
            let slot = self.used_ring() + 4 + 8 * u64::from(self.used % SIZE);
            let bytes = ram.read(slot, 8);
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            all.push((word(0), word(4)));
            self.used = self.used.wrapping_add(1);
        }
        all
    }

    /// Wants a call for the next buffer that comes back.
    pub(super) fn want_call(&self, ram: &Ram) {
        let event = ram.word(self.available_ring() + 4 + 2 * u64::from(SIZE));
        event.store(self.used, Ordering::SeqCst);
    }
}

/// A front end that is connected, its rings described.
pub(super) struct Guest {
    pub(super) frontend: Frontend,
    pub(super) ram: Ram,
    pub(super) queues: Vec<Queue>,
    features: u64,
}

impl Guest {
    pub(super) fn connect(path: &std::path::Path, features: u64, pairs: u16) -> Self {
        let queues = (0..2 * u64::from(pairs)).map(|i| Queue::new(i, features));
        Self::with(path, features, (Ram::new(), queues.collect()))
    }

    /// With a guest that runs already.
    pub(super) fn with(
        path: &std::path::Path,
        features: u64,
        (ram, queues): (Ram, Vec<Queue>),
    ) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        let features = features | VERSION_1 | PROTOCOL;
        let mut guest = Self {
            frontend: Frontend::from_stream(socket, 256),
            ram,
            queues,
            features,
        };
        guest.greet();
        guest
    }

    fn greet(&mut self) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(self.features & !offered, 0);
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::MQ));
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(self.features).unwrap();
        self.share();
        for index in 0..self.queues.len() {
            self.describe(index, 0);
        }
        for index in 0..self.queues.len() {
            self.frontend.set_vring_enable(index, true).unwrap();
        }
    }

    /// The guest goes on without this front end.
    pub(super) fn leave(self) -> (Ram, Vec<Queue>) {
        (self.ram, self.queues)
    }

    pub(super) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.ram.file.as_raw_fd(),
        }
    }

    pub(super) fn share(&mut self) {
        let region = self.region();
        self.frontend.set_mem_table(&[region]).unwrap();
    }

    pub(super) fn describe(&mut self, index: usize, log: u32) {
        let queue = &self.queues[index];
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: log,
            desc_table_addr: USER + queue.descriptors(),
            used_ring_addr: USER + queue.used_ring(),
            avail_ring_addr: USER + queue.available_ring(),
            log_addr: (log != 0).then(|| GUEST + queue.used_ring()),
        };
        let frontend = &mut self.frontend;
        if log == 0 {
            frontend.set_vring_num(index, SIZE).unwrap();
            frontend.set_vring_base(index, queue.used).unwrap();
        }
        frontend.set_vring_addr(index, &addresses).unwrap();
        if log == 0 {
            frontend.set_vring_call(index, &queue.call).unwrap();
            frontend.set_vring_kick(index, &queue.kick).unwrap();
        }
    }

    /// Sends a frame from buffers of its own, cut at `cuts`.
    pub(super) fn send(&mut self, header: [u8; 12], frame: &[u8], cuts: &[usize], indirect: bool) {
        let queue = &mut self.queues[1];
        let slot = u64::from(queue.available % 8);
        let at = BUFFERS + slot * 0x2_0000;
        self.ram.write(at, &header);
        self.ram.write(at + 12, frame);
        let total = 12 + frame.len();
        let mut buffers = Vec::new();
        let mut start = 0;
        for cut in cuts.iter().copied().chain([total]) {
            let end = cut.min(total);
            if end > start {
                buffers.push((at + start as u64, (end - start) as u32));
                start = end;
            }
        }
        queue.add(&self.ram, &buffers, false, indirect);
        queue.kick(&self.ram);
    }

    /// Offers buffers of `len` bytes for frames, until there are `count`.
    pub(super) fn offer(&mut self, count: u16, len: u32) {
        let queue = &mut self.queues[0];
        while queue.available.wrapping_sub(queue.used) < count {
            let head = queue.next_descriptor % SIZE;
            let at = BUFFERS + 0x10_0000 + u64::from(head) * u64::from(len);
            queue.add(&self.ram, &[(at, len)], true, false);
        }
    }

    /// The frames that came into buffers of `offer`, each with its header.
    pub(super) fn received(&mut self, len: u32) -> Vec<Vec<u8>> {
        let used = self.queues[0].used(&self.ram);
        let mut used = used.into_iter();
        let mut frames = Vec::new();
        while let Some((head, written)) = used.next() {
            let at = |head: u32| BUFFERS + 0x10_0000 + u64::from(head) * u64::from(len);
            let mut frame = self.ram.read(at(head), written as usize);
            let count = u16::from_le_bytes([frame[10], frame[11]]);
            for _ in 1..count {
                let (head, written) = used.next().unwrap();
                frame.extend(self.ram.read(at(head), written as usize));
            }
            frames.push(frame);
        }
        frames
    }
}

/// What a worker does with two ports: what comes from one goes to the other.
pub(super) struct Worker {
    pub(super) ports: Arc<Mutex<Vec<VhostUser>>>,
    stop: Arc<AtomicBool>,
    pub(super) slept: Arc<AtomicU16>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(super) fn new(ports: Vec<VhostUser>) -> Self {
        let ports = Arc::new(Mutex::new(ports));
        let stop = Arc::<AtomicBool>::default();
        let slept = Arc::<AtomicU16>::default();
        let (its, ends, sleeps) = (Arc::clone(&ports), Arc::clone(&stop), Arc::clone(&slept));
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                if Self::turn(&mut its.lock().unwrap()) == 0 {
                    Self::sleep(&its, &sleeps);
                }
            }
        });
        Self {
            ports,
            stop,
            slept,
            thread: Some(thread),
        }
    }

    pub(super) fn turn(ports: &mut [VhostUser]) -> usize {
        let mut done = 0;
        for i in 0..ports.len() {
            let [from, to] = if ports.len() == 1 {
                let [only] = ports else { unreachable!() };
                done += only.receive(BURST, &mut |_| {}).unwrap();
                only.flush().unwrap();
                continue;
            } else {
                ports.get_disjoint_mut([i, 1 - i]).unwrap()
            };
            done += from
                .receive(BURST, &mut |frame| {
                    // What does not fit is lost.
                    let _ = to.send(frame);
                })
                .unwrap();
            to.flush().unwrap();
        }
        done
    }

    fn sleep(ports: &Mutex<Vec<VhostUser>>, slept: &AtomicU16) {
        let mut held = ports.lock().unwrap();
        let mut armed = true;
        for port in held.iter_mut() {
            armed &= port.arm().unwrap();
        }
        if !armed {
            held.iter_mut().for_each(Port::disarm);
            return;
        }
        let wakers: Vec<OwnedFd> = held
            .iter()
            .map(Port::waker)
            .map(|fd| fd.try_clone_to_owned().unwrap())
            .collect();
        drop(held);
        slept.fetch_add(1, Ordering::SeqCst);
        let mut fds: Vec<_> = wakers
            .iter()
            .map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN))
            .collect();
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        let _ = rustix::event::poll(&mut fds, Some(&limit));
        ports.lock().unwrap().iter_mut().for_each(Port::disarm);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
