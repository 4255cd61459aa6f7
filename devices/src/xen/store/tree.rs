//! The tree of nodes: values, permissions, and who may do what to them.
//!
//! Nodes are shared between copies of the tree until one of them changes a
//! node: a transaction's copy costs nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Access, Errno, Path, Permissions, Who};
use crate::xen::GUEST;

/// Nodes that the guest may own.
pub(super) const MAX_NODES: usize = 1000;
/// Bytes of a value that the guest writes.
pub(super) const MAX_VALUE: usize = 2048;

/// A change of the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Sets a value; makes the node and those above it if need be.
    Write(Path, Vec<u8>),
    /// Makes a node, and those above it, unless it is there.
    Mkdir(Path),
    /// Removes a node and all below it.
    Remove(Path),
    /// Sets a node's permissions.
    SetPermissions(Path, Permissions),
}

impl Op {
    /// The node that changes.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Write(path, _)
            | Self::Mkdir(path)
            | Self::Remove(path)
            | Self::SetPermissions(path, _) => path,
        }
    }
}

/// A node that has changed: what watches are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// The node.
    pub(super) path: Path,
    /// It went along with one above it: only watches on just this node care.
    pub(super) exact: bool,
    /// Whether the guest may, or might until now, know of it.
    pub(super) visible: bool,
}

#[derive(Clone, Debug)]
struct Node {
    value: Vec<u8>,
    permissions: Permissions,
    /// When it or the list of its children changed last.
    generation: u64,
    children: BTreeMap<String, Arc<Node>>,
}

impl Node {
    fn new(permissions: Permissions, generation: u64) -> Self {
        Self {
            value: Vec::new(),
            permissions,
            generation,
            children: BTreeMap::new(),
        }
    }

    fn owned(&self) -> usize {
        usize::from(self.permissions.owner() == GUEST)
            + self.children.values().map(|c| c.owned()).sum::<usize>()
    }

    /// This node at `path` and all below it, each before its children.
    fn walk<'a>(&'a self, path: &Path, found: &mut Vec<(Path, &'a Node)>) {
        found.push((path.clone(), self));
        for (name, child) in &self.children {
            child.walk(&path.child(name), found);
        }
    }
}

/// A node as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    path: Path,
    value: Vec<u8>,
    permissions: Permissions,
    generation: u64,
}

/// The tree. A copy shares its nodes.
#[derive(Clone, Debug)]
pub struct Tree {
    root: Arc<Node>,
    /// Nodes of the guest's.
    owned: usize,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            root: Arc::new(Node::new(Permissions::private(), 0)),
            owned: 0,
        }
    }
}

impl Tree {
    fn get(&self, path: &Path) -> Option<&Node> {
        path.components()
            .try_fold(self.root.as_ref(), |node, name| {
                node.children.get(name).map(AsRef::as_ref)
            })
    }

    fn get_mut(&mut self, path: &Path) -> Option<&mut Node> {
        path.components()
            .try_fold(Arc::make_mut(&mut self.root), |node, name| {
                node.children.get_mut(name).map(Arc::make_mut)
            })
    }

    /// The node, or the last one that is there on the way to it.
    fn nearest(&self, path: &Path) -> &Node {
        let mut node = self.root.as_ref();
        for name in path.components() {
            match node.children.get(name) {
                Some(child) => node = child,
                None => break,
            }
        }
        node
    }

    /// The node if `who` may do that. Whoever may not know is not told either
    /// that there is no such node.
    fn check(&self, who: Who, path: &Path, access: Access) -> Result<&Node, Errno> {
        let node = self.get(path);
        let decisive = node.unwrap_or_else(|| self.nearest(path));
        if !decisive.permissions.allow(who, access) {
            return Err(Errno::Access);
        }
        node.ok_or(Errno::NoEntry)
    }

    /// When the node changed last; `None` if it is not there.
    #[must_use]
    pub(super) fn generation(&self, path: &Path) -> Option<u64> {
        self.get(path).map(|node| node.generation)
    }

