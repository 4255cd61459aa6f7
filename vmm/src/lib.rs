//! One process, one VM.

pub mod config;
