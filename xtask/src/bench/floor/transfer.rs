//! The least that moving a guest's memory takes: the same bytes over the same
//! kind of connection, from memory that no cache holds into memory that the
//! kernel has yet to give, and nothing else: no sums, no headers, no guest.

use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow};
use blanket_memory::{Backing, GuestRam, Spec};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile, VolatileSlice,
    WriteVolatile,
};

/// Bytes that go at once.
const PIECE: usize = 1 << 20;

/// Moves `mib` MiB over each of `streams` connections of the loopback
/// interface; Gb/s.
///
/// # Errors
/// The memory or the connections are not to be had.
pub fn transfer(mib: usize, streams: usize) -> Result<f64> {
    let (from, to) = (memory(mib, streams)?, memory(mib, streams)?);
    for (number, region) in from.iter().enumerate() {
        // Whatever is not all zeros, and different on each page.
        for page in (0..region.len()).step_by(4096) {
            let word = page ^ (number as u64 + 1) << 40 | 1;
            from.write_obj(word, GuestAddress(region.start_addr().0 + page))?;
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let start = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let mut threads = Vec::new();
        for (source, target) in from.iter().zip(to.iter()) {
            let mut sender = TcpStream::connect(address)?;
            let (mut receiver, _) = listener.accept()?;
            threads.push(scope.spawn(move || -> Result<()> {
                pieces(&source.as_volatile_slice()?, |piece| {
                    Ok(sender.write_all_volatile(piece)?)
                })
            }));
            threads.push(scope.spawn(move || -> Result<()> {
                pieces(&target.as_volatile_slice()?, |piece| {
                    Ok(receiver.read_exact_volatile(piece)?)
                })
            }));
        }
        for thread in threads {
            let ended = thread.join();
            ended.map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(())
    })?;
    let bits = (mib * streams) as f64 * 8.0 * 1024.0 * 1024.0;
    Ok(bits / start.elapsed().as_secs_f64() / 1e9)
}

fn pieces<B: BitmapSlice>(
    all: &VolatileSlice<'_, B>,
    mut each: impl FnMut(&mut VolatileSlice<'_, B>) -> Result<()>,
) -> Result<()> {
    for at in (0..all.len()).step_by(PIECE) {
        each(&mut all.subslice(at, PIECE.min(all.len() - at))?)?;
    }
    Ok(())
}

/// Memory like a guest's, a region for each stream.
fn memory(mib: usize, streams: usize) -> Result<GuestRam> {
    let len = (mib as u64) << 20;
    let places: Vec<_> = (0..streams as u64)
        .map(|number| (GuestAddress(number * len), len))
        .collect();
    Ok(blanket_memory::build_at(
        &Spec {
            size: len * streams as u64,
            backing: Backing::Transparent,
            shared: false,
        },
        &places,
    )?)
}
