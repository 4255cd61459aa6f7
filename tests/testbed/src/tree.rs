//! A file tree in memory, from which images are made.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cpio;
use crate::error::{Context, Result, malformed};

/// Folders that are links into `usr` (the merged `/usr` of Debian).
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// What is at one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// A folder.
    Folder,
    /// A regular file.
    File(Vec<u8>),
    /// A symbolic link and its target.
    Link(String),
    /// A character device: major and minor number.
    Device(u32, u32),
}

/// Files by path, without the leading slash. All belong to root.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    entries: BTreeMap<String, (u32, Node)>,
}

impl Tree {
    /// A tree with the links of a merged `/usr`, and a console.
    pub(crate) fn new() -> Self {
        let mut tree = Self::default();
        for name in MERGED {
            tree.insert(&format!("usr/{name}"), 0o755, Node::Folder);
            tree.insert(name, 0o777, Node::Link(format!("usr/{name}")));
        }
        for folder in [
            "proc", "sys", "dev", "run", "tmp", "root", "etc", "var", "mnt",
        ] {
            tree.insert(folder, 0o755, Node::Folder);
        }
        tree.insert("dev/console", 0o600, Node::Device(5, 1));
        tree
    }

    /// Sets what is at `path`, with permission bits `mode`. Folders above it are made.
    pub(crate) fn insert(&mut self, path: &str, mode: u32, node: Node) {
        let path = canonical(path);
        for (slash, _) in path.match_indices('/') {
            self.entries
                .entry(path[..slash].to_owned())
                .or_insert((0o755, Node::Folder));
        }
        self.entries.insert(path, (mode, node));
    }

    /// Adds a file with this content.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) {
        self.insert(path, mode, Node::File(content.into()));
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.insert(path, 0o777, Node::Link(target.to_owned()));
    }

    /// Whether there is something at `path`.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.entries.contains_key(&canonical(path))
    }

    /// Writes the file at `path` to the host.
    pub(crate) fn extract(&self, path: &str, host: &Path) -> Result<()> {
        match self.entries.get(&canonical(path)) {
            Some((mode, Node::File(content))) => write_file(host, *mode, content),
            _ => Err(malformed(Path::new(path), "is no file of the image")),
        }
    }

    /// Adds a file of the host, with its permission bits.
    pub(crate) fn host_file(&mut self, path: &str, host: &Path) -> Result<()> {
        let reading = || format!("cannot read {}", host.display());
        let mode = fs::metadata(host).context(reading)?.permissions().mode() & 0o7777;
        self.file(path, mode, fs::read(host).context(reading)?);
        Ok(())
    }

    /// Adds the files of a Debian package whose paths `wanted` accepts.
    pub(crate) fn package(&mut self, deb: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let mut unpacker = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(deb)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context(|| "cannot run dpkg-deb".to_owned())?;
        let added = match unpacker.stdout.take() {
            Some(stdout) => self.tar(stdout, &wanted),
            None => Ok(()),
        };
        let status = unpacker
            .wait()
            .context(|| "cannot wait for dpkg-deb".to_owned())?;
        added.context(|| format!("cannot unpack {}", deb.display()))?;
        if status.success() {
            Ok(())
        } else {
            Err(malformed(deb, "is no Debian package"))
        }
    }

    fn tar(&mut self, stream: impl Read, wanted: &impl Fn(&str) -> bool) -> std::io::Result<()> {
        let mut archive = tar::Archive::new(stream);
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = canonical(&entry.path()?.to_string_lossy());
            if path.is_empty() || MERGED.contains(&path.as_str()) || !wanted(&path) {
                continue;
            }
            let mode = entry.header().mode()? & 0o7777;
            let target = entry
                .link_name()?
                .map(|target| target.to_string_lossy().into_owned());
            let kind = entry.header().entry_type();
            if kind.is_dir() {
                self.insert(&path, mode, Node::Folder);
            } else if kind.is_symlink() {
                self.link(&path, &target.unwrap_or_default());
            } else if kind.is_hard_link() {
                let linked = self
                    .entries
                    .get(&canonical(&target.unwrap_or_default()))
                    .cloned();
                let (mode, node) =
                    linked.ok_or_else(|| std::io::Error::other("dangling hard link"))?;
                self.insert(&path, mode, node);
            } else {
                let mut content = Vec::new();
                entry.read_to_end(&mut content)?;
                self.file(&path, mode, content);
            }
        }
        // dpkg-deb would be killed by a closed pipe.
        std::io::copy(&mut archive.into_inner(), &mut std::io::sink())?;
        Ok(())
    }

    /// Adds a folder of the host with all that is in it.
    pub(crate) fn host_folder(&mut self, path: &str, host: &Path) -> Result<()> {
        let reading = || format!("cannot read {}", host.display());
        for entry in fs::read_dir(host).context(reading)? {
            let entry = entry.context(reading)?;
            let inside = format!("{path}/{}", entry.file_name().to_string_lossy());
            let kind = entry.file_type().context(reading)?;
            if kind.is_dir() {
                self.host_folder(&inside, &entry.path())?;
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path()).context(reading)?;
                self.link(&inside, &target.to_string_lossy());
            } else {
                self.host_file(&inside, &entry.path())?;
            }
        }
        Ok(())
    }

    /// Writes the tree as an initramfs. The same tree gives the same bytes.
    pub(crate) fn write_cpio(&self, to: impl Write) -> std::io::Result<()> {
        let mut archive = cpio::Writer::new(to);
        for (path, (mode, node)) in &self.entries {
            match node {
                Node::Folder => archive.folder(path, *mode),
                Node::File(content) => archive.file(path, *mode, content),
                Node::Link(target) => archive.link(path, target),
                Node::Device(major, minor) => archive.character_device(path, *mode, *major, *minor),
            }?;
        }
        archive.finish()
    }

    /// Writes the tree into a folder of the host. Devices are left out: only root may make them.
    pub(crate) fn write_folder(&self, root: &Path) -> Result<()> {
        for (path, (mode, node)) in &self.entries {
            let target = root.join(path);
            let result = match node {
                Node::Folder => fs::create_dir_all(&target),
                Node::File(content) => {
                    write_file(&target, *mode, content)?;
                    continue;
                }
                Node::Link(to) => std::os::unix::fs::symlink(to, &target),
                Node::Device(..) => Ok(()),
            };
            result.context(|| format!("cannot write {}", target.display()))?;
        }
        Ok(())
    }
}

