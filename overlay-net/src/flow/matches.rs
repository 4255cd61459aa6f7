//! What an entry matches.

use thiserror::Error;

use super::fields::{self, Field, Flat, Needs, TAGGED};
use crate::frame::key::{ethertype, protocol};

/// Which frames an entry is for: some bits of their keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Match {
    value: Flat,
    mask: Flat,
}

/// A match that no entry can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MatchError {
    /// A field of frames that it is not limited to.
    #[error("{} needs {} before it", field.name(), needs.text())]
    Needs {
        /// Which.
        field: Field,
        /// What must be matched, too.
        needs: Needs,
    },
    /// A field is given twice, with values that differ.
    #[error("{} is given twice, and differs", .0.name())]
    Twice(Field),
    /// More bits than the field has.
    #[error("{value:#x} is more than the {} bits of {}", field.bits(), field.name())]
    TooLarge {
        /// Which.
        field: Field,
        /// The value, or the mask.
        value: u128,
    },
    /// A mask for what is matched whole or not at all.
    #[error("{} is matched whole or not at all: it takes no mask", .0.name())]
    Masked(Field),
}

impl Needs {
    /// As in errors.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Vlan => "dl_vlan",
            Self::Ip => "ip or ipv6",
            Self::Ethertype(ethertype::IPV4) => "ip",
            Self::Ethertype(_) => "ipv6",
            Self::Arp => "arp or rarp",
            Self::Protocol(protocol::TCP) => "tcp or tcp6",
            Self::Protocol(protocol::UDP) => "udp or udp6",
            Self::Protocol(_) => "sctp or sctp6",
            Self::Over(ethertype::IPV4, _) => "icmp",
            Self::Over(..) => "icmp6",
            Self::Neighbour => "icmp6,icmp_type=135 or 136",
        }
    }
}

impl Match {
    /// Matches every frame.
    #[must_use]
    pub fn any() -> Self {
        Self::default()
    }

    /// Only frames in whose `field` the bits of `mask` are those of `value`.
    /// What a field needs must be matched before.
    ///
    /// # Errors
    ///
    /// See [`MatchError`]; nothing is changed then.
    pub fn set(&mut self, field: Field, value: u128, mask: u128) -> Result<(), MatchError> {
        let large = |value| MatchError::TooLarge { field, value };
        if value > field.all() {
            return Err(large(value));
        }
        if mask > field.all() {
            return Err(large(mask));
        }
        if mask == 0 {
            return Ok(());
        }
        if mask != field.all() && !field.is_maskable() {
            return Err(MatchError::Masked(field));
        }
        let needs = field.needs();
        if !self.has(needs) {
            return Err(MatchError::Needs { field, needs });
        }
        let before = self.mask.get(field);
        if (self.value.get(field) ^ value) & before & mask != 0 {
            return Err(MatchError::Twice(field));
        }
        self.value.set(field, value, mask);
        // Several masks may make a whole.
        let mask = if (before | mask) & field.all() == field.all() {
            fields::exact(field)
        } else {
            mask
        };
        self.mask.set(field, u128::MAX, mask);
        Ok(())
    }

    /// As [`Self::set`], all bits.
    ///
    /// # Errors
    ///
    /// See [`MatchError`].
    pub fn exactly(&mut self, field: Field, value: u128) -> Result<(), MatchError> {
        self.set(field, value, field.all())
    }

    /// The value and mask of a field; none if it is not matched, or if what it
    /// needs is not, and its place is another's.
    #[must_use]
    pub fn get(&self, field: Field) -> Option<(u128, u128)> {
        let mask = self.mask.get(field) & field.all();
        (mask != 0 && self.has(field.needs())).then(|| (self.value.get(field), mask))
    }

    /// A field's value if all of it is matched.
    #[must_use]
    pub fn whole(&self, field: Field) -> Option<u128> {
        let (value, mask) = self.get(field)?;
        (mask == field.all()).then_some(value)
    }

    /// Whether frames that it matches have what a field needs.
    #[must_use]
    pub fn has(&self, needs: Needs) -> bool {
        let kind = || {
            let mask = self.mask.get(Field::EthType);
            (mask != 0).then(|| self.value.get(Field::EthType) as u16)
        };
        let proto = || {
            let mask = self.mask.get(Field::IpProto);
            (mask != 0).then(|| self.value.get(Field::IpProto) as u8)
        };
        let ip = || matches!(kind(), Some(ethertype::IPV4 | ethertype::IPV6));
        match needs {
            Needs::Nothing => true,
            Needs::Vlan => {
                let tagged = u128::from(TAGGED);
                self.mask.get(Field::VlanTci) & self.value.get(Field::VlanTci) & tagged != 0
            }
            Needs::Ip => ip(),
            Needs::Ethertype(wanted) => kind() == Some(wanted),
            Needs::Arp => matches!(kind(), Some(ethertype::ARP | ethertype::RARP)),
            Needs::Protocol(wanted) => ip() && proto() == Some(wanted),
            Needs::Over(wanted, over) => kind() == Some(wanted) && proto() == Some(over),
            Needs::Neighbour => {
                self.has(Needs::Over(ethertype::IPV6, protocol::ICMPV6))
                    && matches!(self.whole(Field::Icmp6Type), Some(135 | 136))
            }
        }
    }

    /// The bits that it looks at.
    #[must_use]
    pub fn mask(&self) -> &Flat {
        &self.mask
    }

    /// What they must be.
    #[must_use]
    pub fn value(&self) -> &Flat {
        &self.value
    }

    /// Whether a frame is matched.
    #[must_use]
    pub fn matches(&self, flat: &Flat) -> bool {
        *flat & self.mask == self.value
    }

    /// Whether all frames that `other` matches are matched.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        other.mask & self.mask == self.mask && other.value & self.mask == self.value
    }

    /// Whether there may be frames that both match.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let both = self.mask & other.mask;
        self.value & both == other.value & both
    }
}
