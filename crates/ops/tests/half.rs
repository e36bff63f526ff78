//! Every op in f16 and bf16, forward and backward, against f32 on the same rounded inputs.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use common::randn;
use ops::{Parameter, Value};

fn flat(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest relative rounding error of a type.
fn unit(dtype: DType) -> f32 {
    if dtype == DType::F16 { 1.0 / 2048.0 } else { 1.0 / 256.0 }
}

type Op<'a> = dyn Fn(&[Value]) -> Result<Value> + 'a;

/// Output and gradients of `op` in each half type against f32. `roundings` is how many times a result or a term of it is rounded to the
/// type; errors are relative to the tensor's largest value. Inputs after the first `wide` stay f32, as norms' weights do.
fn check(name: &str, shapes: &[&[usize]], wide: usize, roundings: f32, op: &Op<'_>) {
    for dtype in [DType::F16, DType::BF16] {
        // Rounded to the type first, so that both runs start from the same numbers.
        let round = |t: Tensor| t.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
        let inputs: Vec<Tensor> = shapes.iter().enumerate().map(|(i, s)| round(randn(s, i as u64 + 1))).collect();
        let run = |compute: DType| {
            let params: Vec<Parameter> = inputs.iter().map(|t| Parameter::new("p", t.clone())).collect();
            let cast = |(i, p): (usize, &Parameter)| if i < wide { ops::to_dtype(&p.value(), compute).unwrap() } else { p.value() };
            let y = op(&params.iter().enumerate().map(cast).collect::<Vec<_>>()).unwrap();
            assert_eq!(y.tensor().dtype(), compute, "{name}: the output has the type of the input");
            let dy = round(randn(y.dims(), 99)).to_dtype(compute).unwrap();
            let out = y.tensor().clone();
            ops::backward(vec![(y, dy)]).unwrap();
            let grads: Vec<Tensor> = params.iter().map(|p| p.grad().unwrap()).collect();
            assert!(grads.iter().all(|g| g.dtype() == DType::F32), "{name}: parameters' gradients are f32");
            (out, grads)
        };
        let ((half, half_grads), (full, full_grads)) = (run(dtype), run(DType::F32));
        let all = std::iter::once((&half, &full)).chain(half_grads.iter().zip(&full_grads));
        for (i, (got, want)) in all.enumerate() {
            let (got, want) = (flat(got), flat(want));
            let top = want.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
            let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, |m, d| if d.is_nan() { f32::NAN } else { m.max(d) });
            assert!(worst <= roundings * unit(dtype) * top, "{name} {dtype:?} {i}: off by {} units", worst / unit(dtype) / top);
        }
    }
}

#[test]
fn plain_ops() {
    check("add", &[&[3, 5], &[3, 5]], 2, 1.0, &|v| ops::add(&v[0], &v[1]));
    check("add_bias_nc", &[&[2, 3, 40, 50], &[2, 3]], 2, 1.0, &|v| ops::add_bias_nc(&v[0], &v[1]));
    check("mul_scalar", &[&[7]], 1, 2.0, &|v| ops::mul_scalar(&v[0], 0.3));
    check("matmul", &[&[5, 70], &[70, 3]], 2, 2.0, &|v| ops::matmul(&v[0], &v[1]));
    check("transpose", &[&[2, 3, 4]], 1, 0.0, &|v| ops::transpose(&v[0], 1, 2));
    check("reshape", &[&[2, 3, 4]], 1, 0.0, &|v| ops::reshape(&v[0], &[6, 4]));
    check("narrow", &[&[2, 9, 4]], 1, 0.0, &|v| ops::narrow(&v[0], 1, 2, 5));
    check("cat", &[&[2, 3, 4], &[2, 2, 4]], 2, 0.0, &|v| ops::cat(&[&v[0], &v[1]], 1));
    check("gather_rows", &[&[2, 6, 4]], 1, 0.0, &|v| ops::gather_rows(&v[0], &[5, 1]));
    // The gradient is a sum of four, each partial sum rounded.
    check("upsample", &[&[2, 3, 4, 5]], 1, 3.0, &|v| ops::upsample_nearest(&v[0], (8, 10)));
    check("upsample to an odd size", &[&[1, 2, 4, 5]], 1, 3.0, &|v| ops::upsample_nearest(&v[0], (7, 9)));
}

