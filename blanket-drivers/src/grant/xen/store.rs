//! A question to xenstored (`xen/include/public/io/xs_wire.h`).

use std::fs::File;
use std::io::{self, Read, Write};

use super::Error;

const DEVICE: &str = "/dev/xen/xenbus";

/// `XS_READ`.
const READ: u32 = 2;

/// Longest answer that is read; a domain's number has five digits.
const MOST: u32 = 16;

/// The number of the domain that this machine is.
///
/// # Errors
/// [`Error::Device`], or xenstored does not say.
pub fn own_domain() -> Result<u16, Error> {
    let device = |source| Error::Device {
        path: DEVICE,
        module: "xenfs",
        source,
    };
    let store = File::options().read(true).write(true).open(DEVICE);
    let answer = ask(&store.map_err(device)?, "domid");
    answer.map_err(device)?.ok_or(Error::Store)
}

/// A number in the caller's own directory; none if it is no number.
pub(super) fn ask(mut store: impl Read + Write, path: &str) -> io::Result<Option<u16>> {
    let mut question = Vec::new();
    // Operation, request, transaction, length of the path with its end.
    for word in [READ, 0, 0, path.len() as u32 + 1] {
        question.extend(word.to_ne_bytes());
    }
    question.extend(path.bytes());
    question.push(0);
    store.write_all(&question)?;
    let mut words = [0; 4];
    for word in &mut words {
        let mut bytes = [0; 4];
        store.read_exact(&mut bytes)?;
        *word = u32::from_ne_bytes(bytes);
    }
    let [operation, _, _, len] = words;
    if operation != READ || len > MOST {
        return Ok(None);
    }
    let mut answer = vec![0; len as usize];
    store.read_exact(&mut answer)?;
    Ok(std::str::from_utf8(&answer)
        .ok()
        .and_then(|text| text.parse().ok()))
}
