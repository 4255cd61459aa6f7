//! The xenstore of one guest: a tree of small values by which the guest and
//! its backends find each other (`xen/docs/misc/xenstore.txt`,
//! `xen/include/public/io/xs_wire.h`).
//!
//! [`Store`] is the tree with its watches and transactions; [`connection`]
//! serves the guest over the ring in its memory. There are two parties: the
//! monitor ([`Who::Toolstack`]), which may do anything, and the guest, whose
//! nodes, watches, transactions and events are bounded, so that it cannot make
//! the monitor allocate without bound.

pub mod connection;
mod path;
mod permissions;
#[cfg(test)]
pub(crate) mod testing;
mod transaction;
mod tree;
mod watches;
mod wire;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use path::Path;
pub use permissions::{Access, Permissions, Who};
pub use tree::{Op, Tree};

use transaction::{MAX_TRANSACTIONS, Transaction};
use tree::Change;
use watches::Watches;

/// The guest's directory: what its relative paths start from.
pub const HOME: &str = "/local/domain/1";

/// Why a request is refused. Shown as it is on the wire (`xsd_errors`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Errno {
    /// The request or its path is malformed.
    #[error("EINVAL")]
    Invalid,
    /// The node's permissions forbid it.
    #[error("EACCES")]
    Access,
    /// The watch exists already.
    #[error("EEXIST")]
    Exists,
    /// There is no such node, watch or transaction.
    #[error("ENOENT")]
    NoEntry,
    /// A quota is used up.
    #[error("ENOSPC")]
    NoSpace,
    /// The store does not do this.
    #[error("ENOSYS")]
    NoSystem,
    /// A transaction was opened within a transaction.
    #[error("EBUSY")]
    Busy,
    /// The transaction conflicts with changes made since its start.
    #[error("EAGAIN")]
    Again,
    /// The answer does not fit into a message.
    #[error("E2BIG")]
    TooBig,
}

/// The store.
#[derive(Debug, Default)]
pub struct Store {
    tree: Tree,
    /// Raised by each change.
    generation: u64,
    transactions: BTreeMap<u32, Transaction>,
    last_transaction: u32,
    watches: Watches,
    changed: Vec<Path>,
    conflicts: u64,
}

/// The store as it is saved.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    tree: Vec<tree::Record>,
    generation: u64,
    transactions: Vec<(u32, transaction::Record)>,
    last_transaction: u32,
    watches: Watches,
}

impl Store {
    /// The tree as `transaction` sees it (0: as it is), to look at `path`.
    ///
    /// # Errors
    /// There is no such transaction, or it has become too large.
    pub fn view(&mut self, transaction: u32, path: &Path) -> Result<&Tree, Errno> {
        match transaction {
            0 => Ok(&self.tree),
            id => self
                .transactions
                .get_mut(&id)
                .ok_or(Errno::NoEntry)?
                .view(path),
        }
    }

    /// The tree as it is.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Changes the tree as the guest asks, within a transaction or without (0).
    ///
    /// # Errors
    /// The guest may not, a quota is used up, or there is no such transaction.
    pub fn modify(&mut self, transaction: u32, op: Op) -> Result<(), Errno> {
        self.generation = self.generation.wrapping_add(1);
        if transaction != 0 {
            return self
                .transactions
                .get_mut(&transaction)
                .ok_or(Errno::NoEntry)?
                .apply(op, self.generation);
        }
        let changes = self.tree.apply(Who::Guest, &op, self.generation)?;
        self.fire(&changes);
        self.changed
            .extend(changes.into_iter().map(|change| change.path));
        Ok(())
    }

    /// Changes the tree as the monitor asks.
    ///
    /// # Errors
    /// The change makes no sense, like removing the root.
    pub fn set(&mut self, op: &Op) -> Result<(), Errno> {
        self.generation = self.generation.wrapping_add(1);
        let changes = self.tree.apply(Who::Toolstack, op, self.generation)?;
        self.fire(&changes);
        Ok(())
    }

    fn fire(&mut self, changes: &[Change]) {
        for change in changes {
            self.watches.fire(change);
        }
    }

    /// Opens a transaction of the guest's.
    ///
    /// # Errors
    /// There are too many.
    pub fn start_transaction(&mut self) -> Result<u32, Errno> {
        if self.transactions.len() >= MAX_TRANSACTIONS {
            return Err(Errno::NoSpace);
        }
        let id = loop {
            self.last_transaction = self.last_transaction.wrapping_add(1);
            let id = self.last_transaction;
            if id != 0 && !self.transactions.contains_key(&id) {
                break id;
            }
        };
        self.transactions.insert(id, Transaction::new(&self.tree));
        Ok(id)
    }

    /// Ends a transaction of the guest's.
    ///
    /// # Errors
    /// There is none; or [`Errno::Again`]: nothing has changed, and the guest
    /// should try again from the start.
    pub fn end_transaction(&mut self, id: u32, commit: bool) -> Result<(), Errno> {
        let transaction = self.transactions.remove(&id).ok_or(Errno::NoEntry)?;
        if !commit {
            return Ok(());
        }
        self.generation = self.generation.wrapping_add(1);
        let changes = transaction
            .commit(&mut self.tree, self.generation)
            .inspect_err(|_| self.conflicts += 1)?;
        self.fire(&changes);
        self.changed
            .extend(changes.into_iter().map(|change| change.path));
        Ok(())
    }

    /// The guest's watches.
    fn watches(&mut self) -> &mut Watches {
        &mut self.watches
    }

    /// Takes the nodes that the guest has changed since the last call.
    pub fn take_changed(&mut self) -> Vec<Path> {
        std::mem::take(&mut self.changed)
    }

    /// Forgets the guest's watches and transactions: it starts anew.
    pub fn forget_client(&mut self) {
        self.watches.clear();
        self.transactions.clear();
    }

    /// Its counters now, as (name, value).
    #[must_use]
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        let (watches, waiting, merged) = self.watches.counts();
        vec![
            ("guest_nodes", self.tree.guest_nodes() as u64),
            ("watches", watches as u64),
            ("events_waiting", waiting as u64),
            ("events_merged", merged),
            ("transactions_open", self.transactions.len() as u64),
            ("transactions_conflicting", self.conflicts),
        ]
    }

    /// Everything, to be restored.
    #[must_use]
    pub fn save(&self) -> State {
        State {
            tree: self.tree.save(),
            generation: self.generation,
            transactions: self
                .transactions
                .iter()
                .map(|(id, transaction)| (*id, transaction.save(&self.tree)))
                .collect(),
            last_transaction: self.last_transaction,
            watches: self.watches.clone(),
        }
    }

    /// The store of a saved state.
    ///
    /// # Errors
    /// The saved tree lacks nodes.
    pub fn restore(state: State) -> Result<Self, Errno> {
        let tree = Tree::restore(state.tree)?;
        let mut watches = state.watches;
        watches.restored();
        Ok(Self {
            transactions: state
                .transactions
                .into_iter()
                .map(|(id, record)| {
                    let transaction = Transaction::restore(record, &tree, state.generation);
                    (id, transaction)
                })
                .collect(),
            tree,
            generation: state.generation,
            last_transaction: state.last_transaction,
            watches,
            changed: Vec::new(),
            conflicts: 0,
        })
    }
}

#[cfg(test)]
mod tests;
