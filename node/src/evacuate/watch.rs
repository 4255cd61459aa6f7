//! The provider's notices are watched, and guests saved in time.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use blanket_drivers::provider::{
    Asking, Machine, Notice, NoticeKind, notices, poll_interval, report,
};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::save_all;
use crate::commands::evacuate::tell;
use crate::home::Home;
use crate::up::System;

/// Guests are saved so long before maintenance begins.
const LEAD: Duration = Duration::from_secs(300);

/// The time that there is where a notice tells none: the shortest that a
/// provider gives.
const SHORTEST: Duration = Duration::from_secs(30);

/// The longest between two questions to a service that does not answer.
const SLOWEST: Duration = Duration::from_secs(30);

/// What guests come through as they are: the provider moves the machine while
/// it runs, or stops it for a moment (`MIGRATE_ON_HOST_MAINTENANCE` on Compute
/// Engine, `Freeze` on Azure).
const HARMLESS: [&str; 2] = ["migrate", "freeze"];

/// What tells a notice from others.
fn key(notice: &Notice) -> String {
    let at = notice.at.map(|at| at.to_rfc3339()).unwrap_or_default();
    let id = notice.id.as_deref().unwrap_or_default();
    format!("{:?} {} {id} {at}", notice.kind, notice.action)
}

/// How long there is until the provider acts on a notice; `None` if nothing has
/// to be done about it, or not yet. `now` is in seconds since 1970.
fn due(notice: &Notice, now: i64) -> Option<Duration> {
    let left = notice.at.map(|at| at.timestamp().saturating_sub(now));
    let left = left.map(|left| Duration::from_secs(u64::try_from(left).unwrap_or(0)));
    let now = match notice.kind {
        NoticeKind::Rebalance => false,
        NoticeKind::SpotTermination => true,
        NoticeKind::Maintenance => {
            !HARMLESS.contains(&notice.action.as_str()) && left.is_none_or(|left| left <= LEAD)
        }
    };
    now.then(|| left.unwrap_or_default().max(SHORTEST))
}

/// The notices for which guests have been saved, kept over restarts: whoever
/// brings guests back while a notice is still told wants them to run.
struct Handled<'a> {
    path: &'a Path,
    keys: BTreeSet<String>,
}

impl<'a> Handled<'a> {
    fn read(path: &'a Path) -> Result<Self> {
        let text = System::this().read(path)?.unwrap_or_default();
        // A file that is damaged is as good as none.
        let keys = serde_json::from_str(&text).unwrap_or_default();
        Ok(Self { path, keys })
    }

    /// Notices that are not told any more are forgotten, so that the same one
    /// counts when it is told again.
    fn keep_told(&mut self, told: &[Notice]) -> Result<()> {
        let told: BTreeSet<_> = told.iter().map(key).collect();
        let before = self.keys.len();
        self.keys.retain(|key| told.contains(key));
        if self.keys.len() < before {
            self.store()?;
        }
        Ok(())
    }

    fn store(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.keys)?;
        System::this().write_file(self.path, &text)
    }
}

/// Ends the watch on SIGTERM and SIGINT, and sleeps between questions.
struct Signals(UnixStream);

impl Signals {
    fn new() -> Result<Self> {
        let (receiver, sender) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT] {
            signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
        }
        Ok(Self(receiver))
    }

    /// Whether a signal came before `time` was over.
    fn came_within(&self, time: Duration) -> Result<bool> {
        self.0.set_read_timeout(Some(time))?;
        match (&self.0).read(&mut [0]) {
            Ok(_) => Ok(true),
            // By a signal: those that count have left their byte.
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                self.came_within(Duration::from_millis(1))
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Ok(false)
            }
            Err(error) => Err(error).context("cannot wait for signals"),
        }
    }
}

