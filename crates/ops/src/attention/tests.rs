//! Attention in chunks against the plain form.

use super::*;
use crate::gemm::tests::numbers;
use crate::tape::{Parameter, backward as run_backward};
use candle_core::Device;

#[test]
fn chunked_attention_equals_the_plain_form() -> Result<()> {
    // Below one chunk of queries, and with a last chunk that is not full.
    let chunked = 2 * QUERIES + 52;
    for (n, heads, tq, tk, d, causal) in [
        (2, 3, 150, 77, 8, false),
        (1, 2, 77, 77, 16, true),
        (1, 2, chunked, 77, 8, false),
        (2, 1, chunked, chunked, 8, true),
        (1, 1, 1, 5, 4, false),
    ] {
        let random = |t: usize, seed: u32, size: f64| -> Result<Tensor> {
            Tensor::from_vec(numbers(n * t * heads * d, seed), (n, t, heads * d), &Device::Cpu)? * size
        };
        let make = |t: usize, seed: u32| -> Result<Parameter> { Ok(Parameter::new("input", random(t, seed, 2.5)?)) };
        let (q, k, v) = (make(tq, 1)?, make(tk, 2)?, make(tk, 3)?);
        let dy = random(tq, 4, 1.7)?;
        let run = |plain: Option<usize>| -> Result<Vec<Vec<f32>>> {
            let (qv, kv, vv) = (q.value(), k.value(), v.value());
            let s = Sizes::new(qv.tensor(), kv.tensor(), vv.tensor(), heads, causal)?;
            let y = match plain {
                Some(chunk) => composed_attention(&qv, &kv, &vv, s, chunk)?,
                None => attention(&qv, &kv, &vv, heads, causal)?,
            };
            let mut all = vec![y.tensor().flatten_all()?.to_vec1::<f32>()?];
            run_backward(vec![(y, dy.clone())])?;
            for p in [&q, &k, &v] {
                let g = p.take_grad().ok_or_else(|| candle_core::Error::Msg("no gradient".into()))?;
                all.push(g.flatten_all()?.to_vec1::<f32>()?);
            }
            Ok(all)
        };
        let whole = run(Some(tq))?;
        for other in [run(None)?, run(Some(32))?] {
            for (a, b) in other.iter().zip(&whole) {
                // Sums of up to 500 products in another order: a few 1e-6 of the largest value.
                let top = b.iter().fold(1f32, |m, v| m.max(v.abs()));
                let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / top;
                assert!(worst < 1e-5, "{worst} for {:?}", (n, heads, tq, tk, d, causal));
            }
        }
    }
    Ok(())
}
