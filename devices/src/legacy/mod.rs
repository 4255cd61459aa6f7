//! What a PC has always had, and what firmware has.

pub mod generation;
pub mod power;
pub mod serial;
