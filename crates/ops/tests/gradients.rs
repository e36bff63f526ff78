//! Every op against finite differences and against the form composed of candle's ops (run in f64).

mod common;

use candle_core::{DType, Device, Result, Tensor};
use common::randn;
use ops::{Parameter, Value};

fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn close(name: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    let (a, b) = (flat(got), flat(want));
    let top = b.iter().fold(1e-6f64, |m, v| m.max(v.abs()));
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        assert!((a - b).abs() <= tolerance * top, "{name}[{i}]: {a} against {b}, largest {top}");
    }
}

type Op<'a> = dyn Fn(&[Value]) -> Result<Value> + 'a;

/// Output and gradients of `op` in f32 (fast form) against f64 (composed form) and, for the latter, central differences.
fn check(name: &str, shapes: &[&[usize]], op: &Op<'_>) {
    let inputs: Vec<Tensor> = shapes.iter().enumerate().map(|(i, s)| randn(s, i as u64 + 1)).collect();
    let run = |dtype: DType| {
        let params: Vec<Parameter> = inputs.iter().map(|t| Parameter::new("p", t.to_dtype(dtype).unwrap())).collect();
        let values: Vec<Value> = params.iter().map(|p| p.value()).collect();
        let y = op(&values).unwrap();
        let dy = randn(y.dims(), 99).to_dtype(y.tensor().dtype()).unwrap();
        let out = y.tensor().clone();
        ops::backward(vec![(y, dy)]).unwrap();
        (out, params.iter().map(|p| p.grad().unwrap()).collect::<Vec<_>>())
    };
    let (y32, g32) = run(DType::F32);
    let (y64, g64) = run(DType::F64);
    // f32 sums of up to a few hundred terms; erf and exp are good to 2e-7.
    close(name, &y32, &y64, 2e-6);
    for (i, (a, b)) in g32.iter().zip(&g64).enumerate() {
        close(&format!("{name} gradient {i}"), a, b, 5e-6);
    }
    let dy = randn(y64.dims(), 99);
    let loss = |inputs: &[Tensor]| -> f64 {
        let values: Vec<Value> = inputs.iter().map(|t| Value::constant(t.to_dtype(DType::F64).unwrap())).collect();
        let y = op(&values).unwrap();
        flat(y.tensor()).iter().zip(flat(&dy)).map(|(a, b)| a * b).sum()
    };
    for (i, input) in inputs.iter().enumerate() {
        let base = flat(input);
        let grad = flat(&g64[i]);
        for j in (0..base.len()).step_by(base.len() / 5 + 1) {
            let shifted = |h: f64| {
                let mut v = base.clone();
                v[j] += h;
                let mut all: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
                all[i] = Tensor::from_vec(v, input.shape(), &Device::Cpu).unwrap();
                loss(&all)
            };
            // Norms, sigmoid and gelu run their f64 forms through f32, so the step is large and the bound loose.
            let h = 1e-2;
            let want = (shifted(h) - shifted(-h)) / (2.0 * h);
            assert!((want - grad[j]).abs() < 2e-3 * (1.0 + want.abs()), "{name}: d/d{i}[{j}] {} against {want}", grad[j]);
        }
    }
}

#[test]
fn plain_ops() {
    check("add", &[&[3, 5], &[3, 5]], &|v| ops::add(&v[0], &v[1]));
    check("add_bias_nc", &[&[2, 3, 4, 5], &[2, 3]], &|v| ops::add_bias_nc(&v[0], &v[1]));
    check("mul_scalar", &[&[7]], &|v| ops::mul_scalar(&v[0], 0.3));
    check("matmul", &[&[5, 7], &[7, 3]], &|v| ops::matmul(&v[0], &v[1]));
    check("transpose", &[&[2, 3, 4]], &|v| ops::transpose(&v[0], 1, 2));
    check("narrow", &[&[2, 9, 4]], &|v| ops::narrow(&v[0], 1, 2, 5));
    check("cat", &[&[2, 3, 4], &[2, 2, 4]], &|v| ops::cat(&[&v[0], &v[1]], 1));
    check("gather_rows", &[&[2, 6, 4]], &|v| ops::gather_rows(&v[0], &[5, 1]));
    check("upsample", &[&[2, 3, 4, 5]], &|v| ops::upsample_nearest(&v[0], (8, 10)));
    check("upsample to an odd size", &[&[1, 2, 4, 5]], &|v| ops::upsample_nearest(&v[0], (7, 9)));
}

