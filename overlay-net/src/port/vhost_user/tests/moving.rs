//! Frames both ways.

use std::path::PathBuf;

use super::super::VhostUser;
use super::driver::*;
use crate::frame::{Checksum, Frame, Head, Offload};
use crate::port::Port;

struct Two {
    _folder: tempfile::TempDir,
    paths: [PathBuf; 2],
    worker: Worker,
}

fn two(pairs: u16) -> Two {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let ports = paths
        .iter()
        .map(|path| VhostUser::listen(path, pairs, 1518).unwrap());
    let worker = Worker::new(ports.collect());
    Two {
        _folder: folder,
        paths,
        worker,
    }
}

pub(super) fn bytes(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
    bytes.extend((14..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)));
    bytes
}

fn first_frame(guest: &mut Guest, len: u32) -> Vec<u8> {
    let mut all = Vec::new();
    until("frame", || {
        all.extend(guest.received(len));
        !all.is_empty()
    });
    assert_eq!(all.len(), 1);
    all.remove(0)
}

#[test]
fn frames_of_all_sizes_go_both_ways() {
    for features in [
        MERGE,
        MERGE | EVENT | INDIRECT,
        MERGE | EVENT | INDIRECT | OFFLOADS,
    ] {
        let two = two(1);
        let mut guests = two
            .paths
            .each_ref()
            .map(|path| Guest::connect(path, features, 1));
        let indirect = features & INDIRECT != 0;
        for (i, len) in [60, 191, 192, 193, 204, 205, 1514, 9000]
            .into_iter()
            .enumerate()
        {
            let [a, b] = &mut guests;
            let (from, to) = if i % 2 == 0 { (a, b) } else { (b, a) };
            let frame = bytes(len, i as u8);
            for cuts in [&[][..], &[5, 12], &[12], &[30, 300, 700]] {
                to.offer(8, 2048);
                from.send([0; 12], &frame, cuts, indirect);
                let got = first_frame(to, 2048);
                let count = u16::from_le_bytes([got[10], got[11]]);
                assert_eq!(usize::from(count), (len + 12).div_ceil(2048));
                assert_eq!(got[..10], [0; 10]);
                assert!(got[12..] == frame, "{len} bytes cut at {cuts:?}");
                let back = from.queues[1].used(&from.ram);
                assert_eq!(back.len(), 1);
            }
        }
    }
}

#[test]
fn an_idle_worker_sleeps_and_one_kick_wakes_it() {
    for features in [MERGE, MERGE | EVENT] {
        let two = two(1);
        let mut guests = two
            .paths
            .each_ref()
            .map(|path| Guest::connect(path, features, 1));
        let [a, b] = &mut guests;
        for round in 0..20 {
            let slept = two.worker.slept.load(std::sync::atomic::Ordering::SeqCst);
            until("sleep", || {
                two.worker.slept.load(std::sync::atomic::Ordering::SeqCst) > slept
            });
            b.offer(1, 2048);
            b.queues[0].want_call(&b.ram);
            let _ = b.queues[0].call.read();
            a.send([0; 12], &bytes(100, round), &[], false);
            assert!(first_frame(b, 2048)[12..] == bytes(100, round));
            // The guest is told, too.
            until("call", || b.queues[0].call.read().is_ok());
        }
    }
}

