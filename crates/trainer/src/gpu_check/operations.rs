//! Each differentiable operation on two devices with the same inputs.

use candle_core::{DType, Device, Tensor};
use ops::{Parameter, Value};
use random::{Purpose, Stream};

use super::Report;
use crate::error::Result;

type Forward = fn(&[Value]) -> candle_core::Result<Value>;

/// An operation with the shapes of its inputs.
struct Case {
    name: &'static str,
    inputs: &'static [&'static [usize]],
    forward: Forward,
}

/// The shapes are SDXL's, a few channels or tokens wide, and odd where an operation may be.
const CASES: &[Case] = &[
    Case { name: "add", inputs: &[&[2, 9, 33], &[2, 9, 33]], forward: |v| ops::add(&v[0], &v[1]) },
    Case { name: "add_bias_nc", inputs: &[&[2, 40, 7, 5], &[2, 40]], forward: |v| ops::add_bias_nc(&v[0], &v[1]) },
    Case { name: "mul_scalar", inputs: &[&[3, 65]], forward: |v| ops::mul_scalar(&v[0], 0.37) },
    Case { name: "matmul", inputs: &[&[17, 40], &[40, 11]], forward: |v| ops::matmul(&v[0], &v[1]) },
    Case { name: "transpose", inputs: &[&[2, 6, 10]], forward: |v| ops::transpose(&v[0], 1, 2) },
    Case { name: "narrow", inputs: &[&[2, 10, 6]], forward: |v| ops::narrow(&v[0], 1, 3, 4) },
    Case { name: "cat", inputs: &[&[2, 3, 8, 6], &[2, 5, 8, 6]], forward: |v| ops::cat(&[&v[0], &v[1]], 1) },
    Case { name: "gather_rows", inputs: &[&[2, 77, 24]], forward: |v| ops::gather_rows(&v[0], &[76, 5]) },
    Case { name: "upsample_nearest", inputs: &[&[2, 8, 7, 5]], forward: |v| ops::upsample_nearest(&v[0], (14, 10)) },
    Case { name: "silu", inputs: &[&[4, 257]], forward: |v| ops::silu(&v[0]) },
    Case { name: "gelu", inputs: &[&[4, 257]], forward: |v| ops::gelu(&v[0]) },
    Case { name: "quick_gelu", inputs: &[&[4, 257]], forward: |v| ops::quick_gelu(&v[0]) },
    Case { name: "geglu", inputs: &[&[2, 33, 128]], forward: |v| ops::geglu(&v[0]) },
    Case { name: "layer_norm", inputs: &[&[2, 77, 64], &[64], &[64]], forward: |v| ops::layer_norm(&v[0], &v[1], &v[2], 1e-5) },
    Case { name: "group_norm", inputs: &[&[2, 32, 9, 7], &[32], &[32]], forward: |v| ops::group_norm(&v[0], &v[1], &v[2], 8, 1e-5, false) },
    Case {
        name: "group_norm + silu",
        inputs: &[&[2, 32, 9, 7], &[32], &[32]],
        forward: |v| ops::group_norm(&v[0], &v[1], &v[2], 8, 1e-5, true),
    },
    Case {
        name: "attention",
        inputs: &[&[2, 130, 80], &[2, 77, 80], &[2, 77, 80]],
        forward: |v| ops::attention(&v[0], &v[1], &v[2], 2, false),
    },
    Case {
        name: "attention, causal",
        inputs: &[&[2, 77, 64], &[2, 77, 64], &[2, 77, 64]],
        forward: |v| ops::attention(&v[0], &v[1], &v[2], 4, true),
    },
    Case {
        name: "attention, heads of 64",
        inputs: &[&[2, 130, 128], &[2, 77, 128], &[2, 77, 128]],
        forward: |v| ops::attention(&v[0], &v[1], &v[2], 2, false),
    },
    Case {
        name: "attention, heads of 64, causal",
        inputs: &[&[2, 77, 192], &[2, 77, 192], &[2, 77, 192]],
        forward: |v| ops::attention(&v[0], &v[1], &v[2], 3, true),
    },
    Case { name: "linear", inputs: &[&[2, 77, 64], &[48, 64], &[48]], forward: |v| ops::linear(&v[0], v[1].tensor(), Some(v[2].tensor())) },
    Case {
        name: "conv2d 3x3",
        inputs: &[&[2, 16, 17, 11], &[24, 16, 3, 3], &[24]],
        forward: |v| ops::conv2d(&v[0], v[1].tensor(), Some(v[2].tensor()), 1, 1),
    },
    Case {
        name: "conv2d 3x3, stride 2",
        inputs: &[&[2, 16, 16, 10], &[24, 16, 3, 3], &[24]],
        forward: |v| ops::conv2d(&v[0], v[1].tensor(), Some(v[2].tensor()), 2, 1),
    },
    Case {
        name: "conv2d 1x1",
        inputs: &[&[2, 16, 9, 7], &[24, 16, 1, 1], &[24]],
        forward: |v| ops::conv2d(&v[0], v[1].tensor(), Some(v[2].tensor()), 1, 0),
    },
    Case {
        name: "lokr linear",
        inputs: &[&[2, 77, 64], &[48, 64], &[4, 4], &[12, 16]],
        forward: |v| lokr_linear(v, lokr::functional::Path::Factored),
    },
    Case {
        name: "lokr linear, merged",
        inputs: &[&[2, 77, 64], &[48, 64], &[4, 4], &[12, 16]],
        forward: |v| lokr_linear(v, lokr::functional::Path::Merged),
    },
    Case {
        name: "lokr linear, wide",
        inputs: &[&[2, 77, 64], &[16, 64], &[2, 8], &[8, 8]],
        forward: |v| lokr_linear(v, lokr::functional::Path::Factored),
    },
    Case {
        name: "lokr linear, factor 8",
        inputs: &[&[2, 77, 64], &[48, 64], &[8, 8], &[6, 8]],
        forward: |v| lokr_linear(v, lokr::functional::Path::Factored),
    },
    Case {
        name: "lokr linear, bias",
        inputs: &[&[2, 77, 128], &[128, 128], &[4, 4], &[32, 32], &[128]],
        forward: |v| lokr::functional::lokr_linear(&v[0], v[1].tensor(), Some(v[4].tensor()), &v[2], &v[3], 0.7, None),
    },
    Case {
        name: "lokr conv2d, bias",
        inputs: &[&[2, 16, 8, 8], &[32, 16, 3, 3], &[4, 4], &[8, 4, 3, 3], &[32]],
        forward: |v| lokr::functional::lokr_conv2d(&v[0], v[1].tensor(), Some(v[4].tensor()), &v[2], &v[3], 0.7, (1, 1), None),
    },
    Case {
        name: "lokr conv2d",
        inputs: &[&[2, 16, 9, 7], &[24, 16, 3, 3], &[4, 4], &[6, 4, 3, 3]],
        forward: |v| lokr_conv2d(v, lokr::functional::Path::Factored),
    },
    Case {
        name: "lokr conv2d, merged",
        inputs: &[&[2, 16, 9, 7], &[24, 16, 3, 3], &[4, 4], &[6, 4, 3, 3]],
        forward: |v| lokr_conv2d(v, lokr::functional::Path::Merged),
    },
];

