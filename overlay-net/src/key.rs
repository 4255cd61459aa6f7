//! The switch's key: who it is to other nodes.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use data_encoding::BASE64;

use crate::tunnel::{PrivateKey, PublicKey, generate};

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read or made.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is none.
    #[error("{} holds no key: 44 characters of base64; move it away to have a new one made, by which other nodes know this one then", .0.display())]
    Content(PathBuf),
}

/// Reads a key as people write it.
///
/// # Errors
///
/// It is none; the message says what one looks like.
pub fn parse(text: &str) -> Result<PublicKey, String> {
    let bytes = BASE64.decode(text.trim().as_bytes()).ok();
    let key = bytes.and_then(|bytes| PublicKey::try_from(bytes).ok());
    key.ok_or_else(|| {
        format!("`{text}` is no public key: 44 characters of base64, as blanket net info shows it")
    })
}

/// The private key in the file at `path`, which is made if it is not there.
///
/// # Errors
///
/// See [`Error`].
pub fn load(path: &Path) -> Result<PrivateKey, Error> {
    let error = |what| {
        move |source| Error::Io {
            what,
            path: path.to_owned(),
            source,
        }
    };
    match fs::read_to_string(path) {
        Ok(text) => parse(&text).map_err(|_| Error::Content(path.to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let private = generate();
            let mut options = OpenOptions::new();
            let options = options.write(true).create_new(true).mode(0o600);
            let mut file = options.open(path).map_err(error("make"))?;
            let text = format!("{}\n", BASE64.encode(&private));
            let written = file
                .write_all(text.as_bytes())
                .and_then(|()| file.sync_all());
            written.map_err(error("write"))?;
            Ok(private)
        }
        Err(e) => Err(error("read")(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_its_owners() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        let key = load(&path).expect("a new one");
        assert_eq!(load(&path).expect("the same"), key);
        let mode = fs::metadata(&path)
            .expect("it is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(&path, "nothing").expect("spoilt");
        assert!(matches!(load(&path), Err(Error::Content(_))));
    }
}
