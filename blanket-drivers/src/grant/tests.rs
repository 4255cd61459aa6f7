//! [`Pages`] against a model of them, with a granter that knows what is mapped.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::{Access, Granter, Metrics, Page, Pages};

/// What an entry says: nothing is granted, another may use the page, or which
/// page the backend may use, and whether it may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Unused,
    Foreign,
    Page { frame: u8, writable: bool },
}

#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    NotGranted,
    ReadOnly,
}

const ENTRIES: usize = 6;

/// A table of grants.
struct Table {
    entries: Mutex<[Entry; ENTRIES]>,
    /// Mappings by reference.
    mapped: Mutex<BTreeMap<u32, usize>>,
}

impl Table {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            entries: Mutex::new([Entry::Unused; ENTRIES]),
            mapped: Mutex::default(),
        })
    }

    fn put(&self, reference: u32, entry: Entry) {
        self.entries.lock().unwrap()[reference as usize] = entry;
    }

    fn check(&self, reference: u32, access: Access) -> Result<u8, Refusal> {
        match self.entries.lock().unwrap()[reference as usize] {
            Entry::Page { frame, writable } if writable || access == Access::Read => Ok(frame),
            Entry::Page { .. } => Err(Refusal::ReadOnly),
            Entry::Unused | Entry::Foreign => Err(Refusal::NotGranted),
        }
    }

    fn mapped(&self) -> Vec<u32> {
        self.mapped.lock().unwrap().keys().copied().collect()
    }
}

struct Mapping {
    table: Arc<Table>,
    reference: u32,
    access: Access,
    frame: u8,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let mut mapped = self.table.mapped.lock().unwrap();
        let count = mapped.get_mut(&self.reference).unwrap();
        *count -= 1;
        if *count == 0 {
            mapped.remove(&self.reference);
        }
    }
}

impl Granter for Table {
    type Page = Mapping;
    type Error = Refusal;

    fn map(self: &Arc<Self>, reference: u32, access: Access) -> Result<Mapping, Refusal> {
        let frame = self.check(reference, access)?;
        *self.mapped.lock().unwrap().entry(reference).or_default() += 1;
        Ok(Mapping {
            table: Arc::clone(self),
            reference,
            access,
            frame,
        })
    }

    fn stands(&self, page: &Mapping) -> bool {
        self.check(page.reference, page.access) == Ok(page.frame)
    }

    fn may_be_readable(error: &Refusal) -> bool {
        *error == Refusal::ReadOnly
    }
}

/// The recently used references, the last one at the end.
#[derive(Default)]
struct Model {
    kept: Vec<(u32, u8)>,
    room: usize,
    hits: u64,
    misses: u64,
    evictions: u64,
    revocations: u64,
    maps: u64,
    refusals: u64,
}

