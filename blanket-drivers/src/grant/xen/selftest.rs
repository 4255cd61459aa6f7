//! Shares pages and events with this domain itself: all of it goes through
//! Xen, as it does between two.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Allocator, Error, EventChannels, Mapper, Memory, Peer, Port, own_domain};
use crate::grant::{Access, Granter, PAGE, Pages};

/// Pages that are shared.
const COUNT: usize = 4;

/// How often a page is mapped, and looked up.
const ROUNDS: u32 = 64;

/// How long an event may take.
const LIMIT: Duration = Duration::from_secs(5);

/// What the self-test found.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// This domain.
    pub domain: u16,
    /// To map a page that is granted, use it and unmap it.
    pub map: Duration,
    /// To use one that is kept.
    pub kept: Duration,
}

/// Shares pages and events, checks that what was not granted is refused, and
/// measures what a kept mapping saves.
///
/// # Errors
/// A driver is not there, or something does not work as it should.
pub fn self_test() -> Result<Report, Error> {
    let domain = own_domain()?;
    let (allocator, mapper) = (Allocator::open()?, Mapper::open()?);
    bytes_go_both_ways(&allocator, &mapper, domain)?;
    what_is_not_granted_is_refused(&allocator, &mapper, domain)?;
    events_arrive(&EventChannels::open()?, &allocator, &mapper, domain)?;
    let (map, kept) = costs(&allocator, mapper, domain)?;
    Ok(Report { domain, map, kept })
}

fn ensure(holds: bool, otherwise: &'static str) -> Result<(), Error> {
    if holds {
        Ok(())
    } else {
        Err(Error::SelfTest(otherwise))
    }
}

fn bytes_go_both_ways(allocator: &Allocator, mapper: &Mapper, domain: u16) -> Result<(), Error> {
    let shared = allocator.share(domain, COUNT, true)?;
    let mapping = mapper.map(domain, shared.references(), Access::Write)?;
    let pattern: Vec<u8> = (0..COUNT * PAGE).map(|n| (n ^ n >> 8) as u8).collect();
    let mut seen = vec![0; pattern.len()];
    shared.write(0, &pattern)?;
    mapping.read(0, &mut seen)?;
    ensure(
        seen == pattern,
        "the mapping shows other bytes than the page",
    )?;
    let back: Vec<u8> = pattern.iter().map(|byte| !byte).collect();
    mapping.write(0, &back)?;
    shared.read(0, &mut seen)?;
    ensure(
        seen == back,
        "the page has other bytes than were written to its mapping",
    )
}

fn is_refused(result: Result<Memory, Error>, otherwise: &'static str) -> Result<(), Error> {
    match result {
        Err(Error::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(Error::SelfTest(otherwise)),
    }
}

fn what_is_not_granted_is_refused(
    allocator: &Allocator,
    mapper: &Mapper,
    domain: u16,
) -> Result<(), Error> {
    // Granted to the control domain, or in that to the first guest.
    let foreign = allocator.share(u16::from(domain == 0), 1, true)?;
    let result = mapper.map(domain, foreign.references(), Access::Read);
    is_refused(result, "a page that is granted to another domain is mapped")?;

    let readable = allocator.share(domain, 1, false)?;
    let result = mapper.map(domain, readable.references(), Access::Write);
    is_refused(
        result,
        "a page that is granted for reading is mapped for writing",
    )?;
    readable.write(0, b"read")?;
    let mut seen = [0; 4];
    let mapping = mapper.map(domain, readable.references(), Access::Read)?;
    mapping.read(0, &mut seen)?;
    ensure(
        &seen == b"read",
        "a page that is mapped for reading shows other bytes",
    )?;

    let references = readable.references().to_vec();
    drop((mapping, readable));
    let result = mapper.map(domain, &references, Access::Read);
    is_refused(result, "a grant that was taken back is mapped")
}

fn events_arrive(
    channels: &EventChannels,
    allocator: &Allocator,
    mapper: &Mapper,
    domain: u16,
) -> Result<(), Error> {
    let near = channels.offer(domain)?;
    let far = channels.connect(domain, near.number())?;
    let expect = |port: &Port| -> Result<(), Error> {
        let got = channels.wait(LIMIT)?;
        ensure(got == Some(port.number()), "an event does not arrive")?;
        port.unmask()
    };
    // A new channel is notified once by Xen itself, so that nothing is lost.
    while let Some(port) = channels.wait(Duration::ZERO)? {
        [&near, &far]
            .into_iter()
            .find(|end| end.number() == port)
            .map_or(Ok(()), Port::unmask)?;
    }
    for _ in 0..2 {
        near.notify()?;
        expect(&far)?;
        far.notify()?;
        expect(&near)?;
    }
    ends_are_told(allocator, mapper, domain, &|| expect(&near), &far)
}

/// The driver clears a byte and notifies `port` at the end of a mapping, and
/// of a grant; `expect` waits for that.
fn ends_are_told(
    allocator: &Allocator,
    mapper: &Mapper,
    domain: u16,
    expect: &dyn Fn() -> Result<(), Error>,
    port: &Port,
) -> Result<(), Error> {
    let mut byte = [1];
    let shared = allocator.share(domain, 1, true)?;
    shared.write(7, &byte)?;
    let mapping = mapper.map(domain, shared.references(), Access::Write)?;
    mapping.notify_at_end(7, Some(port))?;
    drop(mapping);
    expect()?;
    shared.read(7, &mut byte)?;
    ensure(byte == [0], "the end of a mapping does not clear its byte")?;

    shared.write(9, &[1])?;
    let mapping = mapper.map(domain, shared.references(), Access::Read)?;
    shared.notify_at_end(9, Some(port))?;
    drop(shared);
    expect()?;
    mapping.read(9, &mut byte)?;
    ensure(byte == [0], "the end of a grant does not clear its byte")
}

/// The time of a mapping with its end, and of a look-up.
fn costs(
    allocator: &Allocator,
    mapper: Mapper,
    domain: u16,
) -> Result<(Duration, Duration), Error> {
    let shared = allocator.share(domain, COUNT, true)?;
    let peer = Arc::new(Peer::new(mapper, domain));
    let mut once = Pages::new(Arc::clone(&peer), None, &Arc::default());
    let mut kept = Pages::new(peer, NonZeroUsize::new(COUNT), &Arc::default());
    let mapped = time(&mut once, shared.references())?;
    // The first round maps them.
    time(&mut kept, shared.references())?;
    Ok((mapped, time(&mut kept, shared.references())?))
}

/// The mean time of using a page.
fn time<G>(pages: &mut Pages<G>, references: &[u32]) -> Result<Duration, Error>
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
    Ok(start.elapsed() / (ROUNDS * references.len() as u32))
}
