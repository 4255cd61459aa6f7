//! The programmable flow table.
//!
//! ```text
//! Key --> cache --hit--> Decision --> execute --> Sink
//!           \--miss--> Walk through Tables --> Decision, remembered
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`fields`] | a frame's key as a few words, and the fields in it |
//! | [`matches`], [`actions`], [`meter`] | what entries consist of |
//! | [`text`] | the same as text, as users of Open vSwitch write it |
//! | [`tables`], [`control`] | entries; who may change them, while workers look |
//! | [`pipeline`] | a worker's: cache, decision, what is done |
//! | [`conntrack`], [`groups`] | connections; security groups, which let them through |
//! | [`openflow`] | external controllers |
//!
//! One [`Control`] owns the tables. Each worker has a [`Pipeline`], which sees
//! them as they were when it last looked ([`Pipeline::tick`]): they are never
//! changed in place, but swapped. Its cache is its own, as are the counts in it
//! until they are added, so that a frame takes no lock and shares no line of
//! memory with other workers, but for meters and connections.

pub mod actions;
mod apply;
mod cache;
pub mod conntrack;
pub mod control;
pub mod fields;
pub mod groups;
pub mod matches;
pub mod meter;
pub mod openflow;
pub mod pipeline;
mod rewrite;
pub mod tables;
#[cfg(test)]
mod tests;
pub mod text;
mod trace;
mod walk;

pub use actions::Action;
pub use apply::{Packet, Sink, Target};
pub use conntrack::Connections;
pub use control::{Control, Filter, Gone, Refused, Shared};
pub use fields::{Field, Flat};
pub use matches::Match;
pub use pipeline::{CACHE, Decision, Pipeline, Step, ToController};
pub use tables::{Entry, Flags, Flow, Tables};
pub use trace::{Trace, trace};
