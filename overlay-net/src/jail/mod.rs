//! What is left to the switch once it is set up: what comes from guests and
//! from the wire is parsed without privileges that are not needed for it.
//!
//! In this order, before there are other threads and anything that was said to
//! the switch is read: no privileges by exec, no capabilities but [`KEPT`], no
//! core files; no more of the file system than [`Wishes`] has; and the filter
//! of the main thread, which all threads inherit. Each puts itself under the
//! narrower one of its [`Class`] before it does anything else.
//!
//! The switch stays the user that it was started as: what it keeps and its
//! sockets are his.

mod calls;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use blanket_drivers::jail::landlock::{self, Rights};
use blanket_drivers::jail::privileges::{self, Capability};
use blanket_drivers::jail::seccomp::{self, ASSERTIONS, Argument, BASE, Filter, Program, Refusal};
use serde::{Deserialize, Serialize};

use calls::{
    ABOUT_FILES, ACCEPTING, EVENTS, IOCTLS, MEETING, PIECES, READING, SOCKETS, THREADS, WRITING,
};

/// The capabilities that the switch keeps, if it has them.
///
/// * `CAP_NET_ADMIN` makes TAPs for ports that come later, brings them up and
///   sets their MTU, and gives sockets of VXLAN and Geneve their room.
/// * `CAP_CHOWN` gives the socket of a vhost-user port to the user that the
///   guest's monitor runs as.
///
/// Not `CAP_NET_RAW`: raw sockets of uplinks are open by then. Not
/// `CAP_DAC_OVERRIDE`: its files are its own.
pub const KEPT: [Capability; 2] = [Capability::CHOWN, Capability::NET_ADMIN];

/// Whether threads have system call filters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Seccomp {
    /// A system call that is not foreseen ends the switch, with a line that
    /// names it.
    On,
    /// The kernel logs such calls (`SECCOMP` in the audit log), and does them.
    Log,
    /// There are none.
    #[default]
    Off,
}

/// What was chosen, and what the kernel has of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// System call filters.
    pub seccomp: Seccomp,
    /// The capabilities that are left.
    pub capabilities: Vec<String>,
    /// The version of Landlock's ABI by which the file system is confined;
    /// none: this kernel has none.
    pub landlock: Option<u32>,
}

/// A class of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The main thread: the API, controllers, what is kept; makes ports and
    /// the other threads, which inherit its filter under their own.
    Main,
    /// A thread that looks up the names of controllers.
    Resolver,
    /// The thread that moves frames.
    Worker,
    /// A thread that talks with the front ends of a vhost-user port.
    VhostUser,
}

/// What confinement depends on.
#[derive(Clone, Debug)]
pub struct Wishes<'a> {
    /// Filters.
    pub seccomp: Seccomp,
    /// Where it keeps what it is told.
    pub state: &'a Path,
    /// Where its API's socket is: others are made beside it.
    pub run: &'a Path,
    /// Where it may make sockets and read keys besides.
    pub allow: &'a [PathBuf],
}

/// Directories in which sockets are made as a rule, and keys are read.
const USUAL: [&str; 2] = ["/run", "/tmp"];

/// Names of hosts, and keys.
const CONFIGURATION: &str = "/etc";

/// Who is asked for names of hosts.
const RESOLVER: &str = "/etc/resolv.conf";

const TAPS: &str = "/dev/net/tun";

/// A step that the kernel refuses.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}{remedy}")]
pub struct Error {
    what: &'static str,
    source: io::Error,
    remedy: &'static str,
}

/// The filter by which threads confine themselves, once the process is.
static CHOSEN: OnceLock<Confinement> = OnceLock::new();

/// How this process is confined.
#[must_use]
pub fn confinement() -> Confinement {
    CHOSEN.get().cloned().unwrap_or_default()
}

fn step(what: &'static str, remedy: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error {
        what,
        source,
        remedy,
    }
}

