//! Shapes, sums and gathers: ops whose backward is as plain as their forward.

use crate::gemm::gemm;
use crate::pack::Operand;
use crate::tape::{Value, custom};
use crate::view::{F32, build, fast, grain, tensor};
use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Elements that one task of an elementwise loop takes: large enough to hide the hand-over, small enough to share.
pub(crate) const CHUNK: usize = 1 << 15;

/// `x + y`, equal shapes.
///
/// # Errors
/// If shapes or types differ.
pub fn add(x: &Value, y: &Value) -> Result<Value> {
    let out = sum(x.tensor(), y.tensor())?;
    Ok(custom("add", &[x, y], out, |dy| Ok(vec![Some(dy.clone()), Some(dy.clone())])))
}

/// `a + b` of plain tensors of equal shapes.
///
/// # Errors
/// If shapes or types differ.
pub fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(y) = crate::cuda::pointwise::add(a, b)? {
        return Ok(y);
    }
    if !fast(a) || !fast(b) || a.dims() != b.dims() {
        return a + b;
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let (av, bv) = (F32::new(&a)?, F32::new(&b)?);
    let write = |out: &mut [MaybeUninit<f32>]| {
        out.par_chunks_mut(CHUNK).zip(av.par_chunks(CHUNK)).zip(bv.par_chunks(CHUNK)).for_each(|((o, a), b)| {
            for ((o, a), b) in o.iter_mut().zip(a).zip(b) {
                o.write(a + b);
            }
        });
    };
    // SAFETY: both have the length of the result.
    tensor(unsafe { build(av.len(), write) }, a.dims())
}

/// `x (n, c, h, w) + e (n, c)` on every pixel.
///
/// # Errors
/// If shapes or types do not fit.
pub fn add_bias_nc(x: &Value, e: &Value) -> Result<Value> {
    let (n, c) = e.tensor().dims2()?;
    let plane = x.tensor().elem_count() / (n * c).max(1);
    let out = if fast(x.tensor()) && fast(e.tensor()) && x.dims().get(..2) == Some(&[n, c]) && plane > 0 {
        let (x, e) = (x.tensor().contiguous()?, e.tensor().contiguous()?);
        let (xv, ev) = (F32::new(&x)?, F32::new(&e)?);
        let write = |out: &mut [MaybeUninit<f32>]| {
            out.par_chunks_mut(plane).zip(xv.par_chunks(plane)).zip(ev.par_iter()).with_min_len(grain(plane)).for_each(|((o, x), e)| {
                for (o, x) in o.iter_mut().zip(x) {
                    o.write(x + e);
                }
            });
        };
        // SAFETY: there is a number of `e` for each of the n c planes.
        tensor(unsafe { build(xv.len(), write) }, x.dims())?
    } else {
        add_over(x.tensor(), e.tensor(), plane, (n, c, 1, 1))?
    };
    let need_e = e.requires_grad();
    Ok(custom("add_bias_nc", &[x, e], out, move |dy| {
        let de = if need_e { Some(sum_last(&dy.flatten_from(2)?)?) } else { None };
        Ok(vec![Some(dy.clone()), de])
    }))
}

/// `x + b` where b has a value for each run of `run` elements of x and begins anew behind its last: a bias of the last dimension (run 1) or
/// of channels (run h w). `shape` is that of b as candle broadcasts it.
pub(crate) fn add_over(x: &Tensor, b: &Tensor, run: usize, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(y) = crate::cuda::pointwise::add_over(x, b, run)? {
        return Ok(y);
    }
    let _ = run;
    x.broadcast_add(&b.reshape(shape)?)
}

/// The sum over the last dimension, in f32 for narrower types: thousands of pixels would lose digits or overflow in f16.
fn sum_last(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32)?.sum(D::Minus1)?.to_dtype(x.dtype()),
        _ => x.sum(D::Minus1),
    }
}

/// The same values in another type, rounded to nearest; the gradient comes back in the input's type.
///
/// # Errors
/// If the conversion does not exist.
pub fn to_dtype(x: &Value, dtype: DType) -> Result<Value> {
    let from = x.tensor().dtype();
    if from == dtype {
        return Ok(x.clone());
    }
    let out = x.tensor().to_dtype(dtype)?;
    Ok(custom("to_dtype", &[x], out, move |dy| Ok(vec![Some(dy.to_dtype(from)?)])))
}

/// `s * x`.
///
/// # Errors
/// If candle fails.
pub fn mul_scalar(x: &Value, s: f64) -> Result<Value> {
    let out = (x.tensor() * s)?;
    Ok(custom("mul_scalar", &[x], out, move |dy| Ok(vec![Some((dy * s)?)])))
}

