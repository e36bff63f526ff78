//! Micro-kernels: a tile of a matrix product whose sums stay in registers. One for AVX-512, one that the compiler vectorises
//! for any other CPU, one for AVX-512 BF16 (products of bf16 pairs, sums in f32). All add along k in ascending order, so
//! an element's value does not depend on the tile it falls into.
//!
//! Operands come packed by `pack.rs`: strips of `rows` (or `lanes`) neighbours, k by k.

use std::sync::LazyLock;

/// Which micro-kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
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
            Kernel::Portable
        });
        *BEST
    }

    /// Rows of a full tile: with `lanes` columns as many sums as leave registers for the operands.
    pub(crate) fn rows(self) -> usize {
        if self == Self::Portable { 6 } else { 14 }
    }

    /// Columns of a full tile.
    pub(crate) fn lanes(self) -> usize {
        if self == Self::Portable { 16 } else { 32 }
    }

    /// Steps along k in one packed row: bf16 comes in pairs.
    pub(crate) fn per_step(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => 2,
            _ => 1,
        }
    }
}

/// One tile: `c[i * rs + j] = [c +] scale * sum over k of a[k * rows + i] * b[k * lanes + j]`.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub rows: usize,
    /// Columns to write; `lanes` is the strip's width in memory.
    pub columns: usize,
    pub lanes: usize,
    pub steps: usize,
    pub rs: usize,
    pub add: bool,
    pub scale: f32,
}

/// Computes a tile.
///
/// # Safety
/// `a` holds `steps * rows` numbers, `b` `steps * lanes`; `c` is exclusive for `rows` rows of `columns` numbers, `rs` apart; `rows` and
/// `lanes` are at most the kernel's, and the CPU has its instructions.
pub(crate) unsafe fn tile(kernel: Kernel, t: Tile, a: *const f32, b: *const f32, c: *mut f32) {
    debug_assert!(t.rows <= kernel.rows() && t.lanes <= kernel.lanes() && t.columns <= t.lanes);
    // SAFETY: the caller's promises.
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => avx512::dispatch::<false>(t, a, b, c),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Bf16 => avx512::dispatch::<true>(t, a, b, c),
            Kernel::Portable => portable::dispatch(t, a, b, c),
        }
    }
}

mod portable {
    use super::Tile;

    const LANES: usize = 16;

    pub(super) unsafe fn dispatch(t: Tile, a: *const f32, b: *const f32, c: *mut f32) {
        crate::math::simd(
            #[inline(always)]
            || {
                // SAFETY: the promises of `tile`.
                unsafe {
                    match t.rows {
                        1 => run::<1>(t, a, b, c),
                        2 => run::<2>(t, a, b, c),
                        3 => run::<3>(t, a, b, c),
                        4 => run::<4>(t, a, b, c),
                        5 => run::<5>(t, a, b, c),
                        _ => run::<6>(t, a, b, c),
                    }
                }
            },
        );
    }

    #[inline(always)]
    unsafe fn run<const M: usize>(t: Tile, a: *const f32, b: *const f32, c: *mut f32) {
        let mut sums = [[0f32; LANES]; M];
        // SAFETY: the promises of `tile`.
        unsafe {
            for k in 0..t.steps {
                let b = &*b.add(k * LANES).cast::<[f32; LANES]>();
                let a = &*a.add(k * M).cast::<[f32; M]>();
                for (sums, a) in sums.iter_mut().zip(a) {
                    for (s, b) in sums.iter_mut().zip(b) {
                        *s += a * b;
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, s) in sums.iter().take(t.columns).enumerate() {
                    let c = c.add(i * t.rs + j);
                    *c = if t.add { *c + t.scale * s } else { t.scale * s };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::Tile;
    use std::arch::x86_64::*;

    pub(super) unsafe fn dispatch<const BF16: bool>(t: Tile, a: *const f32, b: *const f32, c: *mut f32) {
        macro_rules! by_rows {
            ($($m:literal)*) => {
                // SAFETY: the promises of `tile`.
                unsafe {
                    match (t.rows, t.lanes, BF16) {
                        $(($m, 32, false) => run::<$m, 2>(t, a, b, c), ($m, _, false) => run::<$m, 1>(t, a, b, c),)*
                        $(($m, 32, true) => run_bf16::<$m, 2>(t, a, b, c), ($m, _, true) => run_bf16::<$m, 1>(t, a, b, c),)*
                        _ => unreachable!("a tile of {} rows", t.rows),
                    }
                }
            };
        }
        by_rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn run<const M: usize, const V: usize>(t: Tile, mut a: *const f32, mut b: *const f32, c: *mut f32) {
        let mut sums = [[_mm512_setzero_ps(); V]; M];
        // SAFETY: the promises of `tile`.
        unsafe {
            for _ in 0..t.steps {
                let mut bs = [_mm512_setzero_ps(); V];
                for (v, x) in bs.iter_mut().enumerate() {
                    *x = _mm512_loadu_ps(b.add(16 * v));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(i));
                    for (s, b) in sums.iter_mut().zip(&bs) {
                        *s = _mm512_fmadd_ps(x, *b, *s);
                    }
                }
                a = a.add(M);
                b = b.add(16 * V);
            }
            store::<M, V>(t, &sums, c);
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn run_bf16<const M: usize, const V: usize>(t: Tile, mut a: *const f32, mut b: *const f32, c: *mut f32) {
        let mut sums = [[_mm512_setzero_ps(); V]; M];
        // SAFETY: the promises of `tile`; a pair of bf16 fills the place of one f32.
        unsafe {
            for _ in 0..t.steps {
                let mut bs = [_mm512_setzero_si512(); V];
                for (v, x) in bs.iter_mut().enumerate() {
                    *x = _mm512_loadu_si512(b.add(16 * v).cast());
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(*a.add(i).cast::<i32>());
                    for (s, b) in sums.iter_mut().zip(&bs) {
                        *s =
                            _mm512_dpbf16_ps(*s, std::mem::transmute::<__m512i, __m512bh>(x), std::mem::transmute::<__m512i, __m512bh>(*b));
                    }
                }
                a = a.add(M);
                b = b.add(16 * V);
            }
            store::<M, V>(t, &sums, c);
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn store<const M: usize, const V: usize>(t: Tile, sums: &[[__m512; V]; M], c: *mut f32) {
        let scale = _mm512_set1_ps(t.scale);
        for (i, sums) in sums.iter().enumerate() {
            for (v, s) in sums.iter().enumerate() {
                let left = t.columns.saturating_sub(16 * v).min(16);
                let mask = ((1u32 << left) - 1) as __mmask16;
                // SAFETY: the mask keeps within the row's columns.
                unsafe {
                    let at = c.add(i * t.rs + (16 * v).min(t.columns));
                    let old = if t.add { _mm512_maskz_loadu_ps(mask, at) } else { _mm512_setzero_ps() };
                    _mm512_mask_storeu_ps(at, mask, _mm512_fmadd_ps(scale, *s, old));
                }
            }
        }
    }
}
