//! What one domain can try alone, and two with each other.
//!
//! A domain never maps its own grants here: of a domain with translated memory
//! (all but PV ones) Xen then takes the page away from where it was (4.17's
//! `guest_physmap_add_entry` allows no page at two addresses), and leaves a
//! hole in the kernel's memory when the mapping ends.

use std::fmt;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Allocator, Error, EventChannels, Mapper, Memory, Peer, Port, Shared, own_domain};
use crate::grant::{Access, Granter, PAGE, Pages};

/// Pages that the other domain may write to.
const COUNT: usize = 4;

/// How often each page is mapped, and looked up.
const ROUNDS: u32 = 64;

/// How long the other domain may take for a step.
const LIMIT: Duration = Duration::from_secs(30);

/// How long an offer stands: somebody has to carry the invitation over.
const OFFER_LIMIT: Duration = Duration::from_secs(600);

/// A byte that the driver clears at the end of a mapping; its page is not the
/// first.
const MARK: usize = PAGE + 7;

/// What is written to the first page when its grants are to be taken back.
const TAKE_BACK: &[u8] = b"take back";

/// What goes on in the page that the other domain can only read.
const STEPS: [u8; 3] = [1, 2, 3];

fn ensure(holds: bool, otherwise: &'static str) -> Result<(), Error> {
    if holds {
        Ok(())
    } else {
        Err(Error::SelfTest(otherwise))
    }
}

/// Tries what needs no other domain: pages are granted to another one and
/// taken back, what nobody grants is refused, and events arrive.
///
/// Returns the number of this domain.
///
/// # Errors
/// A driver is not there, or something does not work as it should.
pub fn alone() -> Result<u16, Error> {
    let (allocator, mapper, channels) =
        (Allocator::open()?, Mapper::open()?, EventChannels::open()?);
    let domain = own_domain()?;
    let other = u16::from(domain == 0);
    let shared = allocator.share(other, COUNT, true)?;
    let mut bytes = [1; PAGE];
    shared.read((COUNT - 1) * PAGE, &mut bytes)?;
    ensure(bytes == [0; PAGE], "a new page is not empty")?;
    // The last reference that there can be: nobody has that many.
    is_refused(
        mapper.map(other, &[u32::MAX], Access::Read),
        "a page that nobody grants is mapped",
    )?;
    let near = channels.offer(domain)?;
    let far = channels.connect(domain, near.number())?;
    for (from, to) in [(&near, &far), (&far, &near)] {
        from.notify()?;
        arrives(&channels, to)?;
    }
    Ok(domain)
}

/// Waits for a notification of `port`, and takes those of others.
fn arrives(channels: &EventChannels, port: &Port) -> Result<(), Error> {
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        // A new channel is notified once by Xen itself.
        if channels.wait(LIMIT)? == Some(port.number()) {
            return port.unmask();
        }
    }
    Err(Error::SelfTest("an event does not arrive"))
}

fn is_refused(result: Result<Memory, Error>, otherwise: &'static str) -> Result<(), Error> {
    match result {
        Err(Error::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(Error::SelfTest(otherwise)),
    }
}

/// Looks again at each event, and at the limit's end.
fn until(
    channels: &EventChannels,
    port: &Port,
    limit: Duration,
    otherwise: &'static str,
    mut holds: impl FnMut() -> Result<bool, Error>,
) -> Result<(), Error> {
    let start = Instant::now();
    while !holds()? {
        ensure(start.elapsed() < limit, otherwise)?;
        if channels
            .wait(limit.saturating_sub(start.elapsed()))?
            .is_some()
        {
            port.unmask()?;
        }
    }
    Ok(())
}

/// What the domain that offers writes; its complement is the answer.
fn pattern() -> Vec<u8> {
    (0..COUNT * PAGE).map(|n| (n % 251) as u8).collect()
}

fn complement() -> Vec<u8> {
    pattern().iter().map(|byte| !byte).collect()
}

/// What the other domain has to know; as text for people to carry over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invitation {
    /// Who offers.
    domain: u16,
    /// The event channel.
    port: u32,
    /// [`COUNT`] pages to write, one to read, and one of somebody else's.
    references: [u32; COUNT + 2],
}