    /// Whether this and `other` are copies of which neither has changed.
    #[must_use]
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.root, &other.root)
    }

    /// How many nodes are the guest's.
    #[must_use]
    pub(super) fn guest_nodes(&self) -> usize {
        self.owned
    }

    /// The node's value.
    ///
    /// # Errors
    /// It is not there, or not for `who` to read; so in the others.
    pub fn read(&self, who: Who, path: &Path) -> Result<&[u8], Errno> {
        Ok(&self.check(who, path, Access::Read)?.value)
    }

    /// When the node changed last, and the names of its children.
    ///
    /// # Errors
    /// As [`Tree::read`].
    pub fn directory(
        &self,
        who: Who,
        path: &Path,
    ) -> Result<(u64, impl Iterator<Item = &str>), Errno> {
        let node = self.check(who, path, Access::Read)?;
        Ok((node.generation, node.children.keys().map(String::as_str)))
    }

    /// The node's permissions.
    ///
    /// # Errors
    /// As [`Tree::read`].
    pub fn permissions(&self, who: Who, path: &Path) -> Result<&Permissions, Errno> {
        Ok(&self.check(who, path, Access::Read)?.permissions)
    }

    /// The node and all below it.
    #[must_use]
    pub(super) fn subtree(&self, path: &Path) -> Vec<Path> {
        let mut found = Vec::new();
        if let Some(node) = self.get(path) {
            node.walk(path, &mut found);
        }
        found.into_iter().map(|(path, _)| path).collect()
    }

    /// Changes the tree as `who` asks, in the name of `generation`; returns
    /// what has changed.
    ///
    /// # Errors
    /// `who` may not, or a quota is used up; nothing has changed then.
    pub(super) fn apply(
        &mut self,
        who: Who,
        op: &Op,
        generation: u64,
    ) -> Result<Vec<Change>, Errno> {
        match op {
            Op::Write(path, value) => {
                if who == Who::Guest && value.len() > MAX_VALUE {
                    return Err(Errno::NoSpace);
                }
                let node = self.node_for_writing(who, path, generation)?;
                node.value.clone_from(value);
                node.generation = generation;
                Ok(vec![self.change(path)])
            }
            Op::Mkdir(path) => {
                let there = self.get(path).is_some();
                self.node_for_writing(who, path, generation)?;
                Ok(if there {
                    Vec::new()
                } else {
                    vec![self.change(path)]
                })
            }
            Op::Remove(path) => self.remove(who, path, generation),
            Op::SetPermissions(path, permissions) => {
                self.set_permissions(who, path, permissions, generation)
            }
        }
    }

    fn change(&self, path: &Path) -> Change {
        let permissions = &self.nearest(path).permissions;
        Change {
            path: path.clone(),
            exact: false,
            visible: permissions.allow(Who::Guest, Access::Read),
        }
    }

    /// The node, made if it is not there, like those above it. New nodes have
    /// the permissions of the last one that was there, but are their maker's.
    fn node_for_writing(
        &mut self,
        who: Who,
        path: &Path,
        generation: u64,
    ) -> Result<&mut Node, Errno> {
        let nearest = self.nearest(path);
        if !nearest.permissions.allow(who, Access::Write) {
            return Err(Errno::Access);
        }
        let mut permissions = nearest.permissions.clone();
        if who == Who::Guest {
            permissions = permissions.owned_by(GUEST);
        }
        let missing = self.missing(path);
        if who == Who::Guest && missing > 0 && self.owned + missing > MAX_NODES {
            return Err(Errno::NoSpace);
        }
        if permissions.owner() == GUEST {
            self.owned += missing;
        }
        let mut node = Arc::make_mut(&mut self.root);
        for name in path.components() {
            if !node.children.contains_key(name) {
                node.generation = generation;
            }
            let child = node
                .children
                .entry(name.to_owned())
                .or_insert_with(|| Arc::new(Node::new(permissions.clone(), generation)));
            node = Arc::make_mut(child);
        }
        Ok(node)
    }

    /// How many nodes on the way to `path`, itself too, are not there.
    fn missing(&self, path: &Path) -> usize {
        let mut node = Some(self.root.as_ref());
        let mut missing = 0;
        for name in path.components() {
            node = node.and_then(|node| node.children.get(name).map(AsRef::as_ref));
            missing += usize::from(node.is_none());
        }
        missing
    }

    fn remove(&mut self, who: Who, path: &Path, generation: u64) -> Result<Vec<Change>, Errno> {
        let parent = path.parent().ok_or(Errno::Invalid)?;
        let node = match self.check(who, path, Access::Write) {
            // There is nothing to do, unless the whole path is wrong.
            Err(Errno::NoEntry) if self.get(&parent).is_some() => return Ok(Vec::new()),
            node => node?,
        };
        let mut gone = Vec::new();
        node.walk(path, &mut gone);
        let changes = gone
            .into_iter()
            .map(|(gone, node)| Change {
                exact: gone != *path,
                visible: node.permissions.allow(Who::Guest, Access::Read),
                path: gone,
            })
            .collect();
        let owned = node.owned();
        let name = path.components().last().ok_or(Errno::Invalid)?.to_owned();
        let parent = self.get_mut(&parent).ok_or(Errno::NoEntry)?;
        parent.children.remove(&name);
        parent.generation = generation;
        self.owned -= owned;
        Ok(changes)
    }

    fn set_permissions(
        &mut self,
        who: Who,
        path: &Path,
        permissions: &Permissions,
        generation: u64,
    ) -> Result<Vec<Change>, Errno> {
        let old = &self.check(who, path, Access::Own)?.permissions;
        let (from, to) = (old.owner() == GUEST, permissions.owner() == GUEST);
        // A guest that gave nodes away would escape its quota.
        if who == Who::Guest && !to {
            return Err(Errno::Access);
        }
        let was_visible = old.allow(Who::Guest, Access::Read);
        self.owned = self.owned + usize::from(to) - usize::from(from);
        let node = self.get_mut(path).ok_or(Errno::NoEntry)?;
        node.permissions = permissions.clone();
        node.generation = generation;
        let mut change = self.change(path);
        change.visible |= was_visible;
        Ok(vec![change])
    }

    /// All nodes, each before its children.
    #[must_use]
    pub(super) fn save(&self) -> Vec<Record> {
        let mut nodes = Vec::new();
        if let Ok(root) = Path::new("/") {
            self.root.walk(&root, &mut nodes);
        }
        nodes
            .into_iter()
            .map(|(path, node)| Record {
                path,
                value: node.value.clone(),
                permissions: node.permissions.clone(),
                generation: node.generation,
            })
            .collect()
    }

    /// The tree of what [`Tree::save`] returned.
    ///
    /// # Errors
    /// [`Errno::NoEntry`] if a node's parent is missing.
    pub(super) fn restore(records: Vec<Record>) -> Result<Self, Errno> {
        let mut tree = Self::default();
        for record in records {
            let node = Node {
                value: record.value,
                permissions: record.permissions,
                generation: record.generation,
                children: BTreeMap::new(),
            };
            match (record.path.parent(), record.path.components().last()) {
                (Some(parent), Some(name)) => {
                    let parent = tree.get_mut(&parent).ok_or(Errno::NoEntry)?;
                    parent.children.insert(name.to_owned(), Arc::new(node));
                }
                _ => tree.root = Arc::new(node),
            }
        }
        tree.owned = tree.root.owned();
        Ok(tree)
    }
}

#[cfg(test)]
mod tests;
