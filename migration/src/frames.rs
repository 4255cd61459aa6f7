//! Frames that reach the guest's old place while its networks do not know its
//! new one yet.
//!
//! They wait in the old taps while the guest stands still. When it runs, the
//! source sends them on, until it has seen the guest's announcement come in from
//! each of its networks: whatever is behind that went to the new place by itself.
//! The destination lets nothing else in before, so that no frame overtakes an
//! older one.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::destination::Machine;
use crate::source::Guest;
use crate::wire::{self, Kind};

/// For how long the source waits for the announcement: some networks keep it to
/// themselves.
const LONGEST: Duration = Duration::from_millis(200);
/// For how long the destination waits for the source.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the source sleeps when no frame is there.
const LOOK: Duration = Duration::from_micros(100);
/// What precedes a frame: its interface and its queue.
const PLACE: usize = 4;

/// More frames than this are not sent on: who sends so many does without some.
const MOST: u64 = 100_000;

/// Where a frame belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The guest's interface; from 0 on.
    pub interface: u16,
    /// Its queue; from 0 on.
    pub queue: u16,
}

/// Sends the frames that come to the guest's old place; how many.
pub(crate) fn forward(guest: &mut dyn Guest, stream: &mut UnixStream) -> Result<u64, wire::Error> {
    let end = Instant::now() + LONGEST;
    let mut frame = Vec::new();
    let mut payload = Vec::new();
    let mut count = 0;
    loop {
        // Asked first: what comes before the announcement is still to be taken.
        let found = guest.is_found() || Instant::now() > end;
        match guest.frame(&mut frame) {
            Some(place) => {
                payload.clear();
                payload.extend(place.interface.to_le_bytes());
                payload.extend(place.queue.to_le_bytes());
                payload.extend(&frame);
                wire::send(stream, Kind::Frame, &payload)?;
                count += 1;
                if count >= MOST {
                    break;
                }
            }
            None if found => break,
            None => std::thread::sleep(LOOK),
        }
    }
    wire::send(stream, Kind::Quiet, &[])?;
    Ok(count)
}

/// Takes the frames that the source sends on, to the last one.
pub(crate) fn take(machine: &dyn Machine, stream: &mut UnixStream) -> Result<(), wire::Error> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut payload = Vec::new();
    loop {
        match wire::receive(stream, &mut payload)? {
            Kind::Frame => {
                let (place, frame) = split(&payload)?;
                machine.frame(place, frame);
            }
            Kind::Quiet => return Ok(()),
            _ => return Err(wire::Error::Damaged("its parts are not in order")),
        }
    }
}

fn split(payload: &[u8]) -> Result<(Place, &[u8]), wire::Error> {
    let damaged = wire::Error::Damaged("a frame without a place");
    let (head, frame) = payload.split_first_chunk::<PLACE>().ok_or(damaged)?;
    let [a, b, c, d] = *head;
    let place = Place {
        interface: u16::from_le_bytes([a, b]),
        queue: u16::from_le_bytes([c, d]),
    };
    Ok((place, frame))
}
