//! (crate lokr)
