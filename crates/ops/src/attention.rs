//! Scaled dot-product attention with its own backward, in query chunks: no score matrix is stored, only each row's
//! log-sum-exp (Dao et al. 2022, FlashAttention, equations of section 3.1).

use crate::gemm::{Begin, Dst, Product, Threads, kernel};
use crate::math::{exp_to_87, simd};
use crate::pack::Operand;
use crate::tape::{Value, custom};
use crate::tile::Kernel;
use crate::view::{F32, SharedMut, fast, grain, reuse, tensor};
use candle_core::{D, DType, Result, Tensor};
use rayon::prelude::*;
use std::cell::RefCell;

/// Query rows whose scores are in memory at a time, per thread.
const QUERIES: usize = 224;

/// Scores that a thread keeps room for from call to call: of a picture of 1024x1024 in the UNet. For more, as in the VAE, it is made for the
/// call.
const KEPT: usize = 2 * QUERIES * 4096;

/// Bytes of scores that the CPU's form holds on so many threads, for so many keys.
pub fn attention_buffers(keys: usize, threads: usize) -> usize {
    4 * 2 * threads * QUERIES * keys
}

/// Sizes of one call: batch, heads, tokens of queries and of keys, features per head.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub n: usize,
    pub heads: usize,
    pub tq: usize,
    pub tk: usize,
    pub d: usize,
    pub causal: bool,
}

impl Sizes {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Self> {
        let (n, tq, inner) = q.dims3()?;
        let (nk, tk, inner_k) = k.dims3()?;
        if heads == 0 || inner % heads != 0 || nk != n || inner_k != inner || v.dims() != k.dims() || (causal && tq != tk) {
            candle_core::bail!("attention: q {:?}, k {:?}, v {:?}, {heads} heads", q.dims(), k.dims(), v.dims());
        }
        Ok(Self { n, heads, tq, tk, d: inner / heads, causal })
    }

    pub fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }

    /// Head `h` of item `b` of a slice `(n, t, heads * d)`, from token `from` on.
    fn head<'a>(&self, data: &'a [f32], b: usize, h: usize, t: usize, from: usize) -> &'a [f32] {
        &data[(b * t + from) * self.inner() + h * self.d..]
    }

    fn inner(&self) -> usize {
        self.heads * self.d
    }

    fn place(&self, data: SharedMut, b: usize, h: usize, t: usize, from: usize) -> Dst {
        let inner = self.inner();
        Dst { data, offset: (b * t + from) * inner + h * self.d, rs: inner, turned: false }
    }

    /// Keys that query row `i` sees.
    fn seen(&self, i: usize) -> usize {
        if self.causal { i + 1 } else { self.tk }
    }
}

/// `softmax(q k^T / sqrt(d)) v` per head; `q (n, tq, heads d)`, `k, v (n, tk, heads d)`, result like `q`. With
/// `causal`, token i sees tokens 0..=i.
///
/// # Errors
/// If shapes do not fit.
pub fn attention(q: &Value, k: &Value, v: &Value, heads: usize, causal: bool) -> Result<Value> {
    let s = Sizes::new(q.tensor(), k.tensor(), v.tensor(), heads, causal)?;
    let (qt, kt, vt) = (q.tensor().contiguous()?, k.tensor().contiguous()?, v.tensor().contiguous()?);
    #[cfg(feature = "cuda")]
    if let Some(device) = crate::cuda::attention::serves(&qt, &kt, &vt, s) {
        let (out, lse) = crate::cuda::attention::forward(&device, &qt, &kt, &vt, s)?;
        let kept = out.clone();
        return Ok(custom("attention", &[q, k, v], out, move |dy| {
            let [dq, dk, dv] = crate::cuda::attention::backward(&device, [&qt, &kt, &vt], (&kept, &lse), &dy.contiguous()?, s)?;
            Ok(vec![Some(dq), Some(dk), Some(dv)])
        }));
    }
    if !fast(&qt) {
        return composed_attention(q, k, v, s, (SCORES / (s.n * heads * s.tk).max(1)).clamp(1, s.tq.max(1)));
    }
    let (out, lse) = forward(&F32::new(&qt)?, &F32::new(&kt)?, &F32::new(&vt)?, s);
    let out = tensor(out, qt.dims())?;
    let kept = out.clone();
    Ok(custom("attention", &[q, k, v], out, move |dy| {
        let dy = dy.contiguous()?;
        let (dq, dk, dv) = {
            let (qv, kv, vv) = (F32::new(&qt)?, F32::new(&kt)?, F32::new(&vt)?);
            backward(&qv, &kv, &vv, &F32::new(&kept)?, &F32::new(&dy)?, &lse, s)
        };
        Ok(vec![Some(tensor(dq, qt.dims())?), Some(tensor(dk, kt.dims())?), Some(tensor(dv, vt.dims())?)])
    }))
}

