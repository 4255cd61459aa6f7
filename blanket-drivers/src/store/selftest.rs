//! The self-test: which engine a volume is served best by.
//!
//! Reads only, past the page cache, for a second or so: it disturbs nobody but
//! by its load, and tells nothing of writes, which take the same way.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use blanket_memory::IoVec;
use imago::io_buffers::IoBuffer;
use serde::{Deserialize, Serialize};

use super::{Completion, Engine, Error, Format, Image, Operation, Request, Spec, Store};

/// How long each load runs.
const TIME: Duration = Duration::from_millis(150);
/// Bytes of a random read, and of a sequential one.
const SMALL: usize = 4 << 10;
const BULK: usize = 256 << 10;
/// Requests in flight with each.
const SMALL_DEPTH: u16 = 32;
const BULK_DEPTH: u16 = 8;
/// How much better polling has to be: it takes a processor as long as anything
/// is in flight.
const POLLING_PAYS: f64 = 1.1;
/// The longest that a read may take.
const STUCK: Duration = Duration::from_secs(10);

/// What was measured of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Thousands of random reads of 4 KiB in a second, 32 at a time.
    pub random_kiops: f64,
    /// Microseconds of processor time for one of them.
    pub cpu_us: f64,
    /// Microseconds that such a read takes alone.
    pub latency_us: f64,
    /// MiB in a second, read in a row, 256 KiB each, 8 at a time.
    pub bulk_mib_s: f64,
}

/// An engine, and how it did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Which one.
    pub engine: Engine,
    /// What it carries; absent if it could not be measured.
    pub figures: Option<Figures>,
    /// Why it cannot be used or measured.
    pub obstacle: Option<String>,
    /// Geometric mean of its figures relative to the best of each, 0 to 1.
    pub score: f64,
}

/// The self-test's result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Every engine.
    pub engines: Vec<Measured>,
    /// The engine to use.
    pub chosen: Engine,
    /// Why.
    pub reason: String,
}

impl Report {
    /// Whether anything was measured.
    #[must_use]
    pub fn is_measured(&self) -> bool {
        self.engines.iter().any(|it| it.figures.is_some())
    }
}

/// Measures every engine on a volume, by reading from it.
///
/// # Errors
/// It cannot be opened. That an engine does not work is part of the report.
pub fn measure(path: &Path) -> Result<Report, Error> {
    let spec = |engine| Spec {
        path: path.to_owned(),
        readonly: true,
        format: Some(Format::Raw),
        direct: true,
        backing: false,
        engine,
        stripe: Vec::new(),
    };
    // What is wrong with the volume is wrong with all engines.
    Image::open(&spec(Engine::Sync)).map(drop)?;
    let engines = [Engine::IoUring, Engine::Polled, Engine::Sync].map(|engine| {
        let measured = Image::open(&spec(engine))
            .map_err(|error| error.to_string())
            .and_then(|image| figures(&image).map_err(|error| format!("not measured: {error}")));
        Measured {
            engine,
            figures: measured.as_ref().ok().copied(),
            obstacle: measured.err(),
            score: 0.0,
        }
    });
    Ok(judge(engines.into()))
}

/// Runs all loads on an image.
fn figures(image: &Image) -> io::Result<Figures> {
    let queue = image.queue(SMALL_DEPTH, &|| Box::new(|| Ok(())));
    let mut store = queue.map_err(io::Error::other)?;
    let mut run = |load| run(&mut *store, image.capacity(), load);
    let alone = run(Load::random(1))?;
    let random = run(Load::random(SMALL_DEPTH))?;
    let bulk = run(Load {
        size: BULK,
        depth: BULK_DEPTH,
        random: false,
    })?;
    let reads = random.reads as f64;
    Ok(Figures {
        random_kiops: rounded(reads / random.seconds / 1e3),
        cpu_us: rounded(random.cpu * 1e6 / reads),
        latency_us: rounded(alone.seconds * 1e6 / alone.reads as f64),
        bulk_mib_s: rounded(bulk.bytes as f64 / bulk.seconds / f64::from(1 << 20)),
    })
}

