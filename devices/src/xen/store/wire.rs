//! The messages of the xenstore (`xs_wire.h`).

use super::{Errno, Op, Path, Permissions, Store, Who};
use crate::xen::{BACKEND, GUEST};

/// Bytes of a message behind its header (`XENSTORE_PAYLOAD_MAX`).
pub(super) const MAX_PAYLOAD: usize = 4096;
/// Bytes of a header.
pub(super) const HEADER: usize = 16;

/// `enum xsd_sockmsg_type`, as far as it is for guests.
mod kind {
    pub(super) const DIRECTORY: u32 = 1;
    pub(super) const READ: u32 = 2;
    pub(super) const GET_PERMS: u32 = 3;
    pub(super) const WATCH: u32 = 4;
    pub(super) const UNWATCH: u32 = 5;
    pub(super) const TRANSACTION_START: u32 = 6;
    pub(super) const TRANSACTION_END: u32 = 7;
    pub(super) const GET_DOMAIN_PATH: u32 = 10;
    pub(super) const WRITE: u32 = 11;
    pub(super) const MKDIR: u32 = 12;
    pub(super) const RM: u32 = 13;
    pub(super) const SET_PERMS: u32 = 14;
    pub(super) const WATCH_EVENT: u32 = 15;
    pub(super) const ERROR: u32 = 16;
    pub(super) const IS_DOMAIN_INTRODUCED: u32 = 17;
    pub(super) const RESET_WATCHES: u32 = 21;
    pub(super) const DIRECTORY_PART: u32 = 22;
    /// `XS_CONTROL`, `XS_INTRODUCE`, `XS_RELEASE`, `XS_RESUME`,
    /// `XS_SET_TARGET`: for the control domain only.
    pub(super) const PRIVILEGED: [u32; 5] = [0, 8, 9, 18, 19];
}

/// `struct xsd_sockmsg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: u32,
    pub(super) request: u32,
    pub(super) transaction: u32,
    /// Bytes behind the header.
    pub(super) len: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let word = |i: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[4 * i..4 * i + 4]);
            u32::from_le_bytes(word)
        };
        Self {
            kind: word(0),
            request: word(1),
            transaction: word(2),
            len: word(3),
        }
    }

    fn bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let words = [self.kind, self.request, self.transaction, self.len];
        for (at, word) in bytes.chunks_exact_mut(4).zip(words) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

fn message(header: Header, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        len: payload.len() as u32,
        ..header
    };
    [&header.bytes(), payload].concat()
}

/// The event of a watch as a message.
pub(super) fn event(path: &str, token: &[u8]) -> Vec<u8> {
    let header = Header {
        kind: kind::WATCH_EVENT,
        request: 0,
        transaction: 0,
        len: 0,
    };
    message(header, &[path.as_bytes(), b"\0", token, b"\0"].concat())
}

/// Does what the guest asks and returns the answer, a whole message.
pub(super) fn answer(store: &mut Store, header: Header, payload: &[u8]) -> Vec<u8> {
    let answer = serve(store, header, payload).and_then(|payload| {
        if payload.len() > MAX_PAYLOAD {
            Err(Errno::TooBig)
        } else {
            Ok(payload)
        }
    });
    match answer {
        Ok(payload) => message(header, &payload),
        Err(errno) => message(
            Header {
                kind: kind::ERROR,
                ..header
            },
            format!("{errno}\0").as_bytes(),
        ),
    }
}

fn serve(store: &mut Store, header: Header, payload: &[u8]) -> Result<Vec<u8>, Errno> {
    let done = |()| b"OK\0".to_vec();
    match header.kind {
        kind::DIRECTORY => directory(store, header.transaction, payload),
        kind::DIRECTORY_PART => directory_part(store, header.transaction, payload),
        kind::READ => {
            let path = Path::new(only(payload)?)?;
            let tree = store.view(header.transaction, &path)?;
            Ok(tree.read(Who::Guest, &path)?.to_vec())
        }
        kind::GET_PERMS => {
            let path = Path::new(only(payload)?)?;
            let tree = store.view(header.transaction, &path)?;
            Ok(strings(
                tree.permissions(Who::Guest, &path)?.entries().iter(),
            ))
        }
        kind::WRITE | kind::MKDIR | kind::RM | kind::SET_PERMS => {
            let op = change(header.kind, payload)?;
            store.modify(header.transaction, op).map(done)
        }
        kind::WATCH | kind::UNWATCH => {
            let (node, token) = pair(payload)?;
            let watches = store.watches();
            match header.kind {
                kind::WATCH => watches.add(node, token),
                _ => watches.remove(node, token),
            }
            .map(done)
        }
        kind::RESET_WATCHES => {
            store.watches().clear();
            Ok(done(()))
        }
        kind::TRANSACTION_START if header.transaction != 0 => Err(Errno::Busy),
        kind::TRANSACTION_START => Ok(format!("{}\0", store.start_transaction()?).into_bytes()),
        kind::TRANSACTION_END => {
            let commit = match only(payload)? {
                "T" => true,
                "F" => false,
                _ => return Err(Errno::Invalid),
            };
            store.end_transaction(header.transaction, commit).map(done)
        }
        kind::GET_DOMAIN_PATH => Ok(format!("/local/domain/{}\0", domain(payload)?).into_bytes()),
        kind::IS_DOMAIN_INTRODUCED => {
            let known = [BACKEND, GUEST].contains(&domain(payload)?);
            Ok(if known { b"T\0" } else { b"F\0" }.to_vec())
        }
        kind if kind::PRIVILEGED.contains(&kind) => Err(Errno::Access),
        _ => Err(Errno::NoSystem),
    }
}

