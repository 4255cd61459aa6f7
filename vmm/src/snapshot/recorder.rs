//! From a monitor's stream to a file.

use std::fs::File;
use std::io;

use super::stream::{self, END, HEAD, MOST_MEMORY, PAGES, REGIONS, REPORT, STATE};
use super::{DiskMark, Error, Head, How, MAGIC, MOST_OTHER, Report, Writer, Written, decode};

/// Takes a [stream](super::stream), in pieces of any size, and writes a file.
pub struct Recorder {
    /// What has come and is not whole.
    input: Vec<u8>,
    started: bool,
    file: Option<File>,
    how: How,
    head: Option<Head>,
    state: Option<Vec<u8>>,
    writer: Option<Writer>,
    chunks: u64,
    memory: u64,
    report: Option<Report>,
    ended: bool,
}

impl Recorder {
    /// Writes `file`, which is empty.
    #[must_use]
    pub fn new(file: File, how: impl Into<How>) -> Self {
        Self {
            input: Vec::new(),
            started: false,
            file: Some(file),
            how: how.into(),
            head: None,
            state: None,
            writer: None,
            chunks: 0,
            memory: 0,
            report: None,
            ended: false,
        }
    }

    /// Bytes of memory that have come.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// How the monitor says that it went, if it does.
    #[must_use]
    pub fn report(&self) -> Option<&Report> {
        self.report.as_ref()
    }

    /// Ends the file.
    ///
    /// # Errors
    /// The stream was not whole, or the file cannot be written.
    pub fn finish(self, disks: &[DiskMark]) -> Result<Written, Error> {
        const CUT: Error = Error::Damaged("the monitor did not send all of it");
        if !self.ended {
            return Err(CUT);
        }
        let writer = self.writer.ok_or(CUT)?;
        writer.finish(&self.state.ok_or(CUT)?, disks)
    }

    /// Takes what is whole of the input.
    fn parse(&mut self) -> Result<(), Error> {
        let mut at = 0;
        if !self.started {
            match self.input.get(..MAGIC.len()) {
                None => return Ok(()),
                Some(magic) if magic == MAGIC => at = MAGIC.len(),
                Some(_) => return Err(Error::NotOne),
            }
            self.started = true;
        }
        let input = std::mem::take(&mut self.input);
        while input.len() - at >= stream::HEADER {
            let mut rest = &input[at..];
            let Some((kind, _, length)) = stream::header(&mut rest)? else {
                break;
            };
            if length > MOST_OTHER.max(MOST_MEMORY as u64) {
                return Err(Error::Damaged("a part of it is too long"));
            }
            if (rest.len() as u64) < length {
                break;
            }
            let mut whole = &input[at..];
            let (_, payload) = stream::next(&mut whole)?;
            at += stream::HEADER + payload.len();
            self.take(kind, payload)?;
        }
        self.input = input[at..].to_vec();
        Ok(())
    }

    fn take(&mut self, kind: [u8; 4], payload: Vec<u8>) -> Result<(), Error> {
        const ORDER: Error = Error::Damaged("its parts are not in order");
        match kind {
            HEAD => self.head = Some(Head::decode(&payload)?),
            REGIONS => {
                let head = self.head.as_ref().ok_or(ORDER)?;
                let file = self.file.take().ok_or(ORDER)?;
                let regions = decode(&payload)?;
                self.writer = Some(Writer::new(file, head, regions, self.how.clone())?);
            }
            STATE => self.state = Some(payload),
            PAGES => {
                let (address, bytes) = payload
                    .split_first_chunk()
                    .ok_or(Error::Damaged("memory without a place"))?;
                let writer = self.writer.as_mut().ok_or(ORDER)?;
                writer.put(u64::from_le_bytes(*address), bytes)?;
                self.memory += bytes.len() as u64;
                self.chunks += 1;
            }
            REPORT => self.report = Some(decode(&payload)?),
            END if payload == self.chunks.to_le_bytes() => self.ended = true,
            END => return Err(ORDER),
            _ => {}
        }
        Ok(())
    }
}

impl io::Write for Recorder {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.input.extend(bytes);
        self.parse().map_err(|error| match error {
            Error::Io(error) => error,
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        })?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
