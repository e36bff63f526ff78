//! Group norm (Wu and He 2018), with SiLU fused behind it if asked, and layer norm (Ba et al. 2016). Statistics are f32
//! whatever the input's type. Weight and bias are values: constants, or trained (the adapter's norm modules).

use crate::activation::{silu, silu_df};
use crate::math::{sigmoid, simd, sum_lanes};
use crate::tape::{Value, custom};
use crate::view::{F32, SharedMut, build, fast, grain, tensor};
use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Sum of `f(v)` in four times 16 lanes, so that it vectorises, waits for no sum, and does not depend on threads; blocks keep the f32
/// sums short.
#[inline(always)]
fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut total = 0f64;
    for block in x.chunks(1024) {
        let mut lanes = [[0f32; 16]; 4];
        let (fours, rest) = block.as_chunks::<64>();
        for four in fours {
            for (k, lanes) in lanes.iter_mut().enumerate() {
                for (i, lane) in lanes.iter_mut().enumerate() {
                    *lane += f(four[16 * k + i]);
                }
            }
        }
        for (i, v) in rest.iter().enumerate() {
            lanes[i / 16][i % 16] += f(*v);
        }
        let [a, b, c, d] = &lanes;
        let mut sums = [0f64; 16];
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = (f64::from(a[i]) + f64::from(b[i])) + (f64::from(c[i]) + f64::from(d[i]));
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                sums[i] += sums[i + half];
            }
        }
        total += sums[0];
    }
    total
}

/// Mean and 1 / sqrt(variance + eps), in two passes: the difference of two large sums would lose digits.
#[inline(always)]
fn mean_rstd(x: &[f32], eps: f64) -> (f32, f32) {
    let n = x.len() as f64;
    let mean = (sum_of(x, |v| v) / n) as f32;
    let var = sum_of(x, |v| (v - mean) * (v - mean)) / n;
    (mean, (1.0 / (var + eps).sqrt()) as f32)
}

/// Sums of `g` and of `g * xhat`.
#[inline(always)]
fn dot2(g: &[f32], x: &[f32], mean: f32, rstd: f32) -> (f32, f32) {
    let (mut s, mut q) = ([0f32; 16], [0f32; 16]);
    let ((gc, g_rest), (xc, x_rest)) = (g.as_chunks::<16>(), x.as_chunks::<16>());
    for (i, (g, x)) in g_rest.iter().zip(x_rest).enumerate() {
        s[i] += g;
        q[i] += g * (x - mean) * rstd;
    }
    for (g, x) in gc.iter().zip(xc) {
        for i in 0..16 {
            s[i] += g[i];
            q[i] += g[i] * (x[i] - mean) * rstd;
        }
    }
    (sum_lanes(&s), sum_lanes(&q))
}