#[test]
fn activations() {
    check("silu", &[&[400]], 1, 1.0, &|v| ops::silu(&v[0]));
    check("gelu", &[&[400]], 1, 1.0, &|v| ops::gelu(&v[0]));
    check("quick_gelu", &[&[400]], 1, 1.0, &|v| ops::quick_gelu(&v[0]));
    check("geglu", &[&[3, 240]], 1, 1.0, &|v| ops::geglu(&v[0]));
}

#[test]
fn norms() {
    check("group_norm", &[&[2, 8, 15, 7], &[8], &[8]], 1, 1.0, &|v| ops::group_norm(&v[0], &v[1], &v[2], 4, 1e-5, false));
    // The norm's result is rounded before SiLU, and so is the gradient between the two.
    check("group_norm and silu", &[&[2, 8, 15, 7], &[8], &[8]], 1, 3.0, &|v| ops::group_norm(&v[0], &v[1], &v[2], 4, 1e-5, true));
    check("layer_norm", &[&[3, 50, 12], &[12], &[12]], 1, 1.0, &|v| ops::layer_norm(&v[0], &v[1], &v[2], 1e-5));
}

#[test]
fn frozen_layers() {
    let half = |t: Tensor, like: &Value| t.to_dtype(DType::BF16)?.to_dtype(like.tensor().dtype());
    // The product is rounded, then the sum with the bias.
    check("linear", &[&[2, 5, 100]], 1, 2.0, &|v| {
        ops::linear(&v[0], &half(randn(&[6, 100], 50), &v[0])?, Some(&half(randn(&[6], 51), &v[0])?))
    });
    for (k, stride, padding, h, w) in [(3, 1, 1, 6, 7), (1, 1, 0, 6, 7), (3, 2, 1, 7, 9), (3, 1, 1, 20, 30)] {
        check(&format!("conv {k} stride {stride} on {h}x{w}"), &[&[2, 3, h, w]], 1, 2.0, &|v| {
            let (weight, bias) = (half(randn(&[4, 3, k, k], 60), &v[0])?, half(randn(&[4], 61), &v[0])?);
            ops::conv2d(&v[0], &weight, Some(&bias), stride, padding)
        });
    }
}

#[test]
fn attention() {
    for (tq, tk, causal) in [(33, 20, false), (25, 25, true)] {
        let shapes: [&[usize]; 3] = [&[2, tq, 32], &[2, tk, 32], &[2, tk, 32]];
        // q k^T is rounded (scores up to about 3), then the probabilities, then the product; the way back rounds as often.
        check(&format!("attention causal {causal}"), &shapes, 3, 8.0, &|v| ops::attention(&v[0], &v[1], &v[2], 2, causal));
    }
}

#[test]
fn kernels_of_the_adapter() {
    for dtype in [DType::F16, DType::BF16] {
        let half = |shape: &[usize], seed| randn(shape, seed).to_dtype(dtype).unwrap();
        let full = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
        let close = |name: &str, got: Tensor, want: Tensor, roundings: f32| {
            let (got, want) = (flat(&got), flat(&want));
            let top = want.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
            for (a, b) in got.iter().zip(&want) {
                assert!((a - b).abs() <= roundings * unit(dtype) * top, "{name} {dtype:?}: {a} {b}");
            }
        };
        let (w, x, y) = (half(&[3, 4], 1), half(&[7, 4, 50], 2), half(&[7, 3, 50], 3));
        close("mix", ops::kernel::mix(&w, 1.0, &x).unwrap(), ops::kernel::mix(&full(&w), 1.0, &full(&x)).unwrap(), 1.0);
        let sum = ops::kernel::mix_grad(&y, &x).unwrap();
        assert_eq!(sum.dtype(), DType::F32, "summed in f32");
        close("mix_grad", sum, ops::kernel::mix_grad(&full(&y), &full(&x)).unwrap(), 2.0);
        for (k, stride, padding) in [(3, 1, 1), (1, 1, 0), (3, 2, 1)] {
            let x = half(&[2, 3, 9, 10], 4);
            let wt = half(&[4, 3, k, k], 5);
            let out = ops::kernel::conv2d_forward(&x, &wt, None, stride, padding).unwrap();
            let dy = half(out.dims(), 6);
            let grad = |x: &Tensor, dy: &Tensor| ops::kernel::conv2d_weight_grad(x, dy, (k, k), stride, padding).unwrap();
            close("conv weight gradient", grad(&x, &dy), grad(&full(&x), &full(&dy)), 1.0);
        }
    }
}

