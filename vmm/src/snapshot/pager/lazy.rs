//! Memory that comes from a snapshot's file when it is needed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use blanket_memory::discard;
use blanket_memory::uffd::Mode;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Job, Thread, give_up};
use crate::snapshot::touched::runs;
use crate::snapshot::{CHUNK, Error, Reader, decode, encode, working_set_of};

/// For so long after the start it is noted what is needed.
const NOTED: Duration = Duration::from_secs(5);
/// Most chunks that are noted: 1 GiB of memory.
const MOST: usize = 1 << 14;
/// Longest file with them, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// What is needed first, from the file beside the snapshot.
#[derive(Debug, Default)]
pub struct WorkingSet {
    /// Chunks to read ahead.
    chunks: Vec<u64>,
    /// Where to note them, if that was not done before.
    file: Option<File>,
}

/// As it is in the file.
#[derive(Serialize, Deserialize)]
struct Noted {
    /// The snapshot's identity.
    snapshot: [u8; 32],
    chunks: Vec<u64>,
}

impl WorkingSet {
    /// Opens the file beside the snapshot at `path`. It is a help: where it
    /// cannot be had, all goes on without it.
    #[must_use]
    pub fn open(path: &Path, reader: &Reader) -> Self {
        let beside = working_set_of(path);
        if let Some(chunks) = read(&beside, reader) {
            return Self { chunks, file: None };
        }
        let mut options = File::options();
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.write(true).create(true).truncate(true).open(beside);
        Self {
            chunks: Vec::new(),
            file: file.ok(),
        }
    }
}

/// What was noted for this very snapshot.
fn read(path: &Path, reader: &Reader) -> Option<Vec<u64>> {
    let mut bytes = Vec::new();
    let file = File::open(path).ok()?;
    file.take(MOST_BYTES).read_to_end(&mut bytes).ok()?;
    let noted: Noted = decode(&bytes).ok()?;
    let sound = noted.snapshot == reader.identity() && noted.chunks.len() <= MOST;
    sound.then_some(noted.chunks)
}

/// What is noted now.
struct Notes {
    file: File,
    until: Instant,
    chunks: Vec<u64>,
}

impl Notes {
    /// Milliseconds that are left.
    fn left(&self) -> i32 {
        let left = self.until.saturating_duration_since(Instant::now());
        left.as_millis() as i32 + 1
    }

    fn write(mut self, reader: &Reader) {
        let noted = Noted {
            snapshot: reader.identity(),
            chunks: self.chunks,
        };
        // A help, and no more: a file that is not whole is not read.
        let _ = encode(&noted).and_then(|bytes| self.file.write_all(&bytes));
    }
}

impl Thread {
    /// Lets memory come from `reader`, until all of it is there or the owner is
    /// gone.
    pub(super) fn lazy(
        &self,
        reader: &Reader,
        set: WorkingSet,
        answer: &SyncSender<io::Result<()>>,
    ) {
        let pieces = match self.arm(reader) {
            Ok(pieces) => pieces,
            Err(error) => return drop(answer.send(Err(error))),
        };
        // The owner waits for it.
        let _ = answer.send(Ok(()));
        match self.serve(reader, set) {
            Ok(Some(waits)) => {
                let done = self.complete(reader, &pieces);
                drop(waits.send(done));
            }
            // Nobody needs anything any more.
            Ok(None) => {}
            Err(error) => give_up(&error),
        }
    }

    /// Empties memory, and sees to it that who touches what is in the file
    /// waits. What is not in it are zeros, as the kernel gives them.
    fn arm(&self, reader: &Reader) -> io::Result<Vec<(u64, u64)>> {
        let mut pieces = Vec::new();
        for (address, len) in reader.used() {
            let host = self.host(address);
            let host = host.ok_or_else(|| io::Error::other("no such memory"))?;
            self.uffd.register(host, len, Mode::Missing)?;
            pieces.push((host, len));
        }
        for region in self.ram.iter() {
            discard(&self.ram, region.start_addr(), region.len() as usize)?;
        }
        Ok(pieces)
    }

    /// Serves faults until all has to be there (somebody waits for that then),
    /// or the owner is gone.
    fn serve(
        &self,
        reader: &Reader,
        set: WorkingSet,
    ) -> Result<Option<SyncSender<io::Result<()>>>, Error> {
        let mut notes = set.file.map(|file| Notes {
            file,
            until: Instant::now() + NOTED,
            chunks: Vec::new(),
        });
        let mut ahead = set.chunks.into_iter();
        let mut content = vec![0; CHUNK];
        loop {
            while let Some(fault) = self.uffd.fault()? {
                let chunk = self.chunk_at(fault.address).ok_or(Error::Memory)?;
                self.bring(reader, chunk, &mut content)?;
                if let Some(notes) = notes.as_mut().filter(|notes| notes.chunks.len() < MOST) {
                    notes.chunks.push(chunk);
                }
            }
            match self.job() {
                Err(()) => return Ok(None),
                Ok(Some(Job::Complete(answer))) => return Ok(Some(answer)),
                Ok(Some(
                    Job::Restore(_, _, answer) | Job::Follow(_, answer) | Job::Save(_, answer),
                )) => {
                    let busy = io::Error::other("the memory is not all there");
                    drop(answer.send(Err(busy)));
                }
                Ok(None) => {}
            }
            if let Some(chunk) = ahead.next() {
                if reader.is_used(chunk) {
                    self.bring(reader, chunk, &mut content)?;
                }
                continue;
            }
            match notes.take_if(|notes| Instant::now() >= notes.until) {
                Some(notes) => notes.write(reader),
                None => self.wait(notes.as_ref().map_or(-1, Notes::left))?,
            }
        }
    }

    /// Puts a chunk in its place.
    fn bring(&self, reader: &Reader, chunk: u64, content: &mut [u8]) -> Result<(), Error> {
        let (address, len) = self.geometry.memory(chunk).ok_or(Error::Memory)?;
        let host = self.host(address).ok_or(Error::Memory)?;
        reader.chunk(chunk, content)?;
        for (start, bytes, zeros) in runs(&content[..len]) {
            let to = host + start as u64;
            if zeros {
                self.uffd.fill_zeros(to, bytes.len())?;
            } else {
                self.uffd.fill(to, bytes)?;
            }
        }
        Ok(())
    }

    /// Brings all that is in the file, while others go on and wait as before.
    fn complete(&self, reader: &Reader, pieces: &[(u64, u64)]) -> io::Result<()> {
        let mut content = vec![0; CHUNK];
        for chunk in (0..self.geometry.chunks()).filter(|chunk| reader.is_used(*chunk)) {
            while let Some(fault) = self.uffd.fault()? {
                let wanted = self.chunk_at(fault.address);
                let wanted = wanted.ok_or_else(|| io::Error::other("no such memory"))?;
                self.bring(reader, wanted, &mut content)
                    .unwrap_or_else(|error| give_up(&error));
            }
            self.bring(reader, chunk, &mut content)
                .unwrap_or_else(|error| give_up(&error));
        }
        for (host, len) in pieces {
            self.uffd.unregister(*host, *len)?;
        }
        Ok(())
    }
}
