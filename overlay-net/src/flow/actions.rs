//! What an entry does with a frame.

use thiserror::Error;

use super::fields::{Field, Needs};
use super::matches::Match;
use crate::frame::PortId;
use crate::frame::key::ethertype;

/// Tables: 0 to this.
pub const LAST_TABLE: u8 = 253;

/// Bytes of a frame that go to a controller if nothing else is said: all.
pub const WHOLE_FRAME: u16 = 0xffff;

/// One action, as entries have them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Out of a port; not out of the one that it came in at.
    Output(PortId),
    /// Out of the port that it came in at.
    InPort,
    /// As the learning bridge would.
    Normal,
    /// Out of all ports of its network but the one that it came in at, as far
    /// as the bridge lets broadcasts go there.
    Flood,
    /// Out of all ports of its network but the one that it came in at.
    All,
    /// To the controllers, this many bytes at most.
    Controller {
        /// Bytes; [`WHOLE_FRAME`]: all.
        max_len: u16,
    },
    /// A copy, as it is now, out of a port that only watches.
    Mirror(PortId),
    /// Sets the bits of a field that are in the mask.
    Set {
        /// Which.
        field: Field,
        /// To what.
        value: u128,
        /// Which bits.
        mask: u128,
    },
    /// One less to live; a frame that has no more is dropped.
    DecTtl,
    /// A tag, equal to the outer one or else 0, in front.
    PushVlan(u16),
    /// The outer tag goes.
    PopVlan,
    /// Takes it through a meter, which may drop it.
    Meter(u32),
    /// Looks up its connection.
    Ct {
        /// Remembers it, if it is new.
        commit: bool,
        /// Connections of different zones are different.
        zone: u16,
        /// Goes on in this table, in which `ct_state` can be matched.
        table: Option<u8>,
    },
    /// Does what an entry of this table says, then goes on here.
    Resubmit(u8),
    /// Forgets what is to be done in the end.
    ClearActions,
    /// To be done in the end, when no table follows.
    WriteActions(Vec<Action>),
    /// Sets bits that later tables can match.
    WriteMetadata {
        /// To what.
        value: u64,
        /// Which bits.
        mask: u64,
    },
    /// Goes on in a later table.
    Goto(u8),
}

/// Actions that no entry can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ActionError {
    /// A field that stays as it is.
    #[error("{} cannot be set", .0.name())]
    NotSettable(Field),
    /// A value or mask that the field has no room for.
    #[error("{value:#x} is more than the {} bits of {}", field.bits(), field.name())]
    TooLarge {
        /// Which.
        field: Field,
        /// The value, or the mask.
        value: u128,
    },
    /// A field that not all frames have which the entry matches.
    #[error("{} can only be set if the entry matches {}", field.name(), needs.text())]
    Needs {
        /// Which.
        field: Field,
        /// What must be matched.
        needs: Needs,
    },
    /// Instructions are followed in one order.
    #[error(
        "wrong order: first meter, then what is done at once, clear_actions, write_actions, \
         write_metadata, and goto_table at the end"
    )]
    Order,
    /// Back, or to where it is.
    #[error("goto_table:{0} must lead to a later table, {LAST_TABLE} at most")]
    Goto(u8),
    /// There is no such table.
    #[error("there is no table {0}, but 0 to {LAST_TABLE}")]
    Table(u8),
    /// A tag of another kind.
    #[error("a tag's type is 0x8100 or 0x88a8, not {0:#06x}")]
    Tag(u16),
    /// What cannot be done in the end.
    #[error("write_actions can only contain output, set_field, tags, TTL and controller")]
    Written,
    /// Something after a frame has gone on elsewhere.
    #[error("ct(table=N) goes on in that table: nothing can follow it")]
    CtLast,
    /// Too many actions.
    #[error("more than {MOST} actions")]
    Many,
}

/// Actions of an entry at most.
pub const MOST: usize = 256;

impl Action {
    /// Its place in the order of instructions.
    pub(crate) fn rank(&self) -> u8 {
        match self {
            Self::Meter(_) => 0,
            Self::ClearActions => 2,
            Self::WriteActions(_) => 3,
            Self::WriteMetadata { .. } => 4,
            Self::Goto(_) => 5,
            _ => 1,
        }
    }

    fn is_writable(&self) -> bool {
        match self {
            Self::Ct { .. } | Self::Resubmit(_) => false,
            other => other.rank() == 1,
        }
    }
}

/// Whether entries of table `table` that match `matches` may have `actions`.
///
/// # Errors
///
/// See [`ActionError`].
pub fn check(actions: &[Action], matches: &Match, table: u8) -> Result<(), ActionError> {
    if actions.len() > MOST {
        return Err(ActionError::Many);
    }
    if !actions.is_sorted_by_key(Action::rank) {
        return Err(ActionError::Order);
    }
    let goes_on = |action: &Action| matches!(action, Action::Ct { table: Some(_), .. });
    if actions.iter().rev().skip(1).any(goes_on) {
        return Err(ActionError::CtLast);
    }
    let mut each = actions.iter();
    each.try_for_each(|action| check_one(action, matches, table))
}

fn check_one(action: &Action, matches: &Match, table: u8) -> Result<(), ActionError> {
    match *action {
        Action::Set { field, value, mask } => {
            if !field.is_settable() {
                return Err(ActionError::NotSettable(field));
            }
            if let Some(value) = [value, mask].into_iter().find(|bits| *bits > field.all()) {
                return Err(ActionError::TooLarge { field, value });
            }
            let needs = field.needs();
            // A frame without a tag gets one.
            if needs != Needs::Vlan && !matches.has(needs) {
                return Err(ActionError::Needs { field, needs });
            }
            Ok(())
        }
        Action::DecTtl if !matches.has(Needs::Ip) => Err(ActionError::Needs {
            field: Field::Ttl,
            needs: Needs::Ip,
        }),
        Action::PushVlan(tpid) if !matches!(tpid, ethertype::VLAN | ethertype::SERVICE_VLAN) => {
            Err(ActionError::Tag(tpid))
        }
        Action::Resubmit(to)
        | Action::Ct {
            table: Some(to), ..
        } if to > LAST_TABLE => Err(ActionError::Table(to)),
        Action::Goto(to) if to <= table || to > LAST_TABLE => Err(ActionError::Goto(to)),
        Action::WriteActions(ref written) => {
            if !written.iter().all(Action::is_writable) {
                return Err(ActionError::Written);
            }
            check(written, matches, table)
        }
        _ => Ok(()),
    }
}
