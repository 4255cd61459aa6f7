//! Channels into guests.

use std::thread;
use std::time::{Duration, Instant};

use blanket_testbed_agent::client::{self, Client};

use crate::error::Result;

/// Pause before a guest's console that is not there yet is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// The channel into a guest on a node (or on this machine), whose agent is on the console that
/// is at the Unix socket `socket` there. Waits up to `limit` for the socket to be there and for
/// the guest to answer.
///
/// # Errors
/// [`crate::Error::Channel`] when no agent has answered in time.
pub fn guest(node: &Client, socket: &str, limit: Duration) -> Result<Client> {
    let deadline = Instant::now() + limit;
    loop {
        let stream = node
            .command("blanket-agent")
            .args(["relay", socket])
            .stream()?;
        let left = deadline.saturating_duration_since(Instant::now());
        match Client::connect(stream.output, stream.input, left) {
            Err(client::Error::Closed(_)) if !left.is_zero() => thread::sleep(RETRY),
            result => return Ok(result?),
        }
    }
}
