//! Micro-kernels: a tile of a matrix product whose sums stay in registers. One for AVX-512, one for AVX2 (`avx2.rs`), one that the
//! compiler vectorises for any other CPU (`portable.rs`); and for products of bf16 with sums in f32 one for AVX-512 BF16 and one for AMX
//! (`amx.rs`). All add along k in ascending order, so an element's value does not depend on the tile it falls into.
//!
//! Operands come packed by `pack.rs`: strips of `rows` (or `lanes`) neighbours, k by k.

use crate::ahead::Ahead;
use std::sync::LazyLock;

/// Which micro-kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Amx,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// Whether this CPU multiplies bf16 pairs (AVX-512 BF16).
pub fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static HAS: LazyLock<bool> = LazyLock::new(|| is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"));
        *HAS
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

impl Kernel {
    /// The best one for this CPU.
    pub(crate) fn f32() -> Self {
        static BEST: LazyLock<Kernel> = LazyLock::new(|| {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx512f") {
                return Kernel::Avx512;
            }
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Kernel::Avx2;
            }
            Kernel::Portable
        });
        *BEST
    }

    /// The best one of bf16 products; only where [`has_bf16`].
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn bf16() -> Self {
        if crate::amx::has_amx() { Self::Amx } else { Self::Avx512Bf16 }
    }

    /// Those that this CPU runs, without bf16's.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        if Self::f32() != Self::Portable {
            all.push(Self::f32());
        }
        #[cfg(target_arch = "x86_64")]
        if Self::f32() == Self::Avx512 && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(Self::Avx2);
        }
        all
    }

    /// Whether its vectors have 16 numbers.
    pub(crate) fn avx512(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 | Self::Amx => true,
            _ => false,
        }
    }

    /// Whether its operands are rounded to bf16.
    pub(crate) fn is_bf16(self) -> bool {
        self.per_step() > 1
    }

    /// Rows of a full tile: with `lanes` columns as many sums as leave registers for the operands.
    pub(crate) fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => crate::amx::SIDE,
            _ if self.avx512() => 14,
            _ => 6,
        }
    }

    /// Columns of a full tile: two vectors.
    pub(crate) fn lanes(self) -> usize {
        if self.avx512() { 32 } else { 16 }
    }

    /// Columns of a tile at the edge: one vector, if that is enough.
    pub(crate) fn narrow(self) -> usize {
        if self == Self::Portable || self.is_amx() { self.lanes() } else { self.lanes() / 2 }
    }

    /// Whether the left operand's lines along k are read where they lie.
    pub(crate) fn in_place(self) -> bool {
        !self.is_bf16()
    }

    /// Whether it has packed operands of its own, see `amx.rs`.
    pub(crate) fn is_amx(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Self::Amx;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// What steps along k come in multiples of: bf16 comes in pairs.
    pub(crate) fn per_step(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => 2,
            #[cfg(target_arch = "x86_64")]
            Self::Amx => crate::amx::SIDE,
            _ => 1,
        }
    }
}

/// What a tile's sums are added to.
#[derive(Clone, Copy)]
pub(crate) enum Start {
    Zero,
    /// What is there.
    Add,
    /// A number for each of the tile's rows.
    Rows(*const f32),
    /// A number for each of the tile's columns.
    Columns(*const f32),
}

/// How a tile's left operand lies in memory.
#[derive(Clone, Copy)]
pub(crate) enum Left {
    /// `a[k * width + i]`.
    Packed(usize),
    /// In lines along k: `a[i * line + k]`. Only where [`Kernel::in_place`].
    Lines(usize),
}

/// One tile: `c[i * rs + j] = start + scale * sum over k of a(i, k) * b[k * lanes + j]`.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub rows: usize,
    /// Columns to write; `lanes` is the strip's width in memory.
    pub columns: usize,
    pub lanes: usize,
    pub steps: usize,
    /// The left operand.
    pub left: Left,
    pub rs: usize,
    /// Element (i, j) goes to `c[j * rs + i]`.
    pub turned: bool,
    pub start: Start,
    pub scale: f32,
}

