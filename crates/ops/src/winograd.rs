//! Convolutions with kernels of 3x3 and stride 1 by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2015, "Fast Algorithms for
//! Convolutional Neural Networks", section 4.1): tiles of 2x2 outputs take 16 multiplications where the definition takes 36. The
//! transformed picture, kernel and result are 16 matrices each, for the places `p` of a 4x4 tile: `M_p (o, tiles) = U_p (o, c) V_p (c, tiles)`.
//!
//! All of it happens in blocks that stay in the second cache; of the transformed kernel only a few rows exist at a time. The three
//! transforms themselves are in `plain.rs` and, for AVX-512, `avx512.rs`.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;

use crate::ahead::Ahead;
use crate::math::simd;
use crate::pack::{SLACK, Strip, column_strips, lines, row_strips};
use crate::tile::{Kernel, Left, Start, Tile, tile};
use crate::view::{SharedMut, grain, reuse};
use rayon::prelude::*;
use std::cell::Cell;

/// Places of a tile.
const PLACES: usize = 16;
/// Tiles beside each other that are transformed together; a row of tiles is filled up to a multiple of it.
const QUAD: usize = 4;
/// Channels that are summed over in a block.
const KC: usize = 128;
/// Of these, channels whose taps are read and transformed at a time, in the first cache.
const TAPS: usize = 16;
/// Strips of rows in a block: as often is a strip of columns used while it is in the first cache.
const GROUPS: usize = 3;
/// Tiles in a block, if the picture's transform then takes no more than [`MOST`] numbers.
const TILES: usize = 256;
const MOST: usize = 1 << 22;

/// Costs in multiply-adds, of a kernel's transform, and of a tile's on each side: so that 640 channels at 8x8, 320 at 16x16 and at 64x64 take
/// the form that was faster when both were timed, with AVX-512 and with AVX2 (`cargo run --release -p benches --bin ops -- --only conv3x3`).
const KERNEL_COST: usize = 200;
const TILE_COST: usize = 200;

/// One convolution `x (n, c, h, w)` to `(n, o, h, w)`, padding 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Winograd {
    pub kernel: Kernel,
    pub n: usize,
    pub c: usize,
    pub o: usize,
    pub h: usize,
    pub w: usize,
    /// Whether the taps come in reverse order.
    pub flipped: bool,
}

/// Writes the kernels of the output channels of a strip from input channels `k0..k0 + kc` (the pair): tap `t` of input channel `k0 + k` for
/// all these outputs at `(9 k + t) * width`. [`SLACK`] places behind them may be overwritten. The last argument is a buffer to use.
pub(crate) type Taps<'a> = dyn Fn(Strip, (usize, usize), &mut [f32], &mut Vec<f32>) + Sync + 'a;

/// Where the taps of so many output channels (first, count) for some input channels (first, count) lie, to be asked for.
pub(crate) type TapsAhead<'a> = dyn Fn((usize, usize), (usize, usize)) -> Ahead + Sync + 'a;

