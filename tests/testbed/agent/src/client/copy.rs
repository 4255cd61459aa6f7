//! Files to and from the machine.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use super::{Client, Error, Result, refused};
use crate::protocol::{Message, Outcome};

/// Time limit of one copy.
const LIMIT: Duration = Duration::from_secs(600);

pub(super) fn put(client: &Client, path: &str, mode: u32, from: impl Read) -> Result<()> {
    let what = format!("cannot write {path} in the machine");
    let message = Message::Put {
        path: path.to_owned(),
        mode,
    };
    let (request, messages) = client.request(message, Some(LIMIT))?;
    request.feed(from)?;
    match request.next(&messages)? {
        Some(Message::Done(Outcome::Copied, _)) => Ok(()),
        Some(Message::Done(other, _)) => Err(refused(what, other)),
        _ => Err(Error::NoAnswer(LIMIT)),
    }
}

pub(super) fn put_file(client: &Client, local: &Path, path: &str) -> Result<()> {
    let failed = |source| Error::Io {
        what: format!("cannot read {}", local.display()),
        source,
    };
    let file = File::open(local).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o7777;
    put(client, path, mode, file)
}

pub(super) fn get(client: &Client, path: &str, to: &mut impl Write) -> Result<()> {
    let what = format!("cannot read {path} in the machine");
    let (request, messages) = client.request(
        Message::Get {
            path: path.to_owned(),
        },
        Some(LIMIT),
    )?;
    loop {
        match request.next(&messages)? {
            Some(Message::Stdout(bytes)) => to.write_all(&bytes).map_err(|source| Error::Io {
                what: format!("cannot store {path}"),
                source,
            })?,
            Some(Message::Done(Outcome::Copied, _)) => return Ok(()),
            Some(Message::Done(other, _)) => return Err(refused(what, other)),
            Some(_) => {}
            None => return Err(Error::NoAnswer(LIMIT)),
        }
    }
}

pub(super) fn get_file(client: &Client, path: &str, local: &Path) -> Result<()> {
    let failed = |source| Error::Io {
        what: format!("cannot write {}", local.display()),
        source,
    };
    let mut file = File::create(local).map_err(failed)?;
    get(client, path, &mut file)
}
