//! What is between the two ends, with its faults.

use std::os::fd::AsRawFd;

use super::*;
use crate::records::{Secrets, Suite, Traffic};
use crate::way;

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

/// What the connections have in common.
struct Between {
    fault: Fault,
    /// The guest runs at the destination.
    runs: Arc<AtomicBool>,
    /// Bytes from the destination, and to it.
    counted: [AtomicU64; 2],
    /// Bytes to it while the guest runs there.
    followed: AtomicU64,
    all: Mutex<Vec<UnixStream>>,
    /// The fault has happened.
    done: AtomicBool,
}

/// Carries connections from one socket to another, once with a fault. Of those
/// that may, every other one is handed over with secrets.
pub(super) fn relay(from: &Path, to: PathBuf, fault: Fault, runs: &Arc<AtomicBool>) {
    let listener = UnixListener::bind(from).unwrap();
    let between = Arc::new(Between {
        fault,
        runs: Arc::clone(runs),
        counted: Default::default(),
        followed: AtomicU64::default(),
        all: Mutex::default(),
        done: AtomicBool::new(fault == Fault::None),
    });
    thread::spawn(move || {
        for (number, near) in listener.incoming().enumerate() {
            if fault == Fault::Late && number > 0 {
                thread::sleep(Duration::from_millis(50));
            }
            if matches!(fault, Fault::Sever { .. }) && between.done.load(Ordering::SeqCst) {
                continue;
            }
            let (Ok(near), Ok(far)) = (near, UnixStream::connect(&to)) else {
                continue;
            };
            let between = Arc::clone(&between);
            thread::spawn(move || match number % 2 == 1 && asks(&near) {
                true => between.hand_over(&near, &far),
                false => between.carry(&near, &far),
            });
        }
    });
}

/// Whether what comes on it first is the question for a socket.
fn asks(near: &UnixStream) -> bool {
    let mut byte = 0u8;
    let fd = near.as_raw_fd();
    // SAFETY: the one byte is ours.
    let n = unsafe { libc::recv(fd, (&raw mut byte).cast(), 1, libc::MSG_PEEK) };
    n == 1 && byte == way::ASK
}

impl Between {
    fn hand_over(&self, mut near: &UnixStream, far: &UnixStream) {
        near.read_exact(&mut [0]).unwrap();
        let traffic = |secret| Traffic::new(Suite::Aes128Gcm, &[secret; 32], 1).unwrap();
        let ways = [(near, [1, 2]), (far, [2, 1])].map(|(stream, [write, read])| {
            let (way, other) = UnixStream::pair().unwrap();
            let secrets = Secrets::new(Suite::Aes128Gcm, traffic(write), traffic(read));
            // It may be cut already.
            let _ = way::hand_over(stream, way, Some(&secrets));
            other
        });
        self.carry(&ways[0], &ways[1]);
    }

    fn carry(&self, near: &UnixStream, far: &UnixStream) {
        for stream in [near, far] {
            self.all.lock().unwrap().push(stream.try_clone().unwrap());
        }
        thread::scope(|scope| {
            scope.spawn(|| self.copy(near, far, false));
            self.copy(far, near, true);
        });
    }

    fn copy(&self, mut input: &UnixStream, mut output: &UnixStream, to_destination: bool) {
        let mut bytes = [0; 16384];
        while let Ok(n @ 1..) = input.read(&mut bytes) {
            let n = n as u64;
            let here = self.counted[usize::from(to_destination)].fetch_add(n, Ordering::SeqCst);
            let done = &self.done;
            let hits = |at| here <= at && at < here + n && !done.load(Ordering::SeqCst);
            let mut pass = n;
            match self.fault {
                Fault::Cut {
                    to_destination: which,
                    after,
                } if which == to_destination && hits(after) => {
                    done.store(true, Ordering::SeqCst);
                    pass = after - here;
                }
                Fault::Sever { after }
                    if to_destination
                        && self.runs.load(Ordering::SeqCst)
                        && self.followed.fetch_add(n, Ordering::SeqCst) > after =>
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
                for stream in self.all.lock().unwrap().drain(..) {
                    let _ = stream.shutdown(Shutdown::Both);
                }
            }
        }
        let _ = output.shutdown(Shutdown::Both);
        let _ = input.shutdown(Shutdown::Both);
    }
}
