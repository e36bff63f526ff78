//! A base model of random weights, for measuring and for trying a recipe before the real one is there: every tensor of SDXL, of
//! its own widths or smaller ones.
//!
//! # Determinism
//! Each value is a function of seed, tensor name and place alone.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::f16;
use random::{Purpose, Stream};
use rayon::prelude::*;
use sdxl::checkpoint::{Checkpoint, Layout, Part, Shapes, export};
use storage::safetensors::Dtype;

use crate::error::{Error, Result};

/// Values that share a stream of random numbers.
const CHUNK: usize = 1 << 18;

/// The names of [`shapes`].
pub const NAMES: [&str; 3] = ["sdxl", "mid", "tiny"];

/// Shapes by name: SDXL's, SDXL's topology in smaller widths, or small enough to train in seconds.
///
/// # Errors
/// If there is no such name.
pub fn shapes(name: &str) -> Result<Shapes> {
    match name {
        "sdxl" => Ok(Shapes::sdxl()),
        "mid" => Ok(Shapes::mid()),
        "tiny" => Ok(Shapes::tiny()),
        _ => Err(Error::refused(format!("there are no shapes named `{name}`"), format!("choose one of {}", NAMES.join(", ")))),
    }
}

/// Writes a model of these shapes in f16, tensor by tensor, as a single file or a diffusers folder; gives the number of its
/// parameters.
///
/// # Errors
/// If it cannot be written.
pub fn init_base(shapes: &Shapes, seed: u64, target: &Path, diffusers: bool) -> Result<usize> {
    let described = Checkpoint::described(target, shapes, Dtype::F16)?;
    let of_part =
        |part: Part| described.names(part).filter_map(|n| described.shape(part, n)).map(|s| s.iter().product::<usize>()).sum::<usize>();
    let count = Part::ALL.into_iter().map(of_part).sum();
    let layout = if diffusers { Layout::Diffusers } else { Layout::SingleFile };
    let edit = |part: Part, name: &str, blank: Tensor| Ok(draw(seed, part, name, blank.dims())?);
    // Not the file's name, so that equal seeds give equal files.
    let metadata = BTreeMap::from([("modelspec.title".to_owned(), format!("random weights, seed {seed}"))]);
    export(&described, target, layout, Some(DType::F16), &metadata, &edit)?;
    Ok(count)
}

/// Values under which activations keep their size: norms start at one, embeddings as CLIP starts them (OpenAI's CLIP,
/// clip/model.py `initialize_parameters`), layers as torch does, uniform within 1 / sqrt(fan in).
fn draw(seed: u64, part: Part, name: &str, shape: &[usize]) -> candle_core::Result<Tensor> {
    let count: usize = shape.iter().product();
    let key = random_key(part, name);
    let norm = name.contains("norm") || is_group_norm(part, name);
    let fan_in: usize = shape[1.min(shape.len())..].iter().product();
    let bound = match () {
        () if norm => 0.0,
        () if name.contains("token_embedding") => 0.02 * 3f64.sqrt(),
        () if name.contains("position_embedding") => 0.01 * 3f64.sqrt(),
        // A bias has no fan-in of its own; a small one suits every layer.
        () if shape.len() < 2 => 0.01,
        () => 1.0 / (fan_in.max(1) as f64).sqrt(),
    };
    let mean = if norm && name.ends_with("weight") { 1.0 } else { 0.0 };
    let mut values = vec![f16::from_f64(mean); count];
    if bound > 0.0 {
        values.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
            let mut stream = Stream::new(seed, Purpose::BaseInit, key, i as u64);
            chunk.iter_mut().for_each(|v| *v = f16::from_f64(stream.uniform_in(-bound, bound)));
        });
    }
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// The UNet's group norms are numbered members of a sequence: `in_layers.0`, `out_layers.0`, `out.0`.
fn is_group_norm(part: Part, name: &str) -> bool {
    part == Part::Unet && (name.contains("in_layers.0.") || name.contains("out_layers.0.") || name.starts_with("out.0."))
}

/// A number for a tensor's name (FNV-1a, 64 bits).
fn random_key(part: Part, name: &str) -> u64 {
    let bytes = part.name().bytes().chain([b'.']).chain(name.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
