//! The frozen 2-d convolution. On the CPU a matrix product whose right operand, the patches, is gathered while it is packed; the
//! input gradient is a product with the transposed kernel, whose columns are added to their places while they are in cache.
//! On the GPU, with the feature `cudnn`, all three products are cuDNN's. Elsewhere the input gradient is a convolution with the flipped,
//! transposed kernel.

use crate::basic::add_over;
#[cfg(feature = "cudnn")]
use crate::cudnn;
use crate::gemm::{Begin, Dst, Product, Threads, gemm, kernel};
use crate::linear::widen;
use crate::mapped::Weight;
use crate::pack::{Operand, Side, Strip, pack};
use crate::patches::Geometry;
use crate::tape::{Value, custom};
use crate::view::{F32, SharedMut, fast, grain, tensor};
use crate::weight::{Delta, Frozen, Held, stored};
use crate::winograd::{Winograd, deal_taps};
use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

/// Pixels of the output, and columns (channels times the kernel's area), that the backward pass takes at a time: their products
/// stay in the second cache until they are added up.
const BACK_PIXELS: usize = 256;
const BACK_COLUMNS: usize = 216;
/// Multiply-adds from which all threads share one image; smaller ones are dealt whole.
const SHARED: usize = 1 << 23;

/// Convolution `x (n, c, h, w)` with `weight (o, c, kh, kw)`, bias `(o)`: `(n, o, oh, ow)`. A delta is added to the weight on the
/// way (f32 on the CPU only).
///
/// # Errors
/// If shapes do not fit.
pub fn conv2d_forward<'a>(
    x: &Tensor,
    weight: impl Into<Frozen<'a>>,
    bias: Option<&Tensor>,
    stride: usize,
    padding: usize,
) -> Result<Tensor> {
    let Frozen { weight, delta } = weight.into();
    let (o, c, kh, kw) = weight.dims4()?;
    let dims = x.dims4()?;
    if dims.1 != c {
        candle_core::bail!("conv2d: input {:?}, weight {:?}", x.dims(), weight.dims());
    }
    let g = Geometry::new(dims, (kh, kw), stride, padding)?;
    let bias = bias.map(|b| widen(b, x.dtype())).transpose()?;
    let x = x.contiguous()?;
    if !fast(&x) {
        let y = plain(&x, &weight.widened(x.dtype())?, padding, stride, 1)?;
        return match bias {
            Some(b) => add_over(&y, &b, g.pixels(), (1, o, 1, 1)),
            None => Ok(y),
        };
    }
    let weight = stored(weight)?;
    let held = Held::new(&weight, delta)?;
    let (xv, lines) = (F32::new(&x)?, held.lines()?);
    let (pixels, depth) = (g.pixels(), g.depth());
    let a = Operand::weight_rows(&lines, depth);
    let mut y = Vec::new();
    let out = SharedMut::for_vec(&mut y, g.n * o * pixels);
    let bias = bias.as_ref().map(F32::new).transpose()?;
    let kernel = kernel();
    if let Some(winograd) = g.winograd(kernel, c, o) {
        let taps = |rows: Strip, (k0, kc): (usize, usize), out: &mut [f32], scratch: &mut Vec<f32>| {
            pack(kernel, Side::Left, &a, std::iter::once(rows), 0, (9 * k0, 9 * kc), out, scratch);
        };
        let ahead = |rows, (k0, kc)| lines.ahead(rows, (9 * k0, 9 * kc));
        // SAFETY: `y` is borrowed exclusively, and every element is written.
        unsafe {
            winograd.run(&xv, (&taps, &ahead), bias.as_deref(), out);
            y.set_len(g.n * o * pixels);
        }
        return tensor(y, (g.n, o, g.oh, g.ow));
    }
    let padded = g.pad(&xv);
    let x = padded.as_deref().unwrap_or(&xv);
    let image = x.len() / g.n.max(1);
    let one = |i: usize, threads: Threads| {
        let x = &x[i * image..][..image];
        let patches = |line: usize, from: usize, to: &mut [f32]| g.patch_line(x, line, from, to);
        let b = if g.pointwise() { Operand::columns(x, pixels) } else { Operand::Across(&patches) };
        let dst = Dst { data: out, offset: i * o * pixels, rs: pixels, turned: false };
        let begin = bias.as_deref().map_or(Begin::Zero, Begin::Rows);
        let product = Product { m: o, n: pixels, k: depth, a, b, dst, begin, scale: 1.0, kernel };
        // SAFETY: each image has its own places.
        unsafe { product.run(threads) }
    };
    each_image(g.n, o * pixels * depth, one);
    // SAFETY: the products have written every element.
    unsafe { y.set_len(g.n * o * pixels) };
    tensor(y, (g.n, o, g.oh, g.ow))
}

