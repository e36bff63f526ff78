//! Winograd's transforms for AVX-512: sixteen tiles, or kernels, at a time. See `plain.rs`, which does the same in the same order.

// x and y are places of a tile; what they index is only by the way.
#![allow(clippy::needless_range_loop)]

use super::Quad;
use std::arch::x86_64::*;

/// `B^T d B` of sixteen tiles: four times four beside each other, whose lines are `width` apart; place p goes to `p * region`.
///
/// # Safety
/// The CPU has AVX-512. Four lines of ten numbers behind each pointer, and sixteen places in each region.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn picture(from: [*const f32; 4], width: usize, to: *mut f32, region: usize) {
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    let line = |y: usize| {
        let at = y * width;
        // Eight numbers for each four tiles; then the same two further on.
        // SAFETY: the caller's lines.
        let two = |a: *const f32, b: *const f32| unsafe {
            let (a, b) = (_mm256_loadu_pd(a.cast()), _mm256_loadu_pd(b.cast()));
            _mm512_castpd_ps(_mm512_insertf64x4::<1>(_mm512_castpd256_pd512(a), b))
        };
        let [p, q, r, s] = from.map(|p| p.wrapping_add(at));
        let (a, b) = (two(p, q), two(r, s));
        let (c, d) = (two(p.wrapping_add(2), q.wrapping_add(2)), two(r.wrapping_add(2), s.wrapping_add(2)));
        let (d0, d1) = (_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
        let (d2, d3) = (_mm512_permutex2var_ps(c, even, d), _mm512_permutex2var_ps(c, odd, d));
        [_mm512_sub_ps(d0, d2), _mm512_add_ps(d1, d2), _mm512_sub_ps(d2, d1), _mm512_sub_ps(d1, d3)]
    };
    let t = [line(0), line(1), line(2), line(3)];
    for x in 0..4 {
        let (a, b, c, d) = (t[0][x], t[1][x], t[2][x], t[3][x]);
        // SAFETY: the caller's places.
        unsafe {
            _mm512_storeu_ps(to.add(x * region), _mm512_sub_ps(a, c));
            _mm512_storeu_ps(to.add((4 + x) * region), _mm512_add_ps(b, c));
            _mm512_storeu_ps(to.add((8 + x) * region), _mm512_sub_ps(c, b));
            _mm512_storeu_ps(to.add((12 + x) * region), _mm512_sub_ps(b, d));
        }
    }
}

/// The nine taps of up to sixteen channels, channel by channel, tap by tap: tap `t` at `to + 16 t`. Places behind the channels hold the last one's.
///
/// # Safety
/// The CPU has AVX-512. Nine numbers at `from` for each channel, of which there is one at least, and 144 places at `to`.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn taps(from: *const f32, channels: usize, to: *mut f32) {
    let row = |i: usize| from.wrapping_add(9 * i.min(channels - 1));
    // Eight taps of channels i and i + 8.
    let two = |i: usize| {
        // SAFETY: the caller's taps.
        let (a, b) = unsafe { (_mm256_loadu_pd(row(i).cast()), _mm256_loadu_pd(row(i + 8).cast())) };
        _mm512_castpd_ps(_mm512_insertf64x4::<1>(_mm512_castpd256_pd512(a), b))
    };
    // Four by four in each quarter: of channels i..i + 4 tap j, tap j + 4, and the same of the channels eight further on.
    let four = |i: usize| {
        let (a, b, c, d) = (two(i), two(i + 1), two(i + 2), two(i + 3));
        let pair = |a, b| (_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(a, b)));
        let ((ab, ab2), (cd, cd2)) = (pair(a, b), pair(c, d));
        [_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd), _mm512_unpacklo_pd(ab2, cd2), _mm512_unpackhi_pd(ab2, cd2)]
    };
    let (low, high) = (four(0), four(4));
    let even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    let odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for j in 0..4 {
        // SAFETY: the caller's places.
        unsafe {
            _mm512_storeu_pd(to.add(16 * j).cast(), _mm512_permutex2var_pd(low[j], even, high[j]));
            _mm512_storeu_pd(to.add(16 * (4 + j)).cast(), _mm512_permutex2var_pd(low[j], odd, high[j]));
        }
    }
    for i in 0..16 {
        // SAFETY: the caller's taps and places.
        unsafe { *to.add(16 * 8 + i) = *row(i).add(8) };
    }
}