/// Group norm of `(n, c, h, w)` (or any shape `(n, c, ..)`) over `groups` groups of channels, then SiLU if `with_silu`.
///
/// # Errors
/// If `groups` does not divide the channels or shapes do not fit.
pub fn group_norm(x: &Value, weight: &Value, bias: &Value, groups: usize, eps: f64, with_silu: bool) -> Result<Value> {
    let dims = x.dims().to_vec();
    if dims.len() < 2 || groups == 0 || !dims[1].is_multiple_of(groups) || weight.dims() != [dims[1]] || bias.dims() != [dims[1]] {
        candle_core::bail!("group norm: input {dims:?}, {groups} groups, weight {:?}, bias {:?}", weight.dims(), bias.dims());
    }
    #[cfg(feature = "cuda")]
    if let Some(device) = crate::cuda::device(x.tensor())
        && let Some(y) = crate::cuda::norm::group_norm(device, x, weight, bias, groups, eps, with_silu)?
    {
        return Ok(y);
    }
    if !fast(x.tensor()) {
        return composed_group_norm(x, weight, bias, groups, eps, with_silu);
    }
    let (n, c) = (dims[0], dims[1]);
    let plane: usize = dims[2..].iter().product();
    let per = c / groups;
    let x_t = x.tensor().contiguous()?;
    let w_t = weight.tensor().to_dtype(DType::F32)?.contiguous()?;
    let b_t = bias.tensor().to_dtype(DType::F32)?.contiguous()?;
    let mut stats = vec![(0f32, 0f32); n * groups];
    let out = {
        let (xv, wv, bv) = (F32::new(&x_t)?, F32::new(&w_t)?, F32::new(&b_t)?);
        let size = (per * plane).max(1);
        let grain = grain(8 * size);
        let write = |out: &mut [MaybeUninit<f32>]| {
            out.par_chunks_mut(size).zip(xv.par_chunks(size)).zip(stats.par_iter_mut()).enumerate().with_min_len(grain).for_each(
                |(i, ((o, x), st))| {
                    simd(
                        #[inline(always)]
                        || {
                            let (mean, rstd) = mean_rstd(x, eps);
                            *st = (mean, rstd);
                            let first = i % groups * per;
                            for (k, (o, x)) in o.chunks_exact_mut(plane).zip(x.chunks_exact(plane)).enumerate() {
                                let scale = wv[first + k] * rstd;
                                let shift = bv[first + k] - mean * scale;
                                if with_silu {
                                    for (o, x) in o.iter_mut().zip(x) {
                                        let z = x * scale + shift;
                                        o.write(z * sigmoid(z));
                                    }
                                } else {
                                    for (o, x) in o.iter_mut().zip(x) {
                                        o.write(x * scale + shift);
                                    }
                                }
                            }
                        },
                    )
                },
            )
        };
        // SAFETY: groups, their channels and these pixels tile the tensor.
        tensor(unsafe { build(xv.len(), write) }, dims.as_slice())?
    };
    let (need_x, need_w, need_b) = (x.requires_grad(), weight.requires_grad(), bias.requires_grad());
    Ok(custom("group_norm", &[x, weight, bias], out, move |dy| {
        let dy = dy.contiguous()?;
        let (xv, wv, bv, dyv) = (F32::new(&x_t)?, F32::new(&w_t)?, F32::new(&b_t)?, F32::new(&dy)?);
        let mut dx = Vec::new();
        // Per (n, c): sum of dz and of dz * xhat.
        let mut sums = vec![(0f32, 0f32); n * c];
        let size = per * plane;
        let dx_at = SharedMut::for_vec(&mut dx, if need_x { xv.len() } else { 0 });
        sums.par_chunks_mut(per).enumerate().with_min_len(grain(12 * size)).for_each(|(i, sums)| {
            let (mean, rstd) = stats[i];
            let first = i % groups * per;
            let x = &xv[i * size..][..size];
            let dy = &dyv[i * size..][..size];
            simd(
                #[inline(always)]
                || {
                    // The gradient before SiLU is kept where the input's will stand, which takes its place number by number.
                    let mut spare = Vec::new();
                    let room = match need_x {
                        // SAFETY: each task writes its own group of `dx`, which outlives the loop.
                        true => unsafe { dx_at.room(i * size, size) },
                        false => {
                            spare.reserve_exact(if with_silu { size } else { 0 });
                            spare.spare_capacity_mut()
                        }
                    };
                    if with_silu {
                        for k in 0..per {
                            let scale = wv[first + k] * rstd;
                            let shift = bv[first + k] - mean * scale;
                            let range = k * plane..(k + 1) * plane;
                            for ((d, x), dy) in room[range.clone()].iter_mut().zip(&x[range.clone()]).zip(&dy[range]) {
                                d.write(dy * silu_df(x * scale + shift));
                            }
                        }
                    } else if need_x {
                        for (d, dy) in room.iter_mut().zip(dy) {
                            d.write(*dy);
                        }
                    }
                    let own = match (need_x, with_silu) {
                        // SAFETY: as above, and all of it was written.
                        (true, _) => unsafe { dx_at.at(i * size, size) },
                        (false, true) => {
                            // SAFETY: all of it was written.
                            unsafe { spare.set_len(size) };
                            &mut spare[..]
                        }
                        (false, false) => &mut [],
                    };
                    let (mut s1, mut s2) = (0f32, 0f32);
                    for (k, sum) in sums.iter_mut().enumerate() {
                        let range = k * plane..(k + 1) * plane;
                        let dz = if with_silu { &own[range.clone()] } else { &dy[range.clone()] };
                        *sum = dot2(dz, &x[range], mean, rstd);
                        s1 += wv[first + k] * sum.0;
                        s2 += wv[first + k] * sum.1;
                    }
                    if need_x {
                        let (m1, m2) = (s1 / size as f32, s2 / size as f32);
                        for k in 0..per {
                            let w = wv[first + k];
                            let range = k * plane..(k + 1) * plane;
                            for (d, x) in own[range.clone()].iter_mut().zip(&x[range]) {
                                *d = rstd * (w * *d - m1 - (x - mean) * rstd * m2);
                            }
                        }
                    }
                },
            )
        });
        if need_x {
            // SAFETY: the groups tile it.
            unsafe { dx.set_len(xv.len()) };
        }
        let channel = |pick: fn(&(f32, f32)) -> f32| -> Result<Tensor> {
            let mut total = vec![0f32; c];
            for row in sums.chunks_exact(c) {
                for (t, s) in total.iter_mut().zip(row) {
                    *t += pick(s);
                }
            }
            tensor(total, c)
        };
        Ok(vec![
            if need_x { Some(tensor(dx, x_t.dims())?) } else { None },
            if need_w { Some(channel(|s| s.1)?) } else { None },
            if need_b { Some(channel(|s| s.0)?) } else { None },
        ])
    }))
}

