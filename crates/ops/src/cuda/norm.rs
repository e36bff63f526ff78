//! Launches of kernels/norm.cu.

use candle_core::{CudaDevice, DType, Result, Tensor};
use cudarc::driver::PushKernelArg;

use super::{NORM, address, counts, kernel, launch, output};
use crate::tape::{Value, custom};

/// Rows that one block sums for the gradients of a layer norm's weight and bias.
const ROWS: usize = 128;

/// Threads for a plane of `count` values: whole warps, and few idle ones.
fn threads(count: usize) -> usize {
    count.next_multiple_of(32).min(256)
}

fn wide(v: &Value) -> Result<Tensor> {
    v.tensor().to_dtype(DType::F32)?.contiguous()
}

/// Group norm of `(n, c, ..)`, with SiLU behind it if `silu`; `None` if sizes pass the kernels' counts.
pub(crate) fn group_norm(
    device: CudaDevice,
    x: &Value,
    weight: &Value,
    bias: &Value,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Option<Value>> {
    let dims = x.dims().to_vec();
    let (n, c) = (dims[0], dims[1]);
    let plane: usize = dims[2..].iter().product();
    let Some(sizes) = counts(&[c, c / groups, plane, n * c]).filter(|_| plane > 0) else { return Ok(None) };
    let (channels, per, pixels, silu) = (sizes[0], sizes[1], sizes[2], i32::from(silu));
    let (blocks, threads, eps) = ((n * c, 1, 1), threads(plane), eps as f32);
    let (t, w, b) = (x.tensor().contiguous()?, wide(weight)?, wide(bias)?);
    let dtype = t.dtype();
    let (y, stats) = (output(&device, dtype, dims.as_slice())?, output(&device, DType::F32, (n, groups, 2))?);
    {
        let moments = output(&device, DType::F32, (n, c, 2))?;
        let (xa, ma, wa, ba, ya, sa) = (address(&t)?, address(&moments)?, address(&w)?, address(&b)?, address(&y)?, address(&stats)?);
        let f = kernel(&device, &NORM, "group_norm_moments", dtype)?;
        let mut arguments = f.builder();
        arguments.arg(&pixels).arg(&xa).arg(&ma);
        // SAFETY: a block for each of the n * c planes of x, and for its two moments.
        unsafe { launch(arguments, blocks, threads)? };
        let f = kernel(&device, &NORM, "group_norm", dtype)?;
        let mut arguments = f.builder();
        arguments.arg(&channels).arg(&per).arg(&pixels).arg(&eps).arg(&silu).arg(&xa).arg(&ma).arg(&wa).arg(&ba).arg(&ya).arg(&sa);
        // SAFETY: a block for each plane of x and y; it reads the moments of its group, and w and b of its channel, below c.
        unsafe { launch(arguments, blocks, threads)? };
    }
    let (need_x, need_w, need_b) = (x.requires_grad(), weight.requires_grad(), bias.requires_grad());
    Ok(Some(custom("group_norm", &[x, weight, bias], y, move |dy| {
        let dy = dy.contiguous()?;
        let (db, dw) = (output(&device, DType::F32, (n, c))?, output(&device, DType::F32, (n, c))?);
        let (xa, ga, sa, wa, ba) = (address(&t)?, address(&dy)?, address(&stats)?, address(&w)?, address(&b)?);
        let (dba, dwa) = (address(&db)?, address(&dw)?);
        let f = kernel(&device, &NORM, "group_norm_sums", dtype)?;
        let mut arguments = f.builder();
        arguments.arg(&channels).arg(&per).arg(&pixels).arg(&silu).arg(&xa).arg(&ga).arg(&sa).arg(&wa).arg(&ba).arg(&dba).arg(&dwa);
        // SAFETY: as in the forward pass; each block writes its own place of both sums.
        unsafe { launch(arguments, blocks, threads)? };
        let dx = if need_x {
            let dx = output(&device, dtype, t.shape())?;
            let dxa = address(&dx)?;
            let f = kernel(&device, &NORM, "group_norm_grad", dtype)?;
            let mut arguments = f.builder();
            arguments.arg(&channels).arg(&per).arg(&pixels).arg(&silu).arg(&xa).arg(&ga).arg(&sa).arg(&wa).arg(&ba).arg(&dba).arg(&dwa);
            arguments.arg(&dxa);
            // SAFETY: as in the forward pass, with dx in the place of y.
            unsafe { launch(arguments, blocks, threads)? };
            Some(dx)
        } else {
            None
        };
        Ok(vec![dx, if need_w { Some(dw.sum(0)?) } else { None }, if need_b { Some(db.sum(0)?) } else { None }])
    })))
}

/// Layer norm over the last dimension; `None` if sizes pass the kernels' counts.
pub(crate) fn layer_norm(device: CudaDevice, x: &Value, weight: &Value, bias: &Value, eps: f64) -> Result<Option<Value>> {
    let d = weight.tensor().elem_count();
    let (t, w, b) = (x.tensor().contiguous()?, wide(weight)?, wide(bias)?);
    let rows = t.elem_count() / d.max(1);
    let Some(sizes) = counts(&[d, rows.div_ceil(8)]).filter(|_| rows > 0) else { return Ok(None) };
    let (width, count, eps, dtype) = (sizes[0], rows as i64, eps as f32, t.dtype());
    let (y, stats) = (output(&device, dtype, t.shape())?, output(&device, DType::F32, (rows, 2))?);
    let (xa, wa, ba, ya, sa) = (address(&t)?, address(&w)?, address(&b)?, address(&y)?, address(&stats)?);
    let blocks = (rows.div_ceil(8), 1, 1);
    let f = kernel(&device, &NORM, "layer_norm", dtype)?;
    let mut arguments = f.builder();
    arguments.arg(&count).arg(&width).arg(&eps).arg(&xa).arg(&wa).arg(&ba).arg(&ya).arg(&sa);
    // SAFETY: a warp for each of `rows` rows of `d` values of x and y, and for its two statistics; w and b have d values.
    unsafe { launch(arguments, blocks, 256)? };
    let (need_x, need_w, need_b) = (x.requires_grad(), weight.requires_grad(), bias.requires_grad());
    Ok(Some(custom("layer_norm", &[x, weight, bias], y, move |dy| {
        let dy = dy.contiguous()?;
        let (xa, ga, sa, wa) = (address(&t)?, address(&dy)?, address(&stats)?, address(&w)?);
        let dx = if need_x {
            let dx = output(&device, dtype, t.shape())?;
            let dxa = address(&dx)?;
            let f = kernel(&device, &NORM, "layer_norm_grad", dtype)?;
            let mut arguments = f.builder();
            arguments.arg(&count).arg(&width).arg(&xa).arg(&ga).arg(&sa).arg(&wa).arg(&dxa);
            // SAFETY: as in the forward pass, with dx in the place of y.
            unsafe { launch(arguments, blocks, 256)? };
            Some(dx)
        } else {
            None
        };
        if !need_w && !need_b {
            return Ok(vec![dx, None, None]);
        }
        let pieces = rows.div_ceil(ROWS).min(1024);
        let (dw, db) = (output(&device, DType::F32, (pieces, d))?, output(&device, DType::F32, (pieces, d))?);
        let (dwa, dba) = (address(&dw)?, address(&db)?);
        let f = kernel(&device, &NORM, "layer_norm_sums", dtype)?;
        let mut arguments = f.builder();
        arguments.arg(&count).arg(&width).arg(&xa).arg(&ga).arg(&sa).arg(&dwa).arg(&dba);
        // SAFETY: columns below d and rows below `rows` are read; each block writes its own piece of both sums, columns below d.
        unsafe { launch(arguments, (d.div_ceil(32), pieces, 1), 256)? };
        Ok(vec![dx, if need_w { Some(dw.sum(0)?) } else { None }, if need_b { Some(db.sum(0)?) } else { None }])
    })))
}
