//! What the machine costs a process.

use std::hint::black_box;
use std::io::{self, Read, Write};
use std::process::Command;
use std::time::Instant;

use serde_json::{Map, json};

use crate::Report;
use crate::memory::{PAGE, Pages};
use crate::process;

/// The subcommand that does nothing: what a new program costs at least.
pub(crate) const NOTHING: &str = "nothing";

/// Batches of each measurement.
const BATCHES: usize = 25;

/// Runs `batch`, which does something `count` times, for each of the batches.
fn measure(
    into: &mut Map<String, serde_json::Value>,
    name: &str,
    count: u32,
    mut batch: impl FnMut(u32) -> io::Result<()>,
) -> io::Result<()> {
    // Once to warm up.
    batch(1)?;
    let mut times = Vec::with_capacity(BATCHES);
    for _ in 0..BATCHES {
        let start = Instant::now();
        batch(count)?;
        times.push(start.elapsed().as_secs_f64() * 1e9 / f64::from(count));
    }
    times.sort_by(f64::total_cmp);
    let nanoseconds = json!({ "min": times[0], "median": times[BATCHES / 2] });
    into.insert(name.to_owned(), nanoseconds);
    Ok(())
}

/// Measures; times are in nanoseconds for one operation.
pub(crate) fn run() -> io::Result<Report> {
    let mut all = Map::new();
    measure(&mut all, "getppid", 200, |count| {
        for _ in 0..count {
            // SAFETY: takes no arguments and cannot fail.
            black_box(unsafe { libc::syscall(libc::SYS_getppid) });
        }
        Ok(())
    })?;
    measure(&mut all, "clock_gettime", 2000, |count| {
        for _ in 0..count {
            black_box(Instant::now());
        }
        Ok(())
    })?;
    memory(&mut all)?;
    processes(&mut all)?;
    pipe(&mut all)?;
    measure(&mut all, "compute", 1, |_| {
        black_box(compute());
        Ok(())
    })?;
    Ok(Report {
        good: true,
        json: all.into(),
    })
}

/// Writes a byte to each page.
fn touch(pages: &Pages, count: usize) {
    for index in 0..count {
        // SAFETY: the page belongs to the mapping and nobody refers to it.
        unsafe { pages.page(index).write_volatile(1) };
    }
}

fn memory(all: &mut Map<String, serde_json::Value>) -> io::Result<()> {
    // The page tables of the region are there: only the pages themselves are new.
    const REGION: u32 = 256;
    let region = Pages::map(REGION as usize)?;
    measure(all, "fresh_page_fault", REGION, |count| {
        touch(&region, count as usize);
        // Part of the price, the same on every machine: the pages are given back.
        // SAFETY: the range is the mapping, to which there is no reference.
        unsafe {
            let start = region.page(0).cast();
            libc::madvise(start, REGION as usize * PAGE, libc::MADV_DONTNEED)
        };
        Ok(())
    })?;
    measure(all, "mmap_touch_munmap", 20, |count| {
        for _ in 0..count {
            touch(&Pages::map(1)?, 1);
        }
        Ok(())
    })?;
    let page = Pages::map(1)?;
    measure(all, "mprotect_twice_and_touch", 20, |count| {
        for _ in 0..count {
            page.protect(libc::PROT_READ)?;
            page.protect(libc::PROT_READ | libc::PROT_WRITE)?;
            touch(&page, 1);
        }
        Ok(())
    })
}

fn processes(all: &mut Map<String, serde_json::Value>) -> io::Result<()> {
    measure(all, "fork_exit_wait", 4, |count| {
        for _ in 0..count {
            process::wait(process::fork(|| 0)?)?;
        }
        Ok(())
    })?;
    let program = std::env::current_exe()?;
    measure(all, "vfork_exec_wait", 4, |count| {
        for _ in 0..count {
            Command::new(&program).arg(NOTHING).status()?;
        }
        Ok(())
    })
}

/// A byte to another process and back.
fn pipe(all: &mut Map<String, serde_json::Value>) -> io::Result<()> {
    let (mut request, mut to_child) = io::pipe()?;
    let (mut from_child, mut answer) = io::pipe()?;
    let child = {
        let keep = to_child.try_clone()?;
        process::fork(|| {
            drop(keep);
            let mut byte = [0];
            loop {
                match request.read(&mut byte) {
                    Ok(1) if byte[0] != 0 => drop(answer.write_all(&byte)),
                    _ => return 0,
                }
            }
        })?
    };
    measure(all, "pipe_round_trip", 50, |count| {
        let mut byte = [1];
        for _ in 0..count {
            to_child.write_all(&byte)?;
            from_child.read_exact(&mut byte)?;
        }
        Ok(())
    })?;
    to_child.write_all(&[0])?;
    process::wait(child).map(drop)
}

/// Arithmetic and memory of its own, some milliseconds of it.
fn compute() -> u64 {
    let mut table = [0u64; 4096];
    let mut state = 1;
    let mut sum = 0f64;
    for _ in 0..2_000_000 {
        let number = process::random(&mut state);
        let slot = &mut table[(number >> 52) as usize];
        *slot = slot.wrapping_add(number);
        sum += (number >> 11) as f64;
    }
    table.iter().fold(sum.to_bits(), |sum, slot| sum ^ slot)
}