/// Group norm by candle's ops, for every type and device.
fn composed_group_norm(x: &Value, weight: &Value, bias: &Value, groups: usize, eps: f64, with_silu: bool) -> Result<Value> {
    let dims = x.dims().to_vec();
    let (n, c) = (dims[0], dims[1]);
    let plane: usize = dims[2..].iter().product();
    let dtype = x.tensor().dtype();
    let grouped = x.tensor().to_dtype(DType::F32)?.reshape((n, groups, c / groups * plane))?;
    let (xhat, rstd) = standardise(&grouped, eps)?;
    let affine = affine_nc(weight, bias, c)?;
    let z = (xhat.reshape((n, c, plane))?.broadcast_mul(&affine.0)?).broadcast_add(&affine.1)?;
    let out = z.reshape(dims.as_slice())?.to_dtype(dtype)?;
    let (need_w, need_b) = (weight.requires_grad(), bias.requires_grad());
    let y = custom("group_norm", &[x, weight, bias], out, move |dy| {
        let dz = dy.to_dtype(DType::F32)?.reshape((n, c, plane))?;
        let xhat_c = xhat.reshape((n, c, plane))?;
        let dw = if need_w { Some((&dz * &xhat_c)?.sum((0, 2))?) } else { None };
        let db = if need_b { Some(dz.sum((0, 2))?) } else { None };
        let dxhat = dz.broadcast_mul(&affine.0)?.reshape(xhat.shape())?;
        let dx = standardise_grad(&dxhat, &xhat, &rstd)?.reshape(dims)?.to_dtype(dtype)?;
        Ok(vec![Some(dx), dw, db])
    });
    if with_silu { silu(&y) } else { Ok(y) }
}

fn affine_nc(weight: &Value, bias: &Value, c: usize) -> Result<(Tensor, Tensor)> {
    let f = |v: &Value| v.tensor().to_dtype(DType::F32)?.reshape((1, c, 1));
    Ok((f(weight)?, f(bias)?))
}

/// (x - mean) / sqrt(var + eps) over the last dimension, and 1 / sqrt(var + eps).
fn standardise(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let rstd = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok((centred.broadcast_mul(&rstd)?, rstd))
}

fn standardise_grad(dxhat: &Tensor, xhat: &Tensor, rstd: &Tensor) -> Result<Tensor> {
    let m1 = dxhat.mean_keepdim(D::Minus1)?;
    let m2 = (dxhat * xhat)?.mean_keepdim(D::Minus1)?;
    dxhat.broadcast_sub(&m1)?.sub(&xhat.broadcast_mul(&m2)?)?.broadcast_mul(rstd)
}

/// Rows that one task takes; fixed, so that sums over tasks do not depend on the number of threads.
const ROWS: usize = 32;