/// Matrix product `(m, k) (k, n)`, both differentiable. For small factors; large frozen weights go through
/// [`crate::linear`].
///
/// # Errors
/// If shapes or types do not fit.
pub fn matmul(x: &Value, y: &Value) -> Result<Value> {
    let (a, b) = (x.tensor().contiguous()?, y.tensor().contiguous()?);
    let out = product(&a, false, &b, false)?;
    let (need_a, need_b) = (x.requires_grad(), y.requires_grad());
    Ok(custom("matmul", &[x, y], out, move |dy| {
        let dy = dy.contiguous()?;
        let da = if need_a { Some(product(&dy, false, &b, true)?) } else { None };
        let db = if need_b { Some(product(&a, true, &dy, false)?) } else { None };
        Ok(vec![da, db])
    }))
}

/// `a b` of two contiguous matrices, either transposed first if asked.
///
/// # Errors
/// If shapes or types do not fit.
pub fn product(a: &Tensor, a_t: bool, b: &Tensor, b_t: bool) -> Result<Tensor> {
    if !fast(a) || !fast(b) {
        let turn = |t: &Tensor, turned: bool| if turned { t.t() } else { Ok(t.clone()) };
        return turn(a, a_t)?.matmul(&turn(b, b_t)?);
    }
    let ((ar, ac), (br, bc)) = (a.dims2()?, b.dims2()?);
    let ((m, k), (k2, n)) = (if a_t { (ac, ar) } else { (ar, ac) }, if b_t { (bc, br) } else { (br, bc) });
    if k != k2 {
        candle_core::bail!("product of {:?} and {:?}, transposed {a_t} and {b_t}", a.dims(), b.dims());
    }
    let (av, bv) = (F32::new(a)?, F32::new(b)?);
    let am = if a_t { Operand::columns(&av, ac) } else { Operand::rows(&av, ac) };
    let bm = if b_t { Operand::rows(&bv, bc) } else { Operand::columns(&bv, bc) };
    tensor(gemm(m, n, k, am, bm), (m, n))
}

/// The same elements in another shape.
///
/// # Errors
/// If the number of elements differs.
pub fn reshape(x: &Value, shape: &[usize]) -> Result<Value> {
    let out = x.tensor().reshape(shape)?;
    let from = x.tensor().shape().clone();
    Ok(custom("reshape", &[x], out, move |dy| Ok(vec![Some(dy.reshape(from)?)])))
}

/// Swaps two dimensions; the result is contiguous.
///
/// # Errors
/// If a dimension does not exist.
pub fn transpose(x: &Value, i: usize, j: usize) -> Result<Value> {
    let out = transposed(x.tensor(), i, j)?;
    Ok(custom("transpose", &[x], out, move |dy| Ok(vec![Some(transposed(dy, i, j)?)])))
}

/// Rows and columns of a matrix that are turned at a time: both sides' cache lines stay in the first cache.
const SIDE: usize = 32;

fn transposed(x: &Tensor, i: usize, j: usize) -> Result<Tensor> {
    let &[n, rows, columns] = x.dims() else { return x.transpose(i, j)?.contiguous() };
    if !fast(x) || !x.is_contiguous() || (i.min(j), i.max(j)) != (1, 2) {
        return x.transpose(i, j)?.contiguous();
    }
    let xv = F32::new(x)?;
    let write = |out: &mut [MaybeUninit<f32>]| {
        let image = (rows * columns).max(1);
        out.par_chunks_mut(image).zip(xv.par_chunks(image)).for_each(|(out, x)| {
            // Some columns become so many whole rows of the result.
            out.par_chunks_mut(rows * SIDE).enumerate().with_min_len(grain(rows * SIDE)).for_each(|(strip, out)| {
                for from in (0..rows).step_by(SIDE) {
                    let to = (from + SIDE).min(rows);
                    for (c, out) in out.chunks_exact_mut(rows).enumerate() {
                        for (r, out) in (from..to).zip(&mut out[from..to]) {
                            out.write(x[r * columns + strip * SIDE + c]);
                        }
                    }
                }
            });
        });
    };
    // SAFETY: every row of every image is written, in strips and blocks that cover them.
    let out = unsafe { build(n * rows * columns, write) };
    tensor(out, (n, columns, rows))
}

/// `len` places of dimension `dim` from `start` on.
///
/// # Errors
/// If the range lies outside.
pub fn narrow(x: &Value, dim: usize, start: usize, len: usize) -> Result<Value> {
    let out = x.tensor().narrow(dim, start, len)?.contiguous()?;
    let total = x.tensor().dim(dim)?;
    Ok(custom("narrow", &[x], out, move |dy| {
        let dx = dy.pad_with_zeros(dim, start, total - start - len)?;
        Ok(vec![Some(dx)])
    }))
}

