//! `blanket store`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use blanket_drivers::provider::{Asking, Machine, report};
use blanket_drivers::store::{Engine, stripe};
use blanket_drivers::volume::{Cache, Limits, Record, Volume, list, tell_apart};
use blanket_vmm::config::{ByteSize, DiskConfig};
use serde::Serialize;

use super::{print, print_json};
use crate::failure::{describe, failure};
use crate::home::Home;
use crate::table;

/// What `--use` takes.
const WISHES: [Engine; 4] = [Engine::Auto, Engine::IoUring, Engine::Polled, Engine::Sync];

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Only this volume, like nvme1n1 or /dev/nvme1n1, instead of all.
    #[arg(long, value_name = "VOLUME")]
    volume: Option<String>,
    /// Do not measure what has not been measured before.
    #[arg(long, conflicts_with = "retest")]
    no_test: bool,
    /// Measure anew, also what has been measured before (a second or so each).
    #[arg(long)]
    retest: bool,
    /// Serve disks on this volume by this engine from now on, whatever was
    /// measured; `auto` undoes it.
    #[arg(long = "use", value_name = "ENGINE", requires = "volume", value_parser = parse_wish)]
    wish: Option<Engine>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make several volumes one striped set. What is on them is lost.
    Stripe(StripeArgs),
}

#[derive(clap::Args)]
struct StripeArgs {
    /// Volumes: block devices, or files that have their size already.
    #[arg(required = true, num_args = 2..)]
    volumes: Vec<PathBuf>,
    /// Bytes that lie together, a power of two.
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize(stripe::DEFAULT_CHUNK))]
    chunk: ByteSize,
    /// Take volumes that are not empty.
    #[arg(long)]
    force: bool,
}

fn parse_wish(text: &str) -> Result<Engine, String> {
    let found = WISHES.into_iter().find(|engine| engine.name() == text);
    found.ok_or_else(|| format!("one of {}", WISHES.map(Engine::name).join(", ")))
}

/// A volume as `--json` shows it.
#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    volume: &'a Volume,
    /// Measured before, not now.
    cached: bool,
    uses_engine: Engine,
    reason: String,
    test: Option<&'a Record>,
}

/// A volume, and what is known of its engines.
type Found = (Volume, Option<(Record, bool)>);

