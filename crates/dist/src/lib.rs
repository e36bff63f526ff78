//! (crate dist)