fn write_file(path: &Path, mode: u32, content: &[u8]) -> Result<()> {
    fs::write(path, content)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .context(|| format!("cannot write {}", path.display()))
}

/// A path without leading `./` or `/` and with merged folders under `usr`.
fn canonical(path: &str) -> String {
    let path = path.trim_start_matches("./").trim_matches('/');
    let first = path.split('/').next().unwrap_or_default();
    if first != path && MERGED.contains(&first) {
        format!("usr/{path}")
    } else {
        path.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_folders_are_put_under_usr() {
        assert_eq!(canonical("./bin/sh"), "usr/bin/sh");
        assert_eq!(canonical("/lib64/ld.so"), "usr/lib64/ld.so");
        assert_eq!(canonical("./lib"), "lib");
        assert_eq!(canonical("library/a"), "library/a");
        assert_eq!(canonical("./"), ".".trim_matches('.'));
    }

    #[test]
    fn folders_above_a_file_are_made_and_keep_their_mode() {
        let mut tree = Tree::default();
        tree.insert("tmp", 0o1777, Node::Folder);
        tree.file("tmp/a/b", 0o644, "x");
        assert_eq!(tree.entries["tmp"], (0o1777, Node::Folder));
        assert_eq!(tree.entries["tmp/a"], (0o755, Node::Folder));
        assert_eq!(tree.entries["tmp/a/b"], (0o644, Node::File(b"x".to_vec())));
    }

    #[test]
    fn the_same_tree_gives_the_same_archive_whatever_the_order() {
        let archive = |names: &[&str]| {
            let mut tree = Tree::new();
            for name in names {
                tree.file(name, 0o644, *name);
            }
            let mut bytes = Vec::new();
            tree.write_cpio(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(archive(&["etc/a", "etc/b"]), archive(&["etc/b", "etc/a"]));
        assert_ne!(archive(&["etc/a"]), archive(&["etc/b"]));
    }
}