impl fmt::Display for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.domain, self.port)?;
        self.references
            .iter()
            .try_for_each(|reference| write!(f, ":{reference}"))
    }
}

impl FromStr for Invitation {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let numbers: Option<Vec<u32>> = text.split(':').map(|part| part.parse().ok()).collect();
        let parsed = numbers.and_then(|numbers| {
            let (domain, rest) = numbers.split_first()?;
            let (port, references) = rest.split_first()?;
            Some(Self {
                domain: (*domain).try_into().ok()?,
                port: *port,
                references: references.try_into().ok()?,
            })
        });
        parsed.ok_or(Error::Invitation)
    }
}

/// One end of a test: pages and events for another domain.
#[derive(Debug)]
pub struct Offer {
    channels: EventChannels,
    port: Port,
    pages: Shared,
    readable: Shared,
    /// Granted to yet another domain.
    foreign: Shared,
    domain: u16,
}

impl Offer {
    /// Shares pages with `domain`.
    ///
    /// # Errors
    /// A driver is not there, or has no more.
    pub fn new(domain: u16) -> Result<Self, Error> {
        let (allocator, channels) = (Allocator::open()?, EventChannels::open()?);
        let pages = allocator.share(domain, COUNT, true)?;
        pages.write(0, &pattern())?;
        Ok(Self {
            port: channels.offer(domain)?,
            channels,
            pages,
            readable: allocator.share(domain, 1, false)?,
            foreign: allocator.share(domain ^ 1, 1, true)?,
            domain: own_domain()?,
        })
    }

    /// What to tell the other domain.
    #[must_use]
    pub fn invitation(&self) -> Invitation {
        let shared = [&self.pages, &self.readable, &self.foreign];
        let all = shared.into_iter().flat_map(Shared::references);
        let mut references = [0; COUNT + 2];
        references
            .iter_mut()
            .zip(all)
            .for_each(|(to, from)| *to = *from);
        Invitation {
            domain: self.domain,
            port: self.port.number(),
            references,
        }
    }

    /// Plays its part while the other domain does [`accept`].
    ///
    /// # Errors
    /// Within the limit of a step something does not happen as it should.
    pub fn serve(self) -> Result<(), Error> {
        let Self {
            channels,
            port,
            pages,
            readable,
            ..
        } = self;
        let done = |step: u8| readable.write(0, &[step]).and_then(|()| port.notify());
        let starts_with = |offset: usize, expected: &[u8]| {
            let mut seen = vec![0; expected.len()];
            pages.read(offset, &mut seen)?;
            Ok(seen == expected)
        };
        let answer = complement();
        until(&channels, &port, OFFER_LIMIT, "nobody answers", || {
            starts_with(0, &answer)
        })?;
        done(STEPS[0])?;
        let otherwise = "the end of a mapping does not clear its byte";
        until(&channels, &port, LIMIT, otherwise, || {
            starts_with(MARK, &[0])
        })?;
        done(STEPS[1])?;
        let otherwise = "nobody has the pages taken back";
        until(&channels, &port, LIMIT, otherwise, || {
            starts_with(0, TAKE_BACK)
        })?;
        drop(pages);
        done(STEPS[2])?;
        // The other end closes the channel and the page when it has seen that.
        std::thread::sleep(Duration::from_millis(100));
        Ok(())
    }
}

/// What the domain that accepts has found.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Report {
    /// To map a page that is granted, use it and unmap it, in nanoseconds.
    pub map_ns: u64,
    /// To use one that is kept.
    pub kept_ns: u64,
}

