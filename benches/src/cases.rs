//! The single ops to measure, at the shapes of SDXL's first levels, each under the name that `benches/torch/ops.py` gives
//! its own.

use candle_core::{Device, Tensor};
use ops::{Parameter, Value, kernel};
use optim::{Hyper, Optimizer, OptimizerKind};
use random::{Purpose, Stream};
use rayon::prelude::*;

use crate::Result;

/// Elements of the tensor that Lion8bit steps and of the one that is copied: 512 MiB of f32, more than a server's cache holds.
const LARGE: usize = 1 << 27;

/// What one run of a case works through.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Floating-point operations, a multiply-add counted as two.
    Flops(u64),
    /// Bytes that must move between memory and core.
    Bytes(u64),
}

impl Work {
    /// Thousand millions per second.
    pub fn rate(self, seconds: f64) -> f64 {
        let (Self::Flops(n) | Self::Bytes(n)) = self;
        n as f64 / seconds / 1e9
    }

    /// What is counted.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Flops(_) => "gflops",
            Self::Bytes(_) => "gbytes_per_s",
        }
    }
}

/// One thing to be timed.
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// What a run works through.
    pub work: Work,
    /// One run.
    pub run: Box<dyn FnMut() -> Result<()>>,
}

fn normal(shape: &[usize]) -> Result<Tensor> {
    let values = Stream::new(0, Purpose::Noise, shape.len() as u64, 0).normal(shape.iter().product());
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// A plain function of tensors.
fn plain<T>(name: &'static str, work: Work, mut run: impl FnMut() -> candle_core::Result<T> + 'static) -> Case {
    let run = Box::new(move || {
        std::hint::black_box(run()?);
        Ok(())
    });
    Case { name, work, run }
}

/// Forward without recording, and forward with backward to all `inputs`.
fn pair(
    names: [&'static str; 2],
    work: [Work; 2],
    inputs: &[Tensor],
    f: impl Fn(&[Value]) -> candle_core::Result<Value> + Clone + 'static,
) -> Result<[Case; 2]> {
    let constants: Vec<Value> = inputs.iter().map(|t| Value::constant(t.clone())).collect();
    let gradient = normal(f(&constants)?.dims())?;
    let parameters: Vec<Parameter> = inputs.iter().map(|t| Parameter::new("input", t.clone())).collect();
    let both = {
        let f = f.clone();
        move || {
            let values: Vec<Value> = parameters.iter().map(Parameter::value).collect();
            ops::backward(vec![(f(&values)?, gradient.clone())])?;
            parameters.iter().for_each(Parameter::zero_grad);
            Ok(())
        }
    };
    Ok([plain(names[0], work[0], move || f(&constants)), plain(names[1], work[1], both)])
}

/// All cases; large tensors are made when the list is.
///
/// # Errors
/// If memory is short.
pub fn all() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    let (x, w) = (normal(&[1024, 2048])?, normal(&[2048, 2048])?);
    let flops = Work::Flops(2 * 1024 * 2048 * 2048);
    cases.push(plain("matmul_1024x2048x2048", flops, move || kernel::linear_forward(&x, &w, None)));

    for (names, gradient, c, side) in [
        (["conv3x3_320_64_forward", "conv3x3_320_64_both"], "conv3x3_320_64_input_grad", 320usize, 64usize),
        (["conv3x3_320_16_forward", "conv3x3_320_16_both"], "conv3x3_320_16_input_grad", 320, 16),
        (["conv3x3_640_8_forward", "conv3x3_640_8_both"], "conv3x3_640_8_input_grad", 640, 8),
    ] {
        let (x, w) = (normal(&[1, c, side, side])?, normal(&[c, c, 3, 3])?);
        let flops = (2 * 9 * c * c * side * side) as u64;
        let (dy, frozen) = (x.clone(), w.clone());
        cases.push(plain(gradient, Work::Flops(flops), move || kernel::conv2d_input_grad(&dy, &frozen, (side, side), 1, 1)));
        cases.extend(pair(names, [Work::Flops(flops), Work::Flops(2 * flops)], &[x], move |v| ops::conv2d(&v[0], &w, None, 1, 1))?);
    }

    let x = normal(&[1, 1024, 640])?;
    let flops = 4 * 1024 * 1024 * 640;
    let names = ["attention_10x1024x64_forward", "attention_10x1024x64_both"];
    cases.extend(pair(names, [Work::Flops(flops), Work::Flops(7 * flops / 2)], &[x.clone(), x.clone(), x.clone()], |v| {
        ops::attention(&v[0], &v[1], &v[2], 10, false)
    })?);
    let context = normal(&[1, 77, 640])?;
    let flops = 4 * 1024 * 77 * 640;
    let names = ["attention_10x1024x77x64_forward", "attention_10x1024x77x64_both"];
    cases.extend(pair(names, [Work::Flops(flops), Work::Flops(7 * flops / 2)], &[x.clone(), context.clone(), context], |v| {
        ops::attention(&v[0], &v[1], &v[2], 10, false)
    })?);

    let ones = |c: usize| -> Result<Value> { Ok(Value::constant(Tensor::ones(c, candle_core::DType::F32, &Device::Cpu)?)) };
    let picture = normal(&[1, 320, 64, 64])?;
    // Once in and out; the backward pass reads x and dy and writes dx.
    let moved = |t: &Tensor| 4 * t.elem_count() as u64;
    let traffic = |t: &Tensor| [Work::Bytes(2 * moved(t)), Work::Bytes(5 * moved(t))];
    let (weight, bias) = (ones(320)?, ones(320)?);
    cases.extend(pair(
        ["group_norm_silu_320_64_forward", "group_norm_silu_320_64_both"],
        traffic(&picture),
        std::slice::from_ref(&picture),
        move |v| ops::group_norm(&v[0], &weight, &bias, 32, 1e-5, true),
    )?);
    let (weight, bias) = (ones(640)?, ones(640)?);
    cases.extend(pair(["layer_norm_1024x640_forward", "layer_norm_1024x640_both"], traffic(&x), std::slice::from_ref(&x), move |v| {
        ops::layer_norm(&v[0], &weight, &bias, 1e-5)
    })?);
    let wide = normal(&[1, 1024, 5120])?;
    let bytes = moved(&wide);
    let work = [Work::Bytes(bytes * 3 / 2), Work::Bytes(bytes * 4)];
    cases.extend(pair(["geglu_1024x5120_forward", "geglu_1024x5120_both"], work, &[wide], |v| ops::geglu(&v[0]))?);
    cases.extend(large()?);
    Ok(cases)
}

/// Lion8bit's step, and the plain copy that it is measured by.
fn large() -> Result<[Case; 2]> {
    let gradient = Stream::new(0, Purpose::Noise, 0, 1).normal(LARGE);
    let mut weights = Stream::new(0, Purpose::Noise, 0, 2).normal(LARGE);
    let hyper = Hyper { betas: (0.9, 0.95), weight_decay: 0.1, eps: 0.0 };
    let mut optimizer = Optimizer::new(OptimizerKind::Lion8bit, hyper, &[LARGE]);
    let source = gradient.clone();
    let step = move || {
        optimizer.step(0, &mut weights, &gradient, 2e-5);
        Ok(())
    };
    let mut target = vec![0f32; LARGE];
    let copy = move || {
        target.par_chunks_mut(1 << 16).zip(source.par_chunks(1 << 16)).for_each(|(to, from)| to.copy_from_slice(from));
        std::hint::black_box(&mut target);
        Ok(())
    };
    let n = LARGE as u64;
    // Weight and code in and out, gradient in, and an absmax of four bytes in and out for each 256.
    let lion = Work::Bytes(n * (8 + 2 + 4) + n / 256 * 8);
    Ok([plain("lion8bit_128m", lion, step), plain("copy_512mib", Work::Bytes(8 * n), copy)])
}
