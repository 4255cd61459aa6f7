//! A store that has no room.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

/// Completes at once; writes find room or not.
struct Small {
    room: Arc<AtomicBool>,
    queued: Vec<Request>,
    event: EventFd,
}

impl Store for Small {
    unsafe fn submit(&mut self, request: Request) -> io::Result<()> {
        self.queued.push(request);
        Ok(())
    }
    fn commit(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn complete(&mut self, out: &mut Vec<Completion>) {
        let room = self.room.load(Ordering::Relaxed);
        out.extend(self.queued.drain(..).map(|request| {
            if room || request.operation != Operation::Write {
                return Completion::new(request.token, Ok(0));
            }
            Completion {
                token: request.token,
                result: Err(io::ErrorKind::StorageFull.into()),
                rest: Some(request),
            }
        }));
    }
    fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
    fn in_flight(&self) -> usize {
        self.queued.len()
    }
    fn drain(&mut self, out: &mut Vec<Completion>) {
        self.complete(out);
    }
}

fn engine(room: &Arc<AtomicBool>) -> (Engine<u8>, Arc<Metrics>) {
    let metrics = Arc::<Metrics>::default();
    let store = Small {
        room: Arc::clone(room),
        queued: Vec::new(),
        event: EventFd::new(EFD_NONBLOCK).unwrap(),
    };
    let identity = Identity {
        name: "blk0".to_owned(),
        metrics: Arc::clone(&metrics),
        log: Arc::default(),
    };
    (Engine::new(Box::new(store), Arc::new(identity)), metrics)
}

fn submit(engine: &mut Engine<u8>, operation: Operation, tag: u8) {
    // SAFETY: no memory.
    let taken = unsafe { engine.submit(request(operation, 0, 0), tag) };
    assert!(taken.is_ok());
}

#[test]
fn a_write_without_room_waits_and_is_done_once_there_is_some() {
    let room = Arc::new(AtomicBool::new(false));
    let (mut engine, metrics) = engine(&room);
    let calls = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&calls);
    metrics.when_full(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    submit(&mut engine, Operation::Write, 1);
    submit(&mut engine, Operation::Read, 2);
    submit(&mut engine, Operation::Write, 3);
    let mut done = Vec::new();
    engine.drain(false, &mut done);
    assert_eq!(done, [(2, Outcome::Done(0))]);
    assert_eq!((metrics.held(), engine.in_flight()), (2, 0));
    assert_eq!(calls.load(Ordering::Relaxed), 2);
    assert!(metrics.trouble().unwrap().contains("resume"));
    assert!(check_settled(&metrics).is_err());
    // Others come and go meanwhile, with tokens of their own.
    submit(&mut engine, Operation::Read, 4);
    engine.reap(false, &mut done);
    assert_eq!(done.pop(), Some((4, Outcome::Done(0))));
    // There is still none.
    engine.retry();
    engine.reap(false, &mut done);
    assert_eq!((done.len(), metrics.held()), (1, 2));
    room.store(true, Ordering::Relaxed);
    engine.retry();
    assert_eq!(metrics.held(), 0);
    done.clear();
    // Durable ones are flushed first.
    engine.drain(true, &mut done);
    done.sort_by_key(|(tag, _)| *tag);
    assert_eq!(done, [(1, Outcome::Done(0)), (3, Outcome::Done(0))]);
    assert_eq!(metrics.trouble(), None);
    assert!(check_settled(&metrics).is_ok());
}

#[test]
fn what_waits_goes_with_the_disks_driver() {
    let room = Arc::new(AtomicBool::new(false));
    let (mut engine, metrics) = engine(&room);
    submit(&mut engine, Operation::Write, 1);
    engine.drain(false, &mut Vec::new());
    assert_eq!(metrics.held(), 1);
    drop(engine.into_store());
    assert_eq!(metrics.held(), 0);
}

#[test]
fn a_missing_device_is_told_from_a_bad_one() {
    let metrics = Metrics::default();
    assert_eq!(metrics.trouble(), None);
    metrics.failed_with(&io::Error::from_raw_os_error(libc::EIO));
    assert!(metrics.trouble().unwrap().contains("1 requests"));
    metrics.failed_with(&io::Error::from_raw_os_error(libc::ENODEV));
    assert!(metrics.trouble().unwrap().contains("gone"));
}
