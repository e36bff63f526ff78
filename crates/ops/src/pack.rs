//! Packing: operands of a matrix product into strips that a micro-kernel reads straight through.

use crate::ahead::Ahead;
use crate::tile::Kernel;
use crate::weight::Lines;

/// Writes elements `start..start + out.len()` of a line.
pub(crate) type Fill<'a> = dyn Fn(usize, usize, &mut [f32]) + Sync + 'a;

/// One side of a product. `i` counts along the side that stays (rows of the left operand, columns of the right one), `k` along
/// the one that is summed over.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// Element `(i, k)` at `data[i * across + k * along]`.
    Plain { data: &'a [f32], across: usize, along: usize },
    /// `fill(i, k, out)` writes elements `(i, k..)`.
    AlongK(&'a Fill<'a>),
    /// `fill(k, i, out)` writes elements `(i.., k)`.
    Across(&'a Fill<'a>),
    /// A weight's rows stay, their elements are summed over.
    Rows(&'a Lines<'a>),
    /// The elements of a weight's rows stay, from a place on; the rows are summed over.
    Columns(&'a Lines<'a>, usize),
}

impl<'a> Operand<'a> {
    /// Rows of a row-major matrix stay, its `cols` columns are summed over.
    pub(crate) fn rows(data: &'a [f32], cols: usize) -> Self {
        Self::Plain { data, across: cols, along: 1 }
    }

    /// Columns of a row-major matrix with `cols` columns stay, its rows are summed over.
    pub(crate) fn columns(data: &'a [f32], cols: usize) -> Self {
        Self::Plain { data, across: 1, along: cols }
    }

    /// A weight `(out, depth)` whose rows stay.
    pub(crate) fn weight_rows(lines: &'a Lines<'a>, depth: usize) -> Self {
        lines.plain().map_or(Self::Rows(lines), |w| Self::rows(w, depth))
    }

    /// A weight `(out, depth)` whose elements from `first` on in each row stay.
    pub(crate) fn weight_columns(lines: &'a Lines<'a>, depth: usize, first: usize) -> Self {
        lines.plain().map_or(Self::Columns(lines, first), |w| Self::columns(&w[first..], depth))
    }

    /// The places of elements `i..i + len` and `k..k + kc`, to be asked for, where they are known and come in runs.
    pub(crate) fn ahead(&self, (i, len): (usize, usize), (k, kc): (usize, usize)) -> Ahead {
        match *self {
            Self::Plain { data, across, along: 1 } => Ahead::rows(data.as_ptr().wrapping_add(i * across + k), len, kc, across),
            Self::Plain { data, across: 1, along } => Ahead::rows(data.as_ptr().wrapping_add(i + k * along), kc, len, along),
            Self::Rows(lines) => lines.ahead((i, len), (k, kc)),
            Self::Columns(lines, first) => lines.ahead((k, kc), (first + i, len)),
            _ => Ahead::none(),
        }
    }

    /// Writes elements `(i, k..)` of an operand that is made in lines along k, `(i.., k)` of one that is made across.
    pub(crate) fn line(&self, i: usize, k: usize, out: &mut [f32]) {
        match self {
            Self::AlongK(fill) => fill(i, k, out),
            Self::Across(fill) => fill(k, i, out),
            Self::Rows(lines) => lines.fill(i, k, out),
            Self::Columns(lines, first) => lines.fill(k, first + i, out),
            Self::Plain { .. } => debug_assert!(false, "a plain operand is read"),
        }
    }

    /// Whether lines along k are made.
    pub(crate) fn makes_lines(&self) -> bool {
        matches!(self, Self::AlongK(_) | Self::Rows(_))
    }

    pub(crate) fn check(&self, len: usize, k: usize) {
        if let Self::Plain { data, across, along } = self {
            assert!(len == 0 || k == 0 || (len - 1) * across + (k - 1) * along < data.len());
        }
    }
}

/// Which operand of a product: AMX packs them differently.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Side {
    Left,
    Right,
}

/// A run of neighbours that one tile takes.
#[derive(Clone, Copy)]
pub(crate) struct Strip {
    pub start: usize,
    pub len: usize,
    /// Places in memory for each k.
    pub width: usize,
}

