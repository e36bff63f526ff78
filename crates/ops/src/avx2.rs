//! The micro-kernel for AVX2 and FMA, and how its operands are packed. The left operand may also be read where it lies, if its lines
//! go along k: each of a tile's rows is a stream of its own, and nothing is copied.

use crate::ahead::{Ahead, RUN, ask};
use crate::pack::Strip;
use crate::tile::{Left, Start, Tile};
use std::arch::x86_64::*;

/// One tile, see [`crate::tile::tile`].
///
/// # Safety
/// The promises of `tile`; the CPU has AVX2 and FMA.
pub(crate) unsafe fn dispatch(t: Tile, a: *const f32, b: *const f32, c: *mut f32, ahead: &mut Ahead) {
    macro_rules! by_rows {
        ($($m:literal)*) => {
            // SAFETY: the caller's promises.
            unsafe {
                match (t.rows, t.lanes, t.left) {
                    $(
                        ($m, 16, Left::Packed(width)) => run::<$m, 2, true>(t, width, a, b, c, ahead),
                        ($m, _, Left::Packed(width)) => run::<$m, 1, true>(t, width, a, b, c, ahead),
                        ($m, 16, Left::Lines(line)) => run::<$m, 2, false>(t, line, a, b, c, ahead),
                        ($m, _, Left::Lines(line)) => run::<$m, 1, false>(t, line, a, b, c, ahead),
                    )*
                    _ => unreachable!("a tile of {} rows", t.rows),
                }
            }
        };
    }
    by_rows!(1 2 3 4 5 6)
}

/// `PACKED`: the left operand lies k by k, `apart` from one to the next; else in `M` lines, so far apart.
#[target_feature(enable = "avx2,fma")]
unsafe fn run<const M: usize, const V: usize, const PACKED: bool>(
    t: Tile,
    apart: usize,
    mut a: *const f32,
    mut b: *const f32,
    c: *mut f32,
    ahead: &mut Ahead,
) {
    let mut sums = [[_mm256_setzero_ps(); V]; M];
    // SAFETY: the promises of `tile`.
    unsafe {
        for from in (0..t.steps).step_by(RUN) {
            let lines = ahead.next_run(b);
            for i in 0..RUN.min(t.steps - from) {
                ask(lines, i);
                let mut bs = [_mm256_setzero_ps(); V];
                for (v, x) in bs.iter_mut().enumerate() {
                    *x = _mm256_loadu_ps(b.add(8 * v));
                }
                // Rows by number, so that the compiler sees at once that no sum needs a place in memory.
                macro_rules! rows {
                    ($($i:literal)*) => {$(
                        if $i < M {
                            let x = _mm256_broadcast_ss(&*a.add(if PACKED { $i } else { $i * apart }));
                            sums[$i % M][0] = _mm256_fmadd_ps(x, bs[0], sums[$i % M][0]);
                            if V > 1 {
                                sums[$i % M][V - 1] = _mm256_fmadd_ps(x, bs[V - 1], sums[$i % M][V - 1]);
                            }
                        }
                    )*};
                }
                rows!(0 1 2 3 4 5);
                a = a.add(if PACKED { apart } else { 1 });
                b = b.add(8 * V);
            }
        }
        // A copy, so that the sums themselves never need one: the compiler would write them there in every step.
        let done = sums;
        if t.turned { store_turned::<M, V>(t, &done, c) } else { store::<M, V>(t, &done, c) }
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn store<const M: usize, const V: usize>(t: Tile, sums: &[[__m256; V]; M], c: *mut f32) {
    let scale = _mm256_set1_ps(t.scale);
    for (i, sums) in sums.iter().enumerate() {
        for (v, s) in sums.iter().enumerate() {
            let left = t.columns.saturating_sub(8 * v);
            if left == 0 {
                continue;
            }
            // SAFETY: at most `left` numbers of the row are touched, and of a start that has a number for each row or column.
            unsafe {
                let at = c.add(i * t.rs + 8 * v);
                let old = match t.start {
                    Start::Zero => _mm256_setzero_ps(),
                    Start::Add => load(at, left),
                    Start::Rows(p) => _mm256_broadcast_ss(&*p.add(i)),
                    Start::Columns(p) => load(p.add(8 * v), left),
                };
                put(at, left, _mm256_fmadd_ps(scale, *s, old));
            }
        }
    }
}

/// The tile's rows become columns: element (i, j) goes to `j * rs + i`.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn store_turned<const M: usize, const V: usize>(t: Tile, sums: &[[__m256; V]; M], c: *mut f32) {
    let scale = _mm256_set1_ps(t.scale);
    for v in 0..V {
        let mut r = [_mm256_setzero_ps(); 8];
        for (r, s) in r.iter_mut().zip(sums) {
            *r = s[v];
        }
        let r = turn(r);
        for (j, r) in r.iter().enumerate().take(t.columns.saturating_sub(8 * v)) {
            let column = 8 * v + j;
            // SAFETY: M numbers of a line of the result, and of a start that has a number for each row or column.
            unsafe {
                let at = c.add(column * t.rs);
                let old = match t.start {
                    Start::Zero => _mm256_setzero_ps(),
                    Start::Add => load(at, M),
                    Start::Rows(p) => load(p, M),
                    Start::Columns(p) => _mm256_broadcast_ss(&*p.add(column)),
                };
                put(at, M, _mm256_fmadd_ps(scale, *r, old));
            }
        }
    }
}

/// The first `len` numbers, zeros behind them.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn load(p: *const f32, len: usize) -> __m256 {
    // SAFETY: masked to the caller's numbers.
    unsafe { if len >= 8 { _mm256_loadu_ps(p) } else { _mm256_maskload_ps(p, mask(len)) } }
}

