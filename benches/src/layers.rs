//! Every shape of an adapted layer of SDXL: one forward and backward pass by both of our paths, and as LyCORIS does it, which
//! builds W + delta, multiplies by it, and takes the factors' gradients from a full-size dW. All three are our own kernels, so
//! that the difference is the arithmetic's alone.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use lokr::functional::{Path, lokr_conv2d, lokr_linear, merged_weight};
use lokr::{PlannedKind, PlannedModule};
use ops::kernel::{conv2d_forward, conv2d_input_grad, conv2d_weight_grad, linear_forward, linear_input_grad, product};
use ops::{Parameter, Value};
use random::{Purpose, Stream};
use trainer::config::RunConfig;
use trainer::plan::{self, Planned};

use crate::{Result, median};

/// The ways in the order of the table.
pub const WAYS: [Way; 3] = [Way::Lycoris, Way::Ours(Path::Merged), Way::Ours(Path::Factored)];

/// How a layer is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// W + delta as a tensor, the gradient of all of it, then the factors'.
    Lycoris,
    /// One of our paths.
    Ours(Path),
}

/// A layer's shape: (a c) x (b d) with a kernel of side `k` (0: a linear layer).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    /// Side of the kernel; 0 for a linear layer.
    pub k: usize,
    /// Samples times tokens, or output pixels.
    pub rows: usize,
    /// a, b, c, d.
    pub sides: [usize; 4],
    /// Step between output pixels.
    pub stride: usize,
}

impl Shape {
    fn new(module: &PlannedModule, rows: u64) -> Option<Self> {
        let PlannedKind::Lokr { shape, .. } = &module.kind else { return None };
        // The one layer with a stride is the downsampler.
        let stride = if module.path.ends_with(".op") { 2 } else { 1 };
        let k = shape.layer.kernel.map_or(0, |(k, _)| k);
        Some(Self { k, rows: rows as usize, sides: [shape.a, shape.b, shape.c, shape.d], stride })
    }

    fn area(&self) -> usize {
        (self.k * self.k).max(1)
    }

    /// Outputs and inputs.
    pub fn widths(&self) -> [usize; 2] {
        let [a, b, c, d] = self.sides;
        [a * c, b * d]
    }

    /// The layer in words.
    pub fn name(&self) -> String {
        let [out, inp] = self.widths();
        match (self.k, self.stride) {
            (0, _) => format!("linear {inp} to {out}"),
            (k, 1) => format!("conv {k}x{k}, {inp} to {out}"),
            (k, s) => format!("conv {k}x{k}, {inp} to {out}, stride {s}"),
        }
    }

    /// Floating-point operations of a forward and a backward pass, a multiply-add counted as two.
    pub fn flops(&self, way: Way) -> f64 {
        let [a, b, c, d] = self.sides.map(|n| n as f64);
        let rows = self.rows as f64;
        let weight = a * b * c * d * self.area() as f64;
        // Rows of the input: a convolution with a stride reads more pixels than it writes.
        let inputs = rows * (self.stride * self.stride) as f64;
        // The chain's two halves: through w2, and through w1 on the narrower side.
        let through_w2 = rows * a.min(b) * c * d * self.area() as f64;
        let through_w1 = if b <= a { rows * a * b * c } else { inputs * a * b * d };
        let gradients = 2.0 * (through_w2 + through_w1);
        2.0 * match way {
            // Delta, its sum with W, and both factors' gradients from dW; output, dx and dW.
            Way::Lycoris => 3.0 * rows * weight + 4.0 * weight,
            Way::Ours(Path::Merged) => 2.0 * (rows * weight + weight) + gradients,
            // The input gradient shares its half through w1 (or w2) with a factor's.
            Way::Ours(Path::Factored) => 2.0 * rows * weight + 2.0 * through_w2 + through_w1 + gradients,
        }
    }
}

/// A shape, how often the model has it, and the path that is chosen for it.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Shape.
    pub shape: Shape,
    /// Layers of that shape.
    pub count: usize,
    /// The path that is taken where none is forced.
    pub chosen: Path,
}

/// The shapes of a recipe's adapted layers, in the order of kernel, rows and sides.
///
/// # Errors
/// If the recipe cannot be planned.
pub fn cases(config: &RunConfig) -> Result<Vec<Case>> {
    let request = plan::Request { device: plan::Device::named("cpu")?, tflops: None, bandwidth: None };
    let mut cases: BTreeMap<Shape, Case> = BTreeMap::new();
    for Planned { module, rows, path, .. } in plan::plan(config, &request)?.modules {
        let (Some(rows), Some(chosen)) = (rows, path) else { continue };
        let Some(shape) = Shape::new(&module, rows) else { continue };
        cases.entry(shape).or_insert(Case { shape, count: 0, chosen }).count += 1;
    }
    Ok(cases.into_values().collect())
}

/// The tensors of one layer.
struct Layer {
    shape: Shape,
    weight: Tensor,
    x: Parameter,
    factors: [Parameter; 2],
    dy: Tensor,
}

