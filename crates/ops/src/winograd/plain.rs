//! Winograd's transforms as the compiler vectorises them.

// x and y are places of a tile; what they index is only by the way.
#![allow(clippy::needless_range_loop)]

use super::{QUAD, Quad};

type Four = [f32; QUAD];
type Eight = [f32; 8];

/// `B^T d B` of four tiles beside each other, whose lines are `width` apart; place p goes to `p * region`.
///
/// # Safety
/// Four lines of ten numbers, and four places in each region.
#[inline(always)]
pub(super) unsafe fn picture(from: *const f32, width: usize, to: *mut f32, region: usize) {
    let mut t = [[[0f32; QUAD]; 4]; 4];
    for (y, t) in t.iter_mut().enumerate() {
        // SAFETY: the caller's lines.
        let d = unsafe { &*from.add(y * width).cast::<[f32; 2 * QUAD + 2]>() };
        for i in 0..QUAD {
            let d = [d[2 * i], d[2 * i + 1], d[2 * i + 2], d[2 * i + 3]];
            (t[0][i], t[1][i], t[2][i], t[3][i]) = (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]);
        }
    }
    for x in 0..4 {
        let column = [t[0][x], t[1][x], t[2][x], t[3][x]];
        let mut v = [[0f32; QUAD]; 4];
        for i in 0..QUAD {
            let [a, b, c, d] = column.map(|r: Four| r[i]);
            (v[0][i], v[1][i], v[2][i], v[3][i]) = (a - c, b + c, c - b, b - d);
        }
        for (y, v) in v.iter().enumerate() {
            // SAFETY: the caller's places.
            unsafe { to.add((4 * y + x) * region).cast::<Four>().write_unaligned(*v) };
        }
    }
}

/// `G g G^T` of eight kernels: tap `t` at `from + t * step`, place p at `p * region`.
///
/// # Safety
/// Eight numbers at each of them.
#[inline(always)]
pub(super) unsafe fn kernel(from: *const f32, step: isize, to: *mut f32, region: usize) {
    // SAFETY: the caller's places.
    let tap = |t: isize| unsafe { from.offset(t * step).cast::<Eight>().read_unaligned() };
    let half = |g: [Eight; 3]| {
        let mut out = [g[0], [0.0; 8], [0.0; 8], g[2]];
        for i in 0..8 {
            let (ends, middle) = (0.5 * (g[0][i] + g[2][i]), 0.5 * g[1][i]);
            (out[1][i], out[2][i]) = (ends + middle, ends - middle);
        }
        out
    };
    let columns = [0, 1, 2].map(|x| half([tap(x), tap(3 + x), tap(6 + x)]));
    for y in 0..4 {
        for (x, place) in half([columns[0][y], columns[1][y], columns[2][y]]).iter().enumerate() {
            // SAFETY: the caller's places.
            unsafe { to.add((4 * y + x) * region).cast::<Eight>().write_unaligned(*place) };
        }
    }
}

/// `A^T M A` plus a bias for four tiles: up to two lines of eight outputs.
///
/// # Safety
/// Four numbers at each place of `m`; the quad's outputs lie in `plane`, and are exclusive.
#[inline(always)]
pub(super) unsafe fn outputs(m: *const f32, region: usize, bias: f32, quad: &Quad, width: usize, plane: *mut f32) {
    let mut s = [[[0f32; QUAD]; 4]; 2];
    for x in 0..4 {
        // SAFETY: the caller's places.
        let place = |y: usize| unsafe { m.add((4 * y + x) * region).cast::<Four>().read_unaligned() };
        let (a, b, c, d) = (place(0), place(1), place(2), place(3));
        for i in 0..QUAD {
            (s[0][x][i], s[1][x][i]) = (a[i] + b[i] + c[i], b[i] - c[i] - d[i]);
        }
    }
    for (dy, s) in s.iter().enumerate().take(quad.height) {
        let mut line = [[0f32; 2]; QUAD];
        for (i, line) in line.iter_mut().enumerate() {
            *line = [s[0][i] + s[1][i] + s[2][i] + bias, s[1][i] - s[2][i] - s[3][i] + bias];
        }
        // SAFETY: the caller's places.
        unsafe { std::ptr::copy_nonoverlapping(line.as_ptr().cast::<f32>(), plane.add(quad.to + dy * width), quad.len) };
    }
}