/// Layer norm over the last dimension.
///
/// # Errors
/// If shapes do not fit.
pub fn layer_norm(x: &Value, weight: &Value, bias: &Value, eps: f64) -> Result<Value> {
    let d = x.tensor().dim(D::Minus1)?;
    if weight.dims() != [d] || bias.dims() != [d] {
        candle_core::bail!("layer norm: input {:?}, weight {:?}, bias {:?}", x.dims(), weight.dims(), bias.dims());
    }
    #[cfg(feature = "cuda")]
    if let Some(device) = crate::cuda::device(x.tensor())
        && let Some(y) = crate::cuda::norm::layer_norm(device, x, weight, bias, eps)?
    {
        return Ok(y);
    }
    if !fast(x.tensor()) {
        return composed_layer_norm(x, weight, bias, eps);
    }
    let x_t = x.tensor().contiguous()?;
    let w_t = weight.tensor().to_dtype(DType::F32)?.contiguous()?;
    let b_t = bias.tensor().to_dtype(DType::F32)?.contiguous()?;
    let mut stats = vec![(0f32, 0f32); x_t.elem_count() / d.max(1)];
    let out = {
        let (xv, wv, bv) = (F32::new(&x_t)?, F32::new(&w_t)?, F32::new(&b_t)?);
        let (wv, bv): (&[f32], &[f32]) = (&wv, &bv);
        let grain = grain(4 * ROWS * d);
        let write = |out: &mut [MaybeUninit<f32>]| {
            out.par_chunks_mut(ROWS * d).zip(xv.par_chunks(ROWS * d)).zip(stats.par_chunks_mut(ROWS)).with_min_len(grain).for_each(
                |((o, x), st)| {
                    simd(
                        #[inline(always)]
                        || {
                            for ((o, x), st) in o.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(st) {
                                let (mean, rstd) = mean_rstd(x, eps);
                                *st = (mean, rstd);
                                for (((o, x), w), b) in o.iter_mut().zip(x).zip(wv).zip(bv) {
                                    o.write((x - mean) * rstd * w + b);
                                }
                            }
                        },
                    )
                },
            )
        };
        // SAFETY: rows of `d` tile the tensor.
        tensor(unsafe { build(xv.len(), write) }, x_t.dims())?
    };
    let (need_x, need_w, need_b) = (x.requires_grad(), weight.requires_grad(), bias.requires_grad());
    Ok(custom("layer_norm", &[x, weight, bias], out, move |dy| {
        let dy = dy.contiguous()?;
        let (xv, wv, dyv) = (F32::new(&x_t)?, F32::new(&w_t)?, F32::new(&dy)?);
        let wv: &[f32] = &wv;
        assert_eq!(xv.len(), dyv.len());
        let mut dx = Vec::with_capacity(xv.len());
        let trained = need_w || need_b;
        // Each task's share of (dw, db), added up in order afterwards.
        let shares: Vec<(Vec<f32>, Vec<f32>)> = dx.spare_capacity_mut()[..xv.len()]
            .par_chunks_mut(ROWS * d)
            .zip(xv.par_chunks(ROWS * d))
            .zip(dyv.par_chunks(ROWS * d))
            .zip(stats.par_chunks(ROWS))
            .with_min_len(grain(8 * ROWS * d))
            .map(|(((dx, x), dy), st)| {
                simd(
                    #[inline(always)]
                    || {
                        let mut share = if trained { (vec![0f32; d], vec![0f32; d]) } else { (vec![], vec![]) };
                        let mut dxhat = vec![0f32; d];
                        for (((dx, x), dy), &(mean, rstd)) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d)).zip(st)
                        {
                            for ((g, dy), w) in dxhat.iter_mut().zip(dy).zip(wv) {
                                *g = dy * w;
                            }
                            let (s1, s2) = dot2(&dxhat, x, mean, rstd);
                            let (m1, m2) = (s1 / d as f32, s2 / d as f32);
                            for ((dx, g), x) in dx.iter_mut().zip(&dxhat).zip(x) {
                                dx.write(rstd * (g - m1 - (x - mean) * rstd * m2));
                            }
                            if trained {
                                for (((w, b), dy), x) in share.0.iter_mut().zip(&mut share.1).zip(dy).zip(x) {
                                    *w += dy * (x - mean) * rstd;
                                    *b += dy;
                                }
                            }
                        }
                        share
                    },
                )
            })
            .collect();
        // SAFETY: rows of `d` tile the tensor.
        unsafe { dx.set_len(xv.len()) };
        let trained_len = if trained { d } else { 0 };
        let (mut dw, mut db) = (vec![0f32; trained_len], vec![0f32; trained_len]);
        if trained {
            for (w, b) in &shares {
                dw.iter_mut().zip(w).for_each(|(t, s)| *t += s);
                db.iter_mut().zip(b).for_each(|(t, s)| *t += s);
            }
        }
        Ok(vec![
            if need_x { Some(tensor(dx, x_t.dims())?) } else { None },
            if need_w { Some(tensor(dw, d)?) } else { None },
            if need_b { Some(tensor(db, d)?) } else { None },
        ])
    }))
}

/// Layer norm by candle's ops, for every type and device.
fn composed_layer_norm(x: &Value, weight: &Value, bias: &Value, eps: f64) -> Result<Value> {
    let dtype = x.tensor().dtype();
    let d = x.tensor().dim(D::Minus1)?;
    let rows = x.tensor().elem_count() / d.max(1);
    let (xhat, rstd) = standardise(&x.tensor().to_dtype(DType::F32)?.reshape((rows, d))?, eps)?;
    let w = weight.tensor().to_dtype(DType::F32)?;
    let z = xhat.broadcast_mul(&w)?.broadcast_add(&bias.tensor().to_dtype(DType::F32)?)?;
    let out = z.reshape(x.tensor().shape())?.to_dtype(dtype)?;
    let shape = x.tensor().shape().clone();
    let (need_w, need_b) = (weight.requires_grad(), bias.requires_grad());
    Ok(custom("layer_norm", &[x, weight, bias], out, move |dy| {
        let dz = dy.to_dtype(DType::F32)?.reshape((rows, d))?;
        let dw = if need_w { Some((&dz * &xhat)?.sum(0)?) } else { None };
        let db = if need_b { Some(dz.sum(0)?) } else { None };
        let dx = standardise_grad(&dz.broadcast_mul(&w)?, &xhat, &rstd)?.reshape(shape)?.to_dtype(dtype)?;
        Ok(vec![Some(dx), dw, db])
    }))
}