impl Layer {
    fn new(shape: Shape, stored: DType) -> Result<Self> {
        let normal = |index: u64, dims: &[usize], size: f64| {
            let values = Stream::new(0, Purpose::Noise, index, 0).normal(dims.iter().product());
            Tensor::from_vec(values, dims, &Device::Cpu)? * size
        };
        let ([a, b, c, d], [out, inp], k) = (shape.sides, shape.widths(), shape.k);
        let with_kernel = |m: usize, n: usize| if k == 0 { vec![m, n] } else { vec![m, n, k, k] };
        let side = (shape.rows as f64).sqrt().round() as usize;
        let (x, dy) = if k == 0 {
            (vec![shape.rows, inp], vec![shape.rows, out])
        } else {
            (vec![1, inp, side * shape.stride, side * shape.stride], vec![1, out, side, side])
        };
        let fan = 1.0 / ((inp * shape.area()) as f64).sqrt();
        Ok(Self {
            shape,
            weight: normal(0, &with_kernel(out, inp), fan)?.to_dtype(stored)?,
            x: Parameter::new("x", normal(1, &x, 1.0)?),
            factors: [Parameter::new("w1", normal(2, &[a, b], 0.1)?), Parameter::new("w2", normal(3, &with_kernel(c, d), 0.1 * fan)?)],
            dy: normal(4, &dy, 1.0)?,
        })
    }

    fn run(&self, way: Way) -> Result<()> {
        match way {
            Way::Lycoris => self.lycoris()?,
            Way::Ours(path) => self.ours(path)?,
        }
        Ok(())
    }

    fn ours(&self, path: Path) -> candle_core::Result<()> {
        let (x, [w1, w2]) = (self.x.value(), [self.factors[0].value(), self.factors[1].value()]);
        let y: Value = match self.shape.k {
            0 => lokr_linear(&x, &self.weight, None, &w1, &w2, 1.0, Some(path))?,
            k => lokr_conv2d(&x, &self.weight, None, &w1, &w2, 1.0, (self.shape.stride, k / 2), Some(path))?,
        };
        ops::backward(vec![(y, self.dy.clone())])?;
        for parameter in self.factors.iter().chain([&self.x]) {
            std::hint::black_box(parameter.take_grad());
        }
        Ok(())
    }

    /// lycoris/modules/lokr.py `get_weight` and the gradients that autograd makes of it.
    fn lycoris(&self) -> candle_core::Result<()> {
        let (x, [w1, w2], dy) = (self.x.tensor(), [self.factors[0].tensor(), self.factors[1].tensor()], &self.dy);
        let merged = merged_weight(&self.weight, &w1, &w2, 1.0)?;
        let Shape { k, stride, .. } = self.shape;
        let (y, dx, dw) = if k == 0 {
            (linear_forward(&x, &merged, None)?, linear_input_grad(dy, &merged)?, product(dy, true, &x, false)?)
        } else {
            let size = (x.dim(2)?, x.dim(3)?);
            (
                conv2d_forward(&x, &merged, None, stride, k / 2)?,
                conv2d_input_grad(dy, &merged, size, stride, k / 2)?,
                conv2d_weight_grad(&x, dy, (k, k), stride, k / 2)?,
            )
        };
        let [a, b, c, d] = self.shape.sides;
        let rest = c * d * self.shape.area();
        let dw = dw.reshape((a, c, b, d * self.shape.area()))?.transpose(1, 2)?.contiguous()?.reshape((a * b, rest))?;
        let dw1 = dw.matmul(&w2.reshape((rest, 1))?)?;
        let dw2 = w1.reshape((1, a * b))?.matmul(&dw)?;
        std::hint::black_box((y, dx, dw1, dw2));
        Ok(())
    }
}

/// Median seconds of a forward and backward pass of each of [`WAYS`], taken in turn, after one pass each that is not counted.
///
/// # Errors
/// If memory is short.
pub fn time(shape: Shape, stored: DType, runs: usize) -> Result<[f64; 3]> {
    let layer = Layer::new(shape, stored)?;
    let mut times = [const { Vec::new() }; 3];
    for run in 0..=runs {
        for (way, times) in WAYS.into_iter().zip(&mut times) {
            let start = Instant::now();
            layer.run(way)?;
            if run > 0 {
                times.push(start.elapsed().as_secs_f64());
            }
        }
    }
    Ok(times.map(|t| median(&t)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All three ways of a small layer run, and a factor of 8 saves most of the third product.
    #[test]
    fn the_three_ways_run_and_cost_what_their_products_do() {
        for (k, stride) in [(0, 1), (1, 1), (3, 1), (3, 2)] {
            let shape = Shape { k, rows: 16, sides: [8, 8, 4, 2], stride };
            time(shape, DType::F32, 1).expect("runs");
        }
        let large = Shape { k: 0, rows: 4096, sides: [8, 8, 160, 80], stride: 1 };
        let [lycoris, merged, factored] = WAYS.map(|way| large.flops(way));
        let product = 2.0 * 4096.0 * 1280.0 * 640.0;
        assert!((lycoris / product - 3.0).abs() < 0.01 && (merged / product - 2.25).abs() < 0.1, "{lycoris} {merged}");
        assert!(factored > merged && factored < lycoris);
    }
}