fn lokr_linear(v: &[Value], path: lokr::functional::Path) -> candle_core::Result<Value> {
    lokr::functional::lokr_linear(&v[0], v[1].tensor(), None, &v[2], &v[3], 0.7, Some(path))
}

fn lokr_conv2d(v: &[Value], path: lokr::functional::Path) -> candle_core::Result<Value> {
    lokr::functional::lokr_conv2d(&v[0], v[1].tensor(), None, &v[2], &v[3], 0.7, (1, 1), Some(path))
}

/// Normal numbers; the same for a seed on every device.
fn normal(seed: u64, shape: &[usize], device: &Device) -> candle_core::Result<Tensor> {
    let count = shape.iter().product();
    Tensor::from_vec(Stream::new(seed, Purpose::Noise, 0, 0).normal(count), shape, device)
}

/// Output and gradients of a case, on the host in f32. Parameters are f32; the rest is in the type of the computation.
fn run(case: &Case, device: &Device, dtype: DType) -> candle_core::Result<Vec<Tensor>> {
    let mut parameters = Vec::new();
    let mut values = Vec::new();
    for (i, shape) in case.inputs.iter().enumerate() {
        // As f16 on both devices, so that only the operation differs.
        let t = normal(i as u64, shape, &Device::Cpu)?.to_dtype(DType::F16)?.to_dtype(DType::F32)?.to_device(device)?;
        let parameter = Parameter::new(case.name, t);
        // The factors and norms of the adapter stay f32.
        let adapter = case.name.contains("norm") || case.name.contains("lokr");
        values.push(match (i, adapter) {
            (0, _) | (_, false) => cast(&parameter.value(), dtype)?,
            (1, true) if case.name.contains("lokr") => Value::constant(converted(&parameter.tensor(), dtype)?),
            _ => parameter.value(),
        });
        parameters.push(parameter);
    }
    let out = (case.forward)(&values)?;
    let dy = normal(99, out.dims(), &Device::Cpu)?.to_dtype(out.tensor().dtype())?.to_device(device)?;
    let mut results = vec![host(out.tensor())?];
    ops::backward(vec![(out, dy)])?;
    for parameter in parameters {
        results.extend(parameter.take_grad().map(|g| host(&g)).transpose()?);
    }
    Ok(results)
}

