//! What lies in the slots of the rings (`xen/include/public/io/netif.h`).

/// Bytes of a transmit request: the size of a transmit slot.
pub(super) const TX_REQUEST: usize = 12;
/// Bytes of a transmit response.
pub(super) const TX_RESPONSE: usize = 4;
/// Bytes of a receive request or response.
pub(super) const RX_SLOT: usize = 8;

/// Slots that a packet may take at most (`XEN_NETIF_NR_SLOTS_MIN`), extras not
/// counted: what every backend must accept is all that this one does.
pub(super) const MAX_SLOTS: usize = 18;

/// `NETTXF_csum_blank`: the TCP or UDP checksum has to be filled in.
pub(super) const TX_CSUM_BLANK: u16 = 1 << 0;
/// `NETTXF_more_data`: the packet goes on in the next slot.
pub(super) const TX_MORE_DATA: u16 = 1 << 2;
/// `NETTXF_extra_info`: the next slot is an extra.
pub(super) const TX_EXTRA_INFO: u16 = 1 << 3;

/// `NETRXF_data_validated`: the checksum is known to be right.
pub(super) const RX_DATA_VALIDATED: u16 = 1 << 0;
/// `NETRXF_csum_blank`: only the pseudo header is summed up yet.
pub(super) const RX_CSUM_BLANK: u16 = 1 << 1;
/// `NETRXF_more_data`: the packet goes on in the next slot.
pub(super) const RX_MORE_DATA: u16 = 1 << 2;
/// `NETRXF_extra_info`: the next slot is an extra.
pub(super) const RX_EXTRA_INFO: u16 = 1 << 3;

/// `NETIF_RSP_*`: what became of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
pub(super) enum Status {
    Dropped = -2,
    Error = -1,
    Okay = 0,
    /// An extra's slot has no answer of its own.
    Null = 1,
}

/// `netif_tx_request`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TxRequest {
    /// The granted page.
    pub(super) reference: u32,
    /// Where the data begins in it.
    pub(super) offset: u16,
    pub(super) flags: u16,
    pub(super) id: u16,
    /// Bytes in this slot; in a packet's first slot, bytes of the packet.
    pub(super) size: u16,
}

impl From<[u8; TX_REQUEST]> for TxRequest {
    fn from(slot: [u8; TX_REQUEST]) -> Self {
        let [r0, r1, r2, r3, o0, o1, f0, f1, i0, i1, s0, s1] = slot;
        Self {
            reference: u32::from_le_bytes([r0, r1, r2, r3]),
            offset: u16::from_le_bytes([o0, o1]),
            flags: u16::from_le_bytes([f0, f1]),
            id: u16::from_le_bytes([i0, i1]),
            size: u16::from_le_bytes([s0, s1]),
        }
    }
}

/// `netif_tx_response`.
pub(super) fn tx_response(id: u16, status: Status) -> [u8; TX_RESPONSE] {
    let ([a, b], [c, d]) = (id.to_le_bytes(), (status as i16).to_le_bytes());
    [a, b, c, d]
}

/// `netif_rx_request`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RxRequest {
    pub(super) id: u16,
    /// The granted page.
    pub(super) reference: u32,
}

impl From<[u8; RX_SLOT]> for RxRequest {
    fn from([i0, i1, _, _, r0, r1, r2, r3]: [u8; RX_SLOT]) -> Self {
        Self {
            id: u16::from_le_bytes([i0, i1]),
            reference: u32::from_le_bytes([r0, r1, r2, r3]),
        }
    }
}

/// `netif_rx_response` for `len` bytes (a page at most) from the page's start.
pub(super) fn rx_response(id: u16, flags: u16, len: usize) -> [u8; RX_SLOT] {
    let ([a, b], [e, f]) = (id.to_le_bytes(), flags.to_le_bytes());
    let [g, h] = (len as i16).to_le_bytes();
    [a, b, 0, 0, e, f, g, h]
}

/// `XEN_NETIF_GSO_TYPE_*`: the protocol of a packet to be segmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GsoKind {
    Tcp4 = 1,
    Tcp6 = 2,
}

/// How a packet is to be segmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gso {
    pub(super) kind: GsoKind,
    /// Bytes of payload in a segment; never 0.
    pub(super) size: u16,
}

/// `XEN_NETIF_EXTRA_TYPE_GSO`.
const EXTRA_GSO: u8 = 1;
/// `XEN_NETIF_EXTRA_TYPE_MAX`: types are below.
const EXTRA_MAX: u8 = 5;
/// `XEN_NETIF_EXTRA_FLAG_MORE`.
const EXTRA_MORE: u8 = 1;

/// `netif_extra_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extra {
    /// What it says about segmentation; others are of no concern here.
    pub(super) gso: Option<Gso>,
    /// Whether the next slot is an extra, too.
    pub(super) more: bool,
}

impl Extra {
    /// The extra in a slot of either ring; `None` if it is malformed.
    pub(super) fn parse(slot: &[u8]) -> Option<Self> {
        let &[kind, flags, s0, s1, protocol, ..] = slot else {
            return None;
        };
        let more = flags & EXTRA_MORE != 0;
        if kind != EXTRA_GSO {
            let known = (1..EXTRA_MAX).contains(&kind);
            return known.then_some(Self { gso: None, more });
        }
        let kind = match protocol {
            1 => GsoKind::Tcp4,
            2 => GsoKind::Tcp6,
            _ => return None,
        };
        let size = u16::from_le_bytes([s0, s1]);
        let gso = Some(Gso { kind, size });
        (size > 0).then_some(Self { gso, more })
    }
}

/// The slot for an extra that says how a packet is to be segmented.
pub(super) fn gso_extra(gso: Gso) -> [u8; RX_SLOT] {
    let [s0, s1] = gso.size.to_le_bytes();
    [EXTRA_GSO, 0, s0, s1, gso.kind as u8, 0, 0, 0]
}