/// A product `(m, n, k)` on this thread.
///
/// # Safety
/// No other thread touches the places of `dst` meanwhile.
unsafe fn multiply(kernel: Kernel, (m, n, k): (usize, usize, usize), a: Operand, b: Operand, dst: Dst, add: bool, scale: f32) {
    // SAFETY: the caller's promise.
    unsafe { Product { m, n, k, a, b, dst, begin: if add { Begin::Add } else { Begin::Zero }, scale, kernel }.run(Threads::One) }
}

thread_local! {
    static KEPT_SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Runs `f` with room for the scores of [`QUERIES`] queries with so many keys, twice.
fn with_scores<R>(keys: usize, f: impl FnOnce(&mut [f32], &mut [f32]) -> R) -> R {
    let half = QUERIES * keys;
    let run = |scores: &mut Vec<f32>| {
        let (p, ds) = reuse(scores, 2 * half).split_at_mut(half);
        f(p, ds)
    };
    if 2 * half <= KEPT { KEPT_SCORES.with_borrow_mut(run) } else { run(&mut Vec::new()) }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let ((a16, a), (b16, b)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a16.iter().zip(b16) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>() + lanes.iter().sum::<f32>()
}

#[inline(always)]
fn row_max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for (i, v) in rest.iter().enumerate() {
        lanes[i] = lanes[i].max(*v);
    }
    for v in chunks {
        for i in 0..16 {
            lanes[i] = if v[i] > lanes[i] { v[i] } else { lanes[i] };
        }
    }
    lanes.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b))
}

/// Replaces `row` by exp(row - max) and gives the sum and the maximum.
#[inline(always)]
fn exp_row(row: &mut [f32]) -> (f32, f32) {
    let max = row_max(row);
    let mut lanes = [0f32; 16];
    let (chunks, rest) = row.as_chunks_mut::<16>();
    for v in chunks {
        for i in 0..16 {
            v[i] = exp_to_87(v[i] - max);
            lanes[i] += v[i];
        }
    }
    for (i, v) in rest.iter_mut().enumerate() {
        *v = exp_to_87(*v - max);
        lanes[i] += *v;
    }
    (lanes.iter().sum(), max)
}

/// The output, and log-sum-exp of the scaled scores per (batch, head, query).
fn forward(q: &[f32], k: &[f32], v: &[f32], s: Sizes) -> (Vec<f32>, Vec<f32>) {
    let mut out = Vec::new();
    let mut lse = vec![0f32; s.n * s.heads * s.tq];
    let (out_at, lse_at) = (SharedMut::for_vec(&mut out, q.len()), SharedMut::new(&mut lse));
    let chunks = s.tq.div_ceil(QUERIES);
    let work = QUERIES.min(s.tq) * s.tk * (s.d / 4 + 4);
    let kernel = kernel();
    (0..s.n * s.heads * chunks).into_par_iter().with_min_len(grain(work)).for_each(|task| {
        with_scores(s.tk, |scores, _| {
            let (bh, chunk) = (task / chunks, task % chunks);
            let (b, h) = (bh / s.heads, bh % s.heads);
            let from = chunk * QUERIES;
            let rows = QUERIES.min(s.tq - from);
            let keys = s.seen(from + rows - 1);
            let local = Dst { data: SharedMut::new(scores), offset: 0, rs: s.tk, turned: false };
            let inner = s.inner();
            let (qm, km) = (Operand::rows(s.head(q, b, h, s.tq, from), inner), Operand::rows(s.head(k, b, h, s.tk, 0), inner));
            // SAFETY: `scores` belongs to this task.
            unsafe { multiply(kernel, (rows, keys, s.d), qm, km, local, false, s.scale()) };
            // The sum divides the output, which is shorter than the scores.
            let mut shares = [0f32; QUERIES];
            // SAFETY: each task writes the log-sum-exps of its own queries.
            let lse = unsafe { lse_at.at(bh * s.tq + from, rows) };
            simd(
                #[inline(always)]
                || {
                    for (i, ((row, lse), share)) in scores.chunks_exact_mut(s.tk).zip(lse.iter_mut()).zip(&mut shares).enumerate() {
                        let seen = s.seen(from + i).min(keys);
                        let (sum, max) = exp_row(&mut row[..seen]);
                        row[seen..keys].fill(0.0);
                        *lse = max + sum.ln();
                        *share = 1.0 / sum;
                    }
                },
            );
            let (p, vm) = (Operand::rows(scores, s.tk), Operand::columns(s.head(v, b, h, s.tk, 0), inner));
            // SAFETY: each task writes the outputs of its own queries and head.
            unsafe { multiply(kernel, (rows, s.d, keys), p, vm, s.place(out_at, b, h, s.tq, from), false, 1.0) };
            for (i, share) in shares[..rows].iter().enumerate() {
                // SAFETY: as above; the product has written them.
                let row = unsafe { out_at.at((b * s.tq + from + i) * inner + h * s.d, s.d) };
                row.iter_mut().for_each(|v| *v *= share);
            }
        });
    });
    // SAFETY: the products have written every element: each query's, of each head.
    unsafe { out.set_len(q.len()) };
    (out, lse)
}