pub(crate) fn store(home: &Home, args: &Args) -> Result<ExitCode> {
    if let Some(Command::Stripe(args)) = &args.command {
        return make_stripe(args);
    }
    let cache = Cache::new(&home.stores());
    let mut code = ExitCode::SUCCESS;
    let mut found: Vec<Found> = Vec::new();
    for volume in candidates(args.volume.as_deref())? {
        let record = match one(&cache, args, &volume) {
            Ok(record) => record,
            Err(error) => {
                eprintln!("{}", describe(&error));
                code = ExitCode::FAILURE;
                None
            }
        };
        found.push((volume, record));
    }
    if args.json {
        print_json(&found.iter().map(shown).collect::<Vec<_>>())?;
    } else {
        print(&found.iter().map(render).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(code)
}

fn make_stripe(args: &StripeArgs) -> Result<ExitCode> {
    let layout = stripe::create(&args.volumes, args.chunk.0, args.force)?;
    let name = |path: &PathBuf| path.display().to_string();
    let rest: Vec<_> = args.volumes[1..].iter().map(name).collect();
    print(&format!(
        "{} on {} volumes; use it with --disk path={},stripe={}\n",
        table::bytes(layout.capacity()),
        layout.volumes,
        name(&args.volumes[0]),
        rest.join(":")
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// All volumes of this machine.
pub(super) fn volumes() -> Vec<Volume> {
    list(Path::new("/"), report(&Machine::this(), None).provider)
}

/// The volume that is named, or all.
fn candidates(name: Option<&str>) -> Result<Vec<Volume>> {
    let mut all = volumes();
    if all.iter().any(Volume::is_xens) {
        let report = report(&Machine::this(), Some(&Asking::default()));
        tell_apart(&mut all, &report.instance);
    }
    let Some(name) = name else { return Ok(all) };
    let names: Vec<_> = all.iter().map(|it| it.name.clone()).collect();
    let short = name.strip_prefix("/dev/").unwrap_or(name);
    let found: Vec<_> = all.into_iter().filter(|it| it.name == short).collect();
    if found.is_empty() {
        let remedy = match names.is_empty() {
            true => "there are none at all; see `lsblk`".to_owned(),
            false => format!("use one of: {}", names.join(", ")),
        };
        return Err(failure(format!("there is no volume '{name}'"), remedy));
    }
    Ok(found)
}

/// What is known of a volume's engines, measured now if need be.
fn one(cache: &Cache, args: &Args, volume: &Volume) -> Result<Option<(Record, bool)>> {
    let known = match args.no_test {
        true => cache.load(volume).map(|record| (record, true)),
        false => Some(cache.record(volume, args.retest)?),
    };
    let Some((mut record, cached)) = known else {
        return Ok(None);
    };
    if let Some(wish) = args.wish {
        record.wanted = (wish != Engine::Auto).then_some(wish);
        cache.store(&record).context("cannot keep what is wanted")?;
    }
    Ok(Some((record, cached)))
}

/// Has a disk that is on volumes of this machine, and says no engine, served by
/// what they have been found to be served best by.
pub(super) fn choose_engine(home: &Home, disk: &mut DiskConfig) {
    if disk.engine != Engine::Auto {
        return;
    }
    let paths: Vec<_> = disk.paths().map(std::fs::canonicalize).collect();
    let is_device = |path: &Path| path.starts_with("/dev");
    if !paths.iter().flatten().any(|path| is_device(path)) {
        return;
    }
    let (cache, volumes) = (Cache::new(&home.stores()), volumes());
    let engine = |path: &Path| {
        let volume = volumes.iter().find(|it| it.path == path)?;
        Some(cache.load(volume)?.engine())
    };
    let engines: Vec<_> = paths
        .iter()
        .map(|path| path.as_deref().ok().and_then(engine))
        .collect();
    // io_uring is what `auto` tries first anyway, and does without if it must.
    if let Some(Some(first)) = engines.first()
        && engines.iter().all(|it| *it == Some(*first))
        && *first != Engine::IoUring
    {
        disk.engine = *first;
    }
}

fn reason(record: &Record) -> String {
    match record.wanted {
        Some(_) => format!(
            "--use says so ({} was chosen: {})",
            record.report.chosen.name(),
            record.report.reason
        ),
        None => record.report.reason.clone(),
    }
}

fn shown((volume, record): &Found) -> Shown<'_> {
    let record = record.as_ref();
    Shown {
        volume,
        cached: record.is_some_and(|(_, cached)| *cached),
        uses_engine: record.map_or(Engine::Auto, |(record, _)| record.engine()),
        reason: record.map_or_else(|| "not measured".to_owned(), |(record, _)| reason(record)),
        test: record.map(|(record, _)| record),
    }
}

fn render((volume, record): &Found) -> String {
    let known = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let mut text = format!(
        "{} {} (model {}, driver {}, serial {}{})\n",
        volume.path.display(),
        table::bytes(volume.size),
        known(&volume.model),
        known(&volume.driver),
        known(&volume.serial),
        if volume.readonly { ", read-only" } else { "" },
    );
    let uses = match volume.uses.is_empty() {
        true => "nobody".to_owned(),
        false => volume.uses.join(", "),
    };
    let rows: Vec<_> = [
        ("is:", format!("{} ({})", volume.place, volume.told_by)),
        ("used by:", uses),
        ("blocks:", describe_blocks(&volume.limits)),
        ("cache:", describe_cache(&volume.limits)),
        ("can:", describe_abilities(&volume.limits)),
    ]
    .into_iter()
    .map(|(key, value)| vec![key.to_owned(), value])
    .collect();
    text.push_str(&table::render(&rows));
    if let Some((record, cached)) = record {
        text.push_str(&render_test(record, *cached));
    }
    text
}

fn describe_blocks(limits: &Limits) -> String {
    let logical = limits.logical_block.unwrap_or(512);
    let physical = limits.physical_block.unwrap_or(logical);
    let mut text = format!("{logical} bytes, direct I/O is aligned to that; {physical} below");
    if let Some(best) = limits.optimal_io {
        text.push_str(&format!("; best in {}", table::bytes(best)));
    }
    if let Some(most) = limits.largest_io {
        text.push_str(&format!("; requests up to {}", table::bytes(most)));
    }
    text
}

fn describe_cache(limits: &Limits) -> String {
    let text = match limits.volatile_cache {
        Some(true) if limits.fua => "volatile: flushes are needed; single writes can do without",
        Some(true) => "volatile: flushes are needed",
        Some(false) => "none: with direct I/O there is nothing to flush",
        None => "unknown: taken for volatile",
    };
    text.to_owned()
}

fn describe_abilities(limits: &Limits) -> String {
    let most = |bytes: u64| match bytes {
        0 => "no".to_owned(),
        bytes => format!("up to {}", table::bytes(bytes)),
    };
    format!(
        "discard: {}; write zeros: {}; {} {}, {}{}",
        most(limits.discard),
        most(limits.write_zeroes),
        limits.queues,
        if limits.queues == 1 {
            "queue"
        } else {
            "queues"
        },
        if limits.polled {
            "which can be polled"
        } else {
            "none to be polled"
        },
        if limits.rotational { "; turns" } else { "" },
    )
}

fn render_test(record: &Record, cached: bool) -> String {
    let head = ["ENGINE", "RANDOM 4K", "CPU", "LATENCY", "BULK", "SCORE"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let mut obstacles = String::new();
    for it in &record.report.engines {
        let figures = it.figures;
        let figure = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        rows.push(vec![
            it.engine.name().to_owned(),
            figure(figures.map(|it| format!("{:.1} k/s", it.random_kiops))),
            figure(figures.map(|it| format!("{:.1} us", it.cpu_us))),
            figure(figures.map(|it| format!("{:.0} us", it.latency_us))),
            figure(figures.map(|it| format!("{:.0} MiB/s", it.bulk_mib_s))),
            figure(figures.map(|_| format!("{:.2}", it.score))),
        ]);
        if let Some(obstacle) = &it.obstacle {
            obstacles.push_str(&format!("{}: {obstacle}\n", it.engine.name()));
        }
    }
    format!(
        "{}{obstacles}uses {}: {}{}\n",
        table::render(&rows),
        record.engine().name(),
        reason(record),
        if cached { " (measured before)" } else { "" },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use blanket_drivers::provider::Place;

    fn volume() -> Volume {
        Volume {
            name: "nvme1n1".into(),
            path: "/dev/nvme1n1".into(),
            size: 100 << 30,
            model: Some("Amazon EC2 NVMe Instance Storage".into()),
            vendor: None,
            serial: Some("AWS22".into()),
            driver: Some("nvme".into()),
            place: Place::InstanceStore,
            told_by: "model Amazon EC2 NVMe Instance Storage".into(),
            readonly: false,
            uses: vec!["mounted at /data".into()],
            limits: Limits {
                logical_block: Some(512),
                physical_block: Some(4096),
                largest_io: Some(128 << 10),
                volatile_cache: Some(false),
                discard: 1 << 30,
                queues: 2,
                ..Limits::default()
            },
        }
    }

    fn record(wanted: Option<Engine>) -> Record {
        let json = serde_json::json!({
            "key": {"name": "nvme1n1", "model": null, "serial": null, "driver": null,
                "size": 1, "polled": false, "kernel": "6.1", "version": 1},
            "report": {
                "engines": [
                    {"engine": "io_uring", "obstacle": null, "score": 1.0, "figures":
                        {"random_kiops": 120.5, "cpu_us": 6.0, "latency_us": 80.2,
                            "bulk_mib_s": 2000.0}},
                    {"engine": "polled", "figures": null, "score": 0.0,
                        "obstacle": "no queues to be polled"},
                ],
                "chosen": "io_uring",
                "reason": "it is the only one that could be measured",
            },
            "wanted": wanted,
        });
        Record::parse(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_volume_what_it_can_do_and_what_serves_it_are_told() {
        let text = render(&(volume(), Some((record(None), true))));
        assert_eq!(
            text,
            "/dev/nvme1n1 100 GiB (model Amazon EC2 NVMe Instance Storage, driver nvme, serial AWS22)\n\
             is:       instance store (model Amazon EC2 NVMe Instance Storage)\n\
             used by:  mounted at /data\n\
             blocks:   512 bytes, direct I/O is aligned to that; 4096 below; requests up to 128 KiB\n\
             cache:    none: with direct I/O there is nothing to flush\n\
             can:      discard: up to 1 GiB; write zeros: no; 2 queues, none to be polled\n\
             ENGINE    RANDOM 4K  CPU     LATENCY  BULK        SCORE\n\
             io_uring  120.5 k/s  6.0 us  80 us    2000 MiB/s  1.00\n\
             polled    -          -       -        -           -\n\
             polled: no queues to be polled\n\
             uses io_uring: it is the only one that could be measured (measured before)\n"
        );
    }

    #[test]
    fn what_the_user_wants_goes_before_what_was_measured() {
        let found = (volume(), Some((record(Some(Engine::Sync)), false)));
        let json = shown(&found);
        assert_eq!(json.uses_engine, Engine::Sync);
        assert!(
            json.reason.contains("io_uring was chosen"),
            "{}",
            json.reason
        );
        let untested = shown(&(volume(), None)).reason;
        assert_eq!(untested, "not measured");
    }

    #[test]
    fn a_wish_is_an_engine_or_auto() {
        assert_eq!(parse_wish("auto"), Ok(Engine::Auto));
        assert_eq!(parse_wish("polled"), Ok(Engine::Polled));
        let told = parse_wish("aio").unwrap_err();
        assert!(told.contains("auto, io_uring, polled, sync"), "{told}");
    }

    #[test]
    fn only_disks_on_measured_volumes_are_given_an_engine() {
        let home = tempfile::tempdir().unwrap();
        let home = Home::locate(Some(home.path())).unwrap();
        for path in ["/dev/null", "/etc/hostname", "/none"] {
            let mut disk: DiskConfig = toml::from_str(&format!("path = {path:?}")).unwrap();
            choose_engine(&home, &mut disk);
            assert_eq!(disk.engine, Engine::Auto);
        }
    }
}
