//! One process, one VM.

pub mod api;
pub mod client;
pub mod config;
