//! Tables of entries, looked up by tuple-space search: entries that look at the
//! same bits share a hash table.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::actions::Action;
use super::fields::{Field, Flat, WORDS};
use super::matches::Match;
use super::meter::Meter;
use super::pipeline::Decision;

/// An entry, as it is written down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Its table.
    pub table: u8,
    /// Of several entries that match, the one with the highest counts.
    pub priority: u16,
    /// What it matches.
    pub matches: Match,
    /// What it does; nothing: drops.
    pub actions: Vec<Action>,
    /// Its owner's mark.
    pub cookie: u64,
    /// Seconds without a frame after which it goes; 0: stays.
    pub idle_timeout: u16,
    /// Seconds after which it goes; 0: stays.
    pub hard_timeout: u16,
    /// See [`Flags`].
    pub flags: Flags,
}

/// How an entry is added and removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Controllers are told when it goes.
    pub send_removed: bool,
    /// It is not added if it overlaps one of the same priority.
    pub check_overlap: bool,
    /// Counters start at 0 when it replaces another, or is modified.
    pub reset_counts: bool,
}

/// Priority of an entry that does not say any, as Open vSwitch's.
pub const DEFAULT_PRIORITY: u16 = 32768;

/// What has been counted; workers add to it now and then, not for each frame.
#[derive(Debug, Default)]
pub struct Stats {
    packets: AtomicU64,
    bytes: AtomicU64,
    /// When a frame was last counted, in milliseconds since the start.
    used: AtomicU64,
}

