//! What a frontend asks for (`xen/include/public/io/blkif.h`, x86-64 layout).

use blanket_drivers::store::Operation;

use crate::disk;

/// Bytes of a request: `struct blkif_request`.
pub(super) const REQUEST: usize = 112;

/// Bytes of a response: `struct blkif_response`.
pub(super) const RESPONSE: usize = 16;

/// `BLKIF_OP_READ` and so on.
pub(super) const READ: u8 = 0;
pub(super) const WRITE: u8 = 1;
pub(super) const FLUSH: u8 = 3;
pub(super) const DISCARD: u8 = 5;
pub(super) const INDIRECT: u8 = 6;

/// Most segments in a request itself: `BLKIF_MAX_SEGMENTS_PER_REQUEST`.
const DIRECT_SEGMENTS: usize = 11;

/// Most segments in pages of their own. The table of so many is within the
/// first page.
pub const INDIRECT_SEGMENTS: usize = 256;

/// Bytes of a segment: `struct blkif_request_segment`.
pub(super) const SEGMENT: usize = 8;

/// Sectors in a page.
const SECTORS_PER_PAGE: u8 = 8;

/// Bytes of the unit in which segments and offsets are counted.
const SECTOR: usize = 512;

/// A response's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
pub(super) enum Status {
    /// `BLKIF_RSP_OKAY`: done.
    Okay = 0,
    /// `BLKIF_RSP_ERROR`: it failed, or it is malformed.
    Error = -1,
    /// `BLKIF_RSP_EOPNOTSUPP`: this disk does not know it.
    Unsupported = -2,
}

/// What to do for a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action<'a> {
    /// Data between the disk and the segments in this table.
    Direct(Transfer, &'a [u8]),
    /// The same, with the table in the first bytes of a granted page.
    Indirect(Transfer, Table),
    /// Make everything that has completed durable.
    Flush,
    /// Forget a range: first byte, bytes.
    Discard(u64, u64),
}

/// Which data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    /// Read or write.
    pub(super) operation: Operation,
    /// First byte on the disk.
    pub(super) offset: u64,
}

/// Where the segments of an indirect request are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    /// The page's grant.
    pub(super) reference: u32,
    /// Bytes of the table; at most a page.
    pub(super) len: usize,
}

/// A piece of a granted page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// The page's grant.
    pub(super) reference: u32,
    /// First byte in the page.
    pub(super) offset: usize,
    /// Bytes, at least a sector; the piece is within the page.
    pub(super) len: usize,
}

/// The operation that the response names: what is in the request, or behind
/// its indirection.
pub(super) fn operation(request: &[u8; REQUEST]) -> u8 {
    match request[0] {
        INDIRECT => request[1],
        operation => operation,
    }
}

/// The frontend's own number, given back as it is.
pub(super) fn id(request: &[u8; REQUEST]) -> u64 {
    u64_at(request, 8)
}

/// The response to a request.
pub(super) fn response(id: u64, operation: u8, status: Status) -> [u8; RESPONSE] {
    let mut response = [0; RESPONSE];
    response[..8].copy_from_slice(&id.to_le_bytes());
    response[8] = operation;
    response[10..12].copy_from_slice(&(status as i16).to_le_bytes());
    response
}

/// Understands a request.
///
/// # Errors
/// The status to give it.
pub(super) fn parse(request: &[u8; REQUEST]) -> Result<Action<'_>, Status> {
    match request[0] {
        READ | WRITE => {
            let transfer = transfer(request[0], u64_at(request, 16))?;
            let segments = usize::from(request[1]);
            check_count(segments, DIRECT_SEGMENTS)?;
            let table = &request[24..24 + segments * SEGMENT];
            Ok(Action::Direct(transfer, table))
        }
        INDIRECT => {
            let transfer = transfer(request[1], u64_at(request, 16))?;
            let segments = usize::from(u16::from_le_bytes([request[2], request[3]]));
            check_count(segments, INDIRECT_SEGMENTS)?;
            let table = Table {
                reference: u32_at(request, 28),
                len: segments * SEGMENT,
            };
            Ok(Action::Indirect(transfer, table))
        }
        // Data to write after the flush is Linux's old barrier; not offered.
        FLUSH if request[1] != 0 => Err(Status::Error),
        FLUSH => Ok(Action::Flush),
        DISCARD => {
            let offset = disk::offset(u64_at(request, 16)).ok_or(Status::Error)?;
            let len = disk::offset(u64_at(request, 24)).ok_or(Status::Error)?;
            Ok(Action::Discard(offset, len))
        }
        _ => Err(Status::Unsupported),
    }
}