/// `G g G^T` of sixteen kernels: tap `t` at `from + t * step`, place p at `p * region`.
///
/// # Safety
/// The CPU has AVX-512. Sixteen numbers at each of them.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn kernel(from: *const f32, step: isize, to: *mut f32, region: usize) {
    let half = _mm512_set1_ps(0.5);
    let column = |x: isize| {
        // SAFETY: the caller's places.
        let tap = |t: isize| unsafe { _mm512_loadu_ps(from.offset(t * step)) };
        let (a, b, c) = (tap(x), tap(3 + x), tap(6 + x));
        let (ends, middle) = (_mm512_mul_ps(half, _mm512_add_ps(a, c)), _mm512_mul_ps(half, b));
        [a, _mm512_add_ps(ends, middle), _mm512_sub_ps(ends, middle), c]
    };
    let columns = [column(0), column(1), column(2)];
    for y in 0..4 {
        let (a, b, c) = (columns[0][y], columns[1][y], columns[2][y]);
        let (ends, middle) = (_mm512_mul_ps(half, _mm512_add_ps(a, c)), _mm512_mul_ps(half, b));
        // SAFETY: the caller's places.
        unsafe {
            let to = to.add(4 * y * region);
            _mm512_storeu_ps(to, a);
            _mm512_storeu_ps(to.add(region), _mm512_add_ps(ends, middle));
            _mm512_storeu_ps(to.add(2 * region), _mm512_sub_ps(ends, middle));
            _mm512_storeu_ps(to.add(3 * region), c);
        }
    }
}

/// `A^T M A` plus a bias for up to sixteen tiles: for each four, up to two lines of eight outputs.
///
/// # Safety
/// The CPU has AVX-512. Sixteen numbers at each place of `m`; the quads' outputs lie in `plane`, and are exclusive.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn outputs(m: *const f32, region: usize, bias: f32, quads: &[Quad], width: usize, plane: *mut f32) {
    let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    let bias = _mm512_set1_ps(bias);
    let column = |x: usize| {
        // SAFETY: the caller's places.
        let place = |y: usize| unsafe { _mm512_loadu_ps(m.add((4 * y + x) * region)) };
        let (a, b, c, d) = (place(0), place(1), place(2), place(3));
        [_mm512_add_ps(_mm512_add_ps(a, b), c), _mm512_sub_ps(_mm512_sub_ps(b, c), d)]
    };
    let s = [column(0), column(1), column(2), column(3)];
    for dy in 0..2 {
        let (a, b, c, d) = (s[0][dy], s[1][dy], s[2][dy], s[3][dy]);
        let left = _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), c), bias);
        let right = _mm512_add_ps(_mm512_sub_ps(_mm512_sub_ps(b, c), d), bias);
        // Line by line: outputs of the first two quads, and of the other two.
        let lines = [_mm512_permutex2var_ps(left, low, right), _mm512_permutex2var_ps(left, high, right)];
        for (quads, line) in quads.chunks(2).zip(lines) {
            for (q, quad) in quads.iter().enumerate().filter(|(_, quad)| dy < quad.height) {
                let mask = (((1u32 << quad.len) - 1) << (8 * q)) as __mmask16;
                // SAFETY: masked to the caller's places.
                unsafe { _mm512_mask_storeu_ps(plane.wrapping_add(quad.to + dy * width).wrapping_sub(8 * q), mask, line) };
            }
        }
    }
}