/// cuDNN's convolution where it serves, or candle's; the CPU form of that lacks bf16, which is widened there.
fn plain(x: &Tensor, kernel: &Tensor, padding: usize, stride: usize, dilation: usize) -> Result<Tensor> {
    #[cfg(feature = "cudnn")]
    if dilation == 1 && cudnn::serves(x) {
        return cudnn::forward(x, kernel, stride, padding);
    }
    if x.device().is_cpu() && x.dtype() == DType::BF16 {
        let (x, kernel) = (x.to_dtype(DType::F32)?, kernel.to_dtype(DType::F32)?);
        return x.conv2d(&kernel, padding, stride, dilation, 1)?.to_dtype(DType::BF16);
    }
    x.conv2d(kernel, padding, stride, dilation, 1)
}

/// Large images one after the other on all threads; small ones beside each other.
fn each_image(n: usize, work: usize, one: impl Fn(usize, Threads) + Sync) {
    if n == 1 || work >= SHARED {
        (0..n).for_each(|i| one(i, Threads::All));
    } else {
        (0..n).into_par_iter().with_min_len(grain(work / 16)).for_each(|i| one(i, Threads::One));
    }
}

/// The gradient of the input `(n, c, h, w)` from `dy (n, o, oh, ow)`. On the CPU by products with the kernel's transpose, on the GPU
/// with the feature `cudnn` by cuDNN; elsewhere for stride 1 the convolution of `dy` with the flipped kernel, its first two dimensions
/// swapped, and for larger strides the same on `dy` with zeros between its pixels. A delta is added to the weight on the way (f32 on
/// the CPU only).
///
/// # Errors
/// If shapes do not fit, or the padding exceeds the kernel's reach.
pub fn conv2d_input_grad<'a>(
    dy: &Tensor,
    weight: impl Into<Frozen<'a>>,
    size: (usize, usize),
    stride: usize,
    padding: usize,
) -> Result<Tensor> {
    let Frozen { weight, delta } = weight.into();
    let (o, c, kh, kw) = weight.dims4()?;
    let (n, od, oh, ow) = dy.dims4()?;
    if od != o || kh != kw || padding >= kh {
        candle_core::bail!("conv2d backward: gradient {:?}, weight {:?}, padding {padding}", dy.dims(), weight.dims());
    }
    if fast(dy) {
        let g = Geometry::new((n, c, size.0, size.1), (kh, kw), stride, padding)?;
        if (g.oh, g.ow) != (oh, ow) {
            candle_core::bail!("conv2d backward: gradient {:?} for an input of {size:?}", dy.dims());
        }
        return input_grad(&dy.contiguous()?, &stored(weight)?, delta, o, g);
    }
    let weight = weight.widened(dy.dtype())?;
    #[cfg(feature = "cudnn")]
    if cudnn::serves(dy) {
        return cudnn::input_grad(dy, &weight, size, stride, padding);
    }
    let flipped = flip(&weight)?;
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

fn input_grad(dy: &Tensor, weight: &Weight, delta: Option<Delta<'_>>, o: usize, g: Geometry) -> Result<Tensor> {
    let held = Held::new(weight, delta)?;
    let (dyv, lines) = (F32::new(dy)?, held.lines()?);
    let (pixels, plane, taps, depth) = (g.pixels(), g.h * g.w, g.kh * g.kw, g.depth());
    let kernel = kernel();
    let mut dx = Vec::new();
    let out = SharedMut::for_vec(&mut dx, g.n * g.c * plane);
    if let Some(winograd) = g.winograd(kernel, o, g.c) {
        let taps = |rows: Strip, (k0, kc): (usize, usize), to: &mut [f32], scratch: &mut Vec<f32>| {
            let (from, len) = (9 * rows.start, 9 * rows.len);
            scratch.resize(scratch.len().max(len), 0.0);
            for k in 0..kc {
                let line = match lines.plain() {
                    Some(w) => &w[(k0 + k) * depth + from..][..len],
                    None => {
                        lines.fill(k0 + k, from, &mut scratch[..len]);
                        &scratch[..len]
                    }
                };
                deal_taps(kernel, line, rows, &mut to[9 * k * rows.width..]);
            }
        };
        let ahead = |(first, rows), k| lines.ahead(k, (9 * first, 9 * rows));
        // SAFETY: `dx` is borrowed exclusively, and every element is written.
        unsafe {
            Winograd { flipped: true, ..winograd }.run(&dyv, (&taps, &ahead), None, out);
            dx.set_len(g.n * g.c * plane);
        }
        return tensor(dx, (g.n, g.c, g.h, g.w));
    }
    // The gradient by patches of channels from `first` on, for pixels from `from` on.
    let product = |i: usize, first: usize, channels: usize, from: usize, len: usize, dst: Dst, threads: Threads| {
        let at = first * taps;
        let a = Operand::weight_columns(&lines, depth, at);
        let b = Operand::columns(&dyv[i * o * pixels + from..], pixels);
        // The longer side is the one that is packed in the wider strips.
        let (m, n) = (channels * taps, len);
        let (m, n, a, b, dst) = if m > n && kernel.in_place() { (n, m, b, a, Dst { turned: true, ..dst }) } else { (m, n, a, b, dst) };
        // SAFETY: the callers give each product its own places.
        unsafe { Product { m, n, k: o, a, b, dst, begin: Begin::Zero, scale: 1.0, kernel }.run(threads) }
    };
    if g.pointwise() {
        let dst = |i: usize| Dst { data: out, offset: i * g.c * plane, rs: plane, turned: false };
        each_image(g.n, g.c * pixels * o, |i, threads| product(i, 0, g.c, 0, pixels, dst(i), threads));
    } else {
        // As many groups of channels as give every thread the same number; what they hold does not change the result.
        let threads = rayon::current_num_threads();
        let most = (BACK_COLUMNS / taps).max(1);
        let rounds = (g.n * g.c).div_ceil(most * threads).max(1);
        let channels = (g.n * g.c).div_ceil(rounds * threads).clamp(1, most);
        let groups = g.c.div_ceil(channels);
        (0..g.n * groups).into_par_iter().with_min_len(grain(channels * depth * pixels / 16)).for_each_init(Vec::new, |columns, task| {
            let (i, first) = (task / groups, task % groups * channels);
            let channels = channels.min(g.c - first);
            // SAFETY: each task writes its own planes, whose memory is there.
            let planes = unsafe {
                out.fill((i * g.c + first) * plane, channels * plane, 0.0);
                out.at((i * g.c + first) * plane, channels * plane)
            };
            for from in (0..pixels).step_by(BACK_PIXELS) {
                let len = BACK_PIXELS.min(pixels - from);
                columns.resize((channels * taps * len).max(columns.len()), 0.0);
                let dst = Dst { data: SharedMut::new(columns), offset: 0, rs: len, turned: false };
                product(i, first, channels, from, len, dst, Threads::One);
                for (plane, lines) in planes.chunks_exact_mut(plane).zip(columns.chunks_exact(taps * len)) {
                    for (tap, line) in lines.chunks_exact(len).enumerate() {
                        g.add_back(line, (tap / g.kw, tap % g.kw), from, plane);
                    }
                }
            }
        });
    }
    // SAFETY: every element was written, in products or by the zeros that sums start from.
    unsafe { dx.set_len(g.n * g.c * plane) };
    tensor(dx, (g.n, g.c, g.h, g.w))
}

/// `(o, c, kh, kw)` to `(c, o, kh, kw)` with both kernel axes reversed.
fn flip(weight: &Tensor) -> Result<Tensor> {
    let (o, c, kh, kw) = weight.dims4()?;
    let swapped = weight.transpose(0, 1)?.contiguous()?;
    if kh * kw == 1 {
        return Ok(swapped);
    }
    let last = (kh * kw) as u32;
    let order = Tensor::from_vec((0..last).rev().collect::<Vec<_>>(), kh * kw, weight.device())?;
    swapped.reshape((c, o, kh * kw))?.index_select(&order, 2)?.reshape((c, o, kh, kw))
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
    #[cfg(feature = "cudnn")]
    if cudnn::serves(&x) {
        return cudnn::weight_grad(&x, &dy, kernel, stride, padding);
    }
    if !fast(&x) || !fast(&dy) {
        // dW = conv of x (channels as batch) with dy (channels as kernels), dilated by the stride.
        let images = x.transpose(0, 1)?.contiguous()?;
        let dw = plain(&images, &dy.transpose(0, 1)?.contiguous()?, padding, 1, stride)?;
        return dw.narrow(2, 0, kernel.0)?.narrow(3, 0, kernel.1)?.transpose(0, 1)?.contiguous()?.reshape(shape);
    }
    let (xv, dyv) = (F32::new(&x)?, F32::new(&dy)?);
    let (pixels, depth) = (g.pixels(), g.depth());
    let padded = g.pad(&xv);
    let x = padded.as_deref().unwrap_or(&xv);
    let image = x.len() / g.n.max(1);
    // All images' pixels are summed over in one product. A line goes on in the next image.
    let over_images = |from: usize, out: &mut [f32], one: &dyn Fn(usize, usize, &mut [f32])| {
        let (mut i, mut at, mut done) = (from / pixels, from % pixels, 0);
        while done < out.len() {
            let run = (pixels - at).min(out.len() - done);
            one(i, at, &mut out[done..done + run]);
            (i, at, done) = (i + 1, 0, done + run);
        }
    };
    let dy_line = |r: usize, from: usize, out: &mut [f32]| {
        over_images(from, out, &|i, at, out| out.copy_from_slice(&dyv[(i * o + r) * pixels + at..][..out.len()]));
    };
    let x_line = |line: usize, from: usize, out: &mut [f32]| {
        over_images(from, out, &|i, at, out| g.patch_line(&x[i * image..][..image], line, at, out));
    };
    let dw = gemm(o, depth, g.n * pixels, Operand::AlongK(&dy_line), Operand::AlongK(&x_line));
    tensor(dw, shape)
}

/// A frozen convolution. The weight may be stored narrower than the input's type; it is widened for the call only.
///
/// # Errors
/// If shapes do not fit.
pub fn conv2d(x: &Value, weight: impl Into<Weight>, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Value> {
    let weight = weight.into();
    let out = conv2d_forward(x.tensor(), &weight, bias, stride, padding)?;
    let (_, _, h, w) = x.tensor().dims4()?;
    Ok(custom("conv2d", &[x], out, move |dy| Ok(vec![Some(conv2d_input_grad(dy, &weight, (h, w), stride, padding)?)])))
}
