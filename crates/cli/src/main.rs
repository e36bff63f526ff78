//! The `lokr` binary.
fn main() {}