/// As many digits as a measurement is worth.
fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// Reads of one kind.
#[derive(Clone, Copy)]
struct Load {
    size: usize,
    depth: u16,
    random: bool,
}

impl Load {
    fn random(depth: u16) -> Self {
        Self {
            size: SMALL,
            depth,
            random: true,
        }
    }
}

/// What a load came to: at least one read.
struct Flow {
    reads: u64,
    bytes: u64,
    seconds: f64,
    cpu: f64,
}

/// Where the next read begins: within a volume of so many bytes.
struct Places {
    slots: u64,
    size: u64,
    random: bool,
    state: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        // A multiplicative generator (Knuth's): the order only has to be one
        // that nobody foresees.
        self.state = match self.random {
            true => self
                .state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407),
            false => self.state.wrapping_add(1 << 16),
        };
        (self.state >> 16) % self.slots * self.size
    }
}

fn run(store: &mut dyn Store, capacity: u64, load: Load) -> io::Result<Flow> {
    let slots = capacity / load.size as u64;
    if slots == 0 {
        return Err(io::Error::other("the volume is too small"));
    }
    let mut places = Places {
        slots,
        size: load.size as u64,
        random: load.random,
        state: u64::from(std::process::id()) << 32,
    };
    let mut memory = IoBuffer::new(load.size * usize::from(load.depth), 4096)?;
    let base = memory.as_mut().into_slice().as_mut_ptr();
    let mut submit = |store: &mut dyn Store, token: u64| {
        let at = usize::try_from(token).unwrap_or(0) * load.size;
        let request = Request {
            operation: Operation::Read,
            offset: places.next(),
            len: 0,
            vectors: vec![IoVec::new(base.wrapping_add(at), load.size)],
            token,
        };
        // SAFETY: `memory` outlives the drain below, and each token below the
        // depth has a part of it of its own.
        unsafe { store.submit(request) }
    };
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let mut done: Vec<Completion> = Vec::new();
    let mut work = || -> io::Result<u64> {
        let mut reads = 0;
        for token in 0..u64::from(load.depth) {
            submit(store, token)?;
        }
        while reads == 0 || start.elapsed() < TIME {
            store.commit()?;
            wait(store)?;
            store.complete(&mut done);
            for completion in done.drain(..) {
                completion.result?;
                reads += 1;
                submit(store, completion.token)?;
            }
        }
        Ok(reads)
    };
    let reads = work();
    let seconds = start.elapsed().as_secs_f64();
    let cpu = cpu_seconds() - cpu;
    // Whatever came of it: nobody may touch the memory any more.
    store.drain(&mut done);
    reads.map(|reads| Flow {
        reads,
        bytes: reads * load.size as u64,
        seconds,
        cpu,
    })
}

fn wait(store: &dyn Store) -> io::Result<()> {
    let mut fd = libc::pollfd {
        fd: store.event(),
        events: libc::POLLIN,
        revents: 0,
    };
    let limit = STUCK.as_millis() as libc::c_int;
    // SAFETY: one pollfd, which outlives the call.
    match unsafe { libc::poll(&raw mut fd, 1, limit) } {
        0 => Err(io::ErrorKind::TimedOut.into()),
        // A signal ends it early: the caller looks, and comes back.
        _ => Ok(()),
    }
}

/// Processor time of this process: rings and stores have threads.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec, which outlives the call. It
    // knows this clock; a zero would only be a wrong figure.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Gives marks, and chooses.