/// Confines the process, for good. To be called while it has one thread, the
/// main thread.
///
/// # Errors
/// The kernel refuses a step: the switch must not go on.
pub fn confine(wishes: &Wishes<'_>) -> Result<Confinement, Error> {
    privileges::no_new_privileges().map_err(step("give up privileges", ""))?;
    privileges::empty_bounding_set();
    let kept = privileges::keep_capabilities(&KEPT);
    let kept = kept.map_err(step("drop capabilities", ""))?;
    privileges::not_dumpable().map_err(step("switch core files off", ""))?;
    let landlock = landlock::restrict(&rules(wishes));
    let landlock = landlock.map_err(step("confine the file system", ""))?;
    let chosen = Confinement {
        seccomp: wishes.seccomp,
        capabilities: kept.iter().map(|it| it.name.to_owned()).collect(),
        landlock,
    };
    let chosen = CHOSEN.get_or_init(|| chosen).clone();
    const REMEDY: &str = "; use a kernel with CONFIG_SECCOMP_FILTER, or --seccomp off";
    seccomp::report_refusals("blanket-switch")
        .and_then(|()| enter(Class::Main))
        .map_err(step("install the system call filter", REMEDY))?;
    Ok(chosen)
}

fn rules(wishes: &Wishes<'_>) -> Vec<(PathBuf, Rights)> {
    let own = Rights::READ.and(Rights::WRITE).and(Rights::SOCKETS);
    let mut rules = vec![
        (wishes.state.to_owned(), own),
        (PathBuf::from(CONFIGURATION), Rights::READ),
        (PathBuf::from(TAPS), Rights::DEVICE),
    ];
    // It may be a link to wherever who writes it has it.
    let resolver = std::fs::canonicalize(RESOLVER).ok();
    let resolver = resolver.as_deref().and_then(Path::parent);
    rules.extend(resolver.map(|path| (path.to_owned(), Rights::READ)));
    let usual = USUAL.iter().map(PathBuf::from);
    let places = usual.chain([wishes.run.to_owned()]);
    let places = places.chain(wishes.allow.iter().cloned());
    rules.extend(places.map(|path| (path, Rights::READ.and(Rights::SOCKETS))));
    rules
}

/// Puts the calling thread under the filter of its class, if the process is
/// confined by filters.
///
/// # Errors
/// The kernel refuses: the thread must not go on.
pub fn enter(class: Class) -> io::Result<()> {
    let refusal = match confinement().seccomp {
        Seccomp::On => Refusal::End,
        Seccomp::Log => Refusal::Log,
        Seccomp::Off => return Ok(()),
    };
    let filter = class.filter()?.allowing(refusal)?;
    let polite = match class {
        // Filters are installed last: then they need not allow it.
        Class::Main if refusal == Refusal::End => vec![newer_clone()?, executable()?],
        _ => Vec::new(),
    };
    let mut programs = polite.iter().chain([&filter]);
    programs.try_for_each(seccomp::apply)
}

/// `clone3` has its flags in memory, where no filter sees them; without it, the
/// run time takes `clone`.
fn newer_clone() -> io::Result<Program> {
    let filter = Filter::default().with(&[libc::SYS_clone3]);
    filter.failing(libc::ENOSYS)
}

/// Of the modules that name services have in files, the resolver goes on
/// without those that it cannot load.
fn executable() -> io::Result<Program> {
    const EXECUTABLE: Argument = Argument::masked(2, PROT_EXEC, PROT_EXEC);
    let filter = Filter::default().only(libc::SYS_mmap, &[EXECUTABLE])?;
    let filter = filter.only(libc::SYS_mprotect, &[EXECUTABLE])?;
    filter.failing(libc::EACCES)
}

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;

/// What threads share, as all of the run time's do, and no namespaces of their
/// own.
const CLONE_MASK: libc::c_int = libc::CLONE_THREAD
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWUTS;

/// The kind in the second argument of `socket`, without its flags.
const KIND: u64 = 0xf;

