//! Copying the segments of an ELF image from a stream into guest memory.

use std::io::{BufRead, Read};

use blanket_memory::GuestRam;
use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::payload::Stream;
use super::{Problem, notes};
use notes::Notes;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
/// Program headers of a kernel, and where they end: more is no kernel.
const MAX_HEADERS: u16 = 64;
const MAX_HEAD: u64 = 64 << 10;
/// Bytes of notes.
const MAX_NOTES: u64 = 64 << 10;
/// How far into the image anything may lie.
const MAX_IMAGE: u64 = 1 << 30;

/// The program headers, and all bytes of the stream up to their end.
pub(super) struct Head {
    bytes: Vec<u8>,
    headers: Vec<Elf64_Phdr>,
}

/// Bytes of the image that are wanted.
struct Piece {
    offset: u64,
    len: u64,
    to: Target,
}

enum Target {
    Memory(GuestAddress),
    Notes(Vec<u8>),
}

impl Head {
    /// Reads the ELF header and the program headers.
    pub(super) fn read(stream: &mut Stream<'_>) -> Result<Self, Problem> {
        let format = |why: &str| Problem::Format(why.to_owned());
        let mut header = Elf64_Ehdr::default();
        stream.read_exact(header.as_mut_slice())?;
        if !header.e_ident.starts_with(b"\x7fELF") {
            return Err(format("what it holds is no ELF image"));
        }
        if header.e_ident[4] != 2 || header.e_machine != EM_X86_64 {
            return Err(format("it is for another processor"));
        }
        let size = size_of::<Elf64_Phdr>();
        let end = header
            .e_phoff
            .saturating_add(u64::from(header.e_phnum) * size as u64);
        if header.e_phnum > MAX_HEADERS
            || usize::from(header.e_phentsize) != size
            || end > MAX_HEAD
            || header.e_phoff < size_of::<Elf64_Ehdr>() as u64
        {
            return Err(format("its program headers make no sense"));
        }
        // Both bounded by MAX_HEAD.
        let (start, end) = (header.e_phoff as usize, end as usize);
        let mut bytes = header.as_slice().to_vec();
        bytes.resize(end.max(bytes.len()), 0);
        stream.read_exact(&mut bytes[size_of::<Elf64_Ehdr>()..])?;
        let headers = bytes[start..end].chunks_exact(size).map(|bytes| {
            let mut header = Elf64_Phdr::default();
            header.as_mut_slice().copy_from_slice(bytes);
            header
        });
        let headers: Vec<_> = headers.collect();
        for header in of_type(&headers, PT_LOAD).chain(of_type(&headers, PT_NOTE)) {
            let end = header.p_offset.saturating_add(header.p_filesz);
            let too_long = header.p_type == PT_NOTE && header.p_filesz > MAX_NOTES;
            if end > MAX_IMAGE || too_long {
                return Err(format("its segments make no sense"));
            }
        }
        Ok(Self { bytes, headers })
    }

    /// Reads the notes only.
    pub(super) fn notes(self, stream: &mut Stream<'_>) -> Result<Notes, Problem> {
        let mut pieces = self.note_pieces();
        self.copy(stream, None, &mut pieces)?;
        notes::parse(&joined(pieces))
    }

    /// Copies the segments into memory of `memory` bytes and clears what
    /// follows them. Returns the notes and the first byte behind the kernel.
    pub(super) fn load(
        self,
        stream: &mut Stream<'_>,
        ram: &GuestRam,
        memory: u64,
    ) -> Result<(Notes, u64), Problem> {
        let mut pieces = self.note_pieces();
        let mut end = 0;
        for segment in of_type(&self.headers, PT_LOAD) {
            let segment_end = segment
                .p_paddr
                .checked_add(segment.p_memsz.max(segment.p_filesz));
            end = end.max(segment_end.unwrap_or(u64::MAX));
            pieces.push(Piece {
                offset: segment.p_offset,
                len: segment.p_filesz,
                to: Target::Memory(GuestAddress(segment.p_paddr)),
            });
        }
        if end == 0 {
            return Err(Problem::Format("it has nothing to load".to_owned()));
        }
        if end > memory {
            return Err(Problem::Memory(end));
        }
        self.copy(stream, Some(ram), &mut pieces)?;
        for segment in of_type(&self.headers, PT_LOAD) {
            let cleared = segment.p_memsz.saturating_sub(segment.p_filesz);
            clear(ram, segment.p_paddr + segment.p_filesz, cleared)?;
        }
        let notes = notes::parse(&joined(pieces))?;
        // Linux has no offset. Without one, addresses in the image are those in memory.
        if notes.paddr_offset != 0 {
            return Err(Problem::NoPv("it is not linked to its place in memory"));
        }
        Ok((notes, end))
    }

    fn note_pieces(&self) -> Vec<Piece> {
        of_type(&self.headers, PT_NOTE)
            .map(|header| Piece {
                offset: header.p_offset,
                len: header.p_filesz,
                to: Target::Notes(Vec::new()),
            })
            .collect()
    }

    /// Reads the stream up to the end of the last piece and serves all pieces on the way.
    fn copy(
        &self,
        stream: &mut Stream<'_>,
        ram: Option<&GuestRam>,
        pieces: &mut [Piece],
    ) -> Result<(), Problem> {
        let end = pieces.iter().map(|p| p.offset + p.len).max().unwrap_or(0);
        serve(pieces, 0, &self.bytes, ram)?;
        let mut at = self.bytes.len() as u64;
        while at < end {
            let chunk = stream.fill_buf()?;
            if chunk.is_empty() {
                return Err(Problem::Truncated(format!(
                    "its ELF image has {at} of {end} bytes"
                )));
            }
            let len = chunk.len();
            serve(pieces, at, chunk, ram)?;
            stream.consume(len);
            at += len as u64;
        }
        Ok(())
    }
}

fn of_type(headers: &[Elf64_Phdr], kind: u32) -> impl Iterator<Item = &Elf64_Phdr> {
    headers.iter().filter(move |header| header.p_type == kind)
}

/// Gives each piece what it wants of `chunk`, which lies at `at` in the image.
fn serve(
    pieces: &mut [Piece],
    at: u64,
    chunk: &[u8],
    ram: Option<&GuestRam>,
) -> Result<(), Problem> {
    for piece in pieces {
        let from = piece.offset.max(at);
        let to = (piece.offset + piece.len).min(at + chunk.len() as u64);
        if from >= to {
            continue;
        }
        // Within the chunk, by the minimum and maximum above.
        let wanted = &chunk[(from - at) as usize..(to - at) as usize];
        match (&mut piece.to, ram) {
            (Target::Notes(bytes), _) => bytes.extend_from_slice(wanted),
            (Target::Memory(start), Some(ram)) => {
                ram.write_slice(wanted, GuestAddress(start.0 + (from - piece.offset)))?;
            }
            (Target::Memory(_), None) => {}
        }
    }
    Ok(())
}

fn joined(pieces: Vec<Piece>) -> Vec<u8> {
    let mut out = Vec::new();
    for piece in pieces {
        if let Target::Notes(bytes) = piece.to {
            out.extend(bytes);
        }
    }
    out
}

/// Zeroes guest memory.
pub(super) fn clear(ram: &GuestRam, start: u64, len: u64) -> Result<(), Problem> {
    static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
    let mut done = 0;
    while done < len {
        let step = (len - done).min(ZEROES.len() as u64);
        ram.write_slice(&ZEROES[..step as usize], GuestAddress(start + done))?;
        done += step;
    }
    Ok(())
}