#[test]
fn activations() {
    check("silu", &[&[40]], &|v| ops::silu(&v[0]));
    check("gelu", &[&[40]], &|v| ops::gelu(&v[0]));
    check("quick_gelu", &[&[40]], &|v| ops::quick_gelu(&v[0]));
    check("geglu", &[&[3, 24]], &|v| ops::geglu(&v[0]));
}

#[test]
fn norms() {
    for silu in [false, true] {
        check("group_norm", &[&[2, 8, 5, 7], &[8], &[8]], &|v| ops::group_norm(&v[0], &v[1], &v[2], 4, 1e-5, silu));
    }
    check("group_norm of (n, c, t)", &[&[2, 6, 9], &[6], &[6]], &|v| ops::group_norm(&v[0], &v[1], &v[2], 2, 1e-6, false));
    check("layer_norm", &[&[3, 50, 12], &[12], &[12]], &|v| ops::layer_norm(&v[0], &v[1], &v[2], 1e-5));
}

#[test]
fn frozen_linear() {
    let (w, b) = (randn(&[6, 10], 50), randn(&[6], 51));
    check("linear", &[&[2, 5, 10]], &|v| {
        let dtype = v[0].tensor().dtype();
        ops::linear(&v[0], &w.to_dtype(dtype)?, Some(&b.to_dtype(dtype)?))
    });
    check("linear without bias", &[&[4, 10]], &|v| ops::linear(&v[0], &w.to_dtype(v[0].tensor().dtype())?, None));
}

#[test]
fn frozen_conv() {
    for (k, stride, padding, h, w) in
        [(3, 1, 1, 6, 7), (1, 1, 0, 6, 7), (3, 2, 1, 8, 10), (3, 2, 1, 7, 9), (3, 2, 0, 9, 8), (1, 2, 0, 6, 6), (3, 1, 1, 20, 30)]
    {
        let (wt, b) = (randn(&[4, 3, k, k], 60), randn(&[4], 61));
        check(&format!("conv {k} stride {stride} padding {padding} on {h}x{w}"), &[&[2, 3, h, w]], &|v| {
            let dtype = v[0].tensor().dtype();
            ops::conv2d(&v[0], &wt.to_dtype(dtype)?, Some(&b.to_dtype(dtype)?), stride, padding)
        });
        let x = randn(&[2, 3, h, w], 62);
        let y = ops::kernel::conv2d_forward(&x, &wt, None, stride, padding).unwrap();
        let dy = randn(y.dims(), 63);
        let fast = ops::kernel::conv2d_weight_grad(&x, &dy, (k, k), stride, padding).unwrap();
        let double = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let plain = ops::kernel::conv2d_weight_grad(&double(&x), &double(&dy), (k, k), stride, padding).unwrap();
        // f32 sums over up to 1,200 pixels.
        close("weight gradient", &fast, &plain, 5e-6);
    }
}

#[test]
fn a_narrow_weight_is_widened_for_the_call() {
    let w = randn(&[6, 10], 50).to_dtype(DType::F16).unwrap();
    let x = Value::constant(randn(&[4, 10], 1));
    let wide = ops::linear(&x, w.to_dtype(DType::F32).unwrap(), None).unwrap();
    assert_eq!(flat(ops::linear(&x, &w, None).unwrap().tensor()), flat(wide.tensor()));
}

#[test]
fn gradients_add_up_and_a_graph_is_passed_once() {
    let p = Parameter::new("p", randn(&[3], 1));
    let y = ops::add(&p.value(), &p.value()).unwrap();
    let dy = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
    ops::backward(vec![(y.clone(), dy.clone())]).unwrap();
    assert_eq!(flat(&p.grad().unwrap()), [2.0; 3]);
    let error = ops::backward(vec![(y, dy.clone())]).unwrap_err();
    assert!(error.to_string().contains("already passed"), "{error}");
    let again = ops::mul_scalar(&p.value(), 3.0).unwrap();
    ops::backward(vec![(again, dy)]).unwrap();
    assert_eq!(flat(&p.grad().unwrap()), [5.0; 3]);
    p.zero_grad();
    assert!(p.grad().is_none());
}

