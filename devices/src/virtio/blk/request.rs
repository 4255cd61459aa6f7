//! What a driver asks for (virtio 1.2, 5.2.6).

use blanket_drivers::store::{Operation, Request, SECTOR};
use blanket_memory::{IoVec, iovec};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::disk::{offset, request};
use crate::virtio::queue::{Buffers, read_bytes};

/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;

/// Bytes of a discard's or write-zeroes' range: sector, sectors, flags.
const SEGMENT: usize = 16;

/// Most sectors of one discard or write-zeroes: 1 GiB. A larger one would keep
/// other requests waiting for long.
pub(super) const MAX_FREED_SECTORS: u32 = 1 << 21;

/// Bytes of the serial.
pub(super) const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// A request's status byte as the driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// It failed, or it is malformed.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// This device does not know it.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What the driver may ask for, as it was negotiated.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Accepted {
    /// `VIRTIO_BLK_F_DISCARD`.
    pub(super) discard: bool,
    /// `VIRTIO_BLK_F_WRITE_ZEROES`.
    pub(super) write_zeroes: bool,
}

/// What to do for a request.
#[derive(Debug)]
pub(super) enum Action {
    /// The store has to do it; the token is not set.
    Store(Request),
    /// The serial goes here.
    Id(Vec<IoVec>),
}

/// Where the request's status byte goes: the last writable one, whatever the
/// layout of the descriptors. It leaves `writable`.
pub(super) fn take_status(writable: &mut Vec<IoVec>) -> Option<IoVec> {
    // The queue gives no empty pieces.
    let last = writable.last_mut()?;
    let mut status = *last;
    let before = last.len() - 1;
    status.advance(before);
    last.truncate(before);
    if before == 0 {
        writable.pop();
    }
    Some(status)
}

/// Understands a request whose status byte was taken off already. Nothing of
/// the request is read again later, but for the data to write.
///
/// # Errors
/// The status to give it.
pub(super) fn parse(buffers: &mut Buffers, accepted: Accepted) -> Result<Action, Status> {
    let mut header = [0u8; HEADER];
    if read_bytes(&buffers.readable, &mut header) < HEADER {
        return Err(Status::IoError);
    }
    iovec::advance(&mut buffers.readable, HEADER);
    let kind = u32_at(&header, 0);
    let sector = u64_at(&header, 8);
    match kind {
        VIRTIO_BLK_T_IN => {
            let vectors = std::mem::take(&mut buffers.writable);
            transfer(Operation::Read, sector, vectors)
        }
        VIRTIO_BLK_T_OUT => {
            let vectors = std::mem::take(&mut buffers.readable);
            transfer(Operation::Write, sector, vectors)
        }
        VIRTIO_BLK_T_FLUSH => Ok(Action::Store(request(Operation::Flush, 0, 0))),
        VIRTIO_BLK_T_GET_ID if buffers.writable.is_empty() => Err(Status::IoError),
        VIRTIO_BLK_T_GET_ID => Ok(Action::Id(std::mem::take(&mut buffers.writable))),
        VIRTIO_BLK_T_DISCARD if accepted.discard => free(Operation::Discard, &buffers.readable),
        VIRTIO_BLK_T_WRITE_ZEROES if accepted.write_zeroes => {
            free(Operation::WriteZeroes, &buffers.readable)
        }
        _ => Err(Status::Unsupported),
    }
}

fn transfer(operation: Operation, sector: u64, vectors: Vec<IoVec>) -> Result<Action, Status> {
    // None at all: the buffers point the wrong way.
    if vectors.is_empty() {
        return Err(Status::IoError);
    }
    let offset = offset(sector).ok_or(Status::IoError)?;
    Ok(Action::Store(Request {
        vectors,
        ..request(operation, offset, 0)
    }))
}

/// Discards and write-zeroes. One range per request, as the configuration
/// space says (`max_discard_seg`, `max_write_zeroes_seg`).
fn free(operation: Operation, readable: &[IoVec]) -> Result<Action, Status> {
    if IoVec::total(readable) != SEGMENT {
        return Err(Status::IoError);
    }
    let mut segment = [0u8; SEGMENT];
    if read_bytes(readable, &mut segment) < SEGMENT {
        return Err(Status::IoError);
    }
    let (sector, sectors, flags) = (
        u64_at(&segment, 0),
        u32_at(&segment, 8),
        u32_at(&segment, 12),
    );
    // "Unmap" means something for write-zeroes only (5.2.6.2).
    let known = match operation {
        Operation::WriteZeroes => VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
        _ => 0,
    };
    if flags & !known != 0 {
        return Err(Status::Unsupported);
    }
    if sectors > MAX_FREED_SECTORS {
        return Err(Status::IoError);
    }
    let offset = offset(sector).ok_or(Status::IoError)?;
    let len = u64::from(sectors) * SECTOR;
    Ok(Action::Store(request(operation, offset, len)))
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pieces(bytes: &mut [u8], cuts: &[usize]) -> Vec<IoVec> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let base = bytes.as_mut_ptr();
        cuts.windows(2)
            .filter(|pair| pair[0] < pair[1])
            .map(|pair| IoVec::new(base.wrapping_add(pair[0]), pair[1] - pair[0]))
            .collect()
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_layout_give_a_bounded_request_or_a_status(
            mut readable in prop::collection::vec(any::<u8>(), 0..64),
            kind in prop_oneof![0..16u8, any::<u8>()],
            writable in 0..64usize,
            cuts in prop::collection::vec(any::<usize>(), 0..4),
            accepted in any::<bool>(),
        ) {
            if let Some(first) = readable.first_mut() {
                *first = kind;
            }
            if let Some(rest) = readable.get_mut(1..4) {
                rest.fill(0);
            }
            let mut target = vec![0; writable];
            let mut buffers = Buffers {
                readable: pieces(&mut readable, &cuts),
                writable: pieces(&mut target, &cuts),
            };
            let accepted = Accepted { discard: accepted, write_zeroes: accepted };
            let status = take_status(&mut buffers.writable);
            prop_assert_eq!(status.is_some(), writable > 0);
            prop_assert_eq!(IoVec::total(&buffers.writable), writable.saturating_sub(1));
            let parsed = parse(&mut buffers, accepted);
            if readable.len() < HEADER {
                prop_assert_eq!(parsed.unwrap_err(), Status::IoError);
            } else if let Ok(Action::Store(request)) = parsed {
                let data = match request.operation {
                    Operation::Read => writable - 1,
                    Operation::Write => readable.len() - HEADER,
                    _ => 0,
                };
                prop_assert_eq!(IoVec::total(&request.vectors), data);
                prop_assert!(request.len <= u64::from(MAX_FREED_SECTORS) * SECTOR);
            }
        }
    }

    #[test]
    fn the_status_is_the_last_writable_byte() {
        let mut bytes = [0u8; 8];
        let mut writable = pieces(&mut bytes, &[5]);
        let status = take_status(&mut writable).unwrap();
        assert_eq!(status.as_ptr(), bytes.as_mut_ptr().wrapping_add(7));
        assert_eq!((status.len(), IoVec::total(&writable)), (1, 7));
        let mut single = pieces(&mut bytes[..1], &[]);
        assert!(take_status(&mut single).is_some() && single.is_empty());
    }
}