/// A family of sockets, with kinds and, if it matters, the protocol.
type Family = (libc::c_int, &'static [libc::c_int], Option<libc::c_int>);

const UNIX: Family = (libc::AF_UNIX, &[libc::SOCK_STREAM], None);
const INTERNET: [Family; 2] = [
    (libc::AF_INET, &[libc::SOCK_STREAM, libc::SOCK_DGRAM], None),
    (libc::AF_INET6, &[libc::SOCK_STREAM, libc::SOCK_DGRAM], None),
];
const DATAGRAMS: [Family; 2] = [
    (libc::AF_INET, &[libc::SOCK_DGRAM], None),
    (libc::AF_INET6, &[libc::SOCK_DGRAM], None),
];
/// Interfaces, routes and neighbours.
const ROUTES: Family = (
    libc::AF_NETLINK,
    &[libc::SOCK_DGRAM, libc::SOCK_RAW],
    Some(libc::NETLINK_ROUTE),
);

impl Class {
    /// Its calls, whatever their arguments are.
    fn calls(self) -> Vec<libc::c_long> {
        let lists: &[&[libc::c_long]] = match self {
            Self::Main => &[
                SOCKETS,
                EVENTS,
                PIECES,
                ABOUT_FILES,
                READING,
                WRITING,
                MEETING,
                ACCEPTING,
                THREADS,
            ],
            Self::Resolver => &[SOCKETS, EVENTS, PIECES, ABOUT_FILES, READING, MEETING],
            // A tunnel of others' needs a socket, which it opens itself.
            Self::Worker => &[SOCKETS, EVENTS, PIECES, &[libc::SYS_bind]],
            Self::VhostUser => &[
                SOCKETS,
                EVENTS,
                PIECES,
                ABOUT_FILES,
                &[libc::SYS_accept, libc::SYS_accept4],
            ],
        };
        let lists = [BASE, ASSERTIONS].iter().chain(lists);
        lists.copied().flatten().copied().collect()
    }

    fn families(self) -> Vec<Family> {
        match self {
            Self::Main | Self::Resolver => [&[UNIX, ROUTES][..], &INTERNET].concat(),
            Self::Worker => [&[ROUTES][..], &DATAGRAMS].concat(),
            Self::VhostUser => Vec::new(),
        }
    }

    fn ioctls(self) -> &'static [libc::Ioctl] {
        match self {
            Self::Main => IOCTLS,
            Self::Resolver => &[libc::FIONBIO, libc::FIONREAD, libc::FIOCLEX],
            Self::Worker | Self::VhostUser => &[],
        }
    }

    fn filter(self) -> io::Result<Filter> {
        let own = u64::from(std::process::id());
        let mut filter = Filter::default().with(&self.calls());
        filter = filter.only(libc::SYS_tgkill, &[Argument::is(0, own)])?;
        for (family, kinds, protocol) in self.families() {
            for kind in kinds {
                let mut arguments = vec![
                    Argument::is(0, family as u64),
                    Argument::masked(1, KIND, *kind as u64),
                ];
                arguments.extend(protocol.map(|it| Argument::is(2, it as u64)));
                filter = filter.only(libc::SYS_socket, &arguments)?;
            }
        }
        filter = filter.with_ioctls(self.ioctls())?;
        match self {
            // What is refused politely, threads inherit: see `enter`.
            Self::Main => making_threads(filter),
            Self::Resolver => Ok(filter),
            Self::Worker | Self::VhostUser => {
                let plain = [Argument::masked(2, PROT_EXEC, 0)];
                let filter = filter.only(libc::SYS_mmap, &plain)?;
                filter.only(libc::SYS_mprotect, &plain)
            }
        }
    }
}

fn making_threads(mut filter: Filter) -> io::Result<Filter> {
    /// `PR_SET_VMA`: by it, memory gets a name.
    const SET_VMA: libc::c_int = 0x5356_4d41;
    let clone = Argument::masked(0, CLONE_MASK as u64, libc::CLONE_THREAD as u64);
    filter = filter.only(libc::SYS_clone, &[clone])?;
    for option in [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS, SET_VMA] {
        filter = filter.only(libc::SYS_prctl, &[Argument::is(0, option as u64)])?;
    }
    let own = Argument::is(0, libc::SECCOMP_SET_MODE_FILTER.into());
    filter = filter.only(libc::SYS_seccomp, &[own])?;
    // Limits are read, and not set.
    filter.only(libc::SYS_prlimit64, &[Argument::masked(2, u64::MAX, 0)])
}