impl Stats {
    /// Adds what a worker has counted until `used` (milliseconds).
    pub fn add(&self, packets: u64, bytes: u64, used: u64) {
        self.packets.fetch_add(packets, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.used.fetch_max(used, Ordering::Relaxed);
    }

    /// Packets.
    #[must_use]
    pub fn packets(&self) -> u64 {
        self.packets.load(Ordering::Relaxed)
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// When it was last added to, since the start; 0: never.
    #[must_use]
    pub fn used(&self) -> Duration {
        Duration::from_millis(self.used.load(Ordering::Relaxed))
    }
}

/// An entry in a table.
#[derive(Debug)]
pub struct Entry {
    /// What it is.
    pub flow: Flow,
    /// When it was added, since the start.
    pub created: Duration,
    /// What it has counted.
    pub stats: Arc<Stats>,
    /// The order of entries: of two that match with the same priority, the
    /// older counts.
    pub(super) id: u64,
    /// What it decides if no other table is looked at.
    pub(super) alone: OnceLock<Arc<Decision>>,
}

impl Entry {
    /// One that is in no table.
    pub(super) fn of(actions: Vec<Action>) -> Self {
        Self {
            flow: Flow {
                priority: DEFAULT_PRIORITY,
                actions,
                ..Flow::default()
            },
            created: Duration::ZERO,
            stats: Arc::default(),
            id: 0,
            alone: OnceLock::new(),
        }
    }

    fn rank(&self) -> (u16, Reverse<u64>) {
        (self.flow.priority, Reverse(self.id))
    }
}

/// A hash table's hasher for what is a hash already.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ready(u64);

impl Hasher for Ready {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

/// The words of a mask that are not 0, to hash and compare only those.
#[derive(Clone, Debug, Default)]
pub struct Words {
    mask: Flat,
    which: [u8; WORDS],
    count: u8,
    seed: u64,
}

impl Words {
    /// Of `mask`; hashes differ from one `seed` to another.
    #[must_use]
    pub fn of(mask: &Flat, seed: u64) -> Self {
        let mut words = Self {
            mask: *mask,
            seed,
            ..Self::default()
        };
        for (index, word) in mask.0.iter().enumerate() {
            if *word != 0 {
                words.which[usize::from(words.count)] = index as u8;
                words.count += 1;
            }
        }
        words
    }

    /// The mask.
    #[must_use]
    pub fn mask(&self) -> &Flat {
        &self.mask
    }

    fn indices(&self) -> impl Iterator<Item = usize> + '_ {
        let which = &self.which[..usize::from(self.count)];
        which.iter().map(|index| usize::from(*index) % WORDS)
    }

    /// Whether no bit counts.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// A hash of those bits of `flat` that count.
    #[must_use]
    pub fn hash(&self, flat: &Flat) -> u64 {
        let mut hash = self.seed;
        for index in self.indices() {
            let word = flat.0[index] & self.mask.0[index];
            let product = u128::from(hash ^ word) * 0x9e37_79b9_7f4a_7c15;
            hash = (product >> 64) as u64 ^ product as u64;
            hash = hash.rotate_left(23);
        }
        hash
    }

    /// Whether `flat`, masked, is `value`.
    #[must_use]
    pub fn same(&self, flat: &Flat, value: &Flat) -> bool {
        self.indices()
            .all(|index| flat.0[index] & self.mask.0[index] == value.0[index])
    }
}

type Buckets = HashMap<u64, Vec<Arc<Entry>>, BuildHasherDefault<Ready>>;

/// Entries that look at the same bits.
#[derive(Clone, Debug)]
struct Tuple {
    words: Words,
    /// By hash; the best first.
    buckets: Buckets,
    /// How many there are of each priority.
    priorities: BTreeMap<u16, usize>,
}

impl Tuple {
    fn best(&self) -> u16 {
        self.priorities
            .last_key_value()
            .map_or(0, |(best, _)| *best)
    }

    fn find(&self, flat: &Flat) -> Option<&Arc<Entry>> {
        let bucket = self.buckets.get(&self.words.hash(flat))?;
        bucket
            .iter()
            .find(|entry| self.words.same(flat, entry.flow.matches.value()))
    }

    fn insert(&mut self, entry: Arc<Entry>) {
        let hash = self.words.hash(entry.flow.matches.value());
        *self.priorities.entry(entry.flow.priority).or_default() += 1;
        let bucket = self.buckets.entry(hash).or_default();
        let at = bucket.partition_point(|other| other.rank() > entry.rank());
        bucket.insert(at, entry);
    }

    fn remove(&mut self, entry: &Entry) {
        let hash = self.words.hash(entry.flow.matches.value());
        let Some(bucket) = self.buckets.get_mut(&hash) else {
            return;
        };
        let before = bucket.len();
        bucket.retain(|other| other.id != entry.id);
        let gone = before != bucket.len();
        if bucket.is_empty() {
            self.buckets.remove(&hash);
        }
        if let Some(count) = self.priorities.get_mut(&entry.flow.priority)
            && gone
        {
            *count -= 1;
            if *count == 0 {
                self.priorities.remove(&entry.flow.priority);
            }
        }
    }
}

/// One table.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Those with the best entry first.
    tuples: Vec<Arc<Tuple>>,
    len: usize,
    /// Frames that were looked up.
    pub looked_up: Arc<Stats>,
    /// Frames of which an entry was found.
    pub matched: Arc<Stats>,
}

impl Table {
    /// Entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entry for a frame.
    #[must_use]
    pub fn find(&self, flat: &Flat) -> Option<&Arc<Entry>> {
        let mut best: Option<&Arc<Entry>> = None;
        for tuple in &self.tuples {
            if best.is_some_and(|best| best.flow.priority > tuple.best()) {
                break;
            }
            if let Some(found) = tuple.find(flat)
                && best.is_none_or(|best| found.rank() > best.rank())
            {
                best = Some(found);
            }
        }
        best
    }

