//! Live migration: a running guest moves to another monitor.
//!
//! Two monitors migrate over Unix stream sockets. The source listens, the
//! destination connects: once for the control stream, once for each of the data
//! streams that the source asks for, and once to be able to ask, whatever
//! happens, who has the guest. Neither knows whether the other end is
//! on the same machine, or what carries the bytes there; that may hand over a
//! [shorter way](way) for the data streams, [encrypted](records) or not.
//!
//! ```text
//! source                                   destination
//!   │ ◀────────────── hello ────────────────  │
//!   │ ── offer (memory, machine, files) ────▶ │  builds a machine like it
//!   │ ◀──────── join (each data stream) ────  │
//!   │ ◀────────────── accept ───────────────  │  nothing has been stopped yet
//!   │                                         │
//!   │ ── compare (a stretch of a disk) ─────▶ │  where the destination has
//!   │ ◀───────────────────────────── hashes ─ │  something of a disk already
//!   │ ══ blocks, holes (data streams) ══════▶ │  the disks, if they move
//!   │ ══ sync ══════════════════════════════▶ │  along, and what the guest
//!   │ ◀═══════════════════════════════ sync ═ │  writes to them meanwhile
//!   │ ── flush ─────────────────────────────▶ │
//!   │ ◀─────────────────────────────── flush ─ │  all of it is durable
//!   │                                         │
//!   │ ══ pages, zeros, blocks, holes ═══════▶ │  round after round: what the
//!   │    (pages: as a whole, as LZ4, or as    │
//!   │    what has changed in them)            │
//!   │ ══ sync ══════════════════════════════▶ │  guest and its devices wrote
//!   │ ◀═══════════════════════════════ sync ═ │  in the last one
//!   │                                         │
//!   │ stops the guest, saves its state        │
//!   │ ══ the last of them, sync ════════════▶ │
//!   │ ── flush ─────────────────────────────▶ │
//!   │ ◀─────────────────────────────── flush ─ │
//!   │ ── state ─────────────────────────────▶ │  restores it, does not run it
//!   │ ◀─────────────── ready ───────────────  │
//!   │ ── commit ────────────────────────────▶ │  THE GUEST CHANGES HANDS
//!   │ ◀────────────── running ──────────────  │  it is announced to its networks
//!   │ ── frame (each that comes here) ──────▶ │
//!   │ ── quiet (so is the announcement) ────▶ │  lets frames of its own in
//!   ends                                      goes on
//! ```
//!
//! # Before its memory
//!
//! A guest that writes faster than can be sent, or one for which that is wanted
//! ([`Mode`]), changes hands before its memory, which follows. The end of the
//! sequence is another one then:
//!
//! ```text
//!   │ stops the guest, saves its state        │
//!   │ ── missing (a bit for each page) ─────▶ │  empties them; who touches one
//!   │                                         │  waits: userfaultfd(2)
//!   │ ── state ─────────────────────────────▶ │  restores it
//!   │ ◀╌╌╌╌╌╌ join, need (a spare stream) ╌╌╌ │  (what it needs for that)
//!   │ ╌╌ pages, zeros, sync ╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌▶ │
//!   │ ◀─────────────── ready ───────────────  │
//!   │ ── commit ────────────────────────────▶ │  THE GUEST CHANGES HANDS
//!   │ ◀────────────── running ──────────────  │
//!   │ ◀═ need: a page that somebody waits for │  the first stream
//!   │ ◀═ want: up to 16 of the others ═══════ │  the others, many at a time
//!   │ ══ pages, zeros, sync ════════════════▶ │  each answer
//!   │ ◀────────────── complete ─────────────  │  all of it is there
//!   │ ── complete ──────────────────────────▶ │
//!   ends                                      goes on
//! ```
//!
//! The source answers, and remembers nothing: what was asked for on a stream
//! that is cut is asked for again on another one. Pages that come twice are not
//! taken twice, as the guest may have written them meanwhile.
//!
//! # Before its disks
//!
//! The disks' content may follow the guest, too ([`Options::lazy_disks`]), whether
//! or not its memory does. No blocks are sent in rounds then; the destination is
//! told which of them it lacks, at first and whenever the guest has written some,
//! and asks for them as it does for memory.
//!
//! ```text
//!   │ ── absent (ranges of disks) ──────────▶ │  who uses one waits: `Absent`
//!   │ ══ pages, zeros, sync ════════════════▶ │  memory, as ever
//!   │ ── absent, state ─────────────────────▶ │
//!   │ ◀─────────────── ready ───────────────  │
//!   │ ── commit ────────────────────────────▶ │  THE GUEST CHANGES HANDS
//!   │ ◀────────────── running ──────────────  │
//!   │ ◀═ need, want: up to 256 KiB of a disk ═ │
//!   │ ══ blocks, holes, sync ═══════════════▶ │
//!   │ ◀────────────── complete ─────────────  │  all of it is there, durably
//!   │ ── complete ──────────────────────────▶ │
//! ```
//!
//! # Who has the guest
//!
//! At any time at most one end may run it. The source owns it until it has sent
//! `commit`, and never runs it after; the destination runs it only when it has
//! received `commit`.
//!
//! ```text
//! source:      copying ──▶ switching ──── commit ────▶ handed ─── running ──▶ moved
//!                 │            │                         │ ▲ └─▶ following ────▲
//!        any error, cancel     │ any error               └─┘         complete ─┘
//!                 ▼            ▼                         asked: commit again
//!              failed ◀─ resumes the guest
//!
//! destination: receiving ──▶ ready ─────── commit ───────▶ running ──▶ all is there
//!                 │            │  └─ cut ─▶ asking ─ commit ──▲   │ ▲ cut: asks again
//!     cut, error, abort      abort            │ abort, silence   └─┘
//!                 ▼            ▼              ▼                  no way any more:
//!               ends          ends         undecided: paused,    ends, says what
//!                                          until it is told      is missing
//! ```
//!
//! | what happens | before `commit` | after |
//! |---|---|---|
//! | connection cut | the guest runs on at the source; the destination ends | the destination asks again, over a new connection, and runs it |
//! | destination dies | the guest runs on at the source | the guest is gone, as with any monitor that dies; the source says so |
//! | source dies | the guest is gone, as with any monitor that dies; if the destination was ready, whoever knows that the source is dead may resume it there | the guest runs at the destination |
//! | a byte changes | its checksum is wrong: as if cut | the same |
//! | the destination has no memory left, or its machine refuses the state | the guest runs on at the source | |
//! | cancelled | the guest runs on at the source | too late |
//!
//! While memory or disks follow, the source keeps all of them, but never runs the
//! guest:
//!
//! | what happens | while memory or disks follow |
//! |---|---|
//! | a stream is cut, or a byte changes | the guest waits where it needs some; the destination asks again on another stream |
//! | destination dies | the guest is gone; the source says so |
//! | source dies, or there is no way to it any more | where memory is missing, the guest is gone; the destination [says what is missing](Lost), and ends. Where only content of disks is, the guest gets errors |
//! | `running` is lost | the destination's questions for memory tell as much |
//!
//! A frame as short as `commit` is taken by a Unix socket whole or not at all:
//! a source that could not send it knows that nobody has it.

mod batch;
mod compare;
mod delta;
mod descriptors;
mod destination;
mod disk;
mod follow;
mod forecast;
mod frames;
mod journal;
mod keep;
pub mod records;
mod source;
mod squeeze;
mod status;
mod sum;
mod throttle;
pub mod way;
pub mod wire;

pub use destination::standby::Replica;
pub use destination::{Destination, Error as DestinationError, Machine, expect, place, store};
pub use disk::{Disk, Disks};
pub use follow::{DISKS_LOST, Lost, MEMORY_LOST, Remote, What as Lacking};
pub use forecast::{Forecast, measure};
pub use frames::Place;
pub use journal::{Journal, Point, replay};
pub use source::{Error, Guest, Source, Terms};
pub use status::{
    Compress, Following, MOST_STREAMS, Mode, Options, Packed, Phase, Progress, Replication, Round,
    Status, Step,
};

#[cfg(test)]
mod tests;
