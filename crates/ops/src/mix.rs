//! The small factor of a Kronecker product applied over groups, and its gradient: many tiny products, too small for a
//! matrix multiplication each.

use crate::basic::sum;
use crate::math::simd;
use crate::view::{F32, build, fast, grain, tensor};
use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Items that one partial sum of [`mix_grad`] takes; fixed, so that the result does not depend on the number of threads.
const ITEMS: usize = 64;

/// `y_i = scale sum_j w (p, q)[i, j] x_j` over the groups of `x (n, q, rest)`: `(n, p, rest)`. `w` is f32.
///
/// # Errors
/// If shapes or types do not fit.
pub fn mix(w: &Tensor, scale: f64, x: &Tensor) -> Result<Tensor> {
    let ((p, q), (n, groups, rest)) = (w.dims2()?, x.dims3()?);
    if groups != q || q == 0 {
        candle_core::bail!("mix: w {:?}, x {:?}", w.dims(), x.dims());
    }
    let x = x.contiguous()?;
    #[cfg(feature = "cuda")]
    if let Some(device) = crate::cuda::device(&x)
        && let Some(y) = crate::cuda::mix::mix(&device, (w, scale), &x, None, None)?
    {
        return Ok(y);
    }
    let w = if scale == 1.0 { w.clone() } else { (w * scale)? };
    let w = w.to_dtype(x.dtype())?.contiguous()?;
    if !fast(&x) {
        return w.reshape((1, p, q))?.broadcast_as((n, p, q))?.contiguous()?.matmul(&x);
    }
    let (wv, xv) = (F32::new(&w)?, F32::new(&x)?);
    let wv: &[f32] = &wv;
    let (from, to) = ((q * rest).max(1), (p * rest).max(1));
    let write = |y: &mut [MaybeUninit<f32>]| {
        y.par_chunks_mut(to).zip(xv.par_chunks(from)).with_min_len(grain(p * q * rest / 4)).for_each(|(y, x)| {
            simd(
                #[inline(always)]
                || {
                    // Pieces of a row that stay in registers over all groups.
                    const PIECE: usize = 64;
                    for (i, y) in y.chunks_exact_mut(rest).enumerate() {
                        let w = &wv[i * q..][..q];
                        for (at, y) in y.chunks_mut(PIECE).enumerate() {
                            let mut sums = [0f32; PIECE];
                            for (k, x) in w.iter().zip(x.chunks_exact(rest)) {
                                let x = &x[at * PIECE..][..y.len()];
                                if let Ok(x) = <&[f32; PIECE]>::try_from(x) {
                                    sums.iter_mut().zip(x).for_each(|(s, x)| *s += k * x);
                                } else {
                                    sums.iter_mut().zip(x).for_each(|(s, x)| *s += k * x);
                                }
                            }
                            y.iter_mut().zip(&sums).for_each(|(y, s)| {
                                y.write(*s);
                            });
                        }
                    }
                },
            )
        })
    };
    // SAFETY: items, rows and their pieces tile the result.
    tensor(unsafe { build(n * p * rest, write) }, (n, p, rest))
}

/// Whether [`mix_onto`] adds a bias in the same pass, so that it is not to be added before.
pub fn mixes_bias(x: &Tensor) -> bool {
    cfg!(feature = "cuda") && x.device().is_cuda()
}

/// `base + y` for the `y` of [`mix`], in the shape of `base`; and plus a bias over y's last two dimensions, with a value for each run of
/// so many elements.
///
/// # Errors
/// If shapes or types do not fit.
pub fn mix_onto(base: &Tensor, bias: Option<(&Tensor, usize)>, w: &Tensor, scale: f64, x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(device) = crate::cuda::device(x).filter(|_| base.dtype() == x.dtype()) {
        let (p, (n, q, rest)) = (w.dim(0)?, x.dims3()?);
        if w.dim(1)? == q && base.elem_count() == n * p * rest && bias.is_none_or(|(b, run)| b.elem_count() * run == p * rest) {
            let (x, whole) = (x.contiguous()?, base.contiguous()?);
            let bias = bias.map(|(b, run)| Ok::<_, candle_core::Error>((b.to_dtype(x.dtype())?.contiguous()?, run))).transpose()?;
            let bias = bias.as_ref().map(|(b, run)| (b, *run));
            if let Some(y) = crate::cuda::mix::mix(&device, (w, scale), &x, Some(&whole), bias)? {
                return y.reshape(base.shape());
            }
        }
    }
    let y = sum(base, &mix(w, scale, x)?.reshape(base.shape())?)?;
    match bias {
        None => Ok(y),
        Some((b, run)) => {
            let grouped = y.reshape((x.dim(0)?, b.elem_count(), run))?;
            grouped.broadcast_add(&b.to_dtype(y.dtype())?.reshape((1, b.elem_count(), 1))?)?.reshape(base.shape())
        }
    }
}