/// Asks the provider until a signal comes, and saves the guests to the directory
/// `to` when it is about to take the machine away.
pub(crate) fn watch(home: &Home, to: &Path) -> Result<()> {
    let signals = Signals::new()?;
    let asking = Asking::default();
    let provider = report(&Machine::this(), Some(&asking)).provider;
    let Some(interval) = poll_interval(provider) else {
        eprintln!("the provider ({provider}) tells no notices: nothing to watch here");
        while !signals.came_within(SLOWEST)? {}
        return Ok(());
    };
    eprintln!(
        "watching for notices of {provider}, every {} s; guests are saved to {}",
        interval.as_secs(),
        to.display()
    );
    let path = home.notices();
    let mut handled = Handled::read(&path)?;
    let mut seen = BTreeSet::new();
    let mut problem = String::new();
    let mut pause = interval;
    loop {
        match notices(provider, &asking) {
            Ok(told) => {
                if !std::mem::take(&mut problem).is_empty() {
                    eprintln!("the provider answers again");
                }
                pause = interval;
                for notice in &told {
                    if seen.insert(key(notice)) {
                        eprintln!(
                            "notice: {}",
                            crate::commands::provider::describe_notice(notice)
                        );
                    }
                }
                act(home, to, &told, &mut handled)?;
            }
            Err(error) => {
                let text = error.to_string();
                if text != problem {
                    eprintln!("{text}");
                    problem = text;
                }
                pause = (pause * 2).min(SLOWEST);
            }
        }
        if signals.came_within(pause)? {
            return Ok(());
        }
    }
}

/// Saves the guests if a notice is due that was not before.
fn act(home: &Home, to: &Path, told: &[Notice], handled: &mut Handled) -> Result<()> {
    handled.keep_told(told)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let now = i64::try_from(now)?;
    let new = told.iter().filter(|one| !handled.keys.contains(&key(one)));
    let due: Vec<_> = new
        .filter_map(|one| Some((key(one), due(one, now)?)))
        .collect();
    let Some(left) = due.iter().map(|(_, left)| *left).min() else {
        return Ok(());
    };
    eprintln!("guests are saved: {} s are left", left.as_secs());
    let deadline = Instant::now().checked_add(left);
    let outcomes = save_all(home, to, deadline)?;
    tell(&outcomes, to);
    handled.keys.extend(due.into_iter().map(|(key, _)| key));
    handled.store()
}

#[cfg(test)]
mod tests {
    use blanket_drivers::provider::NoticeKind::{Maintenance, Rebalance, SpotTermination};
    use chrono::DateTime;

    use super::*;

    fn notice(kind: NoticeKind, action: &str, at: Option<i64>) -> Notice {
        Notice {
            kind,
            action: action.to_owned(),
            at: at.and_then(|at| DateTime::from_timestamp(at, 0)),
            id: None,
            description: None,
        }
    }

    #[test]
    fn a_termination_is_due_at_once_and_maintenance_a_while_before_it_begins() {
        let secs = Duration::from_secs;
        for (kind, action, at, left) in [
            (SpotTermination, "terminate", Some(1120), Some(secs(120))),
            // Too far away to be true: it is near all the same.
            (SpotTermination, "stop", Some(99_000), Some(secs(98_000))),
            (SpotTermination, "stop", None, Some(SHORTEST)),
            // The clock is wrong, or the service slow.
            (SpotTermination, "stop", Some(10), Some(SHORTEST)),
            (
                SpotTermination,
                "stop",
                Some(i64::MIN / 2_000_000),
                Some(SHORTEST),
            ),
            (Rebalance, "rebalance", Some(1000), None),
            (Maintenance, "system-reboot", Some(2000), None),
            (Maintenance, "system-reboot", Some(1300), Some(LEAD)),
            (Maintenance, "redeploy", None, Some(SHORTEST)),
            (Maintenance, "freeze", None, None),
            (Maintenance, "migrate", Some(1001), None),
        ] {
            assert_eq!(
                due(&notice(kind, action, at), 1000),
                left,
                "{kind:?} {action} {at:?}"
            );
        }
    }

    #[test]
    fn a_notice_counts_once_and_again_when_it_was_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notices.json");
        let reboot = notice(Maintenance, "reboot", Some(1000));
        let mut handled = Handled::read(&path).unwrap();
        handled.keys.insert(key(&reboot));
        handled.store().unwrap();
        let mut handled = Handled::read(&path).unwrap();
        handled.keep_told(std::slice::from_ref(&reboot)).unwrap();
        assert!(handled.keys.contains(&key(&reboot)));
        handled.keep_told(&[]).unwrap();
        assert!(Handled::read(&path).unwrap().keys.is_empty());
    }
}
