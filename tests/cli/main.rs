//! The program as its user sees it: commands are run as processes, and exit status, messages and files are looked at.
//!
//! Every test works in a folder of its own under Cargo's folder for test files, with a few drawn pictures, a short recipe and the
//! tiny model of `tests/golden`; only one uses the model of the quickstart. Messages are compared as a whole, with what varies
//! masked; after a change of words, `cargo insta review` (crate `cargo-insta`) shows the differences and writes them into the sources.

#![allow(clippy::disallowed_methods)]

mod support;

mod bad_base;
mod bad_pictures;
mod bad_recipe;
mod clock;
mod damage;
mod dataset;
mod disk;
mod distributed;
mod distributed_faults;
mod distributed_starts;
mod dry_gpu;
mod dry_gpus;
mod export;
mod health;
mod house;
mod init_base;
mod interrupted;
mod kills;
mod latents;
mod mapped_base;
mod plan;
mod power_loss;
mod precision;
mod recipe_change;
mod resume;
mod sample;
mod train;