/// Writes the first `len` numbers of `x`.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn put(p: *mut f32, len: usize, x: __m256) {
    // SAFETY: in halves of what is left, never more than `len`. A masked store would be slow on AMD's CPUs.
    unsafe {
        if len >= 8 {
            return _mm256_storeu_ps(p, x);
        }
        let (mut p, mut half) = (p, _mm256_castps256_ps128(x));
        if len & 4 != 0 {
            _mm_storeu_ps(p, half);
            (p, half) = (p.add(4), _mm256_extractf128_ps::<1>(x));
        }
        if len & 2 != 0 {
            _mm_storel_pd(p.cast(), _mm_castps_pd(half));
            (p, half) = (p.add(2), _mm_movehl_ps(half, half));
        }
        if len & 1 != 0 {
            _mm_store_ss(p, half);
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn mask(len: usize) -> __m256i {
    _mm256_cmpgt_epi32(_mm256_set1_epi32(len.min(8) as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
}

/// The transpose of 8 by 8.
#[target_feature(enable = "avx2")]
#[inline]
fn turn(r: [__m256; 8]) -> [__m256; 8] {
    let z = _mm256_setzero_ps();
    let (mut a, mut b) = ([z; 8], [z; 8]);
    for i in 0..4 {
        a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    // b[4 g + j] holds column j of each half for rows 4 g..4 g + 4.
    for g in 0..2 {
        for h in 0..2 {
            b[4 * g + 2 * h] = _mm256_shuffle_ps::<0x44>(a[4 * g + h], a[4 * g + 2 + h]);
            b[4 * g + 2 * h + 1] = _mm256_shuffle_ps::<0xee>(a[4 * g + h], a[4 * g + 2 + h]);
        }
    }
    let mut out = [z; 8];
    for j in 0..4 {
        out[j] = _mm256_permute2f128_ps::<0x20>(b[j], b[4 + j]);
        out[4 + j] = _mm256_permute2f128_ps::<0x31>(b[j], b[4 + j]);
    }
    out
}

/// Packs `count` lines of `s.len` neighbours, `along` apart, zeros behind each, and writes nothing else.
///
/// # Safety
/// The CPU has AVX2; `data` holds the lines and `out` `count * s.width` places.
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn copy(data: *const f32, along: usize, s: Strip, count: usize, out: *mut f32) {
    for k in 0..count {
        for h in (0..s.width).step_by(8) {
            let left = s.len.saturating_sub(h);
            // SAFETY: both sides end where the line and the strip do.
            unsafe {
                let x = if left == 0 { _mm256_setzero_ps() } else { load(data.add(k * along + h), left) };
                put(out.add(k * s.width + h), s.width - h, x);
            }
        }
    }
}

/// Packs lines along k, `across` apart. Writes up to 8 places behind the end.
///
/// # Safety
/// The CPU has AVX2; `data` holds the lines and `out` `kc * s.width + 8` places.
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn transpose(data: *const f32, across: usize, s: Strip, kc: usize, out: *mut f32) {
    for h in (0..s.width).step_by(8) {
        let rows = s.len.saturating_sub(h).min(8);
        for kb in (0..kc).step_by(8) {
            let len = (kc - kb).min(8);
            let mut r = [_mm256_setzero_ps(); 8];
            for (i, r) in r.iter_mut().enumerate().take(rows) {
                // The next strip's line, which the CPU would not guess.
                _mm_prefetch::<_MM_HINT_T0>(data.wrapping_add((s.width + h + i) * across + kb).cast());
                // SAFETY: masked to the line.
                *r = unsafe { load(data.add((h + i) * across + kb), len) };
            }
            for (kk, r) in turn(r).iter().enumerate().take(len) {
                // SAFETY: the caller left room for 8 behind the last line.
                unsafe { _mm256_storeu_ps(out.add((kb + kk) * s.width + h), *r) };
            }
        }
    }
}