/// Joins along dimension `dim`.
///
/// # Errors
/// If the other dimensions differ.
pub fn cat(parts: &[&Value], dim: usize) -> Result<Value> {
    let tensors: Vec<&Tensor> = parts.iter().map(|v| v.tensor()).collect();
    let out = Tensor::cat(&tensors, dim)?;
    let parts_needed = parts.iter().map(|v| Ok((v.tensor().dim(dim)?, v.requires_grad()))).collect::<Result<Vec<_>>>()?;
    Ok(custom("cat", parts, out, move |dy| {
        let mut start = 0;
        let mut grads = Vec::with_capacity(parts_needed.len());
        for (len, need) in parts_needed {
            grads.push(if need { Some(dy.narrow(dim, start, len)?.contiguous()?) } else { None });
            start += len;
        }
        Ok(grads)
    }))
}

/// Row `rows[i]` of item `i`: `(n, t, d) -> (n, d)`.
///
/// # Errors
/// If a row lies outside, or there are not `n` of them.
pub fn gather_rows(x: &Value, rows: &[usize]) -> Result<Value> {
    let (n, t, d) = x.tensor().dims3()?;
    if rows.len() != n || rows.iter().any(|&r| r >= t) {
        candle_core::bail!("gather_rows: rows {rows:?} of a tensor of shape {:?}", x.dims());
    }
    let flat: Vec<u32> = rows.iter().enumerate().map(|(i, r)| (i * t + r) as u32).collect();
    let index = Tensor::from_vec(flat, n, x.tensor().device())?;
    let out = x.tensor().reshape((n * t, d))?.contiguous()?.index_select(&index, 0)?;
    Ok(custom("gather_rows", &[x], out, move |dy| {
        let dx = Tensor::zeros((n * t, d), dy.dtype(), dy.device())?.index_add(&index, &dy.contiguous()?, 0)?;
        Ok(vec![Some(dx.reshape((n, t, d))?)])
    }))
}

/// Nearest-neighbour enlargement of `(n, c, h, w)` to `(n, c, size.0, size.1)`; each output pixel takes the input pixel
/// at floor(i * in / out), as torch's `interpolate(mode="nearest")`.
///
/// # Errors
/// If the tensor has not four dimensions.
pub fn upsample_nearest(x: &Value, size: (usize, usize)) -> Result<Value> {
    let (n, c, h, w) = x.tensor().dims4()?;
    let (oh, ow) = size;
    let rows: Vec<u32> = (0..oh).map(|i| (i * h / oh) as u32).collect();
    let cols: Vec<u32> = (0..ow).map(|i| (i * w / ow) as u32).collect();
    let out = if fast(x.tensor()) {
        let x = x.tensor().contiguous()?;
        let xv = F32::new(&x)?;
        let write = |out: &mut [MaybeUninit<f32>]| {
            out.par_chunks_mut((oh * ow).max(1)).zip(xv.par_chunks((h * w).max(1))).with_min_len(grain(oh * ow)).for_each(|(o, x)| {
                for (i, row) in o.chunks_exact_mut(ow).enumerate() {
                    let from = &x[rows[i] as usize * w..][..w];
                    for (o, &j) in row.iter_mut().zip(&cols) {
                        o.write(from[j as usize]);
                    }
                }
            });
        };
        // SAFETY: each of the n c planes gives one, of which every row is written whole.
        tensor(unsafe { build(if h * w == 0 { 0 } else { n * c * oh * ow }, write) }, (n, c, oh, ow))?
    } else {
        x.tensor().upsample_nearest2d(oh, ow)?
    };
    let device = x.tensor().device().clone();
    Ok(custom("upsample_nearest", &[x], out, move |dy| {
        if fast(dy) {
            let dy = dy.contiguous()?;
            let dyv = F32::new(&dy)?;
            let mut dx = vec![0f32; n * c * h * w];
            dx.par_chunks_mut((h * w).max(1)).zip(dyv.par_chunks((oh * ow).max(1))).with_min_len(grain(oh * ow)).for_each(|(dx, dy)| {
                for (i, row) in dy.chunks_exact(ow).enumerate() {
                    let to = &mut dx[rows[i] as usize * w..][..w];
                    for (g, &j) in row.iter().zip(&cols) {
                        to[j as usize] += g;
                    }
                }
            });
            return Ok(vec![Some(tensor(dx, (n, c, h, w))?)]);
        }
        let rows = Tensor::from_slice(&rows, oh, &device)?;
        let cols = Tensor::from_slice(&cols, ow, &device)?;
        let tall = Tensor::zeros((n, c, h, ow), dy.dtype(), &device)?.index_add(&rows, &dy.contiguous()?, 2)?;
        let dx = Tensor::zeros((n, c, h, w), dy.dtype(), &device)?.index_add(&cols, &tall, 3)?;
        Ok(vec![Some(dx)])
    }))
}
