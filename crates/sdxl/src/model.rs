//! The whole SDXL model: both text encoders, UNet and VAE of one checkpoint, and the text conditioning they share.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use ops::Value;

use crate::checkpoint::{Checkpoint, Part};
use crate::clip::ClipTextModel;
use crate::config::{ClipConfig, UNetConfig, VaeConfig};
use crate::error::Result;
use crate::recompute::GradientCheckpointing;
use crate::unet::UNet;
use crate::vae::AutoencoderKL;

/// SDXL's networks.
pub struct Sdxl {
    /// CLIP-L.
    pub te1: ClipTextModel,
    /// OpenCLIP bigG.
    pub te2: ClipTextModel,
    /// The UNet.
    pub unet: UNet,
    /// The VAE, always f32.
    pub vae: AutoencoderKL,
}

/// What the text encoders give the UNet.
pub struct TextCondition {
    /// Hidden states of both encoders side by side, `(n, tokens, te1 + te2 width)`.
    pub context: Value,
    /// Projected pooled state of the second encoder's first row, `(n, projection)`.
    pub pooled: Value,
}

impl Sdxl {
    /// Builds all networks of a checkpoint; weights of UNet and text encoders are kept as `dtype`, or as they are in the file
    /// (f16, bf16; anything else as f32). A narrow weight is widened for each call of its layer.
    ///
    /// # Errors
    /// If a file cannot be read, or a part has missing, misshapen or left-over tensors.
    pub fn load(checkpoint: &Checkpoint, dtype: impl Into<Option<DType>>) -> Result<Self> {
        let dtype = dtype.into();
        Self::load_as(checkpoint, dtype, dtype)
    }

    /// As [`Sdxl::load`], with a type of their own for the text encoders' weights. [`DType::F8E4M3`] keeps the weights of linear layers and
    /// convolutions in 8 bits ([`ops::e4m3_codes`]) and widens each for its call.
    ///
    /// # Errors
    /// As [`Sdxl::load`].
    pub fn load_as(checkpoint: &Checkpoint, text: impl Into<Option<DType>>, unet: impl Into<Option<DType>>) -> Result<Self> {
        let (text, dtype) = (text.into(), unet.into());
        let dims = checkpoint.head_dims()?;
        let clip = |part| ClipTextModel::load(checkpoint, part, ClipConfig::of_checkpoint(checkpoint, part, dims)?, text);
        Ok(Self {
            te1: clip(Part::TextEncoder1)?,
            te2: clip(Part::TextEncoder2)?,
            unet: UNet::load(checkpoint, UNetConfig::of_checkpoint(checkpoint, dims)?, dtype)?,
            vae: AutoencoderKL::load(checkpoint, VaeConfig::of_checkpoint(checkpoint, dims)?)?,
        })
    }

    /// Opens and builds a checkpoint in one go, as SDXL's own shapes or what the checkpoint says.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Sdxl::load`].
    pub fn open(path: &Path, dtype: DType) -> Result<Self> {
        Self::load(&Checkpoint::open(path)?, dtype)
    }

    /// Where the networks are, and where their inputs must be.
    pub fn device(&self) -> &Device {
        self.vae.device()
    }

    /// Sets the type in which UNet and text encoders compute, f32 at first. Inputs of any type are taken; the UNet's prediction is f32,
    /// what the text encoders give has the compute type.
    pub fn compute_in(&mut self, dtype: DType) {
        self.te1.compute = dtype;
        self.te2.compute = dtype;
        self.unet.compute = dtype;
    }

    /// The condition of `n` prompts of `chunks` rows of 77 ids each, for both encoders; rows of one prompt follow each
    /// other. Rows are joined as sd-scripts does: first position of the first row, the 75 inner ones of every row, last
    /// position of the last row (facts 2.6). `weights`, if given, multiply the hidden states of each row's positions
    /// (emphasis; `(rows, 77)` for each encoder).
    ///
    /// # Errors
    /// If rows do not divide into prompts or shapes do not fit.
    pub fn encode_text(
        &self,
        ids1: &[Vec<u32>],
        ids2: &[Vec<u32>],
        chunks: usize,
        weights: Option<(&Tensor, &Tensor)>,
        checkpointing: GradientCheckpointing,
    ) -> candle_core::Result<TextCondition> {
        if chunks == 0 || ids1.len() != ids2.len() || !ids1.len().is_multiple_of(chunks) {
            candle_core::bail!("{} and {} token rows in chunks of {chunks}", ids1.len(), ids2.len());
        }
        let mut h1 = self.te1.penultimate(ids1, checkpointing)?;
        let mut h2 = self.te2.penultimate(ids2, checkpointing)?;
        // Row 0 of each prompt gives the pooled output; the last layer runs on those rows only.
        let (first, first_ids) = first_rows(&h2, ids2, chunks)?;
        let pooled = self.te2.pooled(&self.te2.last(&first, checkpointing)?, &first_ids)?;
        if let Some((w1, w2)) = weights {
            h1 = scale_rows(&h1, w1)?;
            h2 = scale_rows(&h2, w2)?;
        }
        let context = ops::cat(&[&join_chunks(&h1, chunks)?, &join_chunks(&h2, chunks)?], 2)?;
        Ok(TextCondition { context, pooled })
    }
}

fn first_rows(h: &Value, ids: &[Vec<u32>], chunks: usize) -> candle_core::Result<(Value, Vec<Vec<u32>>)> {
    if chunks == 1 {
        return Ok((h.clone(), ids.to_vec()));
    }
    let (rows, tokens, width) = h.tensor().dims3()?;
    let grouped = ops::reshape(h, &[rows / chunks, chunks, tokens * width])?;
    let first = ops::reshape(&ops::narrow(&grouped, 1, 0, 1)?, &[rows / chunks, tokens, width])?;
    Ok((first, ids.iter().step_by(chunks).cloned().collect()))
}

fn scale_rows(h: &Value, weights: &Tensor) -> candle_core::Result<Value> {
    let w = weights.unsqueeze(2)?.to_dtype(h.tensor().dtype())?;
    let out = h.tensor().broadcast_mul(&w)?;
    Ok(ops::custom("scale_rows", &[h], out, move |dy| Ok(vec![Some(dy.broadcast_mul(&w)?)])))
}

/// `(n * chunks, 77, d)` to `(n, 75 * chunks + 2, d)`.
fn join_chunks(h: &Value, chunks: usize) -> candle_core::Result<Value> {
    if chunks == 1 {
        return Ok(h.clone());
    }
    let (rows, tokens, width) = h.tensor().dims3()?;
    let n = rows / chunks;
    let long = ops::reshape(h, &[n, chunks * tokens, width])?;
    let mut parts = vec![ops::narrow(&long, 1, 0, 1)?];
    for chunk in 0..chunks {
        parts.push(ops::narrow(&long, 1, chunk * tokens + 1, tokens - 2)?);
    }
    parts.push(ops::narrow(&long, 1, chunks * tokens - 1, 1)?);
    ops::cat(&parts.iter().collect::<Vec<_>>(), 1)
}
