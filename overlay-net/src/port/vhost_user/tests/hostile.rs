//! Front ends and guests that break the rules: the worker lives, and the next
//! front end finds the port as new.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vhost::VhostBackend;
use vm_memory::ByteValued;

use super::super::VhostUser;
use super::driver::*;
use super::moving::bytes;
use crate::frame::{Frame, Head, Offload};
use crate::port::Port;

fn one(folder: &Path) -> (std::path::PathBuf, Worker) {
    let path = folder.join("a");
    let port = VhostUser::listen(&path, 2, 1518).unwrap();
    (path, Worker::new(vec![port]))
}

fn is_up(worker: &Worker) -> bool {
    worker.ports.lock().unwrap()[0].is_up()
}

fn send(worker: &Worker) -> Result<(), crate::drops::Reason> {
    let mut frame = bytes(1000, 0);
    let head = Head::of(&frame);
    let len = head.bytes().len();
    let body = [vm_memory::VolatileSlice::from(&mut frame[len..])];
    let port = &mut worker.ports.lock().unwrap()[0];
    let sent = port.send(&Frame {
        head,
        body: &body,
        offload: Offload::default(),
    });
    port.flush().unwrap();
    sent
}

/// A front end that keeps to the rules is served.
fn works(path: &Path, worker: &Worker) {
    until("end of the last one", || !is_up(worker));
    let mut guest = Guest::connect(path, MERGE, 1);
    guest.offer(1, 2048);
    send(worker).unwrap();
    assert_eq!(guest.received(2048).len(), 1);
}

#[test]
fn broken_rings_end_the_connection() {
    let folder = tempfile::tempdir().unwrap();
    let (path, worker) = one(folder.path());
    type Break = fn(&mut Guest);
    let breaks: [Break; 8] = [
        // More than the ring has.
        |guest| {
            let index = guest.ram.word(guest.queues[1].available_ring() + 2);
            index.store(SIZE + 1, Ordering::SeqCst);
        },
        // A head that is no descriptor.
        |guest| {
            let at = guest.queues[1].available_ring();
            guest.ram.write(at + 4, &SIZE.to_le_bytes());
            guest.ram.word(at + 2).store(1, Ordering::SeqCst);
        },
        // An endless chain.
        |guest| {
            let queue = &mut guest.queues[1];
            queue.add(&guest.ram, &[(BUFFERS, 100)], false, false);
            let looped = Queue::descriptor(GUEST + BUFFERS, 100, 1, 0);
            guest.ram.write(queue.descriptors(), &looped);
        },
        // Memory that is not there.
        |guest| guest.queues[1].add(&guest.ram, &[(MEMORY - 10, 100)], false, false),
        // To be written by the device, in a ring to it.
        |guest| guest.queues[1].add(&guest.ram, &[(BUFFERS, 100)], true, false),
        // A table in a table.
        |guest| {
            let queue = &mut guest.queues[1];
            let table = Queue::descriptor(GUEST + BUFFERS, 16, 4, 0);
            guest.ram.write(BUFFERS, &table);
            queue.add(&guest.ram, &[(BUFFERS, 100)], false, false);
            guest.ram.write(queue.descriptors(), &table);
        },
        // A table of odd length.
        |guest| {
            let queue = &mut guest.queues[1];
            queue.add(&guest.ram, &[(BUFFERS, 100)], false, false);
            let table = Queue::descriptor(GUEST + BUFFERS, 17, 4, 0);
            guest.ram.write(queue.descriptors(), &table);
        },
        // Memory that is taken away.
        |guest| {
            guest.ram.file.set_len(0).unwrap();
        },
    ];
    for (i, broken) in breaks.into_iter().enumerate() {
        let mut guest = Guest::connect(&path, MERGE | INDIRECT, 1);
        assert!(is_up(&worker));
        broken(&mut guest);
        guest.queues[1].kick.write(1).unwrap();
        until(&format!("end after {i}"), || {
            let _ = send(&worker);
            !is_up(&worker)
        });
        drop(guest);
        works(&path, &worker);
    }
}

