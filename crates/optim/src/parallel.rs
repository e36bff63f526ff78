//! How a parameter's elements are dealt to threads: in pieces of a fixed size, so that no result depends on how many
//! threads there are. Every rule here is element-wise or block-wise, and a piece is a whole number of blocks.

/// Elements in a piece: large enough that handing it out costs nothing beside working on it (tens of microseconds), small
/// enough that a parameter of a million elements feeds sixty threads.
pub(crate) const PIECE: usize = 64 * crate::lion8bit::BLOCK;
