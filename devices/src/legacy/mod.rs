//! What a PC has always had.

pub mod power;
pub mod serial;
