//! A cable between two sockets of vhost-user: what comes in at one goes out at
//! the other. One worker, as the switch has them: it polls while there is
//! something to do, and sleeps when there is not.
//!
//! ```text
//! cargo run --example cable -- /run/vu0 /run/vu1
//! ```

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use blanket_overlay::frame::Frame;
use blanket_overlay::port::vhost_user::VhostUser;
use blanket_overlay::port::{BURST, Port};
use rustix::event::{PollFd, PollFlags};

/// How long a worker without work polls before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

#[derive(Default)]
struct Counts {
    passed: u64,
    lost: u64,
}

fn pass(from: &mut VhostUser, to: &mut VhostUser, counts: &mut Counts) -> io::Result<usize> {
    let done = from.receive(BURST, &mut |frame: &mut Frame<'_>| match to.send(frame) {
        Ok(()) => counts.passed += 1,
        Err(_) => counts.lost += 1,
    })?;
    if done > 0 {
        to.flush()?;
    }
    Ok(done)
}

fn sleep(ends: &mut [VhostUser; 2]) -> io::Result<()> {
    let mut armed = true;
    for end in ends.iter_mut() {
        armed &= end.arm()?;
    }
    if armed {
        let wakers: Vec<_> = ends.iter().map(Port::waker).collect();
        let mut fds: Vec<_> = wakers
            .iter()
            .map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN))
            .collect();
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    ends.iter_mut().for_each(Port::disarm);
    Ok(())
}

fn main() -> io::Result<()> {
    let paths: Vec<_> = std::env::args_os().skip(1).collect();
    let [one, two] = paths.as_slice() else {
        return Err(io::Error::other("usage: cable SOCKET SOCKET"));
    };
    let mut ends = [
        VhostUser::listen(Path::new(one), 4, 1522)?,
        VhostUser::listen(Path::new(two), 4, 1522)?,
    ];
    let mut counts = [Counts::default(), Counts::default()];
    let mut busy = Instant::now();
    let mut told = Instant::now();
    loop {
        let [one, two] = &mut ends;
        let done = pass(one, two, &mut counts[0])? + pass(two, one, &mut counts[1])?;
        if done > 0 {
            busy = Instant::now();
        } else if busy.elapsed() > SPIN {
            sleep(&mut ends)?;
            busy = Instant::now();
        }
        if told.elapsed() > Duration::from_secs(1) {
            told = Instant::now();
            for Counts { passed, lost } in &counts {
                print!("passed {passed} lost {lost} ");
            }
            println!();
        }
    }
}
