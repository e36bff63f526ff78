//! The arithmetic under `functional.rs`, on plain tensors: merging, and what a linear layer and a convolution have in
//! common. No gradients here, no choice of path.
//!
//! Letters: w1 is (a, b), w2 is (c, d) or (c, d, kh, kw); g is a or b, whichever the tensor at hand is grouped by.

use candle_core::{CpuStorage, DType, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use ops::kernel::Frozen;
use rayon::prelude::*;

/// What is done with a weight: the adapter treats both alike through these few calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// x (.., in), weight (out, in).
    Linear,
    /// x (n, in, h, w), weight (out, in, kh, kw).
    Conv2d {
        /// Step between output pixels.
        stride: usize,
        /// Zeros around the input.
        padding: usize,
    },
}

impl Layer {
    pub(crate) fn forward<'a>(self, x: &Tensor, weight: impl Into<Frozen<'a>>, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Linear => ops::kernel::linear_forward(x, weight, bias),
            Self::Conv2d { stride, padding } => ops::kernel::conv2d_forward(x, weight, bias, stride, padding),
        }
    }

    /// The gradient of an input whose last dimensions were those of `like`.
    pub(crate) fn input_grad<'a>(self, dy: &Tensor, weight: impl Into<Frozen<'a>>, like: &[usize]) -> Result<Tensor> {
        match (self, like) {
            (Self::Conv2d { stride, padding }, [.., h, w]) => ops::kernel::conv2d_input_grad(dy, weight, (*h, *w), stride, padding),
            _ => ops::kernel::linear_input_grad(dy, weight),
        }
    }

    /// The gradient of a small weight, of its shape `dims`.
    pub(crate) fn weight_grad(self, x: &Tensor, dy: &Tensor, dims: &[usize]) -> Result<Tensor> {
        match (self, dims) {
            (Self::Conv2d { stride, padding }, &[.., kh, kw]) => ops::kernel::conv2d_weight_grad(x, dy, (kh, kw), stride, padding),
            _ => ops::kernel::product(&dy.contiguous()?, true, &x.contiguous()?, false),
        }
    }

    /// Groups as samples of their own: linear (.., g*e) to (rows*g, e), convolution (n, g*e, h, w) to (n*g, e, h, w).
    pub(crate) fn split(self, x: &Tensor, groups: usize) -> Result<Tensor> {
        let x = x.contiguous()?;
        match (self, x.dims()) {
            (Self::Conv2d { .. }, &[n, channels, h, w]) => x.reshape((n * groups, channels / groups, h, w)),
            (_, &[.., width]) => x.reshape((x.elem_count() / width * groups, width / groups)),
            _ => candle_core::bail!("a layer's input cannot have shape {:?}", x.dims()),
        }
    }

    /// Rows of the product: samples times places.
    pub(crate) fn rows(self, y: &[usize]) -> usize {
        match (self, y) {
            (Self::Conv2d { .. }, &[n, _, h, w]) => n * h * w,
            (_, [rest @ .., _]) => rest.iter().product(),
            _ => 0,
        }
    }

    /// Samples, each of which holds its groups one after the other.
    pub(crate) fn samples(self, x: &Tensor) -> usize {
        match (self, x.dims()) {
            (Self::Conv2d { .. }, [n, ..]) => *n,
            (_, [rest @ .., _]) => rest.iter().product(),
            _ => 0,
        }
    }

    /// Seen as (samples, g, rest).
    pub(crate) fn grouped(self, x: &Tensor, samples: usize, groups: usize) -> Result<Tensor> {
        x.contiguous()?.reshape((samples, groups, x.elem_count() / (samples * groups).max(1)))
    }
}

