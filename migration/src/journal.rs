//! What has changed on a replica's disks from one point to the next.
//!
//! A replica is never between two points: what comes is written to a file, and
//! put on the disks when all of it is there. The file consists of frames as they
//! come ([`wire`]), with a [`Kind::Point`] at its end. Without that it is not
//! whole; with it, it can be carried out as often as need be.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::destination::{Error, store};
use crate::disk::{Disk, Disks};
use crate::wire::{self, Frames, Kind};

/// A state in which the disks were, all at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// Its number, from 1 on in each connection.
    pub number: u64,
    /// Milliseconds since then, when it was said.
    pub age_ms: u64,
    /// When it was, in milliseconds of Unix time, by the replica's clock. The
    /// source does not know.
    #[serde(default)]
    pub at_ms: u64,
}

/// A file that takes what comes.
pub struct Journal(Mutex<BufWriter<File>>);

impl Journal {
    /// In this file, which is empty.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self(Mutex::new(BufWriter::with_capacity(1 << 20, file)))
    }

    /// Takes a frame for these disks; what does not fit them is refused.
    pub(crate) fn take(&self, kind: Kind, payload: &[u8], disks: &Disks) -> Result<(), Error> {
        let sizes: Vec<Arc<dyn Disk>> = disks
            .iter()
            .map(|disk| Arc::new(Size(disk.capacity())) as _)
            .collect();
        store(kind, payload, &sizes)?;
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        append(&mut *file, kind, payload).map_err(Error::Disk)
    }

    /// Ends it with a point; durable when this returns.
    pub(crate) fn end(self, point: &Point) -> Result<(), Error> {
        let mut file = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        append(&mut file, Kind::Point, &wire::encode(point)?).map_err(Error::Disk)?;
        let file = file
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error);
        file.and_then(|file| file.sync_all()).map_err(Error::Disk)
    }
}

fn append(file: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut frames = Frames::default();
    frames.begin();
    frames.push(payload);
    frames.end(kind);
    file.write_all(frames.bytes())
}

/// Puts a journal on the disks, which are durable then; its point. Before
/// anything is changed, all of it is looked at.
///
/// # Errors
/// It is not whole or not for these disks, or one fails: it can be tried again.
pub fn replay(path: &Path, disks: &Disks) -> Result<Point, Error> {
    let sizes: Vec<Arc<dyn Disk>> = disks
        .iter()
        .map(|disk| Arc::new(Size(disk.capacity())) as _)
        .collect();
    go_through(path, &sizes)?;
    let point = go_through(path, disks)?;
    disks
        .iter()
        .try_for_each(|disk| disk.flush())
        .map_err(Error::Disk)?;
    Ok(point)
}

fn go_through(path: &Path, disks: &Disks) -> Result<Point, Error> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(Error::Disk)?);
    let mut payload = Vec::new();
    loop {
        match wire::receive(&mut file, &mut payload)? {
            kind @ (Kind::Blocks | Kind::Holes) => store(kind, &payload, disks)?,
            Kind::Point => return Ok(wire::decode(&payload)?),
            _ => return Err(wire::Error::Damaged("its parts are not in order").into()),
        }
    }
}

/// A disk that is as large as another one, and takes anything.
struct Size(u64);

impl Disk for Size {
    fn capacity(&self) -> u64 {
        self.0
    }

    fn next_data(&self, _: u64) -> io::Result<Option<Range<u64>>> {
        Ok(None)
    }

    fn read(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn clear(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
