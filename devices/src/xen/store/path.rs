//! Names of nodes.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Errno, HOME};

/// Bytes of an absolute path (`XENSTORE_ABS_PATH_MAX`).
const MAX_LEN: usize = 3072;
/// Bytes of a path that is relative to the guest's home
/// (`XENSTORE_REL_PATH_MAX`).
const MAX_RELATIVE: usize = 2048;
/// Nodes on the way from the root: what walks the tree may recurse.
const MAX_DEPTH: usize = 64;

/// The path of a node: absolute, well-formed and of bounded length.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Path(String);

impl Path {
    /// Checks `text`. Without a leading slash, it is relative to the guest's
    /// home.
    ///
    /// # Errors
    /// [`Errno::Invalid`] if it is malformed or too long.
    pub fn new(text: &str) -> Result<Self, Errno> {
        let absolute = if text.starts_with('/') {
            text.to_owned()
        } else if text.len() <= MAX_RELATIVE {
            format!("{HOME}/{text}")
        } else {
            return Err(Errno::Invalid);
        };
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"-/_@".contains(&c);
        let path = Self(absolute);
        let well_formed = path.0 == "/" || !(path.0.ends_with('/') || path.0.contains("//"));
        if !well_formed
            || path.0.len() > MAX_LEN
            || !path.0.bytes().all(allowed)
            || path.components().count() > MAX_DEPTH
        {
            return Err(Errno::Invalid);
        }
        Ok(path)
    }

    /// The path as it is on the wire.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The names on the way from the root.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').filter(|name| !name.is_empty())
    }

    /// The node above; the root has none.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        match self.0.rfind('/')? {
            0 if self.0.len() == 1 => None,
            0 => Some(Self("/".into())),
            at => Some(Self(self.0[..at].to_owned())),
        }
    }

    /// The node `name` below this one. `name` is one that a [`Path`] had.
    pub(super) fn child(&self, name: &str) -> Self {
        let parent = self.0.strip_suffix('/').unwrap_or(&self.0);
        Self(format!("{parent}/{name}"))
    }

    /// Whether this is `other` or a node below it.
    #[must_use]
    pub fn is_within(&self, other: &Self) -> bool {
        other.0 == "/"
            || self
                .0
                .strip_prefix(&other.0)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The path as seen from `directory`, if it is below that.
    #[must_use]
    pub fn below(&self, directory: &str) -> Option<&str> {
        self.0.strip_prefix(directory)?.strip_prefix('/')
    }
}

impl TryFrom<String> for Path {
    type Error = Errno;

    fn try_from(text: String) -> Result<Self, Errno> {
        Self::new(&text)
    }
}

impl From<Path> for String {
    fn from(path: Path) -> Self {
        path.0
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_without_a_slash_lie_in_the_guests_home() {
        assert_eq!(Path::new("a/b").unwrap().as_str(), "/local/domain/1/a/b");
        assert_eq!(Path::new("/a/b").unwrap().as_str(), "/a/b");
    }

    #[test]
    fn malformed_and_endless_paths_are_refused() {
        for bad in ["", "a/", "//a", "/a//b", "/a b", "/a\n", "/ä", "/a/"] {
            assert_eq!(Path::new(bad), Err(Errno::Invalid), "{bad:?}");
        }
        assert!(Path::new(&format!("/{}", "a".repeat(MAX_LEN - 1))).is_ok());
        assert!(Path::new(&format!("/{}", "a".repeat(MAX_LEN))).is_err());
        assert!(Path::new(&"a".repeat(MAX_RELATIVE + 1)).is_err());
        assert!(Path::new(&"/a".repeat(MAX_DEPTH)).is_ok());
        assert!(Path::new(&"/a".repeat(MAX_DEPTH + 1)).is_err());
    }

    #[test]
    fn a_node_is_within_its_ancestors_and_itself_only() {
        let path = |text| Path::new(text).unwrap();
        for above in ["/", "/a", "/a/bc"] {
            assert!(path("/a/bc").is_within(&path(above)), "{above}");
        }
        for other in ["/a/b", "/a/bc/d", "/b"] {
            assert!(!path("/a/bc").is_within(&path(other)), "{other}");
        }
        assert_eq!(path("/a/bc").parent(), Some(path("/a")));
        assert_eq!(path("/a").parent(), Some(path("/")));
        assert_eq!(path("/").parent(), None);
        assert_eq!(path("/a/b/c").below("/a"), Some("b/c"));
        assert_eq!(path("/ab").below("/a"), None);
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_can_be_put_together_from_its_components(text in "[a-b@/ ]{0,12}") {
            if let Ok(path) = Path::new(&text) {
                let built = path
                    .components()
                    .fold(Path::new("/").unwrap(), |at, name| at.child(name));
                prop_assert_eq!(&built, &path);
                prop_assert_eq!(Path::try_from(String::from(path.clone())), Ok(path));
            }
        }
    }
}