/// `kron(w1, w2)` in the shape of the layer's weight. Row i of w1 and p of w2 give row i*c + p; column j and q give j*d + q
/// (LyCORIS, lycoris/functional/lokr.py `make_kron`).
///
/// # Errors
/// If `w1` has not two dimensions or `w2` fewer.
pub fn kron(w1: &Tensor, w2: &Tensor) -> Result<Tensor> {
    let (a, b) = w1.dims2()?;
    let (c, d, kernel) = match w2.dims() {
        [c, d, kernel @ ..] => (*c, *d, kernel),
        dims => candle_core::bail!("w2 of shape {dims:?}"),
    };
    let rest: usize = kernel.iter().product();
    let product = w1.reshape((a, 1, b, 1))?.broadcast_mul(&w2.contiguous()?.reshape((1, c, 1, d * rest))?)?;
    let dims: Vec<usize> = [a * c, b * d].iter().chain(kernel).copied().collect();
    product.reshape(dims)
}

/// `weight + scale * kron(w1, w2)` in f32, whatever the weight is stored in. On the CPU in one pass, without the product or
/// a widened copy of the weight in between.
///
/// # Errors
/// If the shapes do not fit.
pub fn merge(weight: &Tensor, w1: &Tensor, w2: &Tensor, scale: f64) -> Result<Tensor> {
    let (a, b) = w1.dims2()?;
    let (c, d) = (w2.dim(0)?, w2.dim(1)?);
    if weight.dim(0)? != a * c || weight.elem_count() != a * b * w2.elem_count() || weight.dim(1)? != b * d {
        candle_core::bail!("weight {:?} is not w1 {:?} by w2 {:?}", weight.dims(), w1.dims(), w2.dims());
    }
    let w1 = (w1.to_dtype(DType::F32)? * scale)?;
    let (weight, w2) = (weight.contiguous()?, w2.to_dtype(DType::F32)?.contiguous()?);
    if weight.device().is_cpu()
        && let Some(merged) = merge_cpu(&weight, &w1.contiguous()?, &w2)?
    {
        return Ok(merged);
    }
    ops::widen(&weight, DType::F32)? + kron(&w1, &w2)?.reshape(weight.shape())?
}

/// Writes as many elements as the slice takes, from the index on, as f32.
type Widen<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// `None` where the weight's type has no fast form.
fn merge_cpu(weight: &Tensor, w1: &Tensor, w2: &Tensor) -> Result<Option<Tensor>> {
    let (_, b) = w1.dims2()?;
    let c = w2.dim(0)?;
    let inner = w2.elem_count() / c.max(1);
    let row = b * inner;
    let (s0, l0) = weight.storage_and_layout();
    let (Storage::Cpu(base), Some((start, end))) = (&*s0, l0.contiguous_offsets()) else { return Ok(None) };
    let widen: Box<Widen> = match base {
        CpuStorage::F32(v) => Box::new(move |at, out| out.copy_from_slice(&v[at..at + out.len()])),
        CpuStorage::F16(v) => Box::new(move |at, out| v[at..at + out.len()].convert_to_f32_slice(out)),
        CpuStorage::U8(v) => Box::new(move |at, out| out.iter_mut().zip(&v[at..]).for_each(|(o, &code)| *o = ops::e4m3_decode(code))),
        CpuStorage::BF16(v) => Box::new(move |at, out| v[at..at + out.len()].convert_to_f32_slice(out)),
        _ => return Ok(None),
    };
    let (w1, w2) = (w1.flatten_all()?.to_vec1::<f32>()?, w2.flatten_all()?.to_vec1::<f32>()?);
    let mut out = vec![0f32; end - start];
    out.par_chunks_mut(row.max(1)).enumerate().for_each(|(r, out)| {
        widen(start + r * row, out);
        let (w1, w2) = (&w1[r / c * b..][..b], &w2[r % c * inner..][..inner]);
        for (out, k) in out.chunks_exact_mut(inner).zip(w1) {
            for (o, v) in out.iter_mut().zip(w2) {
                *o += k * v;
            }
        }
    });
    drop(widen);
    Ok(Some(Tensor::from_vec(out, weight.shape(), weight.device())?))
}
