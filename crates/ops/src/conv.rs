//! The frozen 2-d convolution. On the CPU each task gathers a tile of patches that stays in cache and multiplies it by
//! the kernel; the input gradient is a convolution with the flipped, transposed kernel.

use crate::gemm::{Dst, Mat, Threads, gemm, gemm_into};
use crate::linear::widen;
use crate::tape::{Value, custom};
use crate::view::{F32, SharedMut, fast, grain, tensor};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Output pixels of one tile. Fixed by the shape alone, so that results do not depend on the number of threads.
const TILE: usize = 256;

/// Sizes of one convolution.
#[derive(Clone, Copy)]
struct Geometry {
    n: usize,
    c: usize,
    h: usize,
    w: usize,
    kh: usize,
    kw: usize,
    stride: usize,
    padding: usize,
    oh: usize,
    ow: usize,
}

impl Geometry {
    fn new(x: (usize, usize, usize, usize), kernel: (usize, usize), stride: usize, padding: usize) -> Result<Self> {
        let ((n, c, h, w), (kh, kw)) = (x, kernel);
        if stride == 0 || h + 2 * padding < kh || w + 2 * padding < kw {
            candle_core::bail!("conv2d: input {h}x{w}, kernel {kh}x{kw}, stride {stride}, padding {padding}");
        }
        let (oh, ow) = ((h + 2 * padding - kh) / stride + 1, (w + 2 * padding - kw) / stride + 1);
        Ok(Self { n, c, h, w, kh, kw, stride, padding, oh, ow })
    }

    fn pointwise(&self) -> bool {
        self.kh == 1 && self.kw == 1 && self.stride == 1 && self.padding == 0
    }

    /// Rows of the patch matrix.
    fn depth(&self) -> usize {
        self.c * self.kh * self.kw
    }

    fn pixels(&self) -> usize {
        self.oh * self.ow
    }

    /// Writes the patches of output pixels `from..from + len` of one image: row (c, kh, kw), column pixel.
    fn patches(&self, x: &[f32], from: usize, len: usize, out: &mut [f32]) {
        let mut rows = out.chunks_exact_mut(len);
        for plane in x.chunks_exact(self.h * self.w) {
            for ky in 0..self.kh {
                for kx in 0..self.kw {
                    let Some(row) = rows.next() else { return };
                    self.patch_row(plane, ky, kx, from, row);
                }
            }
        }
    }

    fn patch_row(&self, plane: &[f32], ky: usize, kx: usize, from: usize, row: &mut [f32]) {
        let mut done = 0;
        while done < row.len() {
            let (oy, ox) = ((from + done) / self.ow, (from + done) % self.ow);
            let run = (self.ow - ox).min(row.len() - done);
            let segment = &mut row[done..done + run];
            done += run;
            let y = (oy * self.stride + ky).wrapping_sub(self.padding);
            if y >= self.h {
                segment.fill(0.0);
                continue;
            }
            let line = &plane[y * self.w..(y + 1) * self.w];
            if self.stride == 1 {
                // Output column ox reads input column ox + kx - padding.
                let first = ox + kx;
                let lead = self.padding.saturating_sub(first).min(run);
                let start = (first + lead).saturating_sub(self.padding).min(self.w);
                let inside = (self.w - start).min(run - lead);
                segment[..lead].fill(0.0);
                segment[lead..lead + inside].copy_from_slice(&line[start..start + inside]);
                segment[lead + inside..].fill(0.0);
            } else {
                for (i, v) in segment.iter_mut().enumerate() {
                    let x = ((ox + i) * self.stride + kx).wrapping_sub(self.padding);
                    *v = line.get(x).copied().unwrap_or(0.0);
                }
            }
        }
    }
}

/// Convolution `x (n, c, h, w)` with `weight (o, c, kh, kw)`, bias `(o)`: `(n, o, oh, ow)`.
///
/// # Errors
/// If shapes do not fit.
pub fn conv2d_forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Tensor> {
    let (o, c, kh, kw) = weight.dims4()?;
    let dims = x.dims4()?;
    if dims.1 != c {
        candle_core::bail!("conv2d: input {:?}, weight {:?}", x.dims(), weight.dims());
    }
    let g = Geometry::new(dims, (kh, kw), stride, padding)?;
    let weight = widen(weight, x.dtype())?;
    let bias = bias.map(|b| widen(b, x.dtype())).transpose()?;
    let x = x.contiguous()?;
    if !fast(&x) {
        let y = x.conv2d(&weight, padding, stride, 1, 1)?;
        return match bias {
            Some(b) => y.broadcast_add(&b.reshape((1, o, 1, 1))?),
            None => Ok(y),
        };
    }
    let (xv, wv) = (F32::new(&x)?, F32::new(&weight)?);
    let mut y = vec![0f32; g.n * o * g.pixels()];
    if let Some(b) = &bias {
        let b = F32::new(b)?;
        y.par_chunks_mut(g.pixels().max(1)).enumerate().with_min_len(grain(g.pixels())).for_each(|(i, plane)| plane.fill(b[i % o]));
    }
    convolve(&xv, &wv, o, g, &mut y, bias.is_some());
    tensor(y, (g.n, o, g.oh, g.ow))
}