thread_local! {
    static PICTURE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static BLOCK: Cell<(Vec<f32>, Vec<f32>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

/// Four tiles beside each other.
#[derive(Clone, Copy)]
struct Quad {
    /// Where their four lines of the picture begin in [`Block::lines`].
    from: usize,
    /// Where their outputs begin, for channel 0.
    to: usize,
    /// Outputs in a line, up to eight, and lines.
    len: usize,
    height: usize,
}

/// Some rows of tiles.
struct Block {
    quads: Vec<Quad>,
    /// Lines of the picture: of which image, and which.
    lines: Vec<Option<(usize, usize)>>,
    /// Numbers in a line, the zeros around it included.
    width: usize,
}

impl Block {
    fn tiles(&self) -> usize {
        QUAD * self.quads.len()
    }
}

impl Winograd {
    /// Rows of tiles in an image.
    fn tile_rows(&self) -> usize {
        self.h.div_ceil(2)
    }

    /// Tiles in such a row, filled up.
    fn tile_columns(&self) -> usize {
        self.w.div_ceil(2).next_multiple_of(QUAD)
    }

    /// Rows of tiles, all images' counted, that a block takes.
    fn rows_per_block(&self) -> usize {
        let tiles = (MOST / (PLACES * self.c)).clamp(self.kernel.lanes() * 2, TILES);
        (tiles / self.tile_columns()).clamp(1, self.n * self.tile_rows())
    }

    /// Whether this form is faster than the direct one, for one image: the number of others must not change an image's result.
    pub(crate) fn pays(&self) -> bool {
        if self.h <= 2 || self.w <= 2 || self.kernel.is_bf16() {
            return false;
        }
        let one = Self { n: 1, ..*self };
        let (c, o, rows) = (self.c, self.o, self.tile_rows());
        let (tiles, blocks) = (rows * self.tile_columns(), rows.div_ceil(one.rows_per_block()));
        let direct = c * o * 9 * self.h * self.w;
        let cost = c * o * (PLACES * tiles + KERNEL_COST * blocks) + (c + o) * tiles * TILE_COST;
        cost + cost / 8 < direct
    }

    /// Rows of tiles `rows.0..rows.1`, all images' counted.
    fn block(&self, rows: (usize, usize)) -> Block {
        let (th, tw) = (self.tile_rows(), self.tile_columns());
        let mut block = Block { quads: Vec::new(), lines: Vec::new(), width: 2 * tw + 2 };
        for row in rows.0..rows.1 {
            let (image, ty) = (row / th, row % th);
            // Two lines are those of the row above, if that is the image's too.
            let known = if row > rows.0 && ty > 0 { 2 } else { 0 };
            let first = block.lines.len() - known;
            block.lines.extend((known..4).map(|i| (2 * ty + i).checked_sub(1).filter(|y| *y < self.h).map(|y| (image, y))));
            block.quads.extend((0..tw).step_by(QUAD).map(|tx| Quad {
                from: first * block.width + 2 * tx,
                to: (image * self.o * self.h + 2 * ty) * self.w + 2 * tx,
                len: (2 * QUAD).min(self.w.saturating_sub(2 * tx)),
                height: 2.min(self.h - 2 * ty),
            }));
        }
        block
    }

    /// Computes it into the first `n * o * h * w` places of `out`, all of which are written.
    ///
    /// # Safety
    /// No other thread touches these places meanwhile.
    pub(crate) unsafe fn run(&self, x: &[f32], (taps, ahead): (&Taps, &TapsAhead), bias: Option<&[f32]>, out: SharedMut) {
        assert_eq!(x.len(), self.n * self.c * self.h * self.w);
        let rows = self.n * self.tile_rows();
        let width = vector(self.kernel);
        let groups: Vec<Strip> = row_strips(self.kernel, self.o).map(|s| Strip { width, ..s }).collect();
        let tasks = groups.len().div_ceil(GROUPS).next_multiple_of(rayon::current_num_threads()).min(groups.len());
        let mut picture = PICTURE.take();
        for first in (0..rows).step_by(self.rows_per_block()) {
            let block = self.block((first, (first + self.rows_per_block()).min(rows)));
            let v = reuse(&mut picture, PLACES * self.v_region(block.tiles()));
            self.transform_picture(x, &block, SharedMut::new(v));
            (0..tasks).into_par_iter().with_max_len(1).for_each(|task| {
                let of = |task: usize| &groups[groups.len() * task / tasks..groups.len() * (task + 1) / tasks];
                // What a thread reads first in its next task is asked for in this one's last block.
                let later = rows_of(of((task + 1).min(tasks - 1)));
                // SAFETY: each task writes its own output channels.
                unsafe { self.channels(v, &block, of(task), later, (taps, ahead), bias, out) };
            });
        }
        PICTURE.set(picture);
    }

    /// Columns of a matrix of so many tiles in memory.
    fn padded(&self, tiles: usize) -> usize {
        column_strips(self.kernel, tiles).map(|s| s.width).sum()
    }

    /// Numbers from one of V's matrices to the next; not a power of two, which would share a few lines of the caches.
    fn v_region(&self, tiles: usize) -> usize {
        self.c * self.padded(tiles) + SLACK
    }

    /// V of a block: for each place the strips of columns one after the other, each `c` times its width.
    fn transform_picture(&self, x: &[f32], block: &Block, v: SharedMut) {
        let (kernel, tiles) = (self.kernel, block.tiles());
        let (together, region) = (vector(kernel) / QUAD, self.v_region(tiles));
        let lines = || vec![0f32; block.lines.len() * block.width];
        (0..self.c).into_par_iter().with_min_len(grain(8 * tiles)).for_each_init(lines, |lines, ci| {
            for (to, line) in lines.chunks_exact_mut(block.width).zip(&block.lines) {
                if let Some((image, y)) = line {
                    to[1..=self.w].copy_from_slice(&x[((image * self.c + ci) * self.h + y) * self.w..][..self.w]);
                }
            }
            for (quads, first) in block.quads.chunks(together).zip((0..).step_by(QUAD * together)) {
                let (start, lane) = (first / kernel.lanes() * kernel.lanes(), first % kernel.lanes());
                let strip = if tiles - start <= kernel.narrow() { kernel.narrow() } else { kernel.lanes() };
                let to = v.ptr(start * self.c + ci * strip + lane, (PLACES - 1) * region + QUAD * together);
                let from = |i: usize| lines[quads[i.min(quads.len() - 1)].from..][..3 * block.width + 2 * QUAD + 2].as_ptr();
                // SAFETY: four lines behind each pointer, by the slice; each channel has its own places of V, inside by the check in `ptr`.
                unsafe {
                    #[cfg(target_arch = "x86_64")]
                    if kernel.avx512() {
                        avx512::picture([from(0), from(1), from(2), from(3)], block.width, to, region);
                        continue;
                    }
                    simd(
                        #[inline(always)]
                        || {
                            for i in 0..quads.len() {
                                plain::picture(from(i), block.width, to.add(QUAD * i), region);
                            }
                        },
                    );
                }
            }
        });
    }

    /// The outputs of some strips of channels for a block.
    ///
    /// # Safety
    /// No other thread touches them meanwhile.
    #[allow(clippy::too_many_arguments)]
    unsafe fn channels(
        &self,
        v: &[f32],
        block: &Block,
        groups: &[Strip],
        later: (usize, usize),
        (taps, ahead): (&Taps, &TapsAhead),
        bias: Option<&[f32]>,
        out: SharedMut,
    ) {
        let (first, rows) = rows_of(groups);
        let (kernel, tiles, width) = (self.kernel, block.tiles(), vector(self.kernel));
        let (columns, kc) = (self.padded(tiles), self.c.min(KC));
        let (v_region, u_region, m_region) = (self.v_region(tiles), kc * width * groups.len() + SLACK, rows * columns + SLACK);
        let (mut buffer, mut scratch) = BLOCK.take();
        let (u, rest) = reuse(&mut buffer, PLACES * (u_region + m_region) + 9 * TAPS * width + SLACK).split_at_mut(PLACES * u_region);
        let (m, raw) = rest.split_at_mut(PLACES * m_region);
        for k0 in (0..self.c).step_by(KC) {
            let kc = KC.min(self.c - k0);
            for (g, at) in groups.iter().zip((0..).step_by(kc * width)) {
                for k in (0..kc).step_by(TAPS) {
                    let count = TAPS.min(kc - k);
                    taps(*g, (k0 + k, count), raw, &mut scratch);
                    transform_kernels(kernel, raw, self.flipped, count, &mut u[at + k * width..], u_region);
                }
            }
            let (next_rows, next_k) = if k0 + kc < self.c { ((first, rows), k0 + kc) } else { (later, 0) };
            let mut next = ahead(next_rows, (next_k, KC.min(self.c - next_k)));
            for p in 0..PLACES {
                for s in column_strips(kernel, tiles) {
                    let b = &v[p * v_region + s.start * self.c + k0 * s.width..][..kc * s.width];
                    for (g, at) in groups.iter().zip((0..).step_by(kc * width)) {
                        let a = &u[p * u_region + at..][..kc * width];
                        let c = &mut m[p * m_region + (g.start - first) * columns + s.start..][..(g.len - 1) * columns + s.len];
                        let t = Tile {
                            rows: g.len,
                            columns: s.len,
                            lanes: s.width,
                            steps: kc,
                            left: Left::Packed(width),
                            rs: columns,
                            turned: false,
                            start: if k0 > 0 { Start::Add } else { Start::Zero },
                            scale: 1.0,
                        };
                        // SAFETY: the slices hold what the tile reads and writes.
                        unsafe { tile(kernel, t, a.as_ptr(), b.as_ptr(), c.as_mut_ptr(), &mut next) };
                    }
                }
            }
        }
        for i in 0..rows {
            let bias = bias.map_or(0.0, |b| b[first + i]);
            let plane = out.ptr((first + i) * self.h * self.w, ((self.n - 1) * self.o + 1) * self.h * self.w);
            for (quads, at) in block.quads.chunks(vector(kernel) / QUAD).zip((i * columns..).step_by(vector(kernel))) {
                let m = m[at..][..(PLACES - 1) * m_region + QUAD * quads.len()].as_ptr();
                // SAFETY: M holds a vector for each place, its columns being whole vectors; a quad's outputs lie in its image's plane, exclusive
                // by the caller's promise.
                unsafe {
                    #[cfg(target_arch = "x86_64")]
                    if kernel.avx512() {
                        avx512::outputs(m, m_region, bias, quads, self.w, plane);
                        continue;
                    }
                    simd(
                        #[inline(always)]
                        || {
                            for (q, quad) in quads.iter().enumerate() {
                                plain::outputs(m.add(QUAD * q), m_region, bias, quad, self.w, plane);
                            }
                        },
                    );
                }
            }
        }
        BLOCK.set((buffer, scratch));
    }
}

/// Bytes that convolutions of up to so many channels keep from call to call: a transformed picture, and blocks of products for each thread.
pub fn conv2d_buffers(channels: usize, threads: usize) -> usize {
    let kernel = Kernel::f32();
    let large = Winograd { kernel, n: 1, c: channels, o: channels, h: 64, w: 64, flipped: false };
    if !large.pays() {
        return 0;
    }
    let tiles = large.rows_per_block() * large.tile_columns();
    let block = PLACES * (channels.min(KC) * vector(kernel) * GROUPS + GROUPS * kernel.rows() * large.padded(tiles));
    4 * (PLACES * large.v_region(tiles) + threads * block)
}

/// The nine taps of the channels of a strip, which lie channel by channel in `line`: tap `t` at `t * rows.width`, as [`Taps`] wants it.
pub(crate) fn deal_taps(kernel: Kernel, line: &[f32], rows: Strip, to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if kernel.avx512() && rows.width == 16 && rows.len > 0 {
        assert!(9 * rows.len <= line.len() && 9 * 16 <= to.len());
        // SAFETY: the kernel is chosen only where the CPU has its instructions; reads and writes stay inside by the assertion.
        return unsafe { avx512::taps(line.as_ptr(), rows.len.min(16), to.as_mut_ptr()) };
    }
    lines(kernel, line, 9, 1, Strip { start: 0, ..rows }, 9, to);
}

/// Rows of some strips: the first, and how many.
fn rows_of(strips: &[Strip]) -> (usize, usize) {
    strips.first().zip(strips.last()).map_or((0, 0), |(a, b)| (a.start, b.start + b.len - a.start))
}

/// Numbers in a vector: so many tiles and so many outputs' kernels are transformed at a time.
fn vector(kernel: Kernel) -> usize {
    kernel.lanes() / 2
}

/// `G g G^T` for each of `kc` channels, a vector of kernels at a time: place p at `p * region`.
fn transform_kernels(kernel: Kernel, raw: &[f32], flipped: bool, kc: usize, u: &mut [f32], region: usize) {
    let width = vector(kernel);
    assert!(9 * kc * width <= raw.len() && (PLACES - 1) * region + kc * width <= u.len());
    for k in 0..kc {
        let (from, to) = (raw[9 * k * width..].as_ptr(), u[k * width..].as_mut_ptr());
        // The reverse order is the same from the other end.
        let (from, step) = if flipped { (from.wrapping_add(8 * width), -(width as isize)) } else { (from, width as isize) };
        // SAFETY: all places are inside by the assertion.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if kernel.avx512() {
                avx512::kernel(from, step, to, region);
                continue;
            }
            simd(
                #[inline(always)]
                || plain::kernel(from, step, to, region),
            );
        }
    }
}

#[cfg(test)]
mod tests;
