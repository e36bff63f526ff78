//! Sinusoidal embeddings of timesteps and sizes, and SDXL's added condition made of them.

use candle_core::{DType, Result, Tensor};
use ops::Value;

/// Features per time id (diffusers `addition_time_embed_dim`).
pub const TIME_ID_DIM: usize = 256;

/// `t (n)` to `(n, dim)` in f32: cosines first, then sines, of t * 10000^(-k / (dim/2)) (facts: sd-scripts
/// `library/sdxl_original_unet.py`, `get_timestep_embedding`).
///
/// # Errors
/// If candle fails.
pub fn timestep_embedding(t: &Tensor, dim: usize) -> Result<Tensor> {
    let half = dim / 2;
    let frequencies: Vec<f32> = (0..half).map(|k| (-(10_000f32.ln()) * k as f32 / half as f32).exp()).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, half), t.device())?;
    let angle = t.to_dtype(DType::F32)?.reshape(((), 1))?.broadcast_mul(&frequencies)?;
    Tensor::cat(&[angle.cos()?, angle.sin()?], 1)
}

/// The UNet's added condition `(n, pooled + 6 * 256)`: pooled text, then the embeddings of original height and width, crop
/// top and left, target height and width. `pooled (n, d)`, `time_ids (n, 6)` in that order.
///
/// # Errors
/// If shapes do not fit.
pub fn added_condition(pooled: &Value, time_ids: &Tensor) -> Result<Value> {
    let (n, ids) = time_ids.dims2()?;
    let sizes = timestep_embedding(&time_ids.flatten_all()?, TIME_ID_DIM)?.reshape((n, ids * TIME_ID_DIM))?;
    ops::cat(&[pooled, &Value::constant(sizes.to_dtype(pooled.tensor().dtype())?)], 1)
}
