//! What the tests share: the program, folders to run it in, and files to compare.

pub mod files;
pub mod program;
pub mod world;

pub use files::*;
pub use program::*;
pub use world::*;
