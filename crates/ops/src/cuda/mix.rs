//! Launches of the small factor's products of kernels/pointwise.cu.

use candle_core::{CudaDevice, DType, Result, Tensor};
use cudarc::driver::{DeviceRepr, PushKernelArg};

use super::{POINTWISE, THREADS, address, counts, kernel, launch, neighbours, output};

/// Groups that `mix` takes at most.
const SIDE: usize = 16;
/// Places that a thread of `mix_grad` sums at least, and blocks at most: enough to fill a GPU, few enough to add up their shares.
const PLACES: usize = 3;
const BLOCKS: usize = 2048;

/// The kernels' `Factor`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Factor {
    p: i32,
    q: i32,
    row: i32,
    column: i32,
    scale: f32,
}

// SAFETY: four i32 and an f32 in C layout, the struct `Factor` of kernels/pointwise.cu, which kernels take by value.
unsafe impl DeviceRepr for Factor {}

/// As [`crate::kernel::mix`], on `base` of the result's shape, and with a bias over the result's last two dimensions that has a value for
/// each run of so many elements; `None` if no kernel serves the sizes. `x` and `base` are contiguous; `w` is f32, in any strides.
pub(crate) fn mix(
    device: &CudaDevice,
    (w, scale): (&Tensor, f64),
    x: &Tensor,
    base: Option<&Tensor>,
    bias: Option<(&Tensor, usize)>,
) -> Result<Option<Tensor>> {
    let ((p, q), (n, _, rest)) = (w.dims2()?, x.dims3()?);
    let run = bias.map_or(1, |(_, run)| run);
    let fits = w.dtype() == DType::F32 && p <= SIDE && q <= SIDE && n * rest > 0;
    let Some(sizes) = counts(&[n, rest, run, n * rest]).filter(|_| fits) else { return Ok(None) };
    let groups = [4, 8, 16].into_iter().find(|&groups| q <= groups).unwrap_or(SIDE);
    let (at, strides) = (w.layout().start_offset(), w.stride());
    let factor = Factor { p: p as i32, q: q as i32, row: strides[0] as i32, column: strides[1] as i32, scale: scale as f32 };
    let y = output(device, x.dtype(), (n, p, rest))?;
    let w = super::base(w)? + 4 * at as u64;
    let (xa, ba, bias, ya) = (address(x)?, base.map_or(Ok(0), address)?, bias.map_or(Ok(0), |(bias, _)| address(bias))?, address(&y)?);
    let (bytes, together) = neighbours(x.dtype(), &[rest], &[xa, ba]);
    let f = kernel(device, &POINTWISE, &format!("mix_{groups}_{bytes}"), x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&sizes[0]).arg(&factor).arg(&sizes[1]).arg(&sizes[2]).arg(&w).arg(&xa).arg(&ba).arg(&bias).arg(&ya);
    let threads = n * rest / if groups == 16 { together.div_ceil(2) } else { together };
    // SAFETY: each thread reads neighbouring places of q groups of x and writes those of p groups of y, which base has as well; w has
    // (p, q) values in its strides, p and q at most 16; the bias has p * rest / run.
    unsafe { launch(arguments, (threads.div_ceil(THREADS), 1, 1), THREADS)? };
    Ok(Some(y))
}

/// As [`crate::kernel::mix_grad`]; `None` if no kernel serves the sizes. Contiguous.
pub(crate) fn mix_grad(device: &CudaDevice, y: &Tensor, x: &Tensor) -> Result<Option<Tensor>> {
    let ((n, p, rest), (_, q, _)) = (y.dims3()?, x.dims3()?);
    let side = match p.max(q) {
        0..=4 => 4,
        5..=8 => 8,
        _ => return Ok(None),
    };
    // The stride of a thread's places is added once beyond them.
    let Some(sizes) = counts(&[n, rest, n * rest + BLOCKS * THREADS]) else { return Ok(None) };
    let (ya, xa) = (address(y)?, address(x)?);
    let (bytes, together) = neighbours(x.dtype(), &[rest], &[ya, xa]);
    let blocks = (n * rest / together).div_ceil(THREADS * PLACES).clamp(1, BLOCKS);
    let shares = output(device, DType::F32, (blocks, p, q))?;
    let (p, q, sa) = (p as i32, q as i32, address(&shares)?);
    let f = kernel(device, &POINTWISE, &format!("mix_grad_{side}_{bytes}"), x.dtype())?;
    let mut arguments = f.builder();
    arguments.arg(&sizes[0]).arg(&p).arg(&q).arg(&sizes[1]).arg(&ya).arg(&xa).arg(&sa);
    // SAFETY: places below n * rest of both tensors are read; each block writes its own p q shares.
    unsafe { launch(arguments, (blocks, 1, 1), THREADS)? };
    Ok(Some(if blocks == 1 { shares.squeeze(0)? } else { shares.sum(0)? }))
}