/// Computes a tile, and meanwhile asks for what will be read next.
///
/// # Safety
/// `a` holds `rows` numbers at each of `steps` places, or `rows` lines of `steps`; `b` `steps * lanes`; `c` is exclusive for `rows` rows of `columns`
/// numbers, `rs` apart (turned: the other way); `start` has a number for each row or column; `rows` and `lanes` are at most the kernel's,
/// and the CPU has its instructions.
pub(crate) unsafe fn tile(kernel: Kernel, t: Tile, a: *const f32, b: *const f32, c: *mut f32, ahead: &mut Ahead) {
    debug_assert!(t.rows <= kernel.rows() && t.lanes <= kernel.lanes() && t.columns <= t.lanes);
    debug_assert!(matches!(t.left, Left::Packed(_)) || kernel.in_place());
    let _ = &ahead;
    // SAFETY: the caller's promises.
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => avx512::dispatch::<false>(t, a, b, c, ahead),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Bf16 => avx512::dispatch::<true>(t, a, b, c, ahead),
            #[cfg(target_arch = "x86_64")]
            Kernel::Amx => crate::amx::tile(t, a, b, c),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => crate::avx2::dispatch(t, a, b, c, ahead),
            Kernel::Portable => crate::portable::dispatch(t, a, b, c),
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Left, Start, Tile};
    use crate::ahead::{Ahead, RUN, ask};
    use std::arch::x86_64::*;

    pub(super) unsafe fn dispatch<const BF16: bool>(t: Tile, a: *const f32, b: *const f32, c: *mut f32, ahead: &mut Ahead) {
        macro_rules! by_rows {
            ($($m:literal)*) => {
                // SAFETY: the promises of `tile`.
                unsafe {
                    match (t.rows, t.lanes, BF16, t.left) {
                        $(
                            ($m, 32, false, Left::Packed(width)) => run::<$m, 2, true>(t, width, a, b, c, ahead),
                            ($m, _, false, Left::Packed(width)) => run::<$m, 1, true>(t, width, a, b, c, ahead),
                            ($m, 32, false, Left::Lines(line)) => run::<$m, 2, false>(t, line, a, b, c, ahead),
                            ($m, _, false, Left::Lines(line)) => run::<$m, 1, false>(t, line, a, b, c, ahead),
                            ($m, 32, true, _) => run_bf16::<$m, 2>(t, a, b, c, ahead),
                            ($m, _, true, _) => run_bf16::<$m, 1>(t, a, b, c, ahead),
                        )*
                        _ => unreachable!("a tile of {} rows", t.rows),
                    }
                }
            };
        }
        by_rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    }

    /// `PACKED`: the left operand lies k by k, `apart` from one to the next; else in `M` lines, so far apart.
    #[target_feature(enable = "avx512f")]
    unsafe fn run<const M: usize, const V: usize, const PACKED: bool>(
        t: Tile,
        apart: usize,
        mut a: *const f32,
        mut b: *const f32,
        c: *mut f32,
        ahead: &mut Ahead,
    ) {
        let mut sums = [[_mm512_setzero_ps(); V]; M];
        // SAFETY: the promises of `tile`.
        unsafe {
            for from in (0..t.steps).step_by(RUN) {
                let lines = ahead.next_run(b);
                for i in 0..RUN.min(t.steps - from) {
                    ask(lines, i);
                    let mut bs = [_mm512_setzero_ps(); V];
                    for (v, x) in bs.iter_mut().enumerate() {
                        *x = _mm512_loadu_ps(b.add(16 * v));
                    }
                    // Rows by number, so that the compiler sees at once that no sum needs a place in memory.
                    macro_rules! rows {
                        ($($i:literal)*) => {$(
                            if $i < M {
                                let x = _mm512_set1_ps(*a.add(if PACKED { $i } else { $i * apart }));
                                sums[$i % M][0] = _mm512_fmadd_ps(x, bs[0], sums[$i % M][0]);
                                if V > 1 {
                                    sums[$i % M][V - 1] = _mm512_fmadd_ps(x, bs[V - 1], sums[$i % M][V - 1]);
                                }
                            }
                        )*};
                    }
                    rows!(0 1 2 3 4 5 6 7 8 9 10 11 12 13);
                    a = a.add(if PACKED { apart } else { 1 });
                    b = b.add(16 * V);
                }
            }
            // A copy, so that the sums themselves never need a place in memory.
            let done = sums;
            if t.turned { store_turned::<M, V>(t, &done, c) } else { store::<M, V>(t, &done, c) }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn run_bf16<const M: usize, const V: usize>(t: Tile, mut a: *const f32, mut b: *const f32, c: *mut f32, ahead: &mut Ahead) {
        let mut sums = [[_mm512_setzero_ps(); V]; M];
        // SAFETY: the promises of `tile`; a pair of bf16 fills the place of one f32.
        unsafe {
            for from in (0..t.steps).step_by(RUN) {
                let lines = ahead.next_run(b);
                for i in 0..RUN.min(t.steps - from) {
                    ask(lines, i);
                    let mut bs = [_mm512_setzero_si512(); V];
                    for (v, x) in bs.iter_mut().enumerate() {
                        *x = _mm512_loadu_si512(b.add(16 * v).cast());
                    }
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32(*a.add(i).cast::<i32>());
                        let pair = |v| std::mem::transmute::<__m512i, __m512bh>(v);
                        for (s, b) in sums.iter_mut().zip(&bs) {
                            *s = _mm512_dpbf16_ps(*s, pair(x), pair(*b));
                        }
                    }
                    a = a.add(M);
                    b = b.add(16 * V);
                }
            }
            // A copy, so that the sums themselves never need a place in memory.
            let done = sums;
            if t.turned { store_turned::<M, V>(t, &done, c) } else { store::<M, V>(t, &done, c) }
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn store<const M: usize, const V: usize>(t: Tile, sums: &[[__m512; V]; M], c: *mut f32) {
        let scale = _mm512_set1_ps(t.scale);
        for (i, sums) in sums.iter().enumerate() {
            for (v, s) in sums.iter().enumerate() {
                let mask = mask(t.columns.saturating_sub(16 * v));
                let column = (16 * v).min(t.columns);
                // SAFETY: the mask keeps within the row's columns; a start has a number for each row or column.
                unsafe {
                    let at = c.add(i * t.rs + column);
                    let old = match t.start {
                        Start::Zero => _mm512_setzero_ps(),
                        Start::Add => _mm512_maskz_loadu_ps(mask, at),
                        Start::Rows(p) => _mm512_set1_ps(*p.add(i)),
                        Start::Columns(p) => _mm512_maskz_loadu_ps(mask, p.add(column)),
                    };
                    _mm512_mask_storeu_ps(at, mask, _mm512_fmadd_ps(scale, *s, old));
                }
            }
        }
    }

    /// The tile's rows become columns: element (i, j) goes to `j * rs + i`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn store_turned<const M: usize, const V: usize>(t: Tile, sums: &[[__m512; V]; M], c: *mut f32) {
        let (scale, mask) = (_mm512_set1_ps(t.scale), mask(M));
        for v in 0..V {
            let mut r = [_mm512_setzero_ps(); 16];
            for (r, s) in r.iter_mut().zip(sums) {
                *r = s[v];
            }
            for (j, r) in crate::pack::avx512::turn(r).iter().enumerate().take(t.columns.saturating_sub(16 * v)) {
                let column = 16 * v + j;
                // SAFETY: M numbers of a line of the result; a start has a number for each row or column.
                unsafe {
                    let at = c.add(column * t.rs);
                    let old = match t.start {
                        Start::Zero => _mm512_setzero_ps(),
                        Start::Add => _mm512_maskz_loadu_ps(mask, at),
                        Start::Rows(p) => _mm512_maskz_loadu_ps(mask, p),
                        Start::Columns(p) => _mm512_set1_ps(*p.add(column)),
                    };
                    _mm512_mask_storeu_ps(at, mask, _mm512_fmadd_ps(scale, *r, old));
                }
            }
        }
    }

    fn mask(len: usize) -> __mmask16 {
        ((1u32 << len.min(16)) - 1) as __mmask16
    }
}