#[test]
fn a_ring_to_the_guest_is_checked_too() {
    let folder = tempfile::tempdir().unwrap();
    let (path, worker) = one(folder.path());
    for buffer in [(BUFFERS, 2048, false), (MEMORY - 5, 2048, true)] {
        let mut guest = Guest::connect(&path, MERGE, 1);
        let (at, len, write) = buffer;
        guest.queues[0].add(&guest.ram, &[(at, len)], write, false);
        assert_eq!(send(&worker), Err(crate::drops::Reason::Down));
        until("end", || !is_up(&worker));
        drop(guest);
        works(&path, &worker);
    }
}

#[test]
fn chains_without_bytes_and_of_very_many_pieces_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let (path, worker) = one(folder.path());
    let mut guest = Guest::connect(&path, MERGE, 1);
    guest.queues[1].add(&guest.ram, &[(BUFFERS, 0)], false, false);
    guest.queues[1].add(&guest.ram, &[(BUFFERS, 3), (BUFFERS, 5)], false, false);
    guest.queues[1].add(&guest.ram, &[(BUFFERS, 1 << 20)], false, false);
    guest.queues[1].kick(&guest.ram);
    let mut back = 0;
    until("buffers", || {
        back += guest.queues[1].used(&guest.ram).len();
        back == 3
    });
    assert_eq!(worker.ports.lock().unwrap()[0].drops().total(), 3);
    // Buffers of no bytes are no room.
    for _ in 0..SIZE {
        guest.queues[0].add(&guest.ram, &[(BUFFERS, 0)], true, false);
    }
    assert!(send(&worker).is_err());
    assert!(is_up(&worker));
}

#[test]
fn memory_and_events_that_could_make_the_switch_wait_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, worker) = one(folder.path());
    // On a disk, if that is not tmpfs.
    let file = tempfile::tempfile_in("/var/tmp").unwrap();
    file.set_len(MEMORY).unwrap();
    let on_disk = rustix::fs::fstatfs(&file).unwrap().f_type != 0x0102_1994;
    let guest = Guest::connect(&path, MERGE, 1);
    let mut region = guest.region();
    region.mmap_handle = std::os::fd::AsRawFd::as_raw_fd(&file);
    assert_eq!(guest.frontend.set_mem_table(&[region]).is_err(), on_disk);
    drop(guest);
    works(&path, &worker);
    // A pipe for an event.
    let guest = Guest::connect(&path, MERGE, 1);
    let (_, pipe) = std::io::pipe().unwrap();
    let fd = std::os::fd::IntoRawFd::into_raw_fd(std::os::fd::OwnedFd::from(pipe));
    // SAFETY: the descriptor is nobody else's.
    let pipe = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) };
    assert!(guest.frontend.set_vring_call(0, &pipe).is_err());
    drop(guest);
    works(&path, &worker);
    // Regions that overlap, and one that is not in its file.
    let guest = Guest::connect(&path, MERGE, 1);
    let region = guest.region();
    assert!(guest.frontend.set_mem_table(&[region, region]).is_err());
    drop(guest);
    let guest = Guest::connect(&path, MERGE, 1);
    let mut region = guest.region();
    region.mmap_offset = 4096;
    assert!(guest.frontend.set_mem_table(&[region]).is_err());
    drop(guest);
    works(&path, &worker);
}

#[test]
fn memory_may_change_while_rings_run_if_they_are_still_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let (path, worker) = one(folder.path());
    let mut guest = Guest::connect(&path, MERGE, 1);
    guest.share();
    guest.offer(1, 2048);
    send(&worker).unwrap();
    assert_eq!(guest.received(2048).len(), 1);
    // Elsewhere: the rings are gone, and so is the connection.
    let mut region = guest.region();
    region.userspace_addr += 1 << 40;
    assert!(guest.frontend.set_mem_table(&[region]).is_err());
    until("end", || !is_up(&worker));
    drop(guest);
    works(&path, &worker);
}