#[allow(clippy::too_many_arguments)]
fn backward(q: &[f32], k: &[f32], v: &[f32], out: &[f32], dy: &[f32], lse: &[f32], s: Sizes) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    // With a causal mask later chunks of queries see more keys than the first, which start from zeros.
    let zeros = s.causal || s.tq == 0;
    let start = |len: usize| if zeros { vec![0f32; len] } else { Vec::new() };
    let (mut dq, mut dk, mut dv) = (Vec::new(), start(k.len()), start(v.len()));
    let (dq_at, dk_at) = (SharedMut::for_vec(&mut dq, q.len()), SharedMut::for_vec(&mut dk, k.len()));
    let dv_at = SharedMut::for_vec(&mut dv, v.len());
    let work = s.tq * s.tk * (s.d / 2 + 8);
    let (kernel, inner) = (kernel(), s.inner());
    (0..s.n * s.heads).into_par_iter().with_min_len(grain(work)).for_each(|bh| {
        with_scores(s.tk, |p, ds| {
            let (b, h) = (bh / s.heads, bh % s.heads);
            for from in (0..s.tq).step_by(QUERIES) {
                let rows = QUERIES.min(s.tq - from);
                let keys = s.seen(from + rows - 1);
                let (qh, dyh) = (s.head(q, b, h, s.tq, from), s.head(dy, b, h, s.tq, from));
                let (kh, vh) = (s.head(k, b, h, s.tk, 0), s.head(v, b, h, s.tk, 0));
                let own = |data: &mut [f32]| Dst { data: SharedMut::new(data), offset: 0, rs: s.tk, turned: false };
                let scores = (rows, keys, s.d);
                // SAFETY: `p` and `ds` belong to this task.
                unsafe {
                    multiply(kernel, scores, Operand::rows(qh, inner), Operand::rows(kh, inner), own(p), false, s.scale());
                    multiply(kernel, scores, Operand::rows(dyh, inner), Operand::rows(vh, inner), own(ds), false, 1.0);
                }
                simd(
                    #[inline(always)]
                    || {
                        for i in 0..rows {
                            let seen = s.seen(from + i).min(keys);
                            let at = i * s.tk;
                            let (o, g) = (&out[(b * s.tq + from + i) * s.heads * s.d + h * s.d..][..s.d], &dyh[i * inner..][..s.d]);
                            let delta = dot(o, g);
                            let l = lse[bh * s.tq + from + i];
                            let (p, ds) = (&mut p[at..at + keys], &mut ds[at..at + keys]);
                            for (p, ds) in p[..seen].iter_mut().zip(&mut ds[..seen]) {
                                *p = exp_to_87(*p - l);
                                *ds = *p * (*ds - delta);
                            }
                            p[seen..].fill(0.0);
                            ds[seen..].fill(0.0);
                        }
                    },
                );
                let add = from > 0 || zeros;
                // SAFETY: this task alone writes head `h` of item `b` of all three gradients.
                unsafe {
                    let (dsm, km) = (Operand::rows(ds, s.tk), Operand::columns(kh, inner));
                    multiply(kernel, (rows, s.d, keys), dsm, km, s.place(dq_at, b, h, s.tq, from), false, s.scale());
                    let (dst, pt) = ((keys, s.d, rows), Operand::columns(p, s.tk));
                    let dst_k = s.place(dk_at, b, h, s.tk, 0);
                    multiply(kernel, dst, Operand::columns(ds, s.tk), Operand::columns(qh, inner), dst_k, add, s.scale());
                    multiply(kernel, dst, pt, Operand::columns(dyh, inner), s.place(dv_at, b, h, s.tk, 0), add, 1.0);
                }
            }
        });
    });
    // SAFETY: the products have written every element: the first chunk of queries, of each head, those of all keys.
    unsafe {
        dq.set_len(q.len());
        dk.set_len(k.len());
        dv.set_len(v.len());
    }
    (dq, dk, dv)
}

