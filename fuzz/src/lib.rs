//! What the fuzz targets have in common. `docs/fuzzing.md` has the list.

pub mod bench;
pub mod file;
pub mod guest;
pub mod machine;
pub mod packet;
pub mod xen;