#[test]
fn what_is_written_is_noted() {
    use std::os::fd::AsRawFd;
    let folder = tempfile::tempdir().unwrap();
    let (path, worker) = one(folder.path());
    let mut guest = Guest::connect(&path, MERGE, 1);
    let log = Ram::new();
    let region = vhost::VhostUserDirtyLogRegion {
        mmap_size: MEMORY,
        mmap_offset: 0,
        mmap_handle: log.file.as_raw_fd(),
    };
    guest.offer(2, 2048);
    guest.frontend.set_log_base(0, Some(region)).unwrap();
    send(&worker).unwrap();
    assert!(log.read(0, MEMORY as usize).iter().all(|byte| *byte == 0));
    for index in 0..2 {
        guest.describe(index, 1);
    }
    let features = MERGE | VERSION_1 | 1 << 30 | 1 << 26;
    guest.frontend.set_features(features).unwrap();
    send(&worker).unwrap();
    let noted = log.read(0, MEMORY as usize);
    let mut pages = Vec::new();
    for (i, byte) in noted.iter().enumerate() {
        pages.extend(
            (0..8)
                .filter(|bit| byte >> bit & 1 == 1)
                .map(|bit| i * 8 + bit),
        );
    }
    let page = |at: u64| ((GUEST + at) / 4096) as usize;
    // The second buffer lies in one page with the first.
    let want = [page(guest.queues[0].used_ring()), page(BUFFERS + 0x10_0000)];
    // The worker may have asked for kicks meanwhile, in the other used ring.
    pages.retain(|is| *is != page(guest.queues[1].used_ring()));
    assert_eq!(pages, want);
}

#[test]
fn garbage_for_messages_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let (path, worker) = one(folder.path());
    for request in 0..50_u32 {
        for len in [0_u32, 8, 40, 4096] {
            let mut socket = UnixStream::connect(&path).unwrap();
            let mut message = Vec::new();
            for word in [request, 1 | 8, len] {
                message.extend(word.to_le_bytes());
            }
            message.resize(12 + len as usize, (request * 7) as u8);
            // It may be refused before it is whole.
            let _ = socket.write_all(&message);
        }
    }
    works(&path, &worker);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Rings of any bytes, with sound ones among them.
    #[test]
    fn any_bytes_in_rings_do_no_harm(
        words in prop::collection::vec((0_u64..0x600, any::<u64>(), any::<bool>()), 1..200),
        available in 0_u16..80,
        features in prop_oneof![Just(0), Just(MERGE), Just(MERGE | INDIRECT | EVENT | OFFLOADS)],
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (path, worker) = one(folder.path());
        let guest = Guest::connect(&path, features, 1);
        for (at, word, sound) in words {
            for queue in &guest.queues {
                let bytes = if sound {
                    let flags = (word >> 40) as u16 & 7;
                    let at = GUEST + word % MEMORY;
                    Queue::descriptor(at, (word >> 20) as u32 % 3000, flags, (word >> 50) as u16 % SIZE)
                } else {
                    let mut bytes = [0; 16];
                    bytes[..8].copy_from_slice(word.to_le().as_slice());
                    bytes
                };
                guest.ram.write(queue.descriptors() + at / 16 * 16, &bytes);
                let ring = queue.available_ring() + 4 + at % (2 * u64::from(SIZE)) / 2 * 2;
                guest.ram.write(ring, &(word as u16 % (SIZE + 2)).to_le_bytes());
            }
        }
        for queue in &guest.queues {
            guest.ram.word(queue.available_ring() + 2).store(available, Ordering::SeqCst);
            queue.kick.write(1).unwrap();
        }
        for _ in 0..10 {
            let _ = send(&worker);
        }
        drop(guest);
        works(&path, &worker);
    }
}