/// Values at which a careless order of operations passes 65504, though no result does.
#[test]
fn nothing_overflows_on_the_way_in_f16() {
    let value = |t: Tensor| Value::constant(t.to_dtype(DType::F16).unwrap());
    let finite = |name: &str, y: &Value| assert!(flat(y.tensor()).iter().all(|v| v.is_finite()), "{name}");
    // Norms of values whose squares and sums pass the limit.
    let large = (randn(&[2, 8, 10, 10], 1) * 10_000.0).unwrap();
    let (w, b) = (Value::constant(Tensor::ones(8, DType::F32, &Device::Cpu).unwrap()), Value::constant(randn(&[8], 2)));
    finite("group norm", &ops::group_norm(&value(large.clone()), &w, &b, 4, 1e-5, true).unwrap());
    let (w, b) = (Value::constant(Tensor::ones(10, DType::F32, &Device::Cpu).unwrap()), Value::constant(randn(&[10], 2)));
    finite("layer norm", &ops::layer_norm(&value(large), &w, &b, 1e-5).unwrap());
    // Unscaled scores of 64 * 40 * 40 = 102,400.
    let q = (Tensor::ones((1, 3, 64), DType::F32, &Device::Cpu).unwrap() * 40.0).unwrap();
    let y = ops::attention(&value(q.clone()), &value(q), &value(randn(&[1, 3, 64], 3)), 1, false).unwrap();
    finite("attention", &y);
    // Equal scores: the mean of the values.
    let mean = randn(&[1, 3, 64], 3).mean(1).unwrap();
    for (a, b) in flat(y.tensor()).iter().zip(flat(&mean)) {
        assert!((a - b).abs() < 3.0 / 2048.0, "{a} {b}");
    }
    // As many keys that f16, which counts to 2048 in ones, would not hold the sum of their shares, and values that all are one.
    let ones = |t: usize| value(Tensor::ones((1, t, 8), DType::F32, &Device::Cpu).unwrap());
    let y = ops::attention(&ones(2), &ones(6000), &ones(6000), 1, false).unwrap();
    assert!(flat(y.tensor()).iter().all(|v| (v - 1.0).abs() <= 2.0 / 2048.0), "{:?}", flat(y.tensor()));
    // A gate of -60000 closes; exp(60000) on the way must not become a NaN.
    let gates = Tensor::from_vec(vec![100f32, 200.0, 300.0, -60_000.0, 0.0, 200.0], (1, 6), &Device::Cpu).unwrap();
    let y = ops::geglu(&value(gates.clone())).unwrap();
    assert_eq!(flat(y.tensor()), [0.0, 0.0, 60_000.0]);
    for op in [ops::silu, ops::gelu, ops::quick_gelu] {
        let p = Parameter::new("p", gates.clone());
        let y = op(&ops::to_dtype(&p.value(), DType::F16).unwrap()).unwrap();
        finite("activation", &y);
        ops::backward(vec![(y, Tensor::ones((1, 6), DType::F16, &Device::Cpu).unwrap())]).unwrap();
        assert!(flat(&p.grad().unwrap()).iter().all(|v| v.is_finite()));
    }
    // 4,096 pixels of 100 each: the sum passes the limit and says so, one of 10 each does not.
    let sum = |v: f32| {
        let e = Parameter::new("e", randn(&[1, 1], 1));
        let x = value(Tensor::zeros((1, 1, 64, 64), DType::F32, &Device::Cpu).unwrap());
        let y = ops::add_bias_nc(&x, &ops::to_dtype(&e.value(), DType::F16).unwrap()).unwrap();
        ops::backward(vec![(y, Tensor::full(v, (1, 1, 64, 64), &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap())]).unwrap();
        flat(&e.grad().unwrap())[0]
    };
    assert_eq!((sum(10.0), sum(100.0)), (40_960.0, f32::INFINITY));
}