/// The change that a request asks for.
fn change(kind: u32, payload: &[u8]) -> Result<Op, Errno> {
    match kind {
        kind::WRITE => {
            // The value ends with the message.
            let (path, value) = split(payload)?;
            Ok(Op::Write(Path::new(path)?, value.to_vec()))
        }
        kind::MKDIR => Ok(Op::Mkdir(Path::new(only(payload)?)?)),
        kind::RM => Ok(Op::Remove(Path::new(only(payload)?)?)),
        _ => {
            let (path, entries) = split(payload)?;
            let entries = text(entries.strip_suffix(b"\0").ok_or(Errno::Invalid)?)?;
            let permissions = Permissions::parse(entries.split('\0'))?;
            Ok(Op::SetPermissions(Path::new(path)?, permissions))
        }
    }
}

fn directory(store: &mut Store, transaction: u32, payload: &[u8]) -> Result<Vec<u8>, Errno> {
    let path = Path::new(only(payload)?)?;
    let tree = store.view(transaction, &path)?;
    Ok(strings(tree.directory(Who::Guest, &path)?.1))
}

/// A piece of a long list of children: the node's generation, then whole names
/// from an offset into the list on; an empty one behind the last.
fn directory_part(store: &mut Store, transaction: u32, payload: &[u8]) -> Result<Vec<u8>, Errno> {
    let (path, offset) = pair(payload)?;
    let offset: usize = text(offset)?.parse().map_err(|_| Errno::Invalid)?;
    let path = Path::new(path)?;
    let tree = store.view(transaction, &path)?;
    let (generation, names) = tree.directory(Who::Guest, &path)?;
    let mut answer = format!("{generation}\0").into_bytes();
    let list = strings(names);
    let rest = list.get(offset..).unwrap_or_default();
    let room = MAX_PAYLOAD - answer.len() - 1;
    for name in rest.split_inclusive(|byte| *byte == 0) {
        if answer.len() + name.len() > MAX_PAYLOAD - 1 {
            break;
        }
        answer.extend(name);
    }
    if rest.len() <= room {
        answer.push(0);
    }
    Ok(answer)
}

fn strings(texts: impl Iterator<Item = impl AsRef<str>>) -> Vec<u8> {
    let mut all = Vec::new();
    for text in texts {
        all.extend(text.as_ref().as_bytes());
        all.push(0);
    }
    all
}

fn text(bytes: &[u8]) -> Result<&str, Errno> {
    std::str::from_utf8(bytes).map_err(|_| Errno::Invalid)
}

/// The payload's first string, and what follows it.
fn split(payload: &[u8]) -> Result<(&str, &[u8]), Errno> {
    let end = payload.iter().position(|byte| *byte == 0);
    let end = end.ok_or(Errno::Invalid)?;
    Ok((text(&payload[..end])?, &payload[end + 1..]))
}

/// The payload's only string.
fn only(payload: &[u8]) -> Result<&str, Errno> {
    match split(payload)? {
        (text, []) => Ok(text),
        _ => Err(Errno::Invalid),
    }
}

/// The payload's two strings.
fn pair(payload: &[u8]) -> Result<(&str, &[u8]), Errno> {
    let (first, rest) = split(payload)?;
    match rest.split_last() {
        Some((0, second)) if !second.contains(&0) => Ok((first, second)),
        _ => Err(Errno::Invalid),
    }
}

fn domain(payload: &[u8]) -> Result<u16, Errno> {
    only(payload)?.parse().map_err(|_| Errno::Invalid)
}
