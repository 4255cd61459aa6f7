//! Live migration, between this process and another monitor.
//!
//! [`blanket_migration`] moves memory and decides who has the guest. Here is
//! what it works on: the machine's memory and KVM's log of what the guest
//! writes to it, on a [thread](Migrator) of its own, and the machine's life,
//! which stays with the main thread: the engine sends it [`Order`]s.
//!
//! Where both monitors are on one node, the source hands over what only one
//! process can have open at a time: the files of its disks with their locks, and
//! its taps. The destination opens them before anything is moved, and leaves
//! them alone until the guest is its own; frames that arrive while the guest
//! stands still wait in the tap. Where they are on two nodes, the source [sends
//! those on](frames).

mod frames;
mod guest;
mod hand_over;
mod migrator;
mod slow;

use std::sync::mpsc::SyncSender;

use serde::{Deserialize, Serialize};

pub(crate) use frames::Frames;
pub use guest::Tracked;
pub use hand_over::{Content, HandOver, Offered};
pub(crate) use migrator::Departure;
pub use migrator::Migrator;

/// What a migration is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Request {
    /// How it is done.
    pub options: blanket_migration::Options,
    /// Hand disks and taps over: the destination is on this node and connects
    /// without anything in between.
    pub hand_over: bool,
    /// The destination has the same disks, on storage that both nodes have.
    pub shared_disks: bool,
    /// Find out how much there is to be moved, and move nothing.
    pub dry_run: bool,
    /// Move nothing, but keep a replica of its disks up to date: a point every so
    /// many milliseconds.
    pub replicate_ms: Option<u64>,
}

/// What the engine wants of the main thread.
#[derive(Debug)]
pub struct Order {
    /// What to do.
    pub what: What,
    /// Where the answer goes: a machine's state for [`What::Stop`].
    pub answer: SyncSender<Result<Vec<u8>, String>>,
}

/// What to do.
#[derive(Debug)]
pub enum What {
    /// Stop the guest, save its state.
    Stop,
    /// Let it run on.
    Resume,
    /// It is another monitor's.
    GiveUp,
    /// End the process, which has nothing to do any more.
    End,
    /// Take over the state of a guest whose memory is in place.
    Restore(Vec<u8>),
    /// Run it.
    Run,
    /// End the process: no guest comes, for this reason.
    Fail(String),
}
