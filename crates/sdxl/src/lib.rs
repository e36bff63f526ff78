//! The networks of SDXL: UNet, both CLIP text encoders, VAE, tokenizer, and the checkpoint layouts they come in.
//!
//! [`checkpoint::Checkpoint`] opens a single file or a diffusers folder through a memory map; [`Sdxl`] builds the networks
//! from it, their shapes read off the tensors. Linear, convolution and norm layers ([`layers`]) have a slot for an
//! adapter; each network's [`layers::ModuleTree`] lists its modules under the paths and class names of sd-scripts.
//!
//! Shapes use the letters of the crate `ops`. Knows `ops` and `storage`; must not know `lokr`, `optim`, `diffusion`,
//! `dataset`, `dist`, `trainer`.

pub mod build;
pub mod checkpoint;
pub mod clip;
pub mod conditioning;
pub mod config;
pub mod error;
pub mod layers;
pub mod model;
mod recompute;
pub mod tokenizer;
pub mod unet;
pub mod vae;

pub use error::{Error, Result};
pub use model::{Sdxl, TextCondition};
pub use recompute::GradientCheckpointing;