/// The other end: maps what another domain offers, has both look at the bytes,
/// checks that what it is not granted is refused, and measures what a kept
/// mapping saves.
///
/// # Errors
/// Something does not work as it should, or the domain does not play its part.
pub fn accept(invitation: &Invitation) -> Result<Report, Error> {
    let Invitation {
        domain, references, ..
    } = invitation;
    let (pages, [readable, foreign]) = references.split_at(COUNT) else {
        return Err(Error::Invitation);
    };
    let mapper = Mapper::open()?;
    let channels = EventChannels::open()?;
    let port = channels.connect(*domain, invitation.port)?;
    let steps = mapper.map(*domain, &[*readable], Access::Read)?;
    let reached = |step: u8| {
        let otherwise = "the other domain does not see it";
        until(&channels, &port, LIMIT, otherwise, || {
            let mut seen = [0];
            steps.read(0, &mut seen)?;
            Ok(seen[0] == step)
        })
    };

    let mapping = mapper.map(*domain, pages, Access::Write)?;
    let mut seen = vec![0; COUNT * PAGE];
    mapping.read(0, &mut seen)?;
    ensure(
        seen == pattern(),
        "the mapping shows other bytes than the pages have",
    )?;
    mapping.write(0, &complement())?;
    port.notify()?;
    reached(STEPS[0])?;
    let write = Access::Write;
    is_refused(
        mapper.map(*domain, &[*readable], write),
        "a page that is granted for reading is mapped for writing",
    )?;
    is_refused(
        mapper.map(*domain, &[pages[0], *foreign], Access::Read),
        "a page that is granted to another domain is mapped",
    )?;

    mapping.notify_at_end(MARK, Some(&port))?;
    drop(mapping);
    reached(STEPS[1])?;
    let report = costs(&mapper, *domain, pages)?;
    mapper
        .map(*domain, &pages[..1], write)?
        .write(0, TAKE_BACK)?;
    port.notify()?;
    reached(STEPS[2])?;
    for page in pages {
        is_refused(
            mapper.map(*domain, &[*page], Access::Read),
            "a grant that was taken back is mapped",
        )?;
    }
    Ok(report)
}

/// The time of a mapping with its end, and of a look-up.
fn costs(mapper: &Mapper, domain: u16, references: &[u32]) -> Result<Report, Error> {
    let peer = Arc::new(Peer::new(mapper.clone(), domain));
    let mut once = Pages::new(Arc::clone(&peer), None, &Arc::default());
    let mut kept = Pages::new(peer, NonZeroUsize::new(COUNT), &Arc::default());
    let map_ns = time(&mut once, references)?;
    // The first round maps them.
    time(&mut kept, references)?;
    let kept_ns = time(&mut kept, references)?;
    Ok(Report { map_ns, kept_ns })
}

/// The mean time of using a page, in nanoseconds.
fn time<G>(pages: &mut Pages<G>, references: &[u32]) -> Result<u64, Error>
where
    G: Granter<Page = Memory, Error = Error>,
{
    let start = Instant::now();
    for _ in 0..ROUNDS {
        for reference in references {
            let page = pages.map(*reference, Access::Write)?;
            let mut byte = [0];
            page.read(0, &mut byte)?;
            black_box(byte);
        }
    }
    let uses = ROUNDS * references.len() as u32;
    Ok((start.elapsed() / uses).as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invitation_is_read_as_it_was_written_and_nothing_else_is() {
        let invitation = Invitation {
            domain: 3,
            port: 17,
            references: [8, 9, 10, 11, 12, u32::MAX],
        };
        let text = invitation.to_string();
        assert_eq!(text, "3:17:8:9:10:11:12:4294967295");
        assert_eq!(text.parse::<Invitation>().unwrap(), invitation);
        for wrong in [
            "",
            "3",
            "3:17",
            "3:17:8:9:10:11:12",
            "3:17:8:9:10:11:12:13:14",
            "70000:17:8:9:10:11:12:13",
            "3:17:8:9:10:11:12:x",
        ] {
            assert!(matches!(
                wrong.parse::<Invitation>(),
                Err(Error::Invitation)
            ));
        }
    }

    #[test]
    fn the_mark_is_not_cleared_by_either_side_itself() {
        assert_ne!(pattern()[MARK], 0);
        assert_ne!(complement()[MARK], 0);
        assert_ne!(complement()[..TAKE_BACK.len()], *TAKE_BACK);
    }
}
