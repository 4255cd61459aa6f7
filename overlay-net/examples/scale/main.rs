//! What many stations, ports and nodes cost: a line of JSON, for
//! `cargo xtask bench overlay`.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;

mod world;

use world::{Nodes, Size, World};

/// Frames that are forwarded, to one station after the other.
const FRAMES: u32 = 2_000_000;

/// Stations that move, one after the other.
const MOVES: u32 = 20;

/// Measures a switch that knows so many stations, or many nodes that tell each
/// other of one that moves.
#[derive(Parser)]
struct Options {
    stations: u32,
    ports: u32,
    nodes: u32,
    /// How long it takes until all nodes know of a station that has moved.
    #[arg(long)]
    moves: bool,
}

/// Bytes of memory that this process has.
fn resident() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages = text.split_ascii_whitespace().nth(1);
    let pages: f64 = pages.context("/proc/self/statm")?.parse()?;
    Ok(pages * 4096.0)
}

fn main() -> Result<()> {
    let options = Options::parse();
    let size = Size {
        stations: options.stations,
        ports: options.ports,
        nodes: options.nodes,
    };
    if options.moves {
        moves(size)
    } else {
        forwards(size)
    }
}

fn forwards(size: Size) -> Result<()> {
    let before = resident()?;
    let mut world = World::new(size);
    let bytes = resident()? - before;
    let known = world.directory.len();
    ensure!(
        known == size.stations as usize,
        "{known} stations are known"
    );
    // A large prime: each station has its turn, and no two that are neighbours.
    let mut next = 0;
    let mut go = |frames: u32| {
        let all = (0..frames).filter(|_| {
            next = (next + 7919) % size.stations;
            // The sender itself gets none.
            world.forward(black_box(next.max(1)))
        });
        all.count()
    };
    go(size.stations);
    let start = Instant::now();
    let right = go(FRAMES);
    let seconds = start.elapsed().as_secs_f64();
    ensure!(right == FRAMES as usize, "{right} of {FRAMES} went right");
    println!(
        r#"{{"frame_ns": {}, "station_bytes": {}}}"#,
        seconds / f64::from(FRAMES) * 1e9,
        bytes / f64::from(size.stations)
    );
    Ok(())
}

fn moves(size: Size) -> Result<()> {
    let mut nodes = Nodes::new(size.nodes, size.stations);
    let (mut rounds, mut messages) = (0, 0);
    let start = Instant::now();
    for number in 0..MOVES {
        // None that the last node has.
        let spread = nodes.moves(number * size.nodes);
        rounds = rounds.max(spread.rounds);
        messages = messages.max(spread.messages);
    }
    let seconds = start.elapsed().as_secs_f64() / f64::from(MOVES);
    println!(
        r#"{{"rounds": {rounds}, "messages": {messages}, "all_ms": {}}}"#,
        seconds * 1e3
    );
    Ok(())
}