fn cast(x: &Value, dtype: DType) -> candle_core::Result<Value> {
    let from = x.tensor().dtype();
    Ok(ops::custom("cast", &[x], converted(x.tensor(), dtype)?, move |dy| Ok(vec![Some(converted(dy, from)?)])))
}

/// In another type, by the host, so that nothing but the operation is the device's.
fn converted(t: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
    t.to_device(&Device::Cpu)?.to_dtype(dtype)?.to_device(t.device())
}

fn host(t: &Tensor) -> candle_core::Result<Tensor> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()
}

/// Largest difference relative to the largest value; NaN if anything is.
fn difference(a: &Tensor, b: &Tensor) -> candle_core::Result<f64> {
    let (a, b) = (a.to_vec1::<f32>()?, b.to_vec1::<f32>()?);
    if a.len() != b.len() {
        candle_core::bail!("{} values against {}", a.len(), b.len());
    }
    let top = b.iter().fold(0f64, |m, v| m.max(f64::from(v.abs()))).max(1e-30);
    Ok(a.iter()
        .zip(&b)
        .map(|(a, b)| f64::from((a - b).abs()) / top)
        .fold(0.0, |m: f64, d| if d.is_nan() || m.is_nan() { f64::NAN } else { m.max(d) }))
}

/// Whether a case is compared in bf16 too: those of which every step is a kernel of ours that takes it by its type.
fn in_bf16(case: &Case) -> bool {
    let kernels = ["attention, heads of 64", "norm", "silu", "gelu", "geglu"];
    kernels.iter().any(|k| case.name.contains(k))
}

/// Compares all operations in f32 and f16, and some in bf16, with the CPU's f32.
pub(super) fn compare(device: &Device, report: &mut Report) -> Result<()> {
    for case in CASES {
        let want = run(case, &Device::Cpu, DType::F32)?;
        for (dtype, name, bound) in [
            // Sums of up to some hundred products of order one, in another order.
            (DType::F32, "f32", 2e-5),
            // Inputs are exact in f16; inner results and the output are rounded to 2^-11, sums of them to a few of these.
            (DType::F16, "f16", 1e-2),
            // As f16 with three bits less; the inputs are rounded as well.
            (DType::BF16, "bf16", 8e-2),
        ] {
            if dtype == DType::BF16 && !in_bf16(case) {
                continue;
            }
            let got = run(case, device, dtype)?;
            let mut worst = if got.len() == want.len() { 0f64 } else { f64::NAN };
            for (got, want) in got.iter().zip(&want) {
                let d = difference(got, want)?;
                worst = if d.is_nan() { d } else { worst.max(d) };
            }
            report.compare(&format!("{} {name}", case.name), worst, bound);
        }
    }
    Ok(())
}

