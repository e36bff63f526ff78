//! Launches of the activations and GEGLU of kernels/pointwise.cu.

use candle_core::{CudaDevice, Result, Tensor};
use cudarc::driver::PushKernelArg;

use super::{POINTWISE, THREADS, address, counts, kernel, launch, neighbours, output};
use crate::activation::Kind;

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

/// Whether the kernels serve GEGLU of this shape: an even half width, and sizes that a grid can count.
pub(crate) fn serves_geglu(rows: usize, d: usize) -> bool {
    d.is_multiple_of(2) && d.div_ceil(2 * THREADS) < 65536 && i32::try_from(rows).is_ok()
}

/// `x (rows, 2 d)` to `(rows, d)`, contiguous.
pub(crate) fn geglu(device: &CudaDevice, x: &Tensor, (rows, d): (usize, usize), shape: &[usize]) -> Result<Tensor> {
    let y = output(device, x.dtype(), shape)?;
    let (width, xa, ya) = (d as i32, address(x)?, address(&y)?);
    let f = kernel(device, &POINTWISE, "geglu", x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&width).arg(&xa).arg(&ya);
    // SAFETY: rows below `rows` of 2 d and of d values; d is even, so a thread's two neighbours lie in it.
    unsafe { launch(arguments, (rows, d.div_ceil(2 * THREADS), 1), THREADS)? };
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
    unsafe { launch(arguments, (rows, d.div_ceil(2 * THREADS), 1), THREADS)? };
    Ok(dx)
}

/// `a + b` of one shape and type; `None` if no kernel serves them.
pub(crate) fn add(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    let count = a.elem_count();
    let Some(device) = super::device(a).filter(|_| a.dtype() == b.dtype() && a.dims() == b.dims() && count > 0) else { return Ok(None) };
    let Some(n) = counts(&[count]) else { return Ok(None) };
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let y = output(&device, a.dtype(), a.shape())?;
    let (aa, ba, ya) = (address(&a)?, address(&b)?, address(&y)?);
    let (bytes, together) = neighbours(a.dtype(), &[count], &[aa, ba]);
    let f = kernel(&device, &POINTWISE, &format!("add_{bytes}"), a.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&n[0]).arg(&aa).arg(&ba).arg(&ya);
    // SAFETY: elements below n of three tensors.
    unsafe { launch(arguments, ((count / together).div_ceil(THREADS), 1, 1), THREADS)? };
    Ok(Some(y))
}

/// `x + b`, where b has a value for each run of `run` elements and begins anew behind its last; `None` if no kernel serves them.
pub(crate) fn add_over(x: &Tensor, b: &Tensor, run: usize) -> Result<Option<Tensor>> {
    let count = x.elem_count();
    let Some(device) = super::device(x).filter(|_| x.dtype() == b.dtype() && count > 0) else { return Ok(None) };
    let Some(sizes) = counts(&[count, run, b.elem_count()]) else { return Ok(None) };
    let (x, b) = (x.contiguous()?, b.contiguous()?);
    let y = output(&device, x.dtype(), x.shape())?;
    let (xa, ba, ya) = (address(&x)?, address(&b)?, address(&y)?);
    let (bytes, together) = neighbours(x.dtype(), &[count, if run == 1 { b.elem_count() } else { run }], &[xa]);
    let f = kernel(&device, &POINTWISE, &format!("add_over_{bytes}"), x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&sizes[0]).arg(&sizes[1]).arg(&sizes[2]).arg(&xa).arg(&ba).arg(&ya);
    // SAFETY: elements below n of x and y; places in b below its count.
    unsafe { launch(arguments, ((count / together).div_ceil(THREADS), 1, 1), THREADS)? };
    Ok(Some(y))
}
