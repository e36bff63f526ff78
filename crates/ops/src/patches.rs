//! The patches of a convolution as lines of a matrix `(c kh kw, oh ow)`: made when a product packs them, and added back to where they came
//! from in the backward pass.

use crate::tile::Kernel;
use crate::view::{build, grain};
use crate::winograd::Winograd;
use candle_core::Result;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Sizes of one convolution.
#[derive(Clone, Copy)]
pub(crate) struct Geometry {
    pub n: usize,
    pub c: usize,
    pub h: usize,
    pub w: usize,
    pub kh: usize,
    pub kw: usize,
    pub stride: usize,
    pub padding: usize,
    pub oh: usize,
    pub ow: usize,
}

impl Geometry {
    pub(crate) fn new(x: (usize, usize, usize, usize), kernel: (usize, usize), stride: usize, padding: usize) -> Result<Self> {
        let ((n, c, h, w), (kh, kw)) = (x, kernel);
        if stride == 0 || h + 2 * padding < kh || w + 2 * padding < kw {
            candle_core::bail!("conv2d: input {h}x{w}, kernel {kh}x{kw}, stride {stride}, padding {padding}");
        }
        let (oh, ow) = ((h + 2 * padding - kh) / stride + 1, (w + 2 * padding - kw) / stride + 1);
        Ok(Self { n, c, h, w, kh, kw, stride, padding, oh, ow })
    }

    pub(crate) fn pointwise(&self) -> bool {
        self.kh == 1 && self.kw == 1 && self.stride == 1 && self.padding == 0
    }

    /// The faster form for `c` channels to `o`, if it serves this geometry and pays.
    pub(crate) fn winograd(&self, kernel: Kernel, c: usize, o: usize) -> Option<Winograd> {
        let serves = (self.kh, self.kw, self.stride, self.padding) == (3, 3, 1, 1);
        let winograd = Winograd { kernel, n: self.n, c, o, h: self.h, w: self.w, flipped: false };
        (serves && winograd.pays()).then_some(winograd)
    }

    /// Rows of the patch matrix.
    pub(crate) fn depth(&self) -> usize {
        self.c * self.kh * self.kw
    }

    pub(crate) fn pixels(&self) -> usize {
        self.oh * self.ow
    }

    /// Height and width with the zeros around.
    pub(crate) fn padded(&self) -> (usize, usize) {
        (self.h + 2 * self.padding, self.w + 2 * self.padding)
    }

    /// All planes with zeros around them; `None` if there are none to add.
    pub(crate) fn pad(&self, x: &[f32]) -> Option<Vec<f32>> {
        if self.padding == 0 {
            return None;
        }
        let (ph, pw) = self.padded();
        let zero = |to: &mut [MaybeUninit<f32>]| {
            to.fill(MaybeUninit::new(0.0));
        };
        let write = |out: &mut [MaybeUninit<f32>]| {
            out.par_chunks_mut(ph * pw).zip(x.par_chunks(self.h * self.w)).with_min_len(grain(ph * pw)).for_each(|(to, from)| {
                let (above, rest) = to.split_at_mut(self.padding * pw);
                let (lines, below) = rest.split_at_mut(self.h * pw);
                zero(above);
                for (to, from) in lines.chunks_exact_mut(pw).zip(from.chunks_exact(self.w)) {
                    let (left, rest) = to.split_at_mut(self.padding);
                    let (middle, right) = rest.split_at_mut(self.w);
                    zero(left);
                    for (to, from) in middle.iter_mut().zip(from) {
                        to.write(*from);
                    }
                    zero(right);
                }
                zero(below);
            });
        };
        assert_eq!(x.len(), self.n * self.c * self.h * self.w);
        // SAFETY: of each plane, of which there are as many as of the picture's, every line is written whole.
        Some(unsafe { build(self.n * self.c * ph * pw, write) })
    }

    /// Line `(c, kh, kw)` of the patch matrix of one padded image: its input pixel for each output pixel from `from` on.
    pub(crate) fn patch_line(&self, image: &[f32], line: usize, from: usize, out: &mut [f32]) {
        let (ph, pw) = self.padded();
        let (ci, tap) = (line / (self.kh * self.kw), line % (self.kh * self.kw));
        let (ky, kx) = (tap / self.kw, tap % self.kw);
        let plane = &image[ci * ph * pw..][..ph * pw];
        let (mut oy, mut ox, mut done) = (from / self.ow, from % self.ow, 0);
        while done < out.len() {
            let run = (self.ow - ox).min(out.len() - done);
            let line = &plane[(oy * self.stride + ky) * pw + ox * self.stride + kx..];
            let to = &mut out[done..done + run];
            if self.stride > 1 {
                to.iter_mut().zip(line.iter().step_by(self.stride)).for_each(|(t, f)| *t = *f);
            } else {
                copy(&line[..run], to);
            }
            (oy, ox, done) = (oy + 1, 0, done + run);
        }
    }

    /// Adds line `(kh, kw)` of a gradient by patches to its places in a plane of the input's gradient.
    pub(crate) fn add_back(&self, line: &[f32], (ky, kx): (usize, usize), from: usize, plane: &mut [f32]) {
        let (mut oy, mut ox, mut done) = (from / self.ow, from % self.ow, 0);
        while done < line.len() {
            let run = (self.ow - ox).min(line.len() - done);
            let y = (oy * self.stride + ky).wrapping_sub(self.padding);
            if y < self.h {
                let row = &mut plane[y * self.w..][..self.w];
                // Columns ox.. of the output whose input column ox * stride + kx - padding lies inside.
                let skip = self.padding.saturating_sub(ox * self.stride + kx).div_ceil(self.stride).min(run);
                let first = ((ox + skip) * self.stride + kx).wrapping_sub(self.padding);
                if skip < run && first < self.w {
                    let from = &line[done + skip..done + run];
                    if self.stride == 1 {
                        row[first..].iter_mut().zip(from).for_each(|(r, v)| *r += v);
                    } else {
                        row[first..].iter_mut().step_by(self.stride).zip(from).for_each(|(r, v)| *r += v);
                    }
                }
            }
            (oy, ox, done) = (oy + 1, 0, done + run);
        }
    }
}

/// Short copies without a call: lines of a small picture are 8 or 16 pixels.
#[inline(always)]
fn copy(from: &[f32], to: &mut [f32]) {
    let (f, f_rest) = from.as_chunks::<8>();
    let (t, t_rest) = to.as_chunks_mut::<8>();
    t.iter_mut().zip(f).for_each(|(t, f)| *t = *f);
    t_rest.iter_mut().zip(f_rest).for_each(|(t, f)| *t = *f);
}