/// Strips of rows: as equal as can be, for a tile with few rows wastes most of its time on loads.
pub(crate) fn row_strips(kernel: Kernel, len: usize) -> impl Iterator<Item = Strip> + Clone {
    let count = len.div_ceil(kernel.rows()).max(1);
    (0..count).map(move |s| {
        let (start, end) = (len * s / count, len * (s + 1) / count);
        Strip { start, len: end - start, width: if kernel.is_amx() { kernel.rows() } else { end - start } }
    })
}

/// Strips of columns: all full but the last, which is half as wide if that is enough.
pub(crate) fn column_strips(kernel: Kernel, len: usize) -> impl Iterator<Item = Strip> + Clone {
    let lanes = kernel.lanes();
    (0..len).step_by(lanes).map(move |start| {
        let left = (len - start).min(lanes);
        Strip { start, len: left, width: if left <= kernel.narrow() { kernel.narrow() } else { lanes } }
    })
}

/// Room that may be written behind the last strip.
pub(crate) const SLACK: usize = 16;

/// Packs `strips` of the operand from place `first` on, for `k0..k0 + kc`; `out` takes the strips one after the other, each
/// `kc` (for bf16 half of that, rounded up) times its width. Places behind a strip's end hold zeros or what follows.
#[allow(clippy::too_many_arguments)]
pub(crate) fn pack(
    kernel: Kernel,
    side: Side,
    operand: &Operand,
    strips: impl Iterator<Item = Strip> + Clone,
    first: usize,
    k: (usize, usize),
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let (k0, kc) = k;
    let padded = kc.next_multiple_of(kernel.per_step());
    #[cfg(target_arch = "x86_64")]
    if kernel.is_amx() {
        // SAFETY: the kernel is chosen only where the CPU has its instructions.
        unsafe { crate::amx::pack(operand, side, strips, first, k, out, scratch) };
        return;
    }
    let _ = side;
    // Lines across the strips are taken a few at a time: they are read in one go, and dealt to the strips while they are in the first cache.
    const LINES: usize = 8;
    match operand {
        Operand::Plain { data, across: 1, along } if *along != 1 && kc > 0 => {
            for from in (0..kc).step_by(LINES) {
                let count = LINES.min(kc - from);
                let mut at = 0;
                for s in strips.clone() {
                    let data = &data[first + s.start + (k0 + from) * along..];
                    across(kernel, data, *along, s, count, &mut out[at + from * s.width..]);
                    at += padded * s.width;
                }
            }
        }
        Operand::Across(_) | Operand::Columns(..) => {
            let len: usize = strips.clone().map(|s| s.len).sum();
            scratch.resize((LINES * len).max(scratch.len()), 0.0);
            for from in (0..kc).step_by(LINES) {
                let count = LINES.min(kc - from);
                for (kk, line) in scratch.chunks_exact_mut(len.max(1)).take(count).enumerate() {
                    operand.line(first, k0 + from + kk, line);
                }
                let mut at = 0;
                for s in strips.clone() {
                    let to = &mut out[at + from * s.width..];
                    across(kernel, &scratch[s.start..], len, s, count, to);
                    at += padded * s.width;
                }
            }
        }
        Operand::Plain { data, across, along } => {
            let mut at = 0;
            for s in strips.clone() {
                let data = &data[(first + s.start) * across + k0 * along..];
                lines(kernel, data, *across, *along, s, kc, &mut out[at..]);
                at += padded * s.width;
            }
        }
        Operand::AlongK(_) | Operand::Rows(_) => {
            let mut at = 0;
            scratch.resize((kernel.lanes() * kc).max(scratch.len()), 0.0);
            for s in strips.clone() {
                for (i, line) in scratch.chunks_exact_mut(kc.max(1)).take(s.len).enumerate() {
                    operand.line(first + s.start + i, k0, line);
                }
                lines(kernel, scratch, kc, 1, s, kc, &mut out[at..]);
                at += padded * s.width;
            }
        }
    }
    #[cfg(target_arch = "x86_64")]
    if kernel == Kernel::Avx512Bf16 {
        let mut at = 0;
        for s in strips {
            // Every strip but the shorter last k keeps its place: pairs fill the first half of it.
            let strip = &mut out[at..at + padded * s.width];
            if padded > kc {
                strip[kc * s.width..].fill(0.0);
            }
            // SAFETY: this kernel is chosen only where the CPU has its instructions.
            unsafe { avx512::to_pairs(strip, padded, s.width) };
            at += padded * s.width;
        }
    }
}

