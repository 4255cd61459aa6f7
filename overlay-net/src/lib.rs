//! The overlay: one L2 network across nodes and clouds.
//!
//! Each node has a switch. Guests are its ports; tunnels join it to the
//! switches of other nodes. A frame walks straight through:
//!
//! ```text
//! port --receive--> Frame --parse--> Key --> flow table --> bridge --> port
//!                                                              \--> tunnel --> uplink
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`frame`] | a frame on its way: its head, the rest where it lies, its offloads; what its headers say |
//! | [`port`] | where frames come in and go out |
//! | [`bridge`] | where a frame goes: addresses, VLANs, groups, limits |
//! | [`directory`] | which node has which address, told by all to all |
//! | [`vip`] | one address for many servers |
//! | [`capture`] | frames in a file, and at other ports |
//! | [`tunnel`] | between nodes: encrypted, super-frames, several paths; VXLAN and Geneve |
//! | [`flow`] | the programmable flow table, OpenFlow, stateful security groups |
//! | [`switch`] | networks and ports, the way of each frame, and the thread that moves them |
//! | [`controllers`] | who networks' OpenFlow controllers are, and how they are reached |
//! | [`control`], [`api`], [`key`] | what the switch is asked, checked and kept; HTTP; who it is |
//! | [`jail`] | what is left to the process once it is set up |
//! | [`drops`] | why frames are dropped, counted |
//!
//! Large frames (segmentation offload) stay whole from guest to guest, and
//! every byte of a frame is copied at most once on a node: the head, which
//! decisions are made on, is taken out of the guest's memory first, and it is
//! the copy that is sent on; what the guest changes afterwards, nobody reads.

pub mod api;
pub mod bridge;
pub mod capture;
pub mod control;
pub mod controllers;
pub mod directory;
pub mod drops;
pub mod flow;
pub mod frame;
pub mod jail;
pub mod key;
pub mod port;
pub mod switch;
pub mod tunnel;
pub mod vip;
