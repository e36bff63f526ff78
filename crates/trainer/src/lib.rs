//! (crate trainer)
