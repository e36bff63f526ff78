//! Differentiable tensor operations on candle tensors, with a tape of our own.
//!
//! A [`Value`] is a candle tensor and, where something trainable stands behind it, its place on the tape. A frozen
//! [`Weight`] is a plain tensor, or lies in a mapped file: no gradient of one can be asked for, so none is ever computed or allocated. A trainable
//! tensor is a [`Parameter`]; [`backward`] adds into its gradient as soon as that is complete and drops what the
//! forward pass kept as it goes. [`checkpoint`] keeps only a segment's inputs and runs it again in the backward pass.
//! Every op has a fast form for f32 on the CPU and a form composed of candle's ops for every other type and device;
//! the tests hold the first against the second. Where the composed form is slow on a GPU, kernels of our own serve it (`cuda`). In f16 and bf16 the composed form keeps statistics, softmax, activation
//! functions and sums over pixels in f32.
//!
//! Letters in shapes, in all crates: `n` batch, `c` channels (`o` output channels), `h`, `w` height and width,
//! `t` tokens, `d` features; for LoKr `a, b` the rows and columns of `w1`, `c, d` those of `w2`.
//!
//! Knows candle only; no other crate of the workspace.

mod activation;
mod ahead;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod basic;
mod capability;
mod checkpoint;
mod conv;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cudnn")]
mod cudnn;
mod e4m3;
mod gemm;
mod linear;
mod mapped;
mod math;
mod mix;
mod norm;
mod pack;
mod patches;
mod pool;
mod portable;
mod staging;
mod tape;
mod tile;
mod view;
mod weight;
mod winograd;

pub use activation::{geglu, gelu, quick_gelu, silu};
pub use attention::{attention, attention_buffers};
pub use basic::{add, add_bias_nc, cat, gather_rows, matmul, mul_scalar, narrow, reshape, to_dtype, transpose, upsample_nearest};
pub use candle_core::{Error, Result};
pub use capability::{CPU_CAPABILITY, check_cpu_capability};
pub use checkpoint::checkpoint;
pub use conv::conv2d;
#[cfg(feature = "cuda")]
pub use cuda::{gpu, gpu_memory_peak};
#[cfg(feature = "cudnn")]
pub use cudnn::with_tf32;
pub use e4m3::{E4M3_MAX, e4m3_codes, e4m3_decode, e4m3_encode};
pub use gemm::with_bf16;
pub use linear::{linear, widen};
pub use mapped::{Mapped, Weight};
pub use norm::{group_norm, layer_norm};
pub use pool::{awake, give_back_freed_memory, keep_freed_memory};
pub use staging::Staging;
pub use tape::{OnGradient, Parameter, Value, backward, backward_with, custom, no_grad, recording};
pub use tile::has_bf16;
pub use view::F32;
pub use winograd::conv2d_buffers;

/// Runs `f`: without cuDNN no convolution is rounded to TF32.
#[cfg(not(feature = "cudnn"))]
pub fn with_tf32<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Plain functions on tensors, for ops that are written by hand elsewhere (the adapter's).
pub mod kernel {
    pub use crate::basic::{product, sum};
    pub use crate::conv::{conv2d_forward, conv2d_input_grad, conv2d_weight_grad};
    pub use crate::linear::{linear_forward, linear_input_grad};
    pub use crate::mix::{mix, mix_grad, mix_onto, mixes_bias};
    pub use crate::pool::together;
    pub use crate::view::fast as fuses;
    pub use crate::weight::{Delta, Frozen};
}
