//! The least that an answer takes: somebody who sleeps is asked, and who asked
//! sleeps until it is answered.

use std::path::Path;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::vm::{Machine, Operation};

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answerer<'a> {
    /// A thread of this machine.
    Thread,
    /// The payload in this folder, which takes nothing but an exit for it: no
    /// interrupt, no kernel, no device.
    Guest(&'a Path),
}

/// Asks `count` times, each `pause` after the answer before; the mean time until
/// the answer, in microseconds.
///
/// # Errors
/// KVM or the payload does not do what it must.
pub fn answers(answerer: Answerer<'_>, count: u32, pause: Duration) -> Result<f64> {
    let (ask, asked) = channel();
    let (answer, answered) = channel();
    let mut machine = match answerer {
        Answerer::Thread => None,
        Answerer::Guest(payloads) => {
            let payload = payloads.join("floor");
            Some(Machine::new(&payload, Operation::Exit, 1, count.into())?)
        }
    };
    thread::scope(|scope| {
        let answering = scope.spawn(move || -> Result<()> {
            while let Ok(()) = asked.recv() {
                if let Some(machine) = &mut machine {
                    machine.go_on()?;
                }
                answer.send(())?;
            }
            Ok(())
        });
        let mut total = Duration::ZERO;
        for _ in 0..count {
            thread::sleep(pause);
            let start = Instant::now();
            // If it has failed, it says so below.
            if ask.send(()).is_err() || answered.recv().is_err() {
                break;
            }
            total += start.elapsed();
        }
        drop(ask);
        let ended = answering.join();
        ended.map_err(|_| anyhow!("the thread that answers panicked"))??;
        Ok(total.as_secs_f64() * 1e6 / f64::from(count))
    })
}
