//! Launches of the activations and GEGLU of kernels/pointwise.cu.

use cudarc::driver::PushKernelArg;
use candle_core::{CudaDevice, Result, Tensor};

use super::{POINTWISE, address, counts, kernel, launch, output};
use crate::activation::Kind;

const THREADS: usize = 256;

/// f(x) of a contiguous tensor.
pub(crate) fn activate(device: &CudaDevice, kind: Kind, x: &Tensor) -> Result<Tensor> {
    let y = output(device, x.dtype(), x.shape())?;
    let (count, kind, xa, ya) = (x.elem_count() as i64, kind as i32, address(x)?, address(&y)?);
    let f = kernel(device, &POINTWISE, "activate", x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&count).arg(&kind).arg(&xa).arg(&ya);
    // SAFETY: elements below the count of both tensors.
    unsafe { launch(arguments, (x.elem_count().div_ceil(THREADS), 1, 1), THREADS)? };
    Ok(y)
}

/// dy f'(x) of contiguous tensors of one type.
pub(crate) fn activate_grad(device: &CudaDevice, kind: Kind, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let dx = output(device, x.dtype(), x.shape())?;
    let (count, kind, xa, ga, dxa) = (x.elem_count() as i64, kind as i32, address(x)?, address(dy)?, address(&dx)?);
    let f = kernel(device, &POINTWISE, "activate_grad", x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&count).arg(&kind).arg(&xa).arg(&ga).arg(&dxa);
    // SAFETY: elements below the count of three tensors of one size.
    unsafe { launch(arguments, (x.elem_count().div_ceil(THREADS), 1, 1), THREADS)? };
    Ok(dx)
}

/// Whether the kernels serve GEGLU of this shape: an even half width, and rows that a grid can count.
pub(crate) fn serves_geglu(rows: usize, d: usize) -> bool {
    d.is_multiple_of(2) && rows > 0 && rows <= 65535
}

/// `x (rows, 2 d)` to `(rows, d)`, contiguous.
pub(crate) fn geglu(device: &CudaDevice, x: &Tensor, (rows, d): (usize, usize), shape: &[usize]) -> Result<Tensor> {
    let y = output(device, x.dtype(), shape)?;
    let (width, xa, ya) = (d as i32, address(x)?, address(&y)?);
    let f = kernel(device, &POINTWISE, "geglu", x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&width).arg(&xa).arg(&ya);
    // SAFETY: rows below `rows` of 2 d and of d values; d is even, so a thread's two neighbours lie in it.
    unsafe { launch(arguments, (d.div_ceil(2 * THREADS), rows, 1), THREADS)? };
    Ok(y)
}

/// The gradient of x; dy is contiguous and of its type.
pub(crate) fn geglu_grad(device: &CudaDevice, x: &Tensor, dy: &Tensor, (rows, d): (usize, usize)) -> Result<Tensor> {
    let dx = output(device, x.dtype(), x.shape())?;
    let (width, xa, ga, dxa) = (d as i32, address(x)?, address(dy)?, address(&dx)?);
    let f = kernel(device, &POINTWISE, "geglu_grad", x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&width).arg(&xa).arg(&ga).arg(&dxa);
    // SAFETY: as in `geglu`.
    unsafe { launch(arguments, (d.div_ceil(2 * THREADS), rows, 1), THREADS)? };
    Ok(dx)
}

/// `x + b`, where b has a value for each run of `run` elements and begins anew behind its last; `None` if no kernel serves them.
pub(crate) fn add_over(x: &Tensor, b: &Tensor, run: usize) -> Result<Option<Tensor>> {
    let Some(device) = super::device(x).filter(|_| x.dtype() == b.dtype()) else { return Ok(None) };
    let Some(sizes) = counts(&[run, b.elem_count(), x.elem_count().div_ceil(THREADS)]) else { return Ok(None) };
    let (x, b) = (x.contiguous()?, b.contiguous()?);
    let y = output(&device, x.dtype(), x.shape())?;
    let (n, run, count, xa, ba, ya) = (x.elem_count() as i64, sizes[0], sizes[1], address(&x)?, address(&b)?, address(&y)?);
    let f = kernel(&device, &POINTWISE, "add_over", x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&n).arg(&run).arg(&count).arg(&xa).arg(&ba).arg(&ya);
    // SAFETY: elements below n of x and y; places in b below its count.
    unsafe { launch(arguments, (x.elem_count().div_ceil(THREADS), 1, 1), THREADS)? };
    Ok(Some(y))
}
