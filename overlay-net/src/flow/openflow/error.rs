//! What is told when a request is refused (OpenFlow 1.3.5, 7.4.4).

use crate::flow::actions::ActionError;
use crate::flow::control::Refused;
use crate::flow::matches::MatchError;

/// An error's type and code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong(pub u16, pub u16);

/// Errors by name.
pub(super) struct Code;

impl Code {
    pub(super) const INCOMPATIBLE: Wrong = Wrong(0, 0);
    pub(super) const VERSION: Wrong = Wrong(1, 0);
    pub(super) const TYPE: Wrong = Wrong(1, 1);
    pub(super) const MULTIPART: Wrong = Wrong(1, 2);
    pub(super) const EXPERIMENTER: Wrong = Wrong(1, 3);
    pub(super) const LENGTH: Wrong = Wrong(1, 6);
    pub(super) const BUFFER: Wrong = Wrong(1, 8);
    pub(super) const IS_SLAVE: Wrong = Wrong(1, 10);
    pub(super) const PORT: Wrong = Wrong(1, 11);
    pub(super) const PACKET: Wrong = Wrong(1, 12);
    pub(super) const ACTION_TYPE: Wrong = Wrong(2, 0);
    pub(super) const ACTION_LENGTH: Wrong = Wrong(2, 1);
    pub(super) const ACTION_EXPERIMENTER: Wrong = Wrong(2, 2);
    pub(super) const ACTION_EXPERIMENT: Wrong = Wrong(2, 3);
    pub(super) const OUT_PORT: Wrong = Wrong(2, 4);
    pub(super) const ARGUMENT: Wrong = Wrong(2, 5);
    pub(super) const TOO_MANY: Wrong = Wrong(2, 7);
    pub(super) const GROUP: Wrong = Wrong(2, 9);
    pub(super) const INCONSISTENT: Wrong = Wrong(2, 10);
    pub(super) const ORDER: Wrong = Wrong(2, 11);
    pub(super) const SET_TYPE: Wrong = Wrong(2, 13);
    pub(super) const SET_LENGTH: Wrong = Wrong(2, 14);
    pub(super) const SET_VALUE: Wrong = Wrong(2, 15);
    pub(super) const INSTRUCTION: Wrong = Wrong(3, 0);
    pub(super) const INSTRUCTION_TABLE: Wrong = Wrong(3, 2);
    pub(super) const INSTRUCTION_LENGTH: Wrong = Wrong(3, 7);
    pub(super) const INSTRUCTION_TWICE: Wrong = Wrong(3, 9);
    pub(super) const MATCH_TYPE: Wrong = Wrong(4, 0);
    pub(super) const MATCH_LENGTH: Wrong = Wrong(4, 1);
    pub(super) const FIELD: Wrong = Wrong(4, 6);
    pub(super) const VALUE: Wrong = Wrong(4, 7);
    pub(super) const MASK: Wrong = Wrong(4, 8);
    pub(super) const PREREQUISITE: Wrong = Wrong(4, 9);
    pub(super) const TWICE: Wrong = Wrong(4, 10);
    pub(super) const WILDCARDS: Wrong = Wrong(4, 5);
    pub(super) const TABLE_FULL: Wrong = Wrong(5, 1);
    pub(super) const TABLE: Wrong = Wrong(5, 2);
    pub(super) const OVERLAP: Wrong = Wrong(5, 3);
    pub(super) const COMMAND: Wrong = Wrong(5, 6);
    pub(super) const NO_GROUPS: Wrong = Wrong(6, 3);
    pub(super) const NO_PORT: Wrong = Wrong(7, 0);
    pub(super) const PORT_CONFIG: Wrong = Wrong(7, 2);
    pub(super) const TABLE_CONFIG: Wrong = Wrong(8, 1);
    pub(super) const QUEUE: Wrong = Wrong(9, 1);
    pub(super) const CONFIG: Wrong = Wrong(10, 0);
    pub(super) const STALE: Wrong = Wrong(11, 0);
    pub(super) const ROLE: Wrong = Wrong(11, 2);
    pub(super) const METER_EXISTS: Wrong = Wrong(12, 1);
    pub(super) const METER: Wrong = Wrong(12, 2);
    pub(super) const NO_METER: Wrong = Wrong(12, 3);
    pub(super) const METER_COMMAND: Wrong = Wrong(12, 4);
    pub(super) const METER_FLAGS: Wrong = Wrong(12, 5);
    pub(super) const RATE: Wrong = Wrong(12, 6);
    pub(super) const BAND: Wrong = Wrong(12, 8);
    pub(super) const NO_METERS: Wrong = Wrong(12, 10);
    pub(super) const TABLE_FEATURES: Wrong = Wrong(13, 5);
    pub(super) const BANDS: Wrong = Wrong(12, 11);
}

impl From<MatchError> for Wrong {
    fn from(error: MatchError) -> Self {
        match error {
            MatchError::Needs { .. } => Code::PREREQUISITE,
            MatchError::Twice(_) => Code::TWICE,
            MatchError::TooLarge { .. } => Code::VALUE,
            MatchError::Masked(_) => Code::MASK,
        }
    }
}

impl From<ActionError> for Wrong {
    fn from(error: ActionError) -> Self {
        match error {
            ActionError::NotSettable(_) => Code::SET_TYPE,
            ActionError::TooLarge { .. } => Code::SET_VALUE,
            ActionError::Needs { .. } => Code::INCONSISTENT,
            ActionError::Order | ActionError::Written | ActionError::CtLast => Code::ORDER,
            ActionError::Goto(_) => Code::INSTRUCTION_TABLE,
            ActionError::Table(_) => Code::ARGUMENT,
            ActionError::Tag(_) => Code::ARGUMENT,
            ActionError::Many => Code::TOO_MANY,
        }
    }
}

impl From<Refused> for Wrong {
    fn from(error: Refused) -> Self {
        match error {
            Refused::Table(_) => Code::TABLE,
            Refused::Action(error) => error.into(),
            Refused::NoMeter(_) => Code::NO_METER,
            Refused::Meter(_) => Code::METER_EXISTS,
            Refused::MeterSpec => Code::METER,
            Refused::Meters => Code::NO_METERS,
            Refused::Overlap => Code::OVERLAP,
            Refused::Full => Code::TABLE_FULL,
        }
    }
}
