//! Launches of kernels/attention.cu.

use candle_core::{CudaDevice, DType, Result, Tensor};
use cudarc::driver::{DeviceRepr, PushKernelArg};

use super::{ATTENTION, address, kernel, launch, output};
use crate::attention::Sizes;

/// Features of a head: those of all of SDXL's.
const FEATURES: usize = 64;
/// Queries, and keys in the backward pass, that a block of threads has.
const ROWS: usize = 64;
const THREADS: usize = 128;

/// The kernels' `Attention`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Arguments {
    heads: i32,
    tq: i32,
    tk: i32,
    causal: i32,
    scale: f32,
}

// SAFETY: four i32 and an f32 in C layout, the struct `Attention` of kernels/attention.cu, which kernels take by value.
unsafe impl DeviceRepr for Arguments {}

impl Arguments {
    fn new(s: Sizes) -> Self {
        Self { heads: s.heads as i32, tq: s.tq as i32, tk: s.tk as i32, causal: i32::from(s.causal), scale: s.scale() }
    }
}

/// The device whose kernels serve this call: heads of 64 features in f16 or bf16, contiguous from a multiple of 16 bytes on.
pub(crate) fn serves(q: &Tensor, k: &Tensor, v: &Tensor, s: Sizes) -> Option<CudaDevice> {
    let half = matches!(q.dtype(), DType::F16 | DType::BF16) && k.dtype() == q.dtype() && v.dtype() == q.dtype();
    let aligned = |t: &Tensor| address(t).is_ok_and(|at| at.is_multiple_of(16));
    let small = [s.tq, s.tk].iter().all(|&t| i32::try_from(t + ROWS).is_ok()) && s.heads < 65536 && s.n < 65536;
    let fits = half && s.d == FEATURES && s.tq > 0 && s.tk > 0 && small;
    super::device(q).filter(|_| fits && aligned(q) && aligned(k) && aligned(v))
}

/// The output, and log-sum-exp `(n, heads, tq)` of the scaled scores to base 2.
pub(crate) fn forward(device: &CudaDevice, q: &Tensor, k: &Tensor, v: &Tensor, s: Sizes) -> Result<(Tensor, Tensor)> {
    let out = output(device, q.dtype(), q.shape())?;
    let lse = output(device, DType::F32, (s.n, s.heads, s.tq))?;
    let f = kernel(device, &ATTENTION, "attention", q.dtype())?;
    let (sizes, [qa, ka, va, oa, la]) = (Arguments::new(s), addresses([q, k, v, &out, &lse])?);
    let mut arguments = f.builder();
    arguments.arg(&sizes).arg(&qa).arg(&ka).arg(&va).arg(&oa).arg(&la);
    // SAFETY: rows beyond tq and tk are neither read nor written; the tensors have n * t * heads * 64 elements, which `Sizes` checked.
    unsafe { launch(arguments, (s.tq.div_ceil(ROWS), s.heads, s.n), THREADS)? };
    Ok((out, lse))
}

/// The gradients of q, k and v.
pub(crate) fn backward(
    device: &CudaDevice,
    [q, k, v]: [&Tensor; 3],
    (out, lse): (&Tensor, &Tensor),
    dy: &Tensor,
    s: Sizes,
) -> Result<[Tensor; 3]> {
    let dtype = q.dtype();
    let delta = output(device, DType::F32, (s.n, s.heads, s.tq))?;
    let [dq, dk, dv] = [output(device, dtype, q.shape())?, output(device, dtype, k.shape())?, output(device, dtype, v.shape())?];
    let (sizes, count) = (Arguments::new(s), (s.n * s.heads * s.tq) as i64);
    let [qa, ka, va, oa, la, da, ga] = addresses([q, k, v, out, lse, &delta, dy])?;
    let [dqa, dka, dva] = addresses([&dq, &dk, &dv])?;

    let f = kernel(device, &ATTENTION, "attention_products", dtype)?;
    let mut arguments = f.builder();
    arguments.arg(&sizes).arg(&count).arg(&oa).arg(&ga).arg(&da);
    // SAFETY: a warp reads the 64 features of its own query of `out` and `dy` and writes one place of `delta`.
    unsafe { launch(arguments, ((s.n * s.heads * s.tq).div_ceil(8), 1, 1), 256)? };

    let f = kernel(device, &ATTENTION, "attention_queries_grad", dtype)?;
    let mut arguments = f.builder();
    arguments.arg(&sizes).arg(&qa).arg(&ka).arg(&va).arg(&ga).arg(&la).arg(&da).arg(&dqa);
    // SAFETY: as in `forward`.
    unsafe { launch(arguments, (s.tq.div_ceil(ROWS), s.heads, s.n), THREADS)? };

    let f = kernel(device, &ATTENTION, "attention_keys_grad", dtype)?;
    let mut arguments = f.builder();
    arguments.arg(&sizes).arg(&qa).arg(&ka).arg(&va).arg(&ga).arg(&la).arg(&da).arg(&dka).arg(&dva);
    // SAFETY: as in `forward`, with keys in the place of queries.
    unsafe { launch(arguments, (s.tk.div_ceil(ROWS), s.heads, s.n), THREADS)? };
    Ok([dq, dk, dv])
}

fn addresses<const N: usize>(tensors: [&Tensor; N]) -> Result<[u64; N]> {
    let mut all = [0; N];
    for (to, t) in all.iter_mut().zip(tensors) {
        *to = address(t)?;
    }
    Ok(all)
}
