//! One module against LyCORIS: every case of lokr.safetensors, on both paths.

use super::{close, golden};
use crate::functional::Path;
use crate::{Factor, Layer, LokrModule, LokrShape, Multiplier};
use candle_core::{DType, Tensor};
use ops::{Parameter, Value, Weight};
use sdxl::layers::Adapter;

/// The bound that golden/README.md gives for f32 sums in another order.
const TOLERANCE: f32 = 2e-5;

fn module(case: &golden::Case, tensors: &std::collections::BTreeMap<String, Tensor>, path: Option<Path>) -> LokrModule {
    let shape = LokrShape::new(case.layer, &case.options);
    let value = |factor: Factor| tensors[&format!("{}.{}", case.id, factor.key())].clone();
    let values = shape.tensors().into_iter().map(|(f, _)| (f, value(f))).collect();
    LokrModule::from_values(case.id.clone(), shape, values).with_path(path).with_multiplier(Multiplier::new(case.multiplier))
}

fn run(module: &LokrModule, case: &golden::Case, x: &Value, weight: &Tensor, bias: Option<&Tensor>) -> Value {
    let weight = &Weight::from(weight);
    let out = if case.layer.kernel.is_some() {
        module.conv2d(x, weight, bias, case.stride, case.padding)
    } else {
        module.linear(x, weight, bias)
    };
    out.expect("runs")
}

#[test]
fn outputs_and_gradients_of_every_case_on_both_paths() {
    let tensors = golden::tensors("lokr.safetensors");
    let mut checked = 0;
    for case in golden::cases() {
        for path in [None, Some(Path::Merged), Some(Path::Factored)] {
            let get = |key: &str| tensors.get(&format!("{}.{key}", case.id));
            let need = |key: &str| get(key).unwrap_or_else(|| panic!("{}.{key}", case.id));
            let what = |key: &str| format!("case {} {key} {path:?}", case.id);
            let module = module(&case, &tensors, path);
            let x = Parameter::new("x", need("x").clone());
            let out = run(&module, &case, &x.value(), need("weight"), get("bias"));
            close(out.tensor(), need("out"), TOLERANCE, &what("out"));
            ops::backward(vec![(out, need("grad_out").clone())]).expect("runs backward");
            close(&x.grad().expect("a gradient"), need("grad_x"), TOLERANCE, &what("grad_x"));
            for (factor, parameter) in module.factors() {
                let key = format!("grad_{}", factor.key());
                close(&parameter.grad().expect("a gradient"), need(&key), TOLERANCE, &what(&key));
                checked += 1;
            }
            // The recorded merge includes the multiplier.
            close(&module.merge(need("weight"), case.multiplier).expect("merges"), need("merged"), TOLERANCE, &what("merged"));
        }
    }
    // Two factors a case; seven low-rank w2, one of them with a core, and one low-rank w1 have a tensor more.
    assert_eq!(checked, 3 * (26 * 2 + 7 + 1 + 1), "every factor of every case");
}

#[test]
fn a_weight_in_half_precision_is_widened_and_gets_no_rounding_of_the_sum() {
    let tensors = golden::tensors("lokr.safetensors");
    for case in golden::cases() {
        for (dtype, path) in [(DType::F16, Path::Merged), (DType::F16, Path::Factored), (DType::BF16, Path::Merged)] {
            let weight = tensors[&format!("{}.weight", case.id)].to_dtype(dtype).expect("a type");
            let wide = weight.to_dtype(DType::F32).expect("a type");
            let module = module(&case, &tensors, Some(path));
            let x = Value::constant(tensors[&format!("{}.x", case.id)].clone());
            let narrow_out = run(&module, &case, &x, &weight, None);
            let wide_out = run(&module, &case, &x, &wide, None);
            close(narrow_out.tensor(), wide_out.tensor(), TOLERANCE, &format!("case {} {dtype:?} {path:?}", case.id));
        }
    }
}

/// In f16 the chain stays: a delta under half a unit in the last place of the weight must still act.
#[test]
fn a_small_delta_acts_in_half_precision() {
    let device = &candle_core::Device::Cpu;
    let ones = |dims: &[usize]| Tensor::ones(dims, DType::F32, device).expect("ones");
    let weight = ones(&[64, 64]).to_dtype(DType::F16).expect("f16");
    // Signs alternate along the inputs and along w2's columns: the base output is 0, the delta's 64 * 1e-4.
    let signs = |n: usize| Tensor::from_vec((0..n).map(|i| if i % 2 == 0 { 1f32 } else { -1.0 }).collect(), n, device).expect("signs");
    let x = signs(64).broadcast_as((256, 64)).and_then(|x| x.to_dtype(DType::F16)).and_then(|x| x.contiguous()).expect("f16");
    let w2 = (signs(8) * 1e-4).and_then(|w| w.broadcast_as((8, 8))?.contiguous()).expect("w2");
    let (x, w1, w2) = (Value::constant(x), Value::constant(ones(&[8, 8])), Value::constant(w2));
    let mean = |path| {
        let y = crate::functional::lokr_linear(&x, &weight, None, &w1, &w2, 1.0, path).expect("runs");
        y.tensor().to_dtype(DType::F32).and_then(|y| y.mean_all()).and_then(|y| y.to_scalar::<f32>()).expect("a number")
    };
    // 1e-4 is less than half of f16's step below 1 (2^-11): the merged weight has lost it.
    assert_eq!(mean(Some(Path::Merged)), 0.0);
    // Rounded to f16 a few times, 2^-11 each.
    assert!((mean(Some(Path::Factored)) - 64e-4).abs() < 64e-4 * 2e-3, "{}", mean(Some(Path::Factored)));
    assert_eq!(Path::choose(256, [8, 8, 8, 8], 1, DType::F16, DType::F16), Path::Factored);
}

