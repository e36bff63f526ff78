//! The frozen linear layer: an input gradient, never a weight gradient.

use crate::basic::add_over;
use crate::gemm::{gemm, gemm_from};
use crate::mapped::Weight;
use crate::pack::Operand;
use crate::tape::{Value, custom};
use crate::view::{F32, fast, tensor};
use crate::weight::{Frozen, Held, stored};
use candle_core::{DType, Result, Tensor};

/// A frozen weight in the type that the computation uses: the tensor itself where that is its type already. A weight of type u8 holds the
/// codes of [`crate::e4m3_codes`].
///
/// # Errors
/// If the conversion does not exist.
pub fn widen(weight: &Tensor, compute: DType) -> Result<Tensor> {
    match weight.dtype() {
        dtype if dtype == compute => weight.contiguous(),
        DType::U8 => crate::e4m3::widen_codes(weight, compute),
        _ => weight.to_dtype(compute),
    }
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

/// `x (.., in) weight (out, in)^T + bias (out)`. A delta is added to the weight on the way (f32 on the CPU only).
///
/// # Errors
/// If shapes do not fit.
pub fn linear_forward<'a>(x: &Tensor, weight: impl Into<Frozen<'a>>, bias: Option<&Tensor>) -> Result<Tensor> {
    let Frozen { weight, delta } = weight.into();
    let (out, inner) = weight.dims2()?;
    if x.dims().last() != Some(&inner) {
        candle_core::bail!("linear: input {:?}, weight {:?}", x.dims(), weight.dims());
    }
    let bias = bias.map(|b| widen(b, x.dtype())).transpose()?;
    let (n, shape) = (rows(x, inner), with_last(x, out));
    let x = x.contiguous()?;
    if !fast(&x) {
        let y = x.reshape((n, inner))?.matmul(&weight.widened(x.dtype())?.t()?)?;
        return match bias {
            Some(b) => add_over(&y, &b, 1, out)?.reshape(shape),
            None => y.reshape(shape),
        };
    }
    let weight = stored(weight)?;
    let held = Held::new(&weight, delta)?;
    let (xv, lines) = (F32::new(&x)?, held.lines()?);
    let bias = bias.as_ref().map(F32::new).transpose()?;
    tensor(gemm_from(n, out, inner, Operand::rows(&xv, inner), Operand::weight_rows(&lines, inner), bias.as_deref()), shape)
}

/// `dy (.., out) weight (out, in)`: the gradient of the input. A delta is added to the weight on the way (f32 on the CPU only).
///
/// # Errors
/// If shapes do not fit.
pub fn linear_input_grad<'a>(dy: &Tensor, weight: impl Into<Frozen<'a>>) -> Result<Tensor> {
    let Frozen { weight, delta } = weight.into();
    let (out, inner) = weight.dims2()?;
    if dy.dims().last() != Some(&out) {
        candle_core::bail!("linear backward: gradient {:?}, weight {:?}", dy.dims(), weight.dims());
    }
    let (n, shape) = (rows(dy, out), with_last(dy, inner));
    let dy = dy.contiguous()?;
    if !fast(&dy) {
        return dy.reshape((n, out))?.matmul(&weight.widened(dy.dtype())?)?.reshape(shape);
    }
    let weight = stored(weight)?;
    let held = Held::new(&weight, delta)?;
    let (dyv, lines) = (F32::new(&dy)?, held.lines()?);
    tensor(gemm(n, inner, out, Operand::rows(&dyv, out), Operand::weight_columns(&lines, inner, 0)), shape)
}

/// A frozen linear layer. The weight may be stored narrower than the input's type; it is widened for the call only.
///
/// # Errors
/// If shapes do not fit.
pub fn linear(x: &Value, weight: impl Into<Weight>, bias: Option<&Tensor>) -> Result<Value> {
    let weight = weight.into();
    let out = linear_forward(x.tensor(), &weight, bias)?;
    Ok(custom("linear", &[x], out, move |dy| Ok(vec![Some(linear_input_grad(dy, &weight)?)])))
}
