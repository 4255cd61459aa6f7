//! VLANs: what a port's frames belong to, and how they look elsewhere.

use serde::{Deserialize, Serialize};

use crate::drops::Reason;
use crate::frame::key::ethertype;
use crate::frame::{Head, Key, Offload, Tag};

/// A VLAN of a network, or none. 802.1Q's and 802.1ad's (service) VLANs of the
/// same number are not the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vlan(u16);

impl Vlan {
    /// No VLAN: frames without a tag.
    pub const NONE: Self = Self(0);
    /// The greatest identifier; the next one is reserved.
    pub const MAX: u16 = 4094;
    const SERVICE: u16 = 0x8000;

    /// An 802.1Q VLAN; 0 is none. `None` if there is no such VLAN.
    #[must_use]
    pub fn new(vid: u16) -> Option<Self> {
        (vid <= Self::MAX).then_some(Self(vid))
    }

    /// An 802.1ad VLAN, whose frames may be tagged by those who sent them.
    #[must_use]
    pub fn service(vid: u16) -> Option<Self> {
        (1..=Self::MAX)
            .contains(&vid)
            .then_some(Self(vid | Self::SERVICE))
    }

    /// As a number; the highest bit says that it is a service VLAN.
    #[must_use]
    pub fn number(self) -> u16 {
        self.0
    }

    /// What [`Vlan::number`] gave.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        match number & Self::SERVICE {
            0 => Self::new(number),
            _ => Self::service(number & !Self::SERVICE),
        }
    }

    /// Its tag on a frame with this priority (3 bits and the drop bit, as they
    /// are in a tag); `None`: frames are not tagged.
    #[must_use]
    fn tag(self, priority: u16) -> Option<Tag> {
        let tpid = match self.0 & Self::SERVICE {
            0 => ethertype::VLAN,
            _ => ethertype::SERVICE_VLAN,
        };
        let tci = (priority & 0xf000) | (self.0 & !Self::SERVICE);
        (self != Self::NONE).then_some(Tag { tpid, tci })
    }
}

/// Which VLANs a port is in, and how its frames show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "mode", deny_unknown_fields)]
pub enum Mode {
    /// One VLAN, or none (0); frames have no tag.
    Access {
        /// The VLAN.
        #[serde(default)]
        vlan: u16,
    },
    /// Several VLANs, by 802.1Q tags.
    Trunk {
        /// Which; none listed: all.
        #[serde(default)]
        vlans: Vec<u16>,
        /// The one of frames without a tag (0: the network's own); without
        /// it, they are dropped.
        #[serde(default)]
        native: Option<u16>,
        /// Frames may have a second tag, which is left alone.
        #[serde(default)]
        double: bool,
    },
    /// All frames, tagged or not, are in this service VLAN (802.1ad's customer
    /// port; "dot1q-tunnel").
    Customer {
        /// The VLAN.
        service: u16,
    },
    /// Several service VLANs, by 802.1ad tags.
    Provider {
        /// Which; none listed: all.
        #[serde(default)]
        services: Vec<u16>,
    },
}

impl Default for Mode {
    fn default() -> Self {
        Self::Access { vlan: 0 }
    }
}

fn listed(list: &[u16], vid: u16) -> bool {
    list.is_empty() || list.contains(&vid)
}

/// A frame's VLAN, and the tags it has now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tagged {
    pub(super) vlan: Vlan,
    /// The outer tag, where it is the VLAN's (or carries a priority only).
    outer: Option<Tag>,
    /// It has tags behind (or, of a customer, instead of) that one.
    inner: bool,
}

impl Mode {
    /// Which VLANs do not exist.
    pub(super) fn check(&self) -> Result<(), u16> {
        let mut vids: Box<dyn Iterator<Item = u16>> = match self {
            Self::Access { vlan } => Box::new([*vlan].into_iter()),
            Self::Trunk { vlans, native, .. } => Box::new(vlans.iter().copied().chain(*native)),
            Self::Customer { service } => Box::new([*service].into_iter()),
            Self::Provider { services } => Box::new(services.iter().copied()),
        };
        let zero = matches!(self, Self::Customer { .. } | Self::Provider { .. });
        match vids.find(|vid| *vid > Vlan::MAX || (zero && *vid == 0)) {
            Some(vid) => Err(vid),
            None => Ok(()),
        }
    }

    /// What a frame from the port belongs to.
    pub(super) fn ingress(&self, key: &Key) -> Result<Tagged, Reason> {
        let [outer, inner] = key.tags;
        let vlan = |vid| Vlan::new(vid).ok_or(Reason::VlanRefused);
        match self {
            // A tag with VLAN 0 only carries a priority.
            Self::Access { vlan: vid } => match outer {
                _ if inner.is_some() => Err(Reason::DoubleTag),
                Some(tag) if tag.vid() != 0 || tag.tpid != ethertype::VLAN => {
                    Err(Reason::VlanRefused)
                }
                _ => Tagged::new(vlan(*vid)?, outer, false, key),
            },
            Self::Trunk {
                vlans,
                native,
                double,
            } => {
                let own = outer.filter(|tag| tag.vid() != 0);
                let vid = match own {
                    Some(tag) if tag.tpid == ethertype::VLAN && listed(vlans, tag.vid()) => {
                        tag.vid()
                    }
                    Some(_) => return Err(Reason::VlanRefused),
                    None => (*native).ok_or(Reason::VlanRefused)?,
                };
                // Else whoever gets it without its outer tag would see the
                // inner one as the VLAN's.
                if inner.is_some() && (!double || own.is_none() || Some(vid) == *native) {
                    return Err(Reason::DoubleTag);
                }
                Tagged::new(vlan(vid)?, outer, inner.is_some(), key)
            }
            Self::Customer { service } => {
                if inner.is_some() || outer.is_some_and(|tag| tag.tpid != ethertype::VLAN) {
                    return Err(Reason::DoubleTag);
                }
                let vlan = Vlan::service(*service).ok_or(Reason::VlanRefused)?;
                Tagged::new(vlan, None, outer.is_some(), key)
            }
            Self::Provider { services } => match outer {
                Some(tag) if tag.tpid == ethertype::SERVICE_VLAN && listed(services, tag.vid()) => {
                    let vlan = Vlan::service(tag.vid()).ok_or(Reason::VlanRefused)?;
                    Tagged::new(vlan, outer, inner.is_some(), key)
                }
                _ => Err(Reason::VlanRefused),
            },
        }
    }

