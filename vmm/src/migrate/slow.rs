//! A guest that is slowed down because it writes faster than can be sent.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::vcpu::Brake;

/// How often the vCPUs are taken out of the guest, to look whether they are to
/// sleep.
const TICK: Duration = Duration::from_millis(5);

/// Slows the vCPUs down as long as it lives.
pub(super) struct Slowed {
    brakes: Arc<[Brake]>,
    /// The thread that kicks them ends when this does.
    over: Option<Sender<()>>,
    ticker: Option<JoinHandle<()>>,
}

impl Slowed {
    /// Begins, without slowing anything down yet.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(super) fn new(brakes: &Arc<[Brake]>) -> io::Result<Self> {
        let (over, ended) = channel();
        let kicked = Arc::clone(brakes);
        let ticker = std::thread::Builder::new()
            .name("slow".to_owned())
            .spawn(move || {
                while ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                    kicked.iter().for_each(Brake::kick);
                }
            })?;
        Ok(Self {
            brakes: Arc::clone(brakes),
            over: Some(over),
            ticker: Some(ticker),
        })
    }

    /// Has them sleep so many percent of the time in which they would run.
    pub(super) fn set(&self, percent: u8) {
        self.brakes.iter().for_each(|brake| brake.set(percent));
    }
}

impl Drop for Slowed {
    fn drop(&mut self) {
        self.over = None;
        if let Some(ticker) = self.ticker.take() {
            let _ = ticker.join();
        }
        self.set(0);
    }
}
