//! The end that has a replica of the guest's disks, and not the guest.

use std::io;
use std::sync::RwLock;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Destination, Error, store};
use crate::compare::Compare;
use crate::disk::Disks;
use crate::journal::{Journal, Point};
use crate::wire::{self, Accepted, Kind};

/// What the engine needs of who keeps a replica.
pub trait Replica: Sync {
    /// Its disks, as they were at its last point.
    fn disks(&self) -> &Disks;

    /// Where what comes is kept until it is whole: a new journal, or none if
    /// there has not been a point yet, and it goes to the disks.
    ///
    /// # Errors
    /// There is no room.
    fn journal(&self) -> io::Result<Option<Journal>>;

    /// The journal is whole, or the disks are if there is none: from now on this
    /// is the last point, whatever happens.
    ///
    /// # Errors
    /// It is not: somebody else has the replica, or the node's disk fails.
    fn keep(&self, point: &Point) -> Result<(), String>;

    /// Puts the journal that was kept on the disks.
    ///
    /// # Errors
    /// As [`Replica::keep`].
    fn apply(&self) -> Result<(), String>;
}

impl Destination {
    /// Receives points until the source ends.
    ///
    /// # Errors
    /// Always: why there are no more.
    pub fn stand_by(mut self, replica: &dyn Replica) -> Result<(), Error> {
        let stood = self.receive_points(replica);
        self.tell_failure(&stood);
        stood
    }

    fn receive_points(&mut self, replica: &dyn Replica) -> Result<(), Error> {
        let disks = replica.disks();
        let accepted = Accepted {
            blank: self.blank(disks)?,
            unable: None,
            late: false,
        };
        let journal = RwLock::new(replica.journal().map_err(Error::Disk)?);
        let put = |kind, payload: &[u8]| match kind {
            Kind::Blocks | Kind::Holes => {
                let journal = journal
                    .read()
                    .map_err(|_| Error::Machine("the replica's journal is lost".to_owned()))?;
                match &*journal {
                    Some(journal) => Ok(journal.take(kind, payload, disks)?),
                    None => store(kind, payload, disks),
                }
            }
            _ => Err(wire::Error::Damaged("a replica has no memory").into()),
        };
        self.take(&accepted, put, |this| this.points(replica, &journal))
    }

    fn points(
        &mut self,
        replica: &dyn Replica,
        journal: &RwLock<Option<Journal>>,
    ) -> Result<(), Error> {
        let disks = replica.disks();
        let mut payload = Vec::new();
        loop {
            match wire::receive(&mut self.control, &mut payload)? {
                Kind::Compare => {
                    let hashes = Compare::from_bytes(&payload)?.answer(disks)?;
                    wire::send(&mut self.control, Kind::Hashes, &hashes)?;
                }
                // Only whole points count.
                Kind::Flush => wire::send(&mut self.control, Kind::Flush, &[])?,
                Kind::Point => {
                    let mut point: Point = wire::decode(&payload)?;
                    point.at_ms = now_ms().saturating_sub(point.age_ms);
                    let ended = journal.write().ok().and_then(|mut journal| journal.take());
                    match ended {
                        Some(journal) => journal.end(&point)?,
                        None => {
                            let mut all = disks.iter();
                            all.try_for_each(|disk| disk.flush()).map_err(Error::Disk)?;
                        }
                    }
                    replica.keep(&point).map_err(Error::Machine)?;
                    // It is durable, and all that comes next can wait.
                    wire::send(&mut self.control, Kind::Point, &[])?;
                    replica.apply().map_err(Error::Machine)?;
                    let next = replica.journal().map_err(Error::Disk)?;
                    if let Ok(mut journal) = journal.write() {
                        *journal = next;
                    }
                    // The next round does not begin before this.
                    wire::send(&mut self.control, Kind::Flush, &[])?;
                }
                _ => return Err(wire::Error::Damaged("its parts are not in order").into()),
            }
        }
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}
