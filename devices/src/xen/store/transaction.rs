//! Transactions: several changes at once, or none.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::tree::{Change, Op, Tree};
use super::{Errno, Path, Who};

/// Transactions that a guest may have open.
pub(super) const MAX_TRANSACTIONS: usize = 10;
/// Nodes that a transaction may touch, and changes that it may make.
pub(super) const MAX_TOUCHED: usize = 1024;

/// An open transaction of the guest's. It works on its own copy of the tree;
/// in the end its changes are made again on the real one, if nothing of what
/// it has seen or changed has changed there.
#[derive(Debug)]
pub(super) struct Transaction {
    /// The tree at its start.
    base: Tree,
    /// The tree as the transaction sees it.
    tree: Tree,
    touched: BTreeSet<Path>,
    ops: Vec<Op>,
    /// It was restored, and what it saw is not there any more.
    stale: bool,
}

/// A transaction as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    touched: BTreeSet<Path>,
    ops: Vec<Op>,
    stale: bool,
}

impl Transaction {
    /// Begins with the tree as it is now.
    #[must_use]
    pub(super) fn new(tree: &Tree) -> Self {
        Self {
            base: tree.clone(),
            tree: tree.clone(),
            touched: BTreeSet::new(),
            ops: Vec::new(),
            stale: false,
        }
    }

    /// Notes that the outcome depends on a node: on those above, too, as far
    /// as it is not there.
    fn touch(&mut self, path: &Path) {
        let mut at = Some(path.clone());
        while let Some(path) = at {
            at = match self.base.generation(&path) {
                Some(_) => None,
                None => path.parent(),
            };
            self.touched.insert(path);
        }
    }

    /// The tree, to look at `path`.
    ///
    /// # Errors
    /// The transaction has become too large.
    pub(super) fn view(&mut self, path: &Path) -> Result<&Tree, Errno> {
        if self.touched.len() >= MAX_TOUCHED {
            return Err(Errno::NoSpace);
        }
        self.touch(path);
        Ok(&self.tree)
    }

    /// Changes the transaction's tree.
    ///
    /// # Errors
    /// As [`Tree::apply`], or the transaction has become too large.
    pub(super) fn apply(&mut self, op: Op, generation: u64) -> Result<(), Errno> {
        if self.touched.len() >= MAX_TOUCHED || self.ops.len() >= MAX_TOUCHED {
            return Err(Errno::NoSpace);
        }
        self.touch(op.path());
        if let Op::Remove(path) = &op {
            let parent = path.parent();
            for path in self.tree.subtree(path).into_iter().chain(parent) {
                self.touch(&path);
            }
        }
        self.tree.apply(Who::Guest, &op, generation)?;
        self.ops.push(op);
        Ok(())
    }

    /// Makes the changes on `tree`; returns what has changed.
    ///
    /// # Errors
    /// [`Errno::Again`] if they conflict with changes made since the start;
    /// nothing has changed then.
    pub(super) fn commit(self, tree: &mut Tree, generation: u64) -> Result<Vec<Change>, Errno> {
        let conflict = |path| self.base.generation(path) != tree.generation(path);
        if self.stale || self.touched.iter().any(conflict) {
            return Err(Errno::Again);
        }
        let mut new = tree.clone();
        let mut changes = Vec::new();
        for op in &self.ops {
            // Quotas may have been used up by others.
            changes.extend(
                new.apply(Who::Guest, op, generation)
                    .map_err(|_| Errno::Again)?,
            );
        }
        *tree = new;
        Ok(changes)
    }

    /// What to save beside `tree`, the real one.
    #[must_use]
    pub(super) fn save(&self, tree: &Tree) -> Record {
        Record {
            touched: self.touched.clone(),
            ops: self.ops.clone(),
            stale: self.stale || !self.base.is_same(tree),
        }
    }

    /// The transaction again. One whose view of the tree is lost goes on with
    /// the tree of now, to conflict in the end: the guest then starts over.
    #[must_use]
    pub(super) fn restore(record: Record, tree: &Tree, generation: u64) -> Self {
        let mut copy = tree.clone();
        let mut stale = record.stale;
        for op in &record.ops {
            stale |= copy.apply(Who::Guest, op, generation).is_err();
        }
        Self {
            base: tree.clone(),
            tree: copy,
            touched: record.touched,
            ops: record.ops,
            stale,
        }
    }
}