/// `sum over n of y (n, p, rest) x (n, q, rest)^T`, added up in f32: `(p, q)`.
///
/// # Errors
/// If shapes or types do not fit.
pub fn mix_grad(y: &Tensor, x: &Tensor) -> Result<Tensor> {
    let ((n, p, rest), (n2, q, rest2)) = (y.dims3()?, x.dims3()?);
    if n != n2 || rest != rest2 {
        candle_core::bail!("mix_grad: y {:?}, x {:?}", y.dims(), x.dims());
    }
    let (y, x) = (y.contiguous()?, x.contiguous()?);
    #[cfg(feature = "cuda")]
    if let Some(device) = crate::cuda::device(&x).filter(|_| x.dtype() == y.dtype())
        && let Some(dw) = crate::cuda::mix::mix_grad(&device, &y, &x)?
    {
        return Ok(dw);
    }
    if !fast(&x) || !fast(&y) {
        let (y, x) = if y.dtype().size_in_bytes() < 4 { (y.to_dtype(DType::F32)?, x.to_dtype(DType::F32)?) } else { (y, x) };
        return y.matmul(&x.transpose(D::Minus2, D::Minus1)?.contiguous()?)?.to_dtype(DType::F32)?.sum(0);
    }
    let (yv, xv) = (F32::new(&y)?, F32::new(&x)?);
    let (ys, xs) = ((ITEMS * p * rest).max(1), (ITEMS * q * rest).max(1));
    let partial: Vec<Vec<f32>> = yv
        .par_chunks(ys)
        .zip(xv.par_chunks(xs))
        .with_min_len(grain(ITEMS * p * q * rest / 4))
        .map(|(y, x)| {
            simd(
                #[inline(always)]
                || {
                    // Lane by lane over all items; the lanes are added up once.
                    let mut lanes = vec![[0f32; LANES]; p * q];
                    for (y, x) in y.chunks_exact((p * rest).max(1)).zip(x.chunks_exact((q * rest).max(1))) {
                        for (i, y) in y.chunks_exact(rest).enumerate() {
                            for (j, x) in x.chunks_exact(rest).enumerate() {
                                add_products(&mut lanes[i * q + j], y, x);
                            }
                        }
                    }
                    lanes.iter().map(|lanes| lanes.iter().sum()).collect()
                },
            )
        })
        .collect();
    let mut total = vec![0f32; p * q];
    for part in partial {
        total.iter_mut().zip(part).for_each(|(t, v)| *t += v);
    }
    tensor(total, (p, q))
}

const LANES: usize = 16;

/// Adds the products of `a` and `b` to the lanes: whole vectors, then halves of what is left.
#[inline(always)]
fn add_products(lanes: &mut [f32; LANES], a: &[f32], b: &[f32]) {
    #[inline(always)]
    fn step<'a, const L: usize>(lanes: &mut [f32; LANES], a: &'a [f32], b: &'a [f32]) -> (&'a [f32], &'a [f32]) {
        let ((ac, a), (bc, b)) = (a.as_chunks::<L>(), b.as_chunks::<L>());
        let mut sums = [0f32; L];
        for (a, b) in ac.iter().zip(bc) {
            for i in 0..L {
                sums[i] += a[i] * b[i];
            }
        }
        for (lane, sum) in lanes.iter_mut().zip(sums) {
            *lane += sum;
        }
        (a, b)
    }
    let (a, b) = step::<LANES>(lanes, a, b);
    let (a, b) = step::<8>(lanes, a, b);
    let (a, b) = step::<4>(lanes, a, b);
    for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
        *lane += a * b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn mixing_equals_the_plain_product() -> Result<()> {
        for (n, p, q, rest) in [(1, 2, 3, 5), (130, 4, 4, 40), (7, 8, 2, 17), (3, 1, 1, 1)] {
            let w = Tensor::randn(0f32, 1.0, (p, q), &Device::Cpu)?;
            let x = Tensor::randn(0f32, 1.0, (n, q, rest), &Device::Cpu)?;
            let y = Tensor::randn(0f32, 1.0, (n, p, rest), &Device::Cpu)?;
            let wide = |t: &Tensor| t.to_dtype(DType::F64);
            let close = |a: Tensor, b: Tensor, scale: f64| -> Result<()> {
                let worst = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
                // Sums of up to 5,200 products of order one in f32.
                assert!(worst < 2e-6 * scale, "{worst} for {:?}", (n, p, q, rest));
                Ok(())
            };
            close(mix(&w, 1.0, &x)?, mix(&w, 1.0, &wide(&x)?)?, q as f64 * 3.0)?;
            close(mix(&w, 0.5, &x)?, (mix(&w, 1.0, &x)? * 0.5)?, q as f64 * 3.0)?;
            let bias = Tensor::randn(0f32, 1.0, p * rest, &Device::Cpu)?;
            let plain = (y.broadcast_add(&bias.reshape((1, p, rest))?)? + mix(&w, 1.0, &x)?)?;
            close(mix_onto(&y, Some((&bias, 1)), &w, 1.0, &x)?, plain, q as f64 * 3.0)?;
            close(mix_grad(&y, &x)?, mix_grad(&wide(&y)?, &wide(&x)?)?, (n * rest) as f64)?;
        }
        Ok(())
    }
}