fn convolve(x: &[f32], weight: &[f32], o: usize, g: Geometry, y: &mut [f32], add: bool) {
    let (pixels, depth, image) = (g.pixels(), g.depth(), g.c * g.h * g.w);
    let tiles = pixels.div_ceil(TILE);
    let w = Mat::rows(weight, depth);
    if g.pointwise() && g.n * tiles < 2 {
        return gemm(o, pixels, depth, y, add, w, Mat::rows(x, pixels));
    }
    let out = SharedMut::new(y);
    let work = depth * pixels.min(TILE) * (o / 16 + 1);
    (0..g.n * tiles).into_par_iter().with_min_len(grain(work)).for_each_init(Vec::new, |patches: &mut Vec<f32>, task| {
        let (i, from) = (task / tiles, task % tiles * TILE);
        let len = TILE.min(pixels - from);
        let x = &x[i * image..(i + 1) * image];
        let dst = Dst { data: out, offset: i * o * pixels + from, rs: pixels, cs: 1 };
        let b = if g.pointwise() {
            Mat { data: &x[from..], rs: pixels, cs: 1 }
        } else {
            patches.resize(depth * len, 0.0);
            g.patches(x, from, len, patches);
            Mat::rows(patches, len)
        };
        // SAFETY: each task writes the pixels of its own tile.
        unsafe { gemm_into(o, len, depth, dst, add, w, b, 1.0, Threads::One) };
    });
}

/// The gradient of the input `(n, c, h, w)` from `dy (n, o, oh, ow)`: for stride 1 the convolution of `dy` with the
/// flipped kernel, its first two dimensions swapped; for larger strides the same on `dy` with zeros between its pixels.
///
/// # Errors
/// If shapes do not fit, or the padding exceeds the kernel's reach.
pub fn conv2d_input_grad(dy: &Tensor, weight: &Tensor, size: (usize, usize), stride: usize, padding: usize) -> Result<Tensor> {
    let (o, _c, kh, kw) = weight.dims4()?;
    let (n, od, oh, ow) = dy.dims4()?;
    if od != o || kh != kw || padding >= kh {
        candle_core::bail!("conv2d backward: gradient {:?}, weight {:?}, padding {padding}", dy.dims(), weight.dims());
    }
    let flipped = flip(&widen(weight, dy.dtype())?)?;
    if stride == 1 {
        return conv2d_forward(dy, &flipped, None, 1, kh - 1 - padding);
    }
    // What the strided convolution left over at the lower and right edge.
    let rest = |full: usize, small: usize| (full + 2 * padding).checked_sub((small - 1) * stride + kh);
    let (Some(ry), Some(rx)) = (rest(size.0, oh), rest(size.1, ow)) else {
        candle_core::bail!("conv2d backward: gradient {:?} for an input of {size:?}", dy.dims());
    };
    let spread = |t: &Tensor, dim: usize, len: usize, rest: usize| -> Result<Tensor> {
        let (mut shape, mut flat) = (t.dims().to_vec(), t.dims().to_vec());
        shape.insert(dim + 1, 1);
        flat[dim] = len * stride;
        t.reshape(shape)?
            .pad_with_zeros(dim + 1, 0, stride - 1)?
            .reshape(flat)?
            .narrow(dim, 0, (len - 1) * stride + 1)?
            .pad_with_zeros(dim, 0, rest)
    };
    let wide = spread(&spread(&dy.contiguous()?, 2, oh, ry)?, 3, ow, rx)?;
    debug_assert_eq!(wide.dims()[0], n);
    conv2d_forward(&wide, &flipped, None, 1, kh - 1 - padding)
}

