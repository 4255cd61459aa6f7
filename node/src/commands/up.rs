//! `blanket up` and `blanket down`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use blanket_drivers::probe::{self, Virtualization};
use blanket_drivers::provider::{self, Asking, Machine, poll_interval};
use blanket_drivers::uplink::interfaces;
use blanket_drivers::{uplink, volume};
use blanket_vmm::config::{ByteSize, VmConfig};
use serde::Serialize;

use super::{print, print_json};
use crate::daemon::own_address;
use crate::failure::{describe, failure};
use crate::home::Home;
use crate::machine;
use crate::up::{Book, Change, Node, Options, Plan, SERVICE, System, Undone, Want, usable, wants};

#[derive(clap::Args)]
#[command(
    after_help = "What was asked for with --hugepages and --evacuate-to stays so until another \
    `blanket up` says otherwise."
)]
pub(crate) struct Args {
    /// Print what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Reserve so much memory in huge pages, for guests with --hugepages 2m; 0 gives it back.
    #[arg(long, value_name = "SIZE")]
    hugepages: Option<ByteSize>,
    /// Save guests here when this machine ends: a directory on a volume that outlives it.
    #[arg(long, value_name = "DIR")]
    evacuate_to: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct DownArgs {
    /// Print what would be undone, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Remove packages too that `blanket up` has installed.
    #[arg(long)]
    purge: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One line of what was, or would be, done.
#[derive(Serialize)]
struct Line {
    area: &'static str,
    what: String,
    why: String,
    /// `planned`, `done`, `undone`, `left` or `failed`.
    state: &'static str,
}

/// The node, as it is now.
#[derive(Serialize)]
struct Summary {
    changes: Vec<Line>,
    provider: &'static str,
    title: &'static str,
    platform: &'static str,
    instance_type: Option<String>,
    zone: Option<String>,
    /// What guests get unless they say otherwise, and why; `null` if none can run.
    machine: Option<String>,
    /// Why no guest can run here.
    obstacle: Option<String>,
    /// Each interface and what it uses.
    uplinks: Vec<String>,
    /// Each volume and the engine that serves disks on it.
    stores: Vec<String>,
    /// Where guests are saved when the machine ends; `null` if nobody does that.
    evacuate_to: Option<PathBuf>,
}

/// Prints lines as they come, or keeps them for the end.
struct Report {
    json: bool,
    lines: Vec<Line>,
}

impl Report {
    fn line(&mut self, area: &'static str, what: String, why: &str, state: &'static str) {
        let line = Line {
            area,
            what,
            why: why.to_owned(),
            state,
        };
        if !self.json {
            // Nobody reads it any more: the work goes on.
            let _ = print(&format!(
                "{:<9}  {:<7}  {} ({})\n",
                line.area, line.state, line.what, line.why
            ));
        }
        self.lines.push(line);
    }
}

fn check_root(dry_run: bool) -> Result<()> {
    if dry_run || rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(failure(
        "this changes the machine: it needs root",
        "run it with sudo; --dry-run shows what would be done",
    ))
}

pub(crate) fn up(home: &Home, args: &Args) -> Result<ExitCode> {
    check_root(args.dry_run)?;
    let path = home.up_record();
    let mut book = if args.dry_run {
        Book::look(&path)?
    } else {
        Book::open(&path)?
    };
    if let Some(ByteSize(bytes)) = args.hugepages {
        book.record.options.hugepages = (bytes > 0).then_some(bytes);
    }
    if let Some(to) = &args.evacuate_to {
        let to = std::path::absolute(to).context("the path of --evacuate-to")?;
        book.record.options.evacuate_to = Some(to);
    }
    let system = System::this();
    let machine = provider::report(&Machine::this(), Some(&Asking::default()));
    let options = book.record.options.clone();
    let all = wants(&describe_node(
        home,
        &book,
        &system,
        &options,
        machine.provider,
    )?)?;
    let plan = Plan::of(all, &book, &system)?;
    let mut report = Report {
        json: args.json,
        lines: Vec::new(),
    };
    let done = carry_out(&plan, &mut book, &system, args.dry_run, &mut report);
    if !args.dry_run {
        book.store()?;
    }
    let nothing = plan.is_empty();
    let summary = summarize(home, report.lines, &machine, &options, &system);
    if args.json {
        print_json(&summary)?;
    } else if done.is_ok() {
        print(&render(&summary, nothing))?;
    }
    done?;
    if let (Some(obstacle), false) = (&summary.obstacle, args.dry_run) {
        return Err(failure(
            format!("the machine is prepared, but no guest can run here: {obstacle}"),
            "see blanket doctor",
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// What the wants depend on.
fn describe_node<'a>(
    home: &Home,
    book: &Book,
    system: &'a System,
    options: &'a Options,
    provider: &str,
) -> Result<Node<'a>> {
    let ours = book.record.changes.iter();
    let evacuated = options.evacuate_to.clone();
    let program = std::env::current_exe().context("cannot find this program")?;
    Ok(Node {
        system,
        kvm: Virtualization::of_this_machine(),
        options,
        ours: ours.filter_map(Change::setting).collect(),
        notices: poll_interval(provider).is_some(),
        daemon: Some(program.with_file_name("blanketd")).filter(|path| path.is_file()),
        switch: Some(program.with_file_name("blanket-switch")).filter(|path| path.is_file()),
        outside: outside(),
        program,
        evacuated: evacuated.unwrap_or_else(|| home.evacuated()),
        uplinks: home.uplinks(),
        stores: home.stores(),
    })
}

/// The interface with the address that other nodes most likely reach this one at.
fn outside() -> Option<(String, IpAddr)> {
    let address = own_address().ok()?;
    let all = usable(interfaces().ok()?);
    let mut its = all.filter(|it| it.addresses.contains(&address));
    its.next().map(|it| (it.name, address))
}

/// Does what is planned, or only says so.
fn carry_out(
    plan: &Plan,
    book: &mut Book,
    system: &System,
    dry_run: bool,
    report: &mut Report,
) -> Result<()> {
    const UNWANTED: &str = "not wanted any more";
    for change in &plan.stale {
        if dry_run {
            report.line("undo", change.target.describe(), UNWANTED, "planned");
        } else {
            take_back(change, book, system, false, report)?;
        }
    }
    for want in &plan.wants {
        let (area, what) = (want.area, want.target.describe());
        if dry_run {
            report.line(area, what, &want.why, "planned");
            continue;
        }
        match want.fulfil(book, system) {
            Ok(()) => report.line(area, what, &want.why, "done"),
            Err(error) if want.is_optional() => {
                book.strike(&want.target.identity())?;
                report.line(area, what, &format!("{error:#}"), "failed");
            }
            Err(error) => return Err(unfinished(want, &error)),
        }
    }
    Ok(())
}

/// A step failed: what was done so far stays.
fn unfinished(want: &Want, error: &anyhow::Error) -> anyhow::Error {
    let text = describe(error);
    let text = text.strip_prefix("blanket: ").unwrap_or(&text);
    let (what, remedy) = text.split_once("\n  remedy: ").unwrap_or((text, ""));
    let and = "blanket up goes on from here, blanket down undoes what was done";
    let remedy = match remedy {
        "" => and.to_owned(),
        remedy => format!("{remedy}; {and}"),
    };
    failure(
        format!("{}, cannot {}: {what}", want.area, want.target.describe()),
        remedy,
    )
}

/// Undoes one change and strikes it out.
fn take_back(
    change: &Change,
    book: &mut Book,
    system: &System,
    purge: bool,
    report: &mut Report,
) -> Result<()> {
    const AREA: &str = "undo";
    let what = change.target.describe();
    match change.undo(system, purge)? {
        Undone::Yes => report.line(AREA, what, "as it was before", "undone"),
        Undone::Left(reason) => report.line(AREA, what, &reason, "left"),
        Undone::Kept(reason) => {
            report.line(AREA, what, &reason, "left");
            return Ok(());
        }
    }
    book.strike(&change.target.identity())
}

fn summarize(
    home: &Home,
    changes: Vec<Line>,
    machine: &provider::Report,
    options: &Options,
    system: &System,
) -> Summary {
    let obstacle = probe::report().obstacle;
    let mut config = VmConfig::default();
    let chosen = machine::choose(&mut config, Virtualization::of_this_machine());
    let cache = uplink::Cache::new(&home.uplinks());
    let uplinks = usable(interfaces().unwrap_or_default()).filter_map(|it| {
        let kept = cache.load(&it.name)?;
        Some(format!("{}: {}", it.name, kept.kind()))
    });
    let cache = volume::Cache::new(&home.stores());
    let stores = super::store::volumes().into_iter().filter_map(|it| {
        let kept = cache.load(&it)?;
        Some(format!(
            "{}: {} ({})",
            it.name,
            kept.engine().name(),
            it.place
        ))
    });
    let served = system.has(format!("/etc/systemd/system/{SERVICE}"));
    let to = options.evacuate_to.clone();
    Summary {
        changes,
        provider: machine.provider,
        title: machine.title,
        platform: machine.platform,
        instance_type: machine.instance.kind.clone(),
        zone: machine.instance.zone.clone(),
        machine: chosen.filter(|_| obstacle.is_none()),
        obstacle,
        uplinks: uplinks.collect(),
        stores: stores.collect(),
        evacuate_to: served.then(|| to.unwrap_or_else(|| home.evacuated())),
    }
}

fn render(summary: &Summary, nothing: bool) -> String {
    let mut text = String::new();
    if nothing {
        text.push_str("nothing to do\n");
    }
    let details = [&summary.instance_type, &summary.zone];
    let details: String = details
        .into_iter()
        .flatten()
        .map(|detail| format!(", {detail}"))
        .collect();
    text.push_str(&format!(
        "provider: {} ({}), {}{details}\n",
        summary.provider, summary.title, summary.platform
    ));
    if let Some(machine) = &summary.machine {
        text.push_str(&format!("guests get: {machine}\n"));
    }
    for uplink in &summary.uplinks {
        text.push_str(&format!("uplink {uplink}\n"));
    }
    for store in &summary.stores {
        text.push_str(&format!("store {store}\n"));
    }
    match &summary.evacuate_to {
        Some(to) => text.push_str(&format!(
            "guests are saved to {} when this machine ends\n",
            to.display()
        )),
        None => text.push_str(
            "nobody saves guests when this machine ends: no systemd here; see blanket evacuate\n",
        ),
    }
    text
}

pub(crate) fn down(home: &Home, args: &DownArgs) -> Result<ExitCode> {
    check_root(args.dry_run)?;
    let path = home.up_record();
    let mut report = Report {
        json: args.json,
        lines: Vec::new(),
    };
    let mut code = ExitCode::SUCCESS;
    if args.dry_run {
        for change in Book::look(&path)?.record.changes.iter().rev() {
            report.line(
                "undo",
                change.target.describe(),
                "was not so before",
                "planned",
            );
        }
    } else if path.exists() {
        check_no_guests(home)?;
        let mut book = Book::open(&path)?;
        let system = System::this();
        for change in book.record.changes.clone().iter().rev() {
            if let Err(error) = take_back(change, &mut book, &system, args.purge, &mut report) {
                eprintln!("{}", describe(&error));
                code = ExitCode::FAILURE;
            }
        }
        book.record.options = Options::default();
        book.store()?;
    }
    if args.json {
        print_json(&report.lines)?;
    } else if report.lines.is_empty() {
        print("nothing to undo\n")?;
    }
    Ok(code)
}

/// Running guests need what would be taken away.
fn check_no_guests(home: &Home) -> Result<()> {
    let mut names = Vec::new();
    for vm in home.vms()? {
        if vm.process()?.is_some() {
            names.push(vm.name.to_string());
        }
    }
    if names.is_empty() {
        return Ok(());
    }
    Err(failure(
        format!("guests are running: {}", names.join(", ")),
        "end them (blanket stop NAME) or save them (blanket evacuate)",
    ))
}