/// Scores that the composed form has in memory at a time: 256 MiB of them in f32.
const SCORES: usize = 1 << 26;

/// The composed form's tensors of one call, by heads: `(n, heads, tokens, d)`.
struct Heads {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Sizes,
}

impl Heads {
    fn split(t: &Tensor, s: Sizes) -> Result<Tensor> {
        t.reshape((s.n, (), s.heads, s.d))?.transpose(1, 2)?.contiguous()
    }

    fn join(t: &Tensor, s: Sizes) -> Result<Tensor> {
        t.transpose(1, 2)?.contiguous()?.reshape((s.n, (), s.heads * s.d))
    }

    /// Probabilities (n, heads, rows, tk) of the queries `rows` from `from` on, in f32. The scale goes into q before the product: in f16 the
    /// unscaled scores of wide heads pass 65504.
    fn probabilities(&self, from: usize, rows: usize) -> Result<Tensor> {
        let s = self.s;
        let q = (self.q.narrow(2, from, rows)?.contiguous()? * f64::from(s.scale()))?;
        let mut scores = q.matmul(&self.k.t()?)?.to_dtype(DType::F32)?;
        if s.causal {
            let hidden = |i: usize| if i % s.tk > from + i / s.tk { f32::NEG_INFINITY } else { 0.0 };
            let mask: Vec<f32> = (0..rows * s.tk).map(hidden).collect();
            scores = scores.broadcast_add(&Tensor::from_vec(mask, (rows, s.tk), q.device())?)?;
        }
        let e = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
    }
}

/// By candle's ops, `chunk` queries at a time. Softmax is f32, and so are sums over chunks.
fn composed_attention(q: &Value, k: &Value, v: &Value, s: Sizes, chunk: usize) -> Result<Value> {
    let dtype = q.tensor().dtype();
    let heads = Heads { q: Heads::split(q.tensor(), s)?, k: Heads::split(k.tensor(), s)?, v: Heads::split(v.tensor(), s)?, s };
    let chunks = move || (0..s.tq).step_by(chunk).map(move |from| (from, chunk.min(s.tq - from)));
    let part = |(from, rows)| heads.probabilities(from, rows)?.to_dtype(dtype)?.matmul(&heads.v);
    let out = Heads::join(&Tensor::cat(&chunks().map(part).collect::<Result<Vec<_>>>()?, 2)?, s)?;
    Ok(custom("attention", &[q, k, v], out, move |dy| {
        let dy = Heads::split(&dy.contiguous()?, s)?;
        let (mut dq, mut sums) = (Vec::new(), None::<(Tensor, Tensor)>);
        for (from, rows) in chunks() {
            let p = heads.probabilities(from, rows)?;
            let (qc, dyc) = (heads.q.narrow(2, from, rows)?.contiguous()?, dy.narrow(2, from, rows)?.contiguous()?);
            let dv = p.to_dtype(dtype)?.t()?.contiguous()?.matmul(&dyc)?.to_dtype(DType::F32)?;
            let dp = dyc.matmul(&heads.v.t()?)?.to_dtype(DType::F32)?;
            let delta = (&dp * &p)?.sum_keepdim(D::Minus1)?;
            let ds = ((dp.broadcast_sub(&delta)? * &p)? * f64::from(s.scale()))?.to_dtype(dtype)?;
            dq.push(ds.matmul(&heads.k)?);
            let dk = ds.t()?.contiguous()?.matmul(&qc)?.to_dtype(DType::F32)?;
            sums = Some(match sums {
                Some((dk_sum, dv_sum)) => ((dk_sum + dk)?, (dv_sum + dv)?),
                None => (dk, dv),
            });
        }
        let Some((dk, dv)) = sums else { candle_core::bail!("attention without queries") };
        let dq = Heads::join(&Tensor::cat(&dq, 2)?, s)?;
        Ok(vec![Some(dq), Some(Heads::join(&dk.to_dtype(dtype)?, s)?), Some(Heads::join(&dv.to_dtype(dtype)?, s)?)])
    }))
}

#[cfg(test)]
mod tests;