    /// How the frame must be changed for the port; `None`: it is not for it.
    pub(super) fn egress(&self, frame: &Tagged) -> Option<Edit> {
        let vid = frame.vlan.0 & !Vlan::SERVICE;
        let service = frame.vlan.0 & Vlan::SERVICE != 0;
        match self {
            Self::Access { vlan } => {
                (!service && *vlan == vid && !frame.inner).then(|| frame.edit(None))
            }
            Self::Trunk {
                vlans,
                native,
                double,
            } => {
                let bare = *native == Some(vid);
                let fits = !service && (bare || (vid != 0 && listed(vlans, vid)));
                if !fits || (frame.inner && (bare || !double)) {
                    return None;
                }
                let tag = frame.vlan.tag(frame.priority()).filter(|_| !bare);
                Some(frame.edit(tag))
            }
            Self::Customer { service: own } => (service && *own == vid).then(|| frame.edit(None)),
            Self::Provider { services } => (service && listed(services, vid))
                .then(|| frame.edit(frame.vlan.tag(frame.priority()))),
        }
    }
}

impl Tagged {
    fn new(vlan: Vlan, outer: Option<Tag>, inner: bool, key: &Key) -> Result<Self, Reason> {
        // A third tag, which was not looked at.
        let more = key.tags[1].is_some()
            && matches!(key.ethertype, ethertype::VLAN | ethertype::SERVICE_VLAN);
        if more {
            return Err(Reason::DoubleTag);
        }
        Ok(Self { vlan, outer, inner })
    }

    /// Of a frame from another node, where the VLAN's tag is always there.
    pub(super) fn from_node(key: &Key) -> Result<Self, Reason> {
        let [outer, inner] = key.tags;
        let vlan = match outer {
            None => Some(Vlan::NONE),
            Some(tag) if tag.tpid == ethertype::SERVICE_VLAN => Vlan::service(tag.vid()),
            Some(tag) => Vlan::new(tag.vid()),
        };
        let vlan = vlan.ok_or(Reason::VlanRefused)?;
        if vlan == Vlan::NONE && inner.is_some() {
            return Err(Reason::DoubleTag);
        }
        Self::new(vlan, outer, inner.is_some(), key)
    }

    /// How it is changed for another node.
    pub(super) fn to_node(self) -> Edit {
        self.edit(self.vlan.tag(self.priority()))
    }

    /// It has a tag that is not the VLAN's.
    pub(super) fn is_double(self) -> bool {
        self.inner
    }

    fn priority(&self) -> u16 {
        self.outer.map_or(0, |tag| tag.tci & 0xf000)
    }

    fn edit(&self, want: Option<Tag>) -> Edit {
        match (self.outer, want) {
            (None, None) => Edit::None,
            (None, Some(tag)) => Edit::Push(tag),
            (Some(_), None) => Edit::Pop,
            (Some(is), Some(tag)) if is == tag => Edit::None,
            (Some(_), Some(tag)) => Edit::Set(tag),
        }
    }

    /// A frame without tags of the same VLAN and priority, as an answer is.
    pub(super) fn bare(self) -> Self {
        Self {
            outer: None,
            inner: false,
            ..self
        }
    }
}

/// What to do with a frame's outer tag before it is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Edit {
    /// Nothing.
    #[default]
    None,
    /// Take it off.
    Pop,
    /// Put one on.
    Push(Tag),
    /// Replace it.
    Set(Tag),
}

impl Edit {
    /// Changes the head and moves the offload's places along. False, and the
    /// frame is of no use any more, if there is no room for a tag.
    #[must_use]
    pub fn apply(self, head: &mut Head, offload: &mut Offload) -> bool {
        let bytes = |tag: Tag| {
            let ([a, b], [c, d]) = (tag.tpid.to_be_bytes(), tag.tci.to_be_bytes());
            [a, b, c, d]
        };
        let (done, by) = match self {
            Self::None => (true, 0),
            Self::Pop => (head.remove(12, 4), -4),
            Self::Push(tag) => (head.insert(12, bytes(tag)), 4),
            Self::Set(tag) => match head.bytes_mut().get_mut(12..16) {
                Some(place) => {
                    place.copy_from_slice(&bytes(tag));
                    (true, 0)
                }
                None => (false, 0),
            },
        };
        match offload.moved(by) {
            Some(moved) if done => {
                *offload = moved;
                true
            }
            _ => false,
        }
    }
}
