//! The adapted layer as the formula says, with the full weight and the full dW. Slow, and easy to check by eye; the tests
//! hold `functional.rs` against it. Not used in training.

use crate::kernel::{Layer, kron};
use candle_core::{D, DType, Result, Tensor};

/// `op(x, W + scale * kron(w1, w2)) + bias`.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward(layer: Layer, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, w1: &Tensor, w2: &Tensor, scale: f64) -> Result<Tensor> {
    layer.forward(x, &full(weight, w1, w2, scale)?, bias)
}

fn full(weight: &Tensor, w1: &Tensor, w2: &Tensor, scale: f64) -> Result<Tensor> {
    weight.to_dtype(DType::F32)? + (kron(w1, w2)? * scale)?
}

/// The gradients of x, w1 and w2, through the gradient of the full weight:
/// dw1\[i, j\] = scale * sum over p, q of dW\[i*c + p, j*d + q\] w2\[p, q\], and dw2\[p, q\] likewise over i, j with w1.
///
/// # Errors
/// If the shapes do not fit.
pub fn backward(
    layer: Layer,
    x: &Tensor,
    weight: &Tensor,
    w1: &Tensor,
    w2: &Tensor,
    scale: f64,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let dx = layer.input_grad(dy, &full(weight, w1, w2, scale)?, x.dims())?.reshape(x.shape())?;
    let dw = match layer {
        Layer::Linear => layer.weight_grad(&layer.split(x, 1)?, &layer.split(dy, 1)?, weight.dims())?,
        Layer::Conv2d { .. } => layer.weight_grad(x, dy, weight.dims())?,
    };
    let (a, b) = w1.dims2()?;
    let c = w2.dim(0)?;
    let rest = w2.elem_count() / c;
    let dw = dw.reshape((a, c, b, rest))?;
    let dw1 = dw.broadcast_mul(&w2.reshape((1, c, 1, rest))?)?.sum(D::Minus1)?.sum(1)?;
    let dw2 = dw.broadcast_mul(&w1.reshape((a, 1, b, 1))?)?.sum(2)?.sum(0)?;
    Ok((dx, (dw1 * scale)?, (dw2 * scale)?.reshape(w2.shape())?))
}
