//! A front end in this process, with a driver of its own.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod driver;
mod hostile;
mod moving;