impl Model {
    fn map(&mut self, table: &Table, reference: u32, access: Access) -> Result<u8, Refusal> {
        let outcome = table.check(reference, access);
        if self.room == 0 {
            match outcome {
                Ok(_) => self.maps += 1,
                Err(_) => self.refusals += 1,
            }
            return outcome;
        }
        let writable = table.check(reference, Access::Write);
        if let Some(at) = self.kept.iter().position(|(kept, _)| *kept == reference) {
            let kept = self.kept.remove(at);
            if writable == Ok(kept.1) {
                self.kept.push(kept);
                self.hits += 1;
                return outcome;
            }
            self.revocations += 1;
        }
        self.misses += 1;
        match (&writable, &outcome) {
            (Ok(frame), _) => {
                self.maps += 1;
                self.kept.push((reference, *frame));
                if self.kept.len() > self.room {
                    self.kept.remove(0);
                    self.evictions += 1;
                }
            }
            (_, Ok(_)) => self.maps += 1,
            _ => self.refusals += 1,
        }
        outcome
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A request: whether it is still in flight afterwards.
    Map(u32, bool, bool),
    /// One of those in flight is done.
    Finish(prop::sample::Index),
    Grant(u32, u8, bool),
    Revoke(u32),
    GiveToAnother(u32),
    Release,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let reference = 0..ENTRIES as u32;
    let step = prop_oneof![
        6 => (reference.clone(), any::<bool>(), any::<bool>())
            .prop_map(|(reference, write, flies)| Step::Map(reference, write, flies)),
        3 => any::<prop::sample::Index>().prop_map(Step::Finish),
        4 => (reference.clone(), 0..3u8, prop::bool::weighted(0.8))
            .prop_map(|(reference, frame, writable)| Step::Grant(reference, frame, writable)),
        1 => reference.clone().prop_map(Step::Revoke),
        1 => reference.prop_map(Step::GiveToAnother),
        1 => Just(Step::Release),
    ];
    prop::collection::vec(step, 1..80)
}

/// Pages, their model, and the requests in flight.
struct Bench {
    table: Arc<Table>,
    metrics: Arc<Metrics>,
    pages: Pages<Table>,
    model: Model,
    flying: Vec<(Page<Table>, u32, u8)>,
}

impl Bench {
    fn new(room: usize) -> Self {
        let (table, metrics) = (Table::new(), Arc::default());
        let keep = NonZeroUsize::new(room);
        Self {
            pages: Pages::new(Arc::clone(&table), keep, &metrics),
            table,
            metrics,
            model: Model {
                room,
                ..Model::default()
            },
            flying: Vec::new(),
        }
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Map(reference, write, flies) => {
                let access = if write { Access::Write } else { Access::Read };
                let expected = self.model.map(&self.table, reference, access);
                let got = self.pages.map(reference, access);
                prop_assert_eq!(
                    got.as_ref().map(|page| page.frame),
                    expected.as_ref().copied()
                );
                if let Ok(page) = got {
                    prop_assert!(page.access >= access);
                    if flies {
                        let frame = page.frame;
                        self.flying.push((page, reference, frame));
                    }
                }
            }
            Step::Finish(index) if !self.flying.is_empty() => {
                let at = index.index(self.flying.len());
                drop(self.flying.swap_remove(at));
            }
            Step::Finish(_) => {}
            Step::Grant(reference, frame, writable) => {
                self.table.put(reference, Entry::Page { frame, writable });
            }
            Step::Revoke(reference) => self.table.put(reference, Entry::Unused),
            Step::GiveToAnother(reference) => self.table.put(reference, Entry::Foreign),
            Step::Release => {
                self.pages.release();
                self.model.kept.clear();
            }
        }
        self.check()
    }

    /// Mapped is what is kept or in flight, and nothing else.
    fn check(&self) -> Result<(), TestCaseError> {
        let kept = self.model.kept.iter().map(|(reference, _)| *reference);
        let flying = self.flying.iter().map(|(_, reference, _)| *reference);
        let mut expected: Vec<u32> = kept.chain(flying).collect();
        expected.sort_unstable();
        expected.dedup();
        prop_assert_eq!(self.table.mapped(), expected);
        for (page, reference, frame) in &self.flying {
            prop_assert_eq!((page.reference, page.frame), (*reference, *frame));
        }
        let mapped: usize = self.table.mapped.lock().unwrap().values().sum();
        prop_assert!(mapped <= self.model.room + self.flying.len());
        let model = &self.model;
        let expected = [
            ("grant_hits", model.hits),
            ("grant_misses", model.misses),
            ("grant_evictions", model.evictions),
            ("grant_revocations", model.revocations),
            ("grant_maps", model.maps),
            ("grant_unmaps", model.maps - mapped as u64),
            ("grant_refusals", model.refusals),
        ];
        prop_assert_eq!(self.metrics.list(), expected);
        Ok(())
    }
}

proptest! {
    #[test]
    fn whatever_is_granted_revoked_and_asked_for_pages_do_as_their_model(
        steps in steps(),
        room in 0..4usize,
    ) {
        let mut bench = Bench::new(room);
        for step in &steps {
            bench.step(step)?;
        }
        bench.flying.clear();
        bench.pages.release();
        prop_assert!(bench.table.mapped().is_empty());
    }
}

fn page(frame: u8) -> Entry {
    Entry::Page {
        frame,
        writable: true,
    }
}

#[test]
fn a_revoked_page_is_refused_although_it_is_kept() {
    let mut bench = Bench::new(2);
    bench.table.put(1, page(7));
    assert_eq!(bench.pages.map(1, Access::Read).ok().unwrap().frame, 7);
    assert_eq!(bench.table.mapped(), [1]);
    for entry in [Entry::Unused, Entry::Foreign] {
        bench.table.put(1, entry);
        let refused = bench.pages.map(1, Access::Read).err();
        assert_eq!(refused, Some(Refusal::NotGranted));
        assert!(bench.table.mapped().is_empty());
    }
}

#[test]
fn a_reference_that_is_granted_again_is_the_new_page() {
    let mut bench = Bench::new(2);
    bench.table.put(1, page(7));
    let in_flight = bench.pages.map(1, Access::Write).ok().unwrap();
    bench.table.put(1, page(8));
    assert_eq!(bench.pages.map(1, Access::Write).ok().unwrap().frame, 8);
    assert_eq!(in_flight.frame, 7);
}