fn judge(mut engines: Vec<Measured>) -> Report {
    let all: Vec<Figures> = engines.iter().filter_map(|it| it.figures).collect();
    let best = |of: fn(&Figures) -> f64| all.iter().map(of).fold(0.0, f64::max);
    let marks: [fn(&Figures) -> f64; 3] = [
        |it| it.random_kiops,
        |it| 1.0 / it.latency_us.max(0.01),
        |it| it.bulk_mib_s,
    ];
    for engine in &mut engines {
        let Some(it) = engine.figures else { continue };
        let shares = marks.map(|of| match best(of) {
            most if most > 0.0 => of(&it) / most,
            _ => 0.0,
        });
        engine.score = rounded(shares.iter().product::<f64>().cbrt());
    }
    let score = |it: &Measured| match it.engine {
        Engine::Polled => it.score / POLLING_PAYS,
        _ => it.score,
    };
    // Of equal ones the first, which is the preferred one.
    let winner = engines
        .iter()
        .rev()
        .filter(|it| it.figures.is_some())
        .max_by(|a, b| score(a).total_cmp(&score(b)));
    let (chosen, reason) = match winner {
        None => (
            Engine::Auto,
            "nothing could be measured: io_uring where it can be had".to_owned(),
        ),
        Some(it) if all.len() == 1 => (
            it.engine,
            "it is the only one that could be measured".to_owned(),
        ),
        Some(it) if score(it) < best_score(&engines) => (
            it.engine,
            "polling is better by less than a tenth, which is not worth a processor".to_owned(),
        ),
        Some(it) => (
            it.engine,
            format!("its score of {:.2} is the highest", it.score),
        ),
    };
    Report {
        engines,
        chosen,
        reason,
    }
}

fn best_score(engines: &[Measured]) -> f64 {
    engines.iter().map(|it| it.score).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(engine: Engine, factor: f64) -> Measured {
        Measured {
            engine,
            figures: Some(Figures {
                random_kiops: 100.0 * factor,
                cpu_us: 5.0,
                latency_us: 50.0 / factor,
                bulk_mib_s: 1000.0 * factor,
            }),
            obstacle: None,
            score: 0.0,
        }
    }

    #[test]
    fn polling_is_chosen_only_where_it_is_worth_a_processor() {
        let choice = |ring, polled| {
            let engines = vec![
                measured(Engine::IoUring, ring),
                measured(Engine::Polled, polled),
                measured(Engine::Sync, 0.5),
            ];
            judge(engines)
        };
        assert_eq!(choice(1.0, 1.5).chosen, Engine::Polled);
        let close = choice(1.0, 1.05);
        assert_eq!(close.chosen, Engine::IoUring);
        assert!(close.reason.contains("processor"), "{}", close.reason);
        assert_eq!(choice(1.0, 0.9).chosen, Engine::IoUring);
    }

    #[test]
    fn without_a_measurement_the_choice_is_left_to_the_start() {
        let none = Measured {
            figures: None,
            ..measured(Engine::IoUring, 1.0)
        };
        let report = judge(vec![none]);
        assert_eq!(report.chosen, Engine::Auto);
        assert!(!report.is_measured());
    }

    #[test]
    fn engines_are_measured_by_reading_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume");
        let content: Vec<u8> = (0..1u32 << 20).flat_map(u32::to_le_bytes).collect();
        std::fs::write(&path, &content).unwrap();
        let report = match measure(&path) {
            Ok(report) => report,
            Err(Error::Direct { source, .. }) => {
                eprintln!("skipped, because there is no direct I/O here: {source}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        assert!(std::fs::read(&path).unwrap() == content);
        let of = |engine| {
            report
                .engines
                .iter()
                .find(|it| it.engine == engine)
                .unwrap()
        };
        let figures = of(Engine::Sync).figures.unwrap();
        assert!(figures.random_kiops > 0.0 && figures.latency_us > 0.0);
        let obstacle = of(Engine::Polled).obstacle.as_ref().unwrap();
        assert!(obstacle.contains("no queues to be polled"), "{obstacle}");
        assert_ne!(report.chosen, Engine::Polled);
        assert!(measure(&dir.path().join("none")).is_err());
    }
}