/// Batches that are sent while the device is busy, more than it can have taken by then: they come as they were, though the memory that they
/// go through is taken again and again.
pub(super) fn compare_staging(device: &Device, report: &mut Report) -> Result<()> {
    const NUMBERS: usize = 1 << 18;
    let staging = ops::Staging::default();
    let side = normal(1, &[1024, 1024], device)?;
    let busy = (0..20).map(|_| side.matmul(&side)).collect::<candle_core::Result<Vec<_>>>()?;
    let mut sent = Vec::new();
    for i in 0..100 {
        sent.push(staging.to_device(&Tensor::full(i as f32, NUMBERS, &Device::Cpu)?, device)?);
    }
    drop(busy);
    let mut wrong = 0;
    for (i, t) in sent.iter().enumerate() {
        wrong += host(t)?.to_vec1::<f32>()?.iter().filter(|&&v| v != i as f32).count();
    }
    report.compare("numbers changed in batches sent unwaited for", wrong as f64, 0.0);
    Ok(())
}

/// Three optimizer steps of tensors of every kind (small, short last block, many pieces), and the gradient's norm: equal to the last bit.
#[cfg(feature = "cuda")]
pub(super) fn compare_optimizer(device: &Device, report: &mut Report) -> Result<()> {
    use crate::step::{self, Trained};
    use lokr::ParameterGroup;
    use optim::{Hyper, Optimizer, OptimizerKind};

    let sizes = [100usize, 4095, 4096, 5003, 1_000_001];
    /// Norms, parameters, states.
    type Steps = (Vec<f64>, Vec<Vec<f32>>, Vec<Vec<u8>>);
    let run = |device: &Device| -> Result<Steps> {
        let make = |i: usize, n: usize| -> candle_core::Result<Trained> {
            Ok(Trained { group: ParameterGroup::Unet, parameter: Parameter::new(format!("{i}"), normal(i as u64, &[n], device)?) })
        };
        let trained = sizes.iter().enumerate().map(|(i, &n)| make(i, n)).collect::<candle_core::Result<Vec<_>>>()?;
        let mut optimizer = Optimizer::new(OptimizerKind::Lion8bit, Hyper { betas: (0.9, 0.95), weight_decay: 0.1, eps: 0.0 }, &sizes);
        crate::on_gpu::use_device(&mut optimizer, device)?;
        let mut norms = Vec::new();
        for s in 0..3 {
            for (i, t) in trained.iter().enumerate() {
                t.parameter.accumulate(&normal(100 * (s + 1) + i as u64, &[sizes[i]], device)?)?;
            }
            let (norm, _) = step::gradient_norm(&trained, &optimizer)?;
            norms.push(norm);
            step::update(&trained, &mut optimizer, (norm, 1.0), 1.0, |_| 1e-3)?;
        }
        let values = trained.iter().map(|t| host(&t.parameter.tensor())?.to_vec1()).collect::<candle_core::Result<Vec<Vec<f32>>>>()?;
        let states = optimizer.state()?.into_iter().map(|s| s.bytes.into_owned()).collect();
        Ok((norms, values, states))
    };
    let ((norms, values, states), (want_norms, want_values, want_states)) = (run(device)?, run(&Device::Cpu)?);
    let unequal = |equal: bool| f64::from(u8::from(!equal));
    report.compare("gradient norm, bit for bit", unequal(norms == want_norms), 0.0);
    report.compare("Lion8bit parameters, bit for bit", unequal(values == want_values), 0.0);
    report.compare("Lion8bit states, byte for byte", unequal(states == want_states), 0.0);
    Ok(())
}
