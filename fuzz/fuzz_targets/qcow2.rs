//! A qcow2 image: whatever it holds, it opens or is refused, and requests are
//! carried out or fail, within bounded time and memory. A sound image gives
//! back what was written to it.
#![no_main]

use arbitrary::Arbitrary;
use blanket_drivers::store::{Engine, Format, Image, Operation, Request, Spec};
use blanket_fuzz::file::MemFile;
use blanket_memory::IoVec;
use libfuzzer_sys::fuzz_target;

const CLUSTER: usize = 512;
/// Bytes of the disk.
const CAPACITY: usize = 64 << 10;
/// Bytes of a sparse file.
const HOLE: u64 = 1 << 40;
/// Most bytes of a request.
const MOST: usize = 8 << 10;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Not an image of ours at all.
    bytes: Option<Vec<u8>>,
    /// What differs from a sound image.
    changes: Vec<Change>,
    /// A hole behind it, longer than any memory.
    sparse: bool,
    readonly: bool,
    requests: Vec<Ask>,
}

#[derive(Arbitrary, Debug)]
enum Change {
    /// Any bytes anywhere.
    Bytes { at: u16, bytes: Vec<u8> },
    /// An entry of a table that leads to another cluster of the file.
    Entry {
        table: u8,
        index: u8,
        cluster: u8,
        flags: u8,
    },
    /// A field of the header, in units of four bytes.
    Header { field: u8, value: u32 },
}

impl Change {
    fn make(&self, image: &mut [u8]) {
        let (at, bytes) = match self {
            Self::Bytes { at, bytes } => (usize::from(*at), bytes.clone()),
            Self::Entry {
                table,
                index,
                cluster,
                flags,
            } => {
                let at = usize::from(table % 6) * CLUSTER + usize::from(index % 64) * 8;
                let target = (u64::from(*flags) << 56) | (u64::from(*cluster) * CLUSTER as u64);
                (at, target.to_be_bytes().to_vec())
            }
            Self::Header { field, value } => {
                (usize::from(field % 28) * 4, value.to_be_bytes().to_vec())
            }
        };
        let len = image.len().max(1);
        let rest = image.get_mut(at % len..).unwrap_or_default();
        rest.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }
}

#[derive(Arbitrary, Debug)]
struct Ask {
    kind: Kind,
    sector: u64,
    sectors: u8,
    fill: u8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// A sound image (qcow2 specification, version 3): header, refcount table and
/// block, L1 and L2 table, one cluster of data.
fn sound() -> Vec<u8> {
    let mut image = vec![0; 6 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let at_cluster = |n: u64| n * CLUSTER as u64;
    const COPIED: u64 = 1 << 63;
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &9u32.to_be_bytes());
    put(24, &(CAPACITY as u64).to_be_bytes());
    put(36, &2u32.to_be_bytes());
    put(40, &at_cluster(3).to_be_bytes());
    put(48, &at_cluster(1).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &at_cluster(2).to_be_bytes());
    for used in 0..6 {
        put(2 * CLUSTER + 2 * used, &1u16.to_be_bytes());
    }
    put(3 * CLUSTER, &(at_cluster(4) | COPIED).to_be_bytes());
    put(4 * CLUSTER, &(at_cluster(5) | COPIED).to_be_bytes());
    image
}

fuzz_target!(|input: Input| {
    let intact = input.bytes.is_none() && input.changes.is_empty();
    let mut bytes = input.bytes.unwrap_or_else(sound);
    for change in &input.changes {
        change.make(&mut bytes);
    }
    let file = MemFile::new(&bytes, if input.sparse { HOLE } else { 0 });
    let image = Image::open(&Spec {
        path: file.path(),
        readonly: input.readonly,
        format: Some(Format::Qcow2),
        direct: false,
        backing: false,
        engine: Engine::Auto,
        stripe: Vec::new(),
    });
    assert!(image.is_ok() || !intact);
    let Ok(image) = image else { return };
    let mut store = image.queue(4, &|| Box::new(|| Ok(()))).expect("a thread");
    // What an intact image must hold.
    let mut model = vec![0u8; CAPACITY];
    for ask in input.requests {
        let sectors = image.capacity() / 512;
        let offset = ask.sector % sectors * 512;
        let len = (usize::from(ask.sectors) * 512)
            .min(MOST)
            .min((image.capacity() - offset) as usize);
        let mut memory = vec![ask.fill; len];
        let data = matches!(ask.kind, Kind::Read | Kind::Write);
        let operation = match ask.kind {
            Kind::Read => Operation::Read,
            Kind::Write => Operation::Write,
            Kind::Flush => Operation::Flush,
            Kind::Discard => Operation::Discard,
            Kind::WriteZeroes => Operation::WriteZeroes,
        };
        let request = Request {
            operation,
            offset,
            len: len as u64,
            vectors: Vec::from_iter(data.then(|| IoVec::new(memory.as_mut_ptr(), len))),
            token: 0,
        };
        // SAFETY: `memory` lives until `drain` has returned the completion.
        unsafe { store.submit(request) }.expect("room for one request");
        let mut done = Vec::new();
        store.drain(&mut done);
        let result = &done[0].result;
        if !intact {
            continue;
        }
        let range = offset as usize..offset as usize + len;
        match ask.kind {
            Kind::Read => assert_eq!(memory, model[range]),
            Kind::Flush => {}
            _ if input.readonly => assert!(result.is_err()),
            Kind::Write => model[range].fill(ask.fill),
            Kind::WriteZeroes => model[range].fill(0),
            // A discard may leave anything: make it something.
            Kind::Discard => {
                let vectors = vec![IoVec::new(model[range.clone()].as_mut_ptr(), len)];
                let request = Request {
                    operation: Operation::Read,
                    offset,
                    len: 0,
                    vectors,
                    token: 0,
                };
                // SAFETY: as above, with `model`.
                unsafe { store.submit(request) }.expect("room for one request");
                store.drain(&mut done);
            }
        }
        assert!(input.readonly || done.iter().all(|done| done.result.is_ok()));
    }
    drop(store);
    // A flush may fail on an image that is not sound.
    assert!(image.flush().is_ok() || !intact);
});