#[test]
fn nothing_is_recorded_without_grad_or_without_parameters() {
    let p = Parameter::new("p", randn(&[3], 1));
    assert!(!ops::no_grad(|| ops::silu(&p.value())).unwrap().requires_grad());
    assert!(!ops::silu(&Value::constant(randn(&[3], 1))).unwrap().requires_grad());
    assert!(ops::recording());
}

#[test]
fn checkpointing_changes_no_bit() {
    let (w, b) = (randn(&[12, 12], 5), randn(&[12], 6));
    let p = Parameter::new("p", randn(&[12], 7));
    let x = Parameter::new("x", randn(&[3, 12], 8));
    let dy = randn(&[3, 12], 9);
    // Kept; each segment recomputed; each of its two halves recomputed inside the segment that runs again.
    let run = |depth: usize| -> Vec<Vec<f64>> {
        let (w, b, p2) = (w.clone(), b.clone(), p.clone());
        let first = move |v: &[Value]| {
            let h = ops::layer_norm(&v[0], &p2.value(), &p2.value(), 1e-5)?;
            ops::add(&ops::gelu(&ops::linear(&h, &w, Some(&b))?)?, &v[0])
        };
        // The second input is used more than once, and by every segment.
        let second = |v: &[Value]| ops::add(&v[0], &ops::silu(&ops::add(&v[1], &ops::quick_gelu(&v[1])?)?)?);
        let segment = move |v: &[Value]| {
            if depth < 2 {
                return second(&[first(&v[..1])?, v[1].clone()]);
            }
            let h = ops::checkpoint(&[&v[0]], first.clone())?;
            ops::checkpoint(&[&h, &v[1]], second)
        };
        let mut h = x.value();
        let e = ops::mul_scalar(&x.value(), 0.7).unwrap();
        for _ in 0..3 {
            h = if depth == 0 { segment(&[h, e.clone()]).unwrap() } else { ops::checkpoint(&[&h, &e], segment.clone()).unwrap() };
        }
        let out = flat(h.tensor());
        ops::backward(vec![(h, dy.clone())]).unwrap();
        vec![out, flat(&p.take_grad().unwrap()), flat(&x.take_grad().unwrap())]
    };
    assert_eq!(run(0), run(1));
    assert_eq!(run(0), run(2));
}

#[test]
fn a_parameter_is_told_after_each_use_and_its_gradient_is_complete_after_the_last() {
    let (a, b) = (Parameter::new("a", randn(&[4], 1)), Parameter::new("b", randn(&[4], 2)));
    let dy = randn(&[4], 3);
    let run = |kept: bool| {
        let (a2, b2) = (a.clone(), b.clone());
        let segment = move |v: &[Value]| ops::add(&ops::silu(&ops::add(&v[0], &b2.value())?)?, &a2.value());
        let x = ops::silu(&a.value()).unwrap();
        let y = if kept { segment(&[x]).unwrap() } else { ops::checkpoint(&[&x], segment).unwrap() };
        let mut told = Vec::new();
        ops::backward_with(vec![(y, dy.clone())], &mut |p| {
            told.push((p.name().to_string(), flat(&p.grad().unwrap())));
            Ok(())
        })
        .unwrap();
        assert_eq!(told.last(), Some(&("a".to_string(), flat(&a.take_grad().unwrap()))), "the last that was told is what stays");
        assert_eq!(told.iter().find(|(name, _)| name == "b").map(|(_, g)| g), Some(&flat(&b.take_grad().unwrap())));
        told.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    assert_eq!(run(true), ["a", "b", "a"]);
    assert_eq!(run(false), ["a", "b", "a"]);
}

#[test]
fn what_the_listener_returns_ends_the_pass() {
    let p = Parameter::new("p", randn(&[3], 1));
    let y = ops::silu(&p.value()).unwrap();
    let dy = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
    let error = ops::backward_with(vec![(y, dy)], &mut |_| Err(ops::Error::Msg("enough".into()))).unwrap_err();
    assert!(error.to_string().contains("enough"), "{error}");
}