/// Packs a few lines of one strip, whose elements are neighbours, and writes nothing behind them: other strips are there already.
fn across(kernel: Kernel, data: &[f32], along: usize, s: Strip, count: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if kernel != Kernel::Portable && s.len > 0 && count > 0 {
        assert!((count - 1) * along + s.len <= data.len() && count * s.width <= out.len());
        // SAFETY: a kernel is chosen only where the CPU has its instructions; reads and writes stay inside by the assertion.
        unsafe {
            if kernel.avx512() {
                return avx512::copy_exact(data.as_ptr(), along, s, count, out.as_mut_ptr());
            }
            return crate::avx2::copy(data.as_ptr(), along, s, count, out.as_mut_ptr());
        }
    }
    let _ = kernel;
    for (kk, to) in out.chunks_exact_mut(s.width).take(count).enumerate() {
        to[..s.len].copy_from_slice(&data[kk * along..][..s.len]);
        to[s.len..].fill(0.0);
    }
}

/// Packs one strip from strided data.
pub(crate) fn lines(kernel: Kernel, data: &[f32], across: usize, along: usize, s: Strip, kc: usize, out: &mut [f32]) {
    if s.len == 0 || kc == 0 {
        return;
    }
    assert!((s.len - 1) * across + (kc - 1) * along < data.len() && kc * s.width <= out.len());
    #[cfg(target_arch = "x86_64")]
    if kernel != Kernel::Portable && kc * s.width + SLACK <= out.len() {
        let (data, out) = (data.as_ptr(), out.as_mut_ptr());
        // SAFETY: a kernel is chosen only where the CPU has its instructions; reads and writes stay inside by the assertions.
        unsafe {
            match (kernel.avx512(), across, along) {
                (true, 1, _) => return avx512::copy(data, along, s, kc, out),
                (true, _, 1) => return avx512::transpose(data, across, s, kc, out),
                (false, 1, _) => return crate::avx2::copy(data, along, s, kc, out),
                (false, _, 1) => return crate::avx2::transpose(data, across, s, kc, out),
                _ => {}
            }
        }
    }
    let _ = kernel;
    for (kk, to) in out.chunks_exact_mut(s.width).take(kc).enumerate() {
        for (i, to) in to.iter_mut().enumerate() {
            *to = if i < s.len { data[i * across + kk * along] } else { 0.0 };
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512 {
    use super::Strip;
    use crate::avx512::mask;
    use std::arch::x86_64::*;

    /// Lines of `s.len` neighbours, `along` apart. Writes up to 16 places behind the end.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn copy(data: *const f32, along: usize, s: Strip, kc: usize, out: *mut f32) {
        for h in (0..s.width).step_by(16) {
            let m = mask(s.len.saturating_sub(h));
            for kk in 0..kc {
                // SAFETY: masked to the line; the caller left room for 16 behind the last one.
                unsafe { _mm512_storeu_ps(out.add(kk * s.width + h), _mm512_maskz_loadu_ps(m, data.wrapping_add(kk * along + h))) };
            }
        }
    }

    /// As [`copy`], but writes nothing behind the end.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn copy_exact(data: *const f32, along: usize, s: Strip, count: usize, out: *mut f32) {
        for h in (0..s.width).step_by(16) {
            let (read, write) = (mask(s.len.saturating_sub(h)), mask(s.width - h));
            for kk in 0..count {
                // SAFETY: both masked to the line.
                unsafe {
                    _mm512_mask_storeu_ps(out.add(kk * s.width + h), write, _mm512_maskz_loadu_ps(read, data.wrapping_add(kk * along + h)))
                };
            }
        }
    }

    /// Lines along k, `across` apart. Writes up to 16 places behind the end.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose(data: *const f32, across: usize, s: Strip, kc: usize, out: *mut f32) {
        for h in (0..s.width).step_by(16) {
            let rows = s.len.saturating_sub(h).min(16);
            for kb in (0..kc).step_by(16) {
                let len = (kc - kb).min(16);
                let m = mask(len);
                let row = |i: usize| {
                    // The next strip's line, which the CPU would not guess.
                    _mm_prefetch::<_MM_HINT_T0>(data.wrapping_add((s.width + h + i) * across + kb).cast());
                    let m = if i < rows { m } else { 0 };
                    // SAFETY: masked to the line, or to nothing.
                    unsafe { _mm512_maskz_loadu_ps(m, data.wrapping_add((h + i) * across + kb)) }
                };
                // By number, so that all stay in registers.
                let r = [
                    row(0),
                    row(1),
                    row(2),
                    row(3),
                    row(4),
                    row(5),
                    row(6),
                    row(7),
                    row(8),
                    row(9),
                    row(10),
                    row(11),
                    row(12),
                    row(13),
                    row(14),
                    row(15),
                ];
                let t = turn(r);
                for (kk, t) in t.iter().enumerate().take(len) {
                    // SAFETY: the caller left room for 16 behind the last line.
                    unsafe { _mm512_storeu_ps(out.add((kb + kk) * s.width + h), *t) };
                }
            }
        }
    }

    /// The transpose of 16 by 16.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(crate) fn turn(r: [__m512; 16]) -> [__m512; 16] {
        let z = _mm512_setzero_ps();
        let mut a = [z; 16];
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        // Groups of four rows: b[4 g + j] holds column j of each quarter for rows 4 g..4 g + 4.
        let mut b = [z; 16];
        let (pd, ps) = (_mm512_castps_pd, _mm512_castpd_ps);
        for g in 0..4 {
            let (p, q) = (4 * g, 4 * g + 2);
            b[4 * g] = ps(_mm512_unpacklo_pd(pd(a[p]), pd(a[q])));
            b[4 * g + 1] = ps(_mm512_unpackhi_pd(pd(a[p]), pd(a[q])));
            b[4 * g + 2] = ps(_mm512_unpacklo_pd(pd(a[p + 1]), pd(a[q + 1])));
            b[4 * g + 3] = ps(_mm512_unpackhi_pd(pd(a[p + 1]), pd(a[q + 1])));
        }
        let mut out = [z; 16];
        for j in 0..4 {
            let low = _mm512_shuffle_f32x4::<0x88>(b[j], b[4 + j]);
            let high = _mm512_shuffle_f32x4::<0xdd>(b[j], b[4 + j]);
            let low2 = _mm512_shuffle_f32x4::<0x88>(b[8 + j], b[12 + j]);
            let high2 = _mm512_shuffle_f32x4::<0xdd>(b[8 + j], b[12 + j]);
            out[j] = _mm512_shuffle_f32x4::<0x88>(low, low2);
            out[4 + j] = _mm512_shuffle_f32x4::<0x88>(high, high2);
            out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
            out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
        }
        out
    }

    /// Rounds an f32 strip to bf16 (to nearest even) in place: row k of the result holds the pairs of rows 2 k and 2 k + 1.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn to_pairs(strip: &mut [f32], rows: usize, width: usize) {
        let half = |x: __m512| -> __m512i {
            // SAFETY: both types are 32 bytes of plain bits.
            let bits = unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)) };
            _mm512_cvtepu16_epi32(bits)
        };
        let p = strip.as_mut_ptr();
        for k in 0..rows / 2 {
            for h in (0..width).step_by(16) {
                let m = mask(width - h);
                // SAFETY: inside the strip by the mask; what is written lies at or before what is read next.
                unsafe {
                    let (even, odd) =
                        (_mm512_maskz_loadu_ps(m, p.add(2 * k * width + h)), _mm512_maskz_loadu_ps(m, p.add((2 * k + 1) * width + h)));
                    let pairs = _mm512_or_si512(half(even), _mm512_slli_epi32::<16>(half(odd)));
                    _mm512_mask_storeu_epi32(p.add(k * width + h).cast(), m, pairs);
                }
            }
        }
    }
}