    /// The entry with exactly this match and priority.
    #[must_use]
    pub fn exactly(&self, matches: &Match, priority: u16) -> Option<&Arc<Entry>> {
        let tuple = self
            .tuples
            .iter()
            .find(|tuple| tuple.words.mask() == matches.mask())?;
        let bucket = tuple.buckets.get(&tuple.words.hash(matches.value()))?;
        bucket
            .iter()
            .find(|entry| entry.flow.priority == priority && entry.flow.matches == *matches)
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Entry>> {
        let tuples = self.tuples.iter();
        tuples.flat_map(|tuple| tuple.buckets.values().flatten())
    }

    fn sort(&mut self) {
        self.tuples.sort_by_key(|tuple| Reverse(tuple.best()));
    }

    fn insert(&mut self, entry: Arc<Entry>, seed: u64) {
        let mask = entry.flow.matches.mask();
        let found = self
            .tuples
            .iter_mut()
            .find(|tuple| tuple.words.mask() == mask);
        if let Some(tuple) = found {
            Arc::make_mut(tuple).insert(entry);
        } else {
            let mut tuple = Tuple {
                words: Words::of(mask, seed),
                buckets: HashMap::default(),
                priorities: BTreeMap::new(),
            };
            tuple.insert(entry);
            self.tuples.push(Arc::new(tuple));
        }
        self.len += 1;
        self.sort();
    }

    fn remove(&mut self, entry: &Entry) {
        let mask = entry.flow.matches.mask();
        let found = self
            .tuples
            .iter()
            .position(|tuple| tuple.words.mask() == mask);
        if let Some(index) = found {
            Arc::make_mut(&mut self.tuples[index]).remove(entry);
            if self.tuples[index].buckets.is_empty() {
                self.tuples.remove(index);
            }
            self.len = self.len.saturating_sub(1);
            self.sort();
        }
    }
}

/// All tables and meters, as they are at one time. What changes is copied, as
/// far as somebody else still looks at it.
#[derive(Clone, Debug)]
pub struct Tables {
    tables: BTreeMap<u8, Arc<Table>>,
    meters: BTreeMap<u32, Arc<Meter>>,
    generation: u64,
    seed: u64,
    len: usize,
}

impl Default for Tables {
    fn default() -> Self {
        Self {
            tables: BTreeMap::new(),
            meters: BTreeMap::new(),
            generation: 0,
            seed: RandomState::new().hash_one(0),
            len: 0,
        }
    }
}

impl Tables {
    /// A table; none if it has never had an entry.
    #[must_use]
    pub fn table(&self, id: u8) -> Option<&Table> {
        self.tables.get(&id).map(AsRef::as_ref)
    }

    /// Those that have had an entry.
    pub fn tables(&self) -> impl Iterator<Item = (u8, &Table)> {
        self.tables.iter().map(|(id, table)| (*id, table.as_ref()))
    }

    /// All entries: by table, then by priority, then by age.
    #[must_use]
    pub fn entries(&self) -> Vec<&Arc<Entry>> {
        let mut all: Vec<_> = self
            .tables
            .values()
            .flat_map(|table| table.iter())
            .collect();
        all.sort_by_key(|entry| (entry.flow.table, Reverse(entry.rank())));
        all
    }

    /// Entries in all tables.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Meters, by number.
    #[must_use]
    pub fn meters(&self) -> &BTreeMap<u32, Arc<Meter>> {
        &self.meters
    }

    /// Differs from that of all tables before.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The bits that any entry looks at: frames that differ only in others are
    /// treated alike.
    #[must_use]
    pub fn words(&self) -> Words {
        let mut mask = Flat::default();
        for tuple in self.tables.values().flat_map(|table| &table.tuples) {
            mask |= *tuple.words.mask();
        }
        // The inner tag becomes the outer one when that is popped.
        let tag = mask.get(Field::VlanTci);
        mask.set(Field::InnerTci, u128::MAX, tag);
        Words::of(&mask, self.seed)
    }

    pub(super) fn insert(&mut self, entry: Arc<Entry>) {
        let table = self.tables.entry(entry.flow.table).or_default();
        Arc::make_mut(table).insert(entry, self.seed);
        self.len += 1;
    }

    pub(super) fn remove(&mut self, entry: &Entry) {
        if let Some(table) = self.tables.get_mut(&entry.flow.table) {
            let before = table.len();
            Arc::make_mut(table).remove(entry);
            self.len -= before - table.len();
        }
    }

    pub(super) fn meters_mut(&mut self) -> &mut BTreeMap<u32, Arc<Meter>> {
        &mut self.meters
    }

    pub(super) fn advance(&mut self) {
        self.generation += 1;
    }
}