fn transfer(operation: u8, sector: u64) -> Result<Transfer, Status> {
    let operation = match operation {
        READ => Operation::Read,
        WRITE => Operation::Write,
        _ => return Err(Status::Error),
    };
    let offset = disk::offset(sector).ok_or(Status::Error)?;
    Ok(Transfer { operation, offset })
}

fn check_count(segments: usize, most: usize) -> Result<(), Status> {
    match segments {
        0 => Err(Status::Error),
        n if n > most => Err(Status::Error),
        _ => Ok(()),
    }
}

/// The segments of a table.
pub(super) fn segments(table: &[u8]) -> impl Iterator<Item = Result<Segment, Status>> + '_ {
    table.chunks_exact(SEGMENT).map(|entry| {
        let (first, last) = (entry[4], entry[5]);
        if first > last || last >= SECTORS_PER_PAGE {
            return Err(Status::Error);
        }
        Ok(Segment {
            reference: u32_at(entry, 0),
            offset: usize::from(first) * SECTOR,
            len: usize::from(last - first + 1) * SECTOR,
        })
    })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_give_a_bounded_action_or_a_status(
            bytes in prop::collection::vec(any::<u8>(), REQUEST),
            operation in prop_oneof![0..8u8, any::<u8>()],
            count in prop_oneof![0..16u8, any::<u8>()],
            small in any::<bool>(),
        ) {
            let mut request: [u8; REQUEST] = bytes.try_into().unwrap();
            request[0] = operation;
            request[1] = count;
            if small {
                request[3] = 0;
                request[20..24].fill(0);
                request[28..32].fill(0);
            }
            match parse(&request) {
                Ok(Action::Direct(_, table)) => {
                    prop_assert!(operation <= WRITE);
                    prop_assert_eq!(table.len(), usize::from(count) * SEGMENT);
                    for segment in segments(table).flatten() {
                        prop_assert!(segment.len >= SECTOR);
                        prop_assert!(segment.offset + segment.len <= 4096);
                    }
                }
                Ok(Action::Indirect(_, table)) => {
                    prop_assert!(table.len > 0 && table.len <= 4096);
                    prop_assert!(super::operation(&request) <= WRITE);
                }
                Ok(Action::Flush) => prop_assert_eq!(count, 0),
                Ok(Action::Discard(..)) => prop_assert_eq!(operation, DISCARD),
                Err(Status::Unsupported) => prop_assert!(![0, 1, 3, 5, 6].contains(&operation)),
                Err(status) => prop_assert_eq!(status, Status::Error),
            }
        }
    }

    #[test]
    fn segments_are_within_their_page_and_in_order() {
        let entry = |first, last| [7, 0, 0, 0, first, last, 0, 0];
        let one = |first, last| segments(&entry(first, last)).next().unwrap();
        let whole = Segment {
            reference: 7,
            offset: 0,
            len: 4096,
        };
        assert_eq!(one(0, 7), Ok(whole));
        let last = Segment {
            reference: 7,
            offset: 3584,
            len: 512,
        };
        assert_eq!(one(7, 7), Ok(last));
        for (first, last) in [(7, 0), (1, 0), (0, 8), (8, 8), (0, 255)] {
            assert_eq!(one(first, last), Err(Status::Error));
        }
    }
}
