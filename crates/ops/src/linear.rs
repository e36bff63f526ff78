//! The frozen linear layer: an input gradient, never a weight gradient.

use crate::gemm::{Mat, gemm};
use crate::tape::{Value, custom};
use crate::view::{F32, fast, tensor};
use candle_core::{DType, Result, Tensor};

/// A frozen weight in the type that the computation uses: the tensor itself where that is its type already.
///
/// # Errors
/// If the conversion does not exist.
pub fn widen(weight: &Tensor, compute: DType) -> Result<Tensor> {
    if weight.dtype() == compute { weight.contiguous() } else { weight.to_dtype(compute) }
}

/// Rows of a tensor whose last dimension is `d`.
fn rows(t: &Tensor, d: usize) -> usize {
    t.elem_count() / d.max(1)
}

fn with_last(t: &Tensor, last: usize) -> Vec<usize> {
    let mut shape = t.dims().to_vec();
    if let Some(d) = shape.last_mut() {
        *d = last;
    }
    shape
}

/// `x (.., in) weight (out, in)^T + bias (out)`.
///
/// # Errors
/// If shapes do not fit.
pub fn linear_forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    if x.dims().last() != Some(&inner) {
        candle_core::bail!("linear: input {:?}, weight {:?}", x.dims(), weight.dims());
    }
    let weight = widen(weight, x.dtype())?;
    let bias = bias.map(|b| widen(b, x.dtype())).transpose()?;
    let (n, shape) = (rows(x, inner), with_last(x, out));
    let x = x.contiguous()?;
    if !fast(&x) {
        let y = x.reshape((n, inner))?.matmul(&weight.t()?)?;
        return match bias {
            Some(b) => y.broadcast_add(&b)?.reshape(shape),
            None => y.reshape(shape),
        };
    }
    let (xv, wv) = (F32::new(&x)?, F32::new(&weight)?);
    let mut y = match &bias {
        Some(b) => F32::new(b)?.repeat(n),
        None => vec![0f32; n * out],
    };
    gemm(n, out, inner, &mut y, bias.is_some(), Mat::rows(&xv, inner), Mat::rows(&wv, inner).t());
    tensor(y, shape)
}

/// `dy (.., out) weight (out, in)`: the gradient of the input.
///
/// # Errors
/// If shapes do not fit.
pub fn linear_input_grad(dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    if dy.dims().last() != Some(&out) {
        candle_core::bail!("linear backward: gradient {:?}, weight {:?}", dy.dims(), weight.dims());
    }
    let weight = widen(weight, dy.dtype())?;
    let (n, shape) = (rows(dy, out), with_last(dy, inner));
    let dy = dy.contiguous()?;
    if !fast(&dy) {
        return dy.reshape((n, out))?.matmul(&weight)?.reshape(shape);
    }
    let (dyv, wv) = (F32::new(&dy)?, F32::new(&weight)?);
    let mut dx = vec![0f32; n * inner];
    gemm(n, inner, out, &mut dx, false, Mat::rows(&dyv, out), Mat::rows(&wv, inner));
    tensor(dx, shape)
}

/// A frozen linear layer. The weight may be stored narrower than the input's type; it is widened for the call only.
///
/// # Errors
/// If shapes do not fit.
pub fn linear(x: &Value, weight: &Tensor, bias: Option<&Tensor>) -> Result<Value> {
    let out = linear_forward(x.tensor(), weight, bias)?;
    let weight = weight.clone();
    Ok(custom("linear", &[x], out, move |dy| Ok(vec![Some(linear_input_grad(dy, &weight)?)])))
}
