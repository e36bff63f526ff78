//! The adapted layer as a function of its factors: y = op(x, W + scale * kron(w1, w2)) + bias, with hand-written gradients.
//!
//! With x as (rows, b, d) and dY as (rows, a, c) the gradients of the factors never pass through a full-size dW:
//! T = w1^T dY, dw2 = sum T^T x, U = x w2^T, dw1 = sum dY U^T. Where a < b the other order of the same sums is cheaper:
//! S = w1 x, dw2 = sum dY^T S, V = dY w2, dw1 = sum V x^T. Either way two products of 1/max(a, b) of the layer's own, and for
//! convolutions the same with w2 as a kernel and the groups as samples.
//!
//! The low-rank and tucker forms are not known here: `module.rs` builds w1 and w2 from their tensors on the tape. A form
//! that a reader can check against the formula is `reference.rs`.

use crate::kernel::{Layer, kron, merge};
use candle_core::{DType, Result, Tensor};
use ops::kernel::{Delta, Frozen, fuses, mix, mix_grad, mix_onto, mixes_bias, sum, together};
use ops::{Value, Weight};

/// How the forward pass and the input gradient are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// One product with W + delta. In f32 on the CPU the sum is formed line by line while the weight is packed for the product;
    /// elsewhere it is built for the call and dropped.
    Merged,
    /// The product with W, plus the chain through both factors.
    Factored,
}

/// Multiply-adds in whose time one element of W + delta is formed while the weight is packed. Both numbers are measured: `cargo run
/// --release -p benches --bin layers` times both paths of every layer shape of SDXL (docs/benchmarks.md). Without rows to speak of, W +
/// delta costs 0.5 ns an element more than W on AVX2, which does 28 multiply-adds in a nanosecond.
const MERGE_COST: u128 = 15;
/// Multiply-adds in whose time an element of the chain's results is written, mixed and added: 3.7 ns there, what is left of the
/// difference between the paths at 77 to 256 rows after the products' own multiply-adds.
const MIX_COST: u128 = 100;

impl Path {
    /// The cheaper path for `rows` rows, a layer of a*c outputs and b*d*area inputs, `area` the kernel's.
    ///
    /// In half precision always the chain: W + delta would be rounded to the weight's type, where a delta under half a unit
    /// in the last place is lost (2^-11 of the weight in f16), as it is in LyCORIS 3.3 and later. A weight that is stored narrower
    /// than f32 is widened line by line anyway; adding delta to the line then costs half.
    pub fn choose(rows: usize, [a, b, c, d]: [usize; 4], area: usize, compute: DType, stored: DType) -> Self {
        if compute != DType::F32 {
            return Self::Factored;
        }
        let [rows, a, b, c, d, area] = [rows, a, b, c, d, area].map(|n| n as u128);
        let elements = a * b * c * d * area;
        let merged = elements * if stored == DType::F32 { MERGE_COST } else { MERGE_COST / 2 };
        let factored = rows * (a.min(b) * c * d * area + (a * c + b * d) * MIX_COST);
        if merged < factored { Self::Merged } else { Self::Factored }
    }
}

/// `scale * kron(w1, w2)` in f32: what the adapter adds to the weight.
///
/// # Errors
/// If the shapes are no factors.
pub fn delta(w1: &Tensor, w2: &Tensor, scale: f64) -> Result<Tensor> {
    kron(&(w1.to_dtype(DType::F32)? * scale)?, &w2.to_dtype(DType::F32)?)
}

/// `weight + scale * kron(w1, w2)` in f32, the scale applied once (LyCORIS's own merge applies it twice).
///
/// # Errors
/// If the shapes do not fit.
pub fn merged_weight(weight: &Tensor, w1: &Tensor, w2: &Tensor, scale: f64) -> Result<Tensor> {
    merge(weight, w1, w2, scale)
}

/// The adapted linear layer: x (.., b*d), weight (a*c, b*d), bias (a*c), w1 (a, b), w2 (c, d) to (.., a*c).
///
/// # Errors
/// If the shapes do not fit.
pub fn lokr_linear(
    x: &Value,
    weight: impl Into<Weight>,
    bias: Option<&Tensor>,
    w1: &Value,
    w2: &Value,
    scale: f64,
    path: Option<Path>,
) -> Result<Value> {
    adapted(Layer::Linear, x, weight, bias, w1, w2, scale, path)
}