/// `(o, c, kh, kw)` to `(c, o, kh, kw)` with both kernel axes reversed.
fn flip(weight: &Tensor) -> Result<Tensor> {
    let (o, c, kh, kw) = weight.dims4()?;
    if !fast(weight) {
        let swapped = weight.transpose(0, 1)?.contiguous()?;
        if kh * kw == 1 {
            return Ok(swapped);
        }
        let last = (kh * kw) as u32;
        let order = Tensor::from_vec((0..last).rev().collect::<Vec<_>>(), kh * kw, weight.device())?;
        return swapped.reshape((c, o, kh * kw))?.index_select(&order, 2)?.reshape((c, o, kh, kw));
    }
    let w = F32::new(weight)?;
    let taps = kh * kw;
    let mut out = vec![0f32; w.len()];
    out.par_chunks_mut((o * taps).max(1)).enumerate().with_min_len(grain(o * taps)).for_each(|(ci, row)| {
        for (oi, to) in row.chunks_exact_mut(taps).enumerate() {
            let from = &w[(oi * c + ci) * taps..][..taps];
            for (t, f) in to.iter_mut().zip(from.iter().rev()) {
                *t = *f;
            }
        }
    });
    tensor(out, (c, o, kh, kw))
}

/// The gradient of the kernel `(o, c, kh, kw)` from `x (n, c, h, w)` and `dy (n, o, oh, ow)`. For trained kernels only:
/// the adapter's small ones.
///
/// # Errors
/// If shapes do not fit.
pub fn conv2d_weight_grad(x: &Tensor, dy: &Tensor, kernel: (usize, usize), stride: usize, padding: usize) -> Result<Tensor> {
    let g = Geometry::new(x.dims4()?, kernel, stride, padding)?;
    let (n, o, oh, ow) = dy.dims4()?;
    if n != g.n || oh != g.oh || ow != g.ow {
        candle_core::bail!("conv2d weight gradient: input {:?}, gradient {:?}", x.dims(), dy.dims());
    }
    let shape = (o, g.c, kernel.0, kernel.1);
    let (x, dy) = (x.contiguous()?, dy.contiguous()?);
    if !fast(&x) || !fast(&dy) {
        // dW = conv of x (channels as batch) with dy (channels as kernels), dilated by the stride.
        let dw = x.transpose(0, 1)?.contiguous()?.conv2d(&dy.transpose(0, 1)?.contiguous()?, padding, 1, stride, 1)?;
        return dw.narrow(2, 0, kernel.0)?.narrow(3, 0, kernel.1)?.transpose(0, 1)?.contiguous()?.reshape(shape);
    }
    let (xv, dyv) = (F32::new(&x)?, F32::new(&dy)?);
    let (pixels, depth, image) = (g.pixels(), g.depth(), g.c * g.h * g.w);
    let tiles = pixels.div_ceil(TILE);
    let tasks = g.n * tiles;
    // A fixed number of partial sums, added up in order: the result does not depend on the number of threads.
    let shares = tasks.min(4);
    let partial: Vec<Vec<f32>> = (0..shares)
        .into_par_iter()
        .with_min_len(grain(tasks / shares.max(1) * depth * pixels.min(TILE) * (o / 16 + 1)))
        .map(|share| {
            let mut sum = vec![0f32; o * depth];
            let mut patches = Vec::new();
            for (k, task) in (share * tasks / shares..(share + 1) * tasks / shares).enumerate() {
                let (i, from) = (task / tiles, task % tiles * TILE);
                let len = TILE.min(pixels - from);
                let x = &xv[i * image..(i + 1) * image];
                let b = if g.pointwise() {
                    Mat { data: &x[from..], rs: pixels, cs: 1 }
                } else {
                    patches.resize(depth * len, 0.0);
                    g.patches(x, from, len, &mut patches);
                    Mat::rows(&patches, len)
                };
                let a = Mat { data: &dyv[i * o * pixels + from..], rs: pixels, cs: 1 };
                let dst = Dst { data: SharedMut::new(&mut sum), offset: 0, rs: depth, cs: 1 };
                // SAFETY: `sum` belongs to this task.
                unsafe { gemm_into(o, depth, len, dst, k > 0, a, b.t(), 1.0, Threads::One) };
            }
            sum
        })
        .collect();
    let mut partial = partial.into_iter();
    let mut total = partial.next().unwrap_or_else(|| vec![0f32; o * depth]);
    for p in partial {
        total.iter_mut().zip(p).for_each(|(t, v)| *t += v);
    }
    tensor(total, shape)
}

/// A frozen convolution. The weight may be stored narrower than the input's type; it is widened for the call only.
///
/// # Errors
/// If shapes do not fit.
pub fn conv2d(x: &Value, weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Value> {
    let out = conv2d_forward(x.tensor(), weight, bias, stride, padding)?;
    let (_, _, h, w) = x.tensor().dims4()?;
    let weight = weight.clone();
    Ok(custom("conv2d", &[x], out, move |dy| Ok(vec![Some(conv2d_input_grad(dy, &weight, (h, w), stride, padding)?)])))
}
