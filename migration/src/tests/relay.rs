//! What is between the two ends, with its faults.

use super::*;

/// What becomes of the bytes between the two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fault {
    None,
    /// All connections but the first take their time.
    Late,
    /// All connections are cut after so many bytes in this direction.
    Cut {
        to_destination: bool,
        after: u64,
    },
    /// All are cut after so many bytes of memory that follows the guest, which runs
    /// at the destination, and there are no others from then on.
    Sever {
        after: u64,
    },
    /// One bit of this byte is turned over.
    Flip {
        to_destination: bool,
        at: u64,
    },
}

/// Carries connections from one socket to another, once with a fault.
pub(super) fn relay(from: &Path, to: PathBuf, fault: Fault, runs: &Arc<AtomicBool>) {
    let runs = Arc::clone(runs);
    let followed: Arc<AtomicU64> = Arc::default();
    let listener = UnixListener::bind(from).unwrap();
    let counted: Arc<[AtomicU64; 2]> = Arc::default();
    let all: Arc<Mutex<Vec<UnixStream>>> = Arc::default();
    let done = Arc::new(AtomicBool::new(fault == Fault::None));
    thread::spawn(move || {
        for (number, near) in listener.incoming().enumerate() {
            if fault == Fault::Late && number > 0 {
                thread::sleep(Duration::from_millis(50));
            }
            if matches!(fault, Fault::Sever { .. }) && done.load(Ordering::SeqCst) {
                continue;
            }
            let (Ok(near), Ok(far)) = (near, UnixStream::connect(&to)) else {
                continue;
            };
            for stream in [&near, &far] {
                all.lock().unwrap().push(stream.try_clone().unwrap());
            }
            for (to_destination, mut input, mut output) in [
                (false, near.try_clone().unwrap(), far.try_clone().unwrap()),
                (true, far, near),
            ] {
                let (counted, all, done) =
                    (Arc::clone(&counted), Arc::clone(&all), Arc::clone(&done));
                let (runs, followed) = (Arc::clone(&runs), Arc::clone(&followed));
                thread::spawn(move || {
                    let mut bytes = [0; 16384];
                    while let Ok(n @ 1..) = input.read(&mut bytes) {
                        let n = n as u64;
                        let here =
                            counted[usize::from(to_destination)].fetch_add(n, Ordering::SeqCst);
                        let hits = |at| here <= at && at < here + n && !done.load(Ordering::SeqCst);
                        let mut pass = n;
                        match fault {
                            Fault::Cut {
                                to_destination: which,
                                after,
                            } if which == to_destination && hits(after) => {
                                done.store(true, Ordering::SeqCst);
                                pass = after - here;
                            }
                            Fault::Sever { after }
                                if to_destination
                                    && runs.load(Ordering::SeqCst)
                                    && followed.fetch_add(n, Ordering::SeqCst) > after =>
                            {
                                done.store(true, Ordering::SeqCst);
                                pass = 0;
                            }
                            Fault::Flip {
                                to_destination: which,
                                at,
                            } if which == to_destination && hits(at) => {
                                done.store(true, Ordering::SeqCst);
                                bytes[(at - here) as usize] ^= 0x10;
                            }
                            _ => {}
                        }
                        if output.write_all(&bytes[..pass as usize]).is_err() {
                            break;
                        }
                        if pass < n {
                            for stream in all.lock().unwrap().drain(..) {
                                let _ = stream.shutdown(Shutdown::Both);
                            }
                        }
                    }
                    let _ = output.shutdown(Shutdown::Both);
                    let _ = input.shutdown(Shutdown::Both);
                });
            }
        }
    });
}
