//! The adapter: LoKr (Kronecker-product) factors beside frozen layers, as LyCORIS defines them.
//!
//! [`LokrNetwork`] is the adapter of a whole model, made from a [`Preset`] under a [`NetworkConfig`] or read from a file;
//! [`LokrModule`] and [`NormModule`] are what sits in one layer; [`functional`] holds the mathematics with its gradients,
//! [`reference`](mod@reference) the same as the formula says; [`inspect()`] looks into a file.
//!
//! Letters: w1 is (a, b), w2 is (c, d) or (c, d, kh, kw), r is the rank; a layer has a*c outputs and b*d inputs.
//!
//! Knows `ops`, `sdxl`, `random`, `storage`; must not know `optim`, `diffusion`, `dataset`, `dist`, `trainer`.

mod config;
mod error;
mod factorization;
mod file;
pub mod functional;
mod group;
mod init;
mod inspect;
mod kernel;
mod load;
mod module;
mod names;
mod network;
mod pattern;
mod plan;
mod preset;
mod preset_toml;
pub mod reference;
mod shape;
mod walk;

#[cfg(test)]
mod tests;

pub use config::NetworkConfig;
pub use error::{Error, Result};
pub use factorization::factorization;
pub use file::{FOLDED, FOLDED_KEY, SaveDtype, SaveOptions};
pub use group::ParameterGroup;
pub use inspect::{FileGroup, FileSummary, inspect};
pub use kernel::Layer;
pub use module::{LokrModule, Module, Multiplier, NormModule};
pub use network::{Entry, GroupSummary, LokrNetwork, MergeScale, Trees};
pub use pattern::Pattern;
pub use plan::{PlannedModule, plan};
pub use preset::{Overrides, Preset, Targets};
pub use shape::{Factor, Form, LayerShape, LokrOptions, LokrShape};
pub use walk::PlannedKind;