/// A scale far from 1 with factors that make up for it: what stands between the factors would pass f16's 65504 if a large scale came
/// first, and the gradient of w2, summed over many rows, if a small one came last.
#[test]
fn no_scale_overflows_inside_the_chain_in_f16() {
    let device = &candle_core::Device::Cpu;
    let random = |n: u64, dims: &[usize], size: f64| {
        let values = random::Stream::new(n, random::Purpose::Noise, 0, 0).normal(dims.iter().product());
        (Tensor::from_vec(values, dims, device).expect("a tensor") * size).expect("scaled")
    };
    let half = |t: &Tensor| t.to_dtype(DType::F16).expect("f16");
    let full = |t: &Tensor| t.to_dtype(DType::F32).expect("f32");
    let conv = Layer::Conv2d { stride: 1, padding: 1 };
    // Both orders of the chain: b <= a and a < b.
    for ((a, b), layer) in [(4, 2), (2, 4)].into_iter().flat_map(|sides| [(sides, Layer::Linear), (sides, conv)]) {
        for (scale, size1, size2, rows) in [(1.0, 1.0, 1e-2, 64), (256.0, 4.0, 1e-4, 64), (1.0 / 256.0, 4.0, 10.0, 4096)] {
            let side = f64::from(rows).sqrt() as usize;
            let (kernel, places) = if layer == conv { (vec![3, 3], side * side) } else { (vec![], rows as usize) };
            let at = |channels| if layer == conv { vec![1, channels, side, side] } else { vec![places, channels] };
            let with_kernel = |out, inp| [vec![out, inp], kernel.clone()].concat();
            let (w1, w2) = (half(&random(1, &[a, b], size1)), half(&random(2, &with_kernel(8, 8), size2)));
            let (x, dy) = (half(&random(3, &at(b * 8), 30.0)), half(&random(4, &at(a * 8), 6.0)));
            let weight = Tensor::zeros(with_kernel(a * 8, b * 8), DType::F16, device).expect("zeros");
            let run = |compute: DType| {
                let (x, w1, w2) = (Parameter::new("x", full(&x)), Parameter::new("w1", full(&w1)), Parameter::new("w2", full(&w2)));
                let xv = ops::to_dtype(&x.value(), compute).expect("a type");
                let path = Some(Path::Factored);
                let y = crate::functional::adapted(layer, &xv, &weight, None, &w1.value(), &w2.value(), scale, path).expect("runs");
                let out = full(y.tensor());
                ops::backward(vec![(y, dy.to_dtype(compute).expect("a type"))]).expect("runs backward");
                [Some(out), x.grad(), w1.grad(), w2.grad()].map(|t| t.expect("a gradient"))
            };
            let (got, want) = (run(DType::F16), run(DType::F32));
            for (name, (got, want)) in ["y", "dx", "dw1", "dw2"].iter().zip(got.iter().zip(&want)) {
                // Up to four roundings of 2^-11 each, relative to the largest value.
                close(got, want, 2e-3, &format!("{name} at scale {scale}, {a}x{b}, {layer:?}"));
            }
            // The case is one: without the scale the sum would pass f16's range.
            if scale < 1.0 {
                let largest = want[3].abs().and_then(|t| t.max_all()?.to_scalar::<f32>()).expect("a number");
                assert!(f64::from(largest) / scale > 65504.0, "{largest}");
            }
        }
    }
}

#[test]
fn at_multiplier_nought_the_layer_is_the_base_layer() {
    let tensors = golden::tensors("lokr.safetensors");
    for case in golden::cases() {
        let (weight, x) = (&tensors[&format!("{}.weight", case.id)], &tensors[&format!("{}.x", case.id)]);
        let module = module(&case, &tensors, None).with_multiplier(Multiplier::new(0.0));
        let out = run(&module, &case, &Value::constant(x.clone()), weight, None);
        let layer = match case.layer.kernel {
            Some(_) => Layer::Conv2d { stride: case.stride, padding: case.padding },
            None => Layer::Linear,
        };
        let base = layer.forward(x, weight, None).expect("runs");
        assert_eq!(super::difference(out.tensor(), &base), 0.0, "case {}", case.id);
    }
}

#[test]
fn the_scalar_starts_at_nought_and_is_the_only_one_to_move_first() {
    let options = crate::LokrOptions { dim: 4, factor: 4, full_matrix: true, ..Default::default() };
    let shape = LokrShape::new(crate::LayerShape::linear(32, 48), &options);
    let device = &candle_core::Device::Cpu;
    let module = LokrModule::init("m".into(), shape, true, 1, 0, device).expect("made");
    let random = |n: u64, dims: (usize, usize)| {
        let values = random::Stream::new(n, random::Purpose::Noise, 0, 0).normal(dims.0 * dims.1);
        Tensor::from_vec(values, dims, device).expect("a tensor")
    };
    let (weight, x) = (random(1, (32, 48)), random(2, (5, 48)));
    let out = module.linear(&Value::constant(x.clone()), &Weight::from(&weight), None).expect("runs");
    let base = Layer::Linear.forward(&x, &weight, None).expect("runs");
    close(out.tensor(), &base, 1e-6, "the base layer's output");
    ops::backward(vec![(out, random(3, (5, 32)))]).expect("runs backward");
    let size = |p: &Parameter| p.grad().and_then(|g| g.abs().ok()?.sum_all().ok()?.to_scalar::<f32>().ok()).expect("a gradient");
    for (factor, parameter) in module.factors() {
        assert_eq!(size(parameter), 0.0, "{factor:?}");
    }
    assert!(size(module.scalar().expect("a scalar")) > 1e-3);
}