#[test]
fn what_the_guest_cannot_take_is_done_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let port = VhostUser::listen(&path, 1, 1518).unwrap();
    let worker = Worker::new(vec![port]);
    // No offloads: segments come small and whole.
    let mut guest = Guest::connect(&path, MERGE, 1);
    guest.offer(32, 2048);
    let mut frame = bytes(54, 0);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].copy_from_slice(&[
        0x45, 0, 0x0b, 0xe0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    frame[46] = 0x50;
    frame.resize(54 + 3000, 1);
    let head = Head::of(&frame);
    let len = head.bytes().len();
    let body = [vm_memory::VolatileSlice::from(&mut frame[len..])];
    let whole = Frame {
        head,
        body: &body,
        offload: Offload {
            checksum: Some(Checksum {
                start: 34,
                offset: 16,
            }),
            valid: false,
            segments: Some(crate::frame::Segments {
                kind: crate::frame::Kind::Tcp4,
                ecn: false,
                header: 54,
                size: 1400,
            }),
        },
    };
    until("link", || worker.ports.lock().unwrap()[0].is_up());
    let mut ports = worker.ports.lock().unwrap();
    ports[0].send(&whole).unwrap();
    ports[0].flush().unwrap();
    drop(ports);
    let got = guest.received(2048);
    let lens: Vec<_> = got.iter().map(|frame| frame.len() - 12 - 54).collect();
    assert_eq!(lens, [1400, 1400, 200]);
    assert!(got.iter().all(|frame| frame[..10] == [0; 10]));
}

#[test]
fn a_full_ring_and_a_port_without_front_end_are_told_apart() {
    use crate::drops::Reason;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let worker = Worker::new(vec![VhostUser::listen(&path, 1, 1518).unwrap()]);
    let mut frame = bytes(3000, 0);
    let head = Head::of(&frame);
    let len = head.bytes().len();
    let body = [vm_memory::VolatileSlice::from(&mut frame[len..])];
    let frame = Frame {
        head,
        body: &body,
        offload: Offload::default(),
    };
    let send = || worker.ports.lock().unwrap()[0].send(&frame);
    assert_eq!(send(), Err(Reason::Down));
    let mut guest = Guest::connect(&path, MERGE, 1);
    assert_eq!(send(), Err(Reason::Full));
    guest.offer(1, 2048);
    assert_eq!(send(), Err(Reason::Full), "half of it would fit");
    guest.offer(2, 2048);
    assert_eq!(send(), Ok(()));
    // One buffer per frame, and it is too small.
    drop(guest);
    until("end", || !worker.ports.lock().unwrap()[0].is_up());
    let mut guest = Guest::connect(&path, 0, 1);
    guest.offer(2, 2048);
    assert_eq!(send(), Err(Reason::TooBig));
    assert_eq!(guest.received(2048).len(), 0);
}

#[test]
fn front_ends_come_and_go_and_backends_too() {
    let mut two = two(1);
    let mut first = Guest::connect(&two.paths[0], MERGE | EVENT, 1);
    let mut second = Guest::connect(&two.paths[1], MERGE | EVENT, 1);
    second.offer(16, 2048);
    first.send([0; 12], &bytes(100, 1), &[], false);
    first_frame(&mut second, 2048);
    // Another front end with the first one's guest: as after a new monitor.
    let left = first.leave();
    until("end", || !two.worker.ports.lock().unwrap()[0].is_up());
    let mut first = Guest::with(&two.paths[0], MERGE | EVENT, left);
    first.send([0; 12], &bytes(100, 2), &[], false);
    assert!(first_frame(&mut second, 2048)[12..] == bytes(100, 2));
    // The backend dies, with frames in the rings; the next one takes them.
    drop(two.worker);
    first.send([0; 12], &bytes(100, 3), &[], false);
    let ports = two.paths.iter().map(|path| {
        std::fs::remove_file(path).unwrap();
        VhostUser::listen(path, 1, 1518).unwrap()
    });
    two.worker = Worker::new(ports.collect());
    let mut second = Guest::with(&two.paths[1], MERGE | EVENT, second.leave());
    let _first = Guest::with(&two.paths[0], MERGE | EVENT, first.leave());
    assert!(first_frame(&mut second, 2048)[12..] == bytes(100, 3));
}

#[test]
fn flows_keep_to_a_queue_of_several() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let worker = Worker::new(vec![VhostUser::listen(&path, 4, 1518).unwrap()]);
    let mut guest = Guest::connect(&path, MERGE | 1 << 22, 4);
    for pair in 0..4 {
        let queue = &mut guest.queues[2 * pair];
        for i in 0..32 {
            queue.add(&guest.ram, &[(BUFFERS + i * 2048, 2048)], true, false);
        }
    }
    let mut counts = [0; 4];
    for port in 0..32_u8 {
        let mut frame = bytes(60, 0);
        frame[12..15].copy_from_slice(&[8, 0, 0x45]);
        frame[20..22].fill(0);
        frame[35] = port;
        let mut used = [0; 4];
        for id in 0..2 {
            // What differs from frame to frame does not count.
            frame[19] = id;
            let frame = Frame {
                head: Head::of(&frame),
                body: &[],
                offload: Offload::default(),
            };
            worker.ports.lock().unwrap()[0].send(&frame).unwrap();
        }
        worker.ports.lock().unwrap()[0].flush().unwrap();
        for (pair, used) in used.iter_mut().enumerate() {
            *used = guest.queues[2 * pair].used(&guest.ram).len();
            counts[pair] += *used;
        }
        assert_eq!(used.iter().max(), Some(&2), "{used:?}");
        if counts.iter().max() >= Some(&30) {
            break;
        }
    }
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    // One that is not enabled gets none.
    for pair in 1..4 {
        vhost::vhost_user::VhostUserFrontend::set_vring_enable(
            &mut guest.frontend,
            2 * pair,
            false,
        )
        .unwrap();
    }
    let before = guest.queues[0].used(&guest.ram).len();
    assert_eq!(before, 0);
}
