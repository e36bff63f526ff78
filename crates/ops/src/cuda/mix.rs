//! Launches of the small factor's products of kernels/pointwise.cu.

use cudarc::driver::PushKernelArg;
use candle_core::{CudaDevice, DType, Result, Tensor};

use super::{POINTWISE, address, counts, kernel, launch, output};

const THREADS: usize = 256;
/// Groups that `mix` takes at most.
const SIDE: usize = 16;
/// Places that a thread of `mix_grad` sums at least, and blocks at most: enough to fill a GPU, few enough to add up their shares.
const PLACES: usize = 8;
const BLOCKS: usize = 1024;

/// As [`crate::kernel::mix`], on `base` of the result's shape if there is one; `None` if no kernel serves the sizes. All contiguous.
pub(crate) fn mix(device: &CudaDevice, w: &Tensor, x: &Tensor, base: Option<&Tensor>) -> Result<Option<Tensor>> {
    let ((p, q), (n, _, rest)) = (w.dims2()?, x.dims3()?);
    let (Some(sizes), true) = (counts(&[p, q, (n * rest).div_ceil(THREADS)]), p <= SIDE && q <= SIDE) else { return Ok(None) };
    let w = w.to_dtype(DType::F32)?;
    let y = output(device, x.dtype(), (n, p, rest))?;
    let (count, rows, columns, places) = (n as i64, sizes[0], sizes[1], rest as i64);
    let (wa, xa, base, ya) = (address(&w)?, address(x)?, base.map_or(Ok(0), address)?, address(&y)?);
    let f = kernel(device, &POINTWISE, "mix", x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&count).arg(&rows).arg(&columns).arg(&places).arg(&wa).arg(&xa).arg(&base).arg(&ya);
    // SAFETY: a thread for each of n * rest places; it reads q of x and writes p of y, which base has as well; w has p q <= 256 values.
    unsafe { launch(arguments, ((n * rest).div_ceil(THREADS), 1, 1), THREADS)? };
    Ok(Some(y))
}

/// As [`crate::kernel::mix_grad`]; `None` if no kernel serves the sizes. Contiguous.
pub(crate) fn mix_grad(device: &CudaDevice, y: &Tensor, x: &Tensor) -> Result<Option<Tensor>> {
    let ((n, p, rest), (_, q, _)) = (y.dims3()?, x.dims3()?);
    let name = match p.max(q) {
        0..=4 => "mix_grad_4",
        5..=8 => "mix_grad_8",
        _ => return Ok(None),
    };
    let blocks = (n * rest).div_ceil(THREADS * PLACES).clamp(1, BLOCKS);
    let shares = output(device, DType::F32, (blocks, p, q))?;
    let (count, rows, columns, places) = (n as i64, p as i32, q as i32, rest as i64);
    let (ya, xa, sa) = (address(y)?, address(x)?, address(&shares)?);
    let f = kernel(device, &POINTWISE, name, x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&count).arg(&rows).arg(&columns).arg(&places).arg(&ya).arg(&xa).arg(&sa);
    // SAFETY: places below n * rest of both tensors are read; each block writes its own p q shares.
    unsafe { launch(arguments, (blocks, 1, 1), THREADS)? };
    Ok(Some(shares.sum(0)?))
}
