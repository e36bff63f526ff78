//! SiLU, GELU (erf), quick-GELU, and GEGLU.

use crate::basic::CHUNK;
use crate::math::{erf, exp, sigmoid, simd};
use crate::tape::{Value, custom};
use crate::view::{F32, build, fast, grain, tensor};
use candle_core::{D, Result, Tensor};
use rayon::prelude::*;
use std::mem::MaybeUninit;

#[inline(always)]
fn silu_f(x: f32) -> f32 {
    x * sigmoid(x)
}

#[inline(always)]
pub(crate) fn silu_df(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

#[inline(always)]
fn quick_gelu_f(x: f32) -> f32 {
    x * sigmoid(1.702 * x)
}

#[inline(always)]
fn quick_gelu_df(x: f32) -> f32 {
    let s = sigmoid(1.702 * x);
    s * (1.0 + 1.702 * x * (1.0 - s))
}

#[inline(always)]
fn gelu_f(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

#[inline(always)]
fn gelu_df(x: f32) -> f32 {
    // Phi(x) + x phi(x), 0.3989.. = 1 / sqrt(2 pi).
    0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * 0.398_942_3 * exp(-0.5 * x * x)
}

#[inline(always)]
fn map(x: &Tensor, f: impl Fn(f32) -> f32 + Sync) -> Result<Tensor> {
    let x = x.contiguous()?;
    let xv = F32::new(&x)?;
    let write = |out: &mut [MaybeUninit<f32>]| {
        out.par_chunks_mut(CHUNK).zip(xv.par_chunks(CHUNK)).for_each(|(o, x)| {
            simd(
                #[inline(always)]
                || {
                    for (o, x) in o.iter_mut().zip(x) {
                        o.write(f(*x));
                    }
                },
            )
        });
    };
    // SAFETY: the input has the length of the result.
    tensor(unsafe { build(xv.len(), write) }, x.dims())
}

/// `dy * df(x)`.
#[inline(always)]
fn map_grad(x: &Tensor, dy: &Tensor, df: impl Fn(f32) -> f32 + Sync) -> Result<Tensor> {
    let (x, dy) = (x.contiguous()?, dy.contiguous()?);
    let (xv, dyv) = (F32::new(&x)?, F32::new(&dy)?);
    assert_eq!(xv.len(), dyv.len());
    let write = |out: &mut [MaybeUninit<f32>]| {
        out.par_chunks_mut(CHUNK).zip(xv.par_chunks(CHUNK)).zip(dyv.par_chunks(CHUNK)).for_each(|((o, x), dy)| {
            simd(
                #[inline(always)]
                || {
                    for ((o, x), dy) in o.iter_mut().zip(x).zip(dy) {
                        o.write(dy * df(*x));
                    }
                },
            )
        });
    };
    // SAFETY: both have the length of the result.
    tensor(unsafe { build(xv.len(), write) }, x.dims())
}

/// The composed forms: (f(x), f'(x)) of candle ops, in f32.
mod composed {
    use super::*;

    fn sigmoid(x: &Tensor) -> Result<Tensor> {
        (x.neg()?.exp()? + 1.0)?.recip()
    }

    /// x sigmoid(k x) and its derivative.
    pub fn swish(x: &Tensor, k: f64) -> Result<(Tensor, Tensor)> {
        let x = x.to_dtype(candle_core::DType::F32)?;
        let s = sigmoid(&(&x * k)?)?;
        let f = (&x * &s)?;
        let inner = ((((1.0 - &s)? * &x)? * k)? + 1.0)?;
        let df = (&s * inner)?;
        Ok((f, df))
    }

    pub fn gelu(x: &Tensor) -> Result<(Tensor, Tensor)> {
        let x = x.to_dtype(candle_core::DType::F32)?;
        let phi = (((&x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
        let density = ((x.sqr()? * -0.5)?.exp()? * 0.398_942_280_401_432_7)?;
        Ok(((&x * &phi)?, (phi + (&x * density)?)?))
    }
}

/// The activations, by their numbers in kernels/pointwise.cu.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Silu = 0,
    QuickGelu = 1,
    Gelu = 2,
}

macro_rules! activation {
    ($(#[$doc:meta])* $name:ident, $kind:ident, $f:ident, $df:ident, $composed:expr) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// If candle fails.
        pub fn $name(x: &Value) -> Result<Value> {
            let t = x.tensor();
            #[cfg(feature = "cuda")]
            if let Some(device) = crate::cuda::device(t) {
                let t = t.contiguous()?;
                let out = crate::cuda::pointwise::activate(&device, Kind::$kind, &t)?;
                return Ok(custom(stringify!($name), &[x], out, move |dy| {
                    Ok(vec![Some(crate::cuda::pointwise::activate_grad(&device, Kind::$kind, &t, &dy.contiguous()?)?)])
                }));
            }
            let out = if fast(t) { map(t, #[inline(always)] |v| $f(v))? } else { $composed(t)?.0.to_dtype(t.dtype())? };
            let kept = t.clone();
            Ok(custom(stringify!($name), &[x], out, move |dy| {
                let dx = if fast(&kept) {
                    map_grad(&kept, dy, #[inline(always)] |v| $df(v))?
                } else {
                    (dy.to_dtype(candle_core::DType::F32)? * $composed(&kept)?.1)?.to_dtype(kept.dtype())?
                };
                Ok(vec![Some(dx)])
            }))
        }
    };
}

activation!(
    /// `x sigmoid(x)`.
    silu, Silu, silu_f, silu_df, |t: &Tensor| composed::swish(t, 1.0)
);
activation!(
    /// `x sigmoid(1.702 x)`, CLIP-L's activation.
    quick_gelu, QuickGelu, quick_gelu_f, quick_gelu_df, |t: &Tensor| composed::swish(t, 1.702)
);
activation!(
    /// `x Phi(x)` by the error function (Hendrycks and Gimpel 2016).
    gelu, Gelu, gelu_f, gelu_df, composed::gelu
);

/// `h * gelu(gate)` where `(.., 2 d)` holds `h` then `gate` (Shazeer 2020, GEGLU; the order is diffusers').
///
/// # Errors
/// If the last dimension is odd.
pub fn geglu(x: &Value) -> Result<Value> {
    let width = x.tensor().dim(D::Minus1)?;
    if width % 2 != 0 {
        candle_core::bail!("geglu: odd width {width}");
    }
    let d = width / 2;
    let t = x.tensor().contiguous()?;
    let mut shape = t.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = d;
    }
    #[cfg(feature = "cuda")]
    {
        let sizes = (t.elem_count() / width.max(1), d);
        if let Some(device) = crate::cuda::device(&t).filter(|_| crate::cuda::pointwise::serves_geglu(sizes.0, d)) {
            let out = crate::cuda::pointwise::geglu(&device, &t, sizes, &shape)?;
            return Ok(custom("geglu", &[x], out, move |dy| {
                Ok(vec![Some(crate::cuda::pointwise::geglu_grad(&device, &t, &dy.contiguous()?, sizes)?)])
            }));
        }
    }
    let out = if fast(&t) {
        let xv = F32::new(&t)?;
        let write = |out: &mut [MaybeUninit<f32>]| {
            out.par_chunks_mut(d).zip(xv.par_chunks(2 * d)).with_min_len(grain(16 * d)).for_each(|(o, x)| {
                let (h, gate) = x.split_at(d);
                simd(
                    #[inline(always)]
                    || {
                        for ((o, h), g) in o.iter_mut().zip(h).zip(gate) {
                            o.write(h * gelu_f(*g));
                        }
                    },
                )
            });
        };
        // SAFETY: each row of 2 d gives one of d.
        tensor(unsafe { build(xv.len() / 2, write) }, shape.as_slice())?
    } else {
        // The product is formed in f32 and rounded once.
        let (h, gate) = (t.narrow(D::Minus1, 0, d)?.to_dtype(candle_core::DType::F32)?, t.narrow(D::Minus1, d, d)?);
        (h * composed::gelu(&gate)?.0)?.to_dtype(t.dtype())?
    };
    Ok(custom("geglu", &[x], out, move |dy| {
        if fast(&t) {
            let dy = dy.contiguous()?;
            let (xv, dyv) = (F32::new(&t)?, F32::new(&dy)?);
            assert_eq!(xv.len(), 2 * dyv.len());
            let write = |dx: &mut [MaybeUninit<f32>]| {
                dx.par_chunks_mut(2 * d).zip(xv.par_chunks(2 * d)).zip(dyv.par_chunks(d)).with_min_len(grain(24 * d)).for_each(
                    |((dx, x), dy)| {
                        let (h, gate) = x.split_at(d);
                        let (dh, dgate) = dx.split_at_mut(d);
                        simd(
                            #[inline(always)]
                            || {
                                for i in 0..d {
                                    dh[i].write(dy[i] * gelu_f(gate[i]));
                                    dgate[i].write(dy[i] * h[i] * gelu_df(gate[i]));
                                }
                            },
                        )
                    },
                );
            };
            // SAFETY: each row of d gives one of 2 d.
            let dx = unsafe { build(xv.len(), write) };
            return Ok(vec![Some(tensor(dx, t.dims())?)]);
        }
        let (h, gate) = (t.narrow(D::Minus1, 0, d)?, t.narrow(D::Minus1, d, d)?);
        let (f, df) = composed::gelu(&gate)?;
        let dy = dy.to_dtype(candle_core::DType::F32)?;
        let dh = (&dy * f)?;
        let dgate = ((dy * h.to_dtype(candle_core::DType::F32)?)? * df)?;
        Ok(vec![Some(Tensor::cat(&[dh, dgate], D::Minus1)?.to_dtype(t.dtype())?)])
    }))
}