/// The adapted convolution: x (n, b*d, h, w), weight (a*c, b*d, kh, kw), w1 (a, b), w2 (c, d, kh, kw).
///
/// # Errors
/// If the shapes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn lokr_conv2d(
    x: &Value,
    weight: impl Into<Weight>,
    bias: Option<&Tensor>,
    w1: &Value,
    w2: &Value,
    scale: f64,
    (stride, padding): (usize, usize),
    path: Option<Path>,
) -> Result<Value> {
    adapted(Layer::Conv2d { stride, padding }, x, weight, bias, w1, w2, scale, path)
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn adapted(
    layer: Layer,
    x: &Value,
    weight: impl Into<Weight>,
    bias: Option<&Tensor>,
    w1: &Value,
    w2: &Value,
    scale: f64,
    path: Option<Path>,
) -> Result<Value> {
    let mut op = Op::new(layer, x.tensor(), weight.into(), w1.tensor(), w2.tensor(), scale, path)?;
    let out = op.forward(x.tensor(), bias)?;
    op.need = [x.requires_grad(), w1.requires_grad(), w2.requires_grad()];
    let x_saved = x.tensor().clone();
    Ok(ops::custom("lokr", &[x, w1, w2], out, move |dy| op.backward(&x_saved, dy)))
}

/// One call: what forward and backward share.
struct Op {
    layer: Layer,
    path: Path,
    scale: f64,
    weight: Weight,
    w1: Tensor,
    w2: Tensor,
    /// a, b
    sides: [usize; 2],
    /// Whether x, w1, w2 need a gradient.
    need: [bool; 3],
}

impl Op {
    fn new(layer: Layer, x: &Tensor, weight: Weight, w1: &Tensor, w2: &Tensor, scale: f64, path: Option<Path>) -> Result<Self> {
        let (a, b) = w1.dims2()?;
        let (c, d, area) = match w2.dims() {
            [c, d, kernel @ ..] => (*c, *d, kernel.iter().product::<usize>()),
            dims => candle_core::bail!("w2 of shape {dims:?}"),
        };
        let fits = weight.dims().get(..2) == Some(&[a * c, b * d]) && weight.dims().get(2..) == w2.dims().get(2..);
        if !fits {
            candle_core::bail!("weight {:?} is not w1 {:?} by w2 {:?}", weight.dims(), w1.dims(), w2.dims());
        }
        let rows = layer.rows(x.dims());
        let path = path.unwrap_or_else(|| Path::choose(rows, [a, b, c, d], area, x.dtype(), weight.dtype()));
        let (w1, w2) = (w1.clone(), w2.clone());
        Ok(Self { layer, path, scale, weight, w1, w2, sides: [a, b], need: [false; 3] })
    }

    /// Runs `f` on W + delta, for inputs like `x`.
    fn with_merged<T>(&self, x: &Tensor, f: impl FnOnce(Frozen) -> Result<T>) -> Result<T> {
        if fuses(x) {
            let (w1, w2) = (scaled(&self.w1, self.scale, DType::F32)?, self.w2.to_dtype(DType::F32)?.contiguous()?);
            return f(Frozen { weight: self.weight.clone(), delta: Some(Delta { w1: &w1, w2: &w2 }) });
        }
        let merged = merge(&self.weight.tensor()?, &self.w1, &self.w2, self.scale)?.to_dtype(x.dtype())?;
        f(Frozen::from(&merged))
    }

    /// w1 in f32 and w2 in the type of the computation, without the scale.
    fn factors(&self, compute: DType) -> Result<(Tensor, Tensor)> {
        Ok((self.w1.to_dtype(DType::F32)?, self.w2.to_dtype(compute)?.contiguous()?))
    }

    fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (layer, [a, b]) = (self.layer, self.sides);
        if self.path == Path::Merged {
            return self.with_merged(x, |weight| layer.forward(x, weight, bias));
        }
        let later = bias.filter(|_| b <= a && mixes_bias(x));
        let n = layer.samples(x);
        let (w1, w2) = self.factors(x.dtype())?;
        let base = || layer.forward(x, &self.weight, bias.filter(|_| later.is_none()));
        let chain = || {
            if b <= a {
                return layer.forward(&layer.split(x, b)?, &w2, None);
            }
            let s = mix(&w1, 1.0, &layer.grouped(x, n, b)?)?;
            layer.forward(&self.as_samples(&s, a, x)?, &scaled(&self.w2, self.scale, x.dtype())?, None)
        };
        let (base, chain) = together(x, base, chain);
        let (base, chain) = (base?, chain?);
        if b <= a {
            let bias = later.map(|bias| (bias, base.elem_count() / (n * bias.elem_count()).max(1)));
            return mix_onto(&base, bias, &w1, self.scale, &layer.grouped(&chain, n, b)?);
        }
        sum(&base, &chain.reshape(base.shape())?)
    }

    /// The groups of `s (n, g, rest)` as samples, with the places of `like`.
    fn as_samples(&self, s: &Tensor, groups: usize, like: &Tensor) -> Result<Tensor> {
        let (n, _, rest) = s.dims3()?;
        match (self.layer, like.dims()) {
            (Layer::Conv2d { .. }, &[.., h, w]) => s.reshape((n * groups, rest / (h * w), h, w)),
            _ => s.reshape((n * groups, rest)),
        }
    }

    fn backward(self, x: &Tensor, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let dy = dy.contiguous()?;
        let base = || match self.path {
            Path::Merged => self.with_merged(x, |weight| self.layer.input_grad(&dy, weight, x.dims())),
            Path::Factored => self.layer.input_grad(&dy, &self.weight, x.dims()),
        };
        let base = || self.need[0].then(base).transpose();
        let (base, chain) = together(x, base, || self.chain_backward(x, &dy));
        let (base, [chain, dw1, dw2]) = (base?, chain?);
        let dx = match (base, chain) {
            (Some(base), Some(chain)) => Some(sum(&base.reshape(x.shape())?, &chain.reshape(x.shape())?)?),
            (base, _) => base.map(|base| base.reshape(x.shape())).transpose()?,
        };
        Ok(vec![dx, dw1, dw2])
    }

    /// The gradients of w1 and w2, and on the factored path what the chain adds to the input's gradient, whose first half is shared with a
    /// factor's: dx, dw1, dw2.
    fn chain_backward(&self, x: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let (layer, [a, b], [need_x, need_w1, need_w2]) = (self.layer, self.sides, self.need);
        let n = layer.samples(x);
        let (w1, w2) = self.factors(x.dtype())?;
        let (early, late) = if self.scale.abs() < 1.0 { (self.scale, 1.0) } else { (1.0, self.scale) };
        let dy_groups = layer.grouped(dy, n, a)?;
        let chain_x = need_x && self.path == Path::Factored;
        let (mut dx, mut dw1, mut dw2) = (None, None, None);
        if b <= a {
            let xs = if need_w1 || need_w2 { Some(layer.split(x, b)?) } else { None };
            let t = if need_w2 || chain_x { Some(self.as_samples(&mix(&w1.t()?, early, &dy_groups)?, b, dy)?) } else { None };
            if let (true, Some(xs)) = (need_w1, &xs) {
                let u = layer.forward(xs, &w2, None)?;
                dw1 = Some(times(mix_grad(&dy_groups, &layer.grouped(&u, n, b)?)?, self.scale)?);
            }
            if let (true, Some(xs), Some(t)) = (need_w2, &xs, &t) {
                dw2 = Some(times(layer.weight_grad(xs, t, w2.dims())?.to_dtype(DType::F32)?, late)?);
            }
            if let (true, Some(t)) = (chain_x, &t) {
                dx = Some(layer.input_grad(t, &scaled(&self.w2, late, x.dtype())?, x.dims())?);
            }
        } else {
            let dys = layer.split(dy, a)?;
            let x_groups = layer.grouped(x, n, b)?;
            if need_w2 {
                let s = self.as_samples(&mix(&w1, early, &x_groups)?, a, x)?;
                dw2 = Some(times(layer.weight_grad(&s, &dys, w2.dims())?.to_dtype(DType::F32)?, late)?);
            }
            if need_w1 || chain_x {
                let v = layer.grouped(&layer.input_grad(&dys, &w2, x.dims())?, n, a)?;
                if need_w1 {
                    dw1 = Some(times(mix_grad(&v, &x_groups)?, self.scale)?);
                }
                if chain_x {
                    dx = Some(mix(&w1.t()?, self.scale, &v)?);
                }
            }
        }
        Ok([dx, dw1, dw2])
    }
}

/// A factor times a scale in the type of the computation, rounded after the product. A scale above 1 enters every chain with the last
/// factor, and gradients of factors after the last product, in f32: in f16 it makes nothing between them overflow. A scale below 1 does
/// so too in the forward pass, where a sum has the columns of w2; the gradient of w2, a sum over all rows of a batch, has it in its summands.
fn scaled(factor: &Tensor, scale: f64, compute: DType) -> Result<Tensor> {
    times(factor.to_dtype(DType::F32)?, scale)?.to_dtype(compute)?.contiguous()
}

fn times(t: Tensor, scale: f64) -> Result<Tensor> {
    if scale == 1.0 { Ok(t) } else { t * scale }
}
