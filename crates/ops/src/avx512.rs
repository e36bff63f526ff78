//! The micro-kernel for AVX-512, the one for AVX-512 BF16, and how an adapter is added to a weight. In the first the steps are written in assembly: fourteen by two sums fill the
//! registers so that a compiler which reorders a few loads no longer has room for them.

use crate::ahead::{Ahead, LINE, Lines, ask, ask_next};
use crate::tile::{Left, Start, Tile};
use std::arch::asm;
use std::arch::x86_64::*;

/// Rows of a full tile.
const ROWS: usize = 14;

/// The sums of a tile, two vectors for each row.
type Sums = [[__m512; 2]; ROWS];

/// Calls `$run` for the tile's rows and vectors.
macro_rules! by_rows {
    (@ $run:expr, $t:ident, ($($argument:ident),*)) => {
        $run($t, $($argument),*)
    };
    ($run:ident, $t:ident, $arguments:tt; $($m:literal)*) => {
        match ($t.rows, $t.lanes) {
            $(
                ($m, 32) => by_rows!(@ $run::<$m, 2>, $t, $arguments),
                ($m, _) => by_rows!(@ $run::<$m, 1>, $t, $arguments),
            )*
            _ => unreachable!("a tile of {} rows", $t.rows),
        }
    };
}

/// One tile, see [`crate::tile::tile`].
///
/// # Safety
/// The promises of `tile`; the CPU has AVX-512.
pub(crate) unsafe fn dispatch(t: Tile, a: *const f32, b: *const f32, c: *mut f32, ahead: &mut Ahead) {
    // SAFETY: the caller's promises.
    unsafe { by_rows!(run, t, (a, b, c, ahead); 1 2 3 4 5 6 7 8 9 10 11 12 13 14) }
}

/// The same with pairs of bf16, each in the place of an f32; the left operand packed.
///
/// # Safety
/// The promises of `tile`; the CPU has AVX-512 BF16.
pub(crate) unsafe fn dispatch_bf16(t: Tile, a: *const f32, b: *const f32, c: *mut f32, ahead: &mut Ahead) {
    // SAFETY: the caller's promises.
    unsafe { by_rows!(run_bf16, t, (a, b, c, ahead); 1 2 3 4 5 6 7 8 9 10 11 12 13 14) }
}

#[target_feature(enable = "avx512f")]
unsafe fn run<const M: usize, const V: usize>(t: Tile, a: *const f32, b: *const f32, c: *mut f32, ahead: &mut Ahead) {
    let mut lines = ahead.lines(b);
    // SAFETY: the promises of `tile`.
    unsafe {
        let sums = match t.left {
            Left::Packed(width) => packed::<M, V>(t.steps, a, width, b, &mut lines),
            Left::Lines(apart) => in_lines::<M, V>(t.steps, a, apart, b, &mut lines),
        };
        ahead.took(lines, t.steps);
        if t.turned { store_turned::<M, V>(t, &sums, c) } else { store::<M, V>(t, &sums, c) }
    }
}

/// The sum of row `$i` takes the product of its number at `$at` with both vectors of the right operand.
macro_rules! row {
    ($i:literal, $low:literal, $high:literal, $at:literal) => {
        concat!(
            ".if {m} > ",
            $i,
            "\n",
            "vbroadcastss zmm30, dword ptr [",
            $at,
            "]\n",
            "vfmadd231ps ",
            $low,
            ", zmm30, zmm28\n",
            ".if {v} > 1\n",
            "vfmadd231ps ",
            $high,
            ", zmm30, zmm29\n",
            ".endif\n",
            ".endif"
        )
    };
}

/// The steps of a tile: the sums are set to zero; with each step a line is asked for ([`Lines::next`]), the right operand is read, `$rows`
/// add their products, and the operands' places move on, the left one's as `$on` says.
macro_rules! steps {
    ([$($rows:expr),*], [$($on:literal),*], $steps:expr, $b:expr, $lines:expr, $($operands:tt)*) => {{
        let mut sums: Sums = [[_mm512_setzero_ps(); 2]; ROWS];
        asm!(
            "vpxord zmm0, zmm0, zmm0", "vpxord zmm1, zmm1, zmm1", "vpxord zmm2, zmm2, zmm2", "vpxord zmm3, zmm3, zmm3",
            "vpxord zmm4, zmm4, zmm4", "vpxord zmm5, zmm5, zmm5", "vpxord zmm6, zmm6, zmm6", "vpxord zmm7, zmm7, zmm7",
            "vpxord zmm8, zmm8, zmm8", "vpxord zmm9, zmm9, zmm9", "vpxord zmm10, zmm10, zmm10", "vpxord zmm11, zmm11, zmm11",
            "vpxord zmm12, zmm12, zmm12", "vpxord zmm13, zmm13, zmm13", "vpxord zmm14, zmm14, zmm14", "vpxord zmm15, zmm15, zmm15",
            "vpxord zmm16, zmm16, zmm16", "vpxord zmm17, zmm17, zmm17", "vpxord zmm18, zmm18, zmm18", "vpxord zmm19, zmm19, zmm19",
            "vpxord zmm20, zmm20, zmm20", "vpxord zmm21, zmm21, zmm21", "vpxord zmm22, zmm22, zmm22", "vpxord zmm23, zmm23, zmm23",
            "vpxord zmm24, zmm24, zmm24", "vpxord zmm25, zmm25, zmm25", "vpxord zmm26, zmm26, zmm26", "vpxord zmm27, zmm27, zmm27",
            "test {n}, {n}",
            "jz 3f",
            ".p2align 5",
            "2:",
            ask_next!(),
            "vmovups zmm28, zmmword ptr [{b}]",
            ".if {v} > 1",
            "vmovups zmm29, zmmword ptr [{b} + 64]",
            ".endif",
            $($rows,)*
            $($on,)*
            "add {b}, 64 * {v}",
            "dec {n}",
            "jnz 2b",
            "3:",
            m = const M,
            v = const V,
            n = inout(reg) $steps => _,
            b = inout(reg) $b => _,
            at = inout(reg) $lines.at,
            left = inout(reg) $lines.left,
            row = in(reg) $lines.row,
            turn = in(reg) $lines.turn,
            line = const LINE,
            t = out(reg) _,
            $($operands)*
            out("zmm0") sums[0][0], out("zmm1") sums[0][1], out("zmm2") sums[1][0], out("zmm3") sums[1][1],
            out("zmm4") sums[2][0], out("zmm5") sums[2][1], out("zmm6") sums[3][0], out("zmm7") sums[3][1],
            out("zmm8") sums[4][0], out("zmm9") sums[4][1], out("zmm10") sums[5][0], out("zmm11") sums[5][1],
            out("zmm12") sums[6][0], out("zmm13") sums[6][1], out("zmm14") sums[7][0], out("zmm15") sums[7][1],
            out("zmm16") sums[8][0], out("zmm17") sums[8][1], out("zmm18") sums[9][0], out("zmm19") sums[9][1],
            out("zmm20") sums[10][0], out("zmm21") sums[10][1], out("zmm22") sums[11][0], out("zmm23") sums[11][1],
            out("zmm24") sums[12][0], out("zmm25") sums[12][1], out("zmm26") sums[13][0], out("zmm27") sums[13][1],
            out("zmm28") _, out("zmm29") _, out("zmm30") _,
            options(nostack, readonly),
        );
        sums
    }};
}

/// The sums with a left operand that lies k by k, `width` numbers from one to the next.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn packed<const M: usize, const V: usize>(steps: usize, a: *const f32, width: usize, b: *const f32, lines: &mut Lines) -> Sums {
    // SAFETY: the promises of `tile`: M numbers of `a` and V vectors of `b` in each step. Registers that change are named, memory is only read.
    unsafe {
        steps!(
            [
                row!(0, "zmm0", "zmm1", "{a} + 0"),
                row!(1, "zmm2", "zmm3", "{a} + 4"),
                row!(2, "zmm4", "zmm5", "{a} + 8"),
                row!(3, "zmm6", "zmm7", "{a} + 12"),
                row!(4, "zmm8", "zmm9", "{a} + 16"),
                row!(5, "zmm10", "zmm11", "{a} + 20"),
                row!(6, "zmm12", "zmm13", "{a} + 24"),
                row!(7, "zmm14", "zmm15", "{a} + 28"),
                row!(8, "zmm16", "zmm17", "{a} + 32"),
                row!(9, "zmm18", "zmm19", "{a} + 36"),
                row!(10, "zmm20", "zmm21", "{a} + 40"),
                row!(11, "zmm22", "zmm23", "{a} + 44"),
                row!(12, "zmm24", "zmm25", "{a} + 48"),
                row!(13, "zmm26", "zmm27", "{a} + 52")
            ],
            ["add {a}, {apart}"],
            steps, b, lines,
            a = inout(reg) a => _,
            apart = in(reg) 4 * width,
        )
    }
}

/// The sums with a left operand in lines along k, `apart` numbers from one to the next. Four pointers reach all of them, for an address may
/// add a register's single, double, fourfold and eightfold.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn in_lines<const M: usize, const V: usize>(steps: usize, a: *const f32, apart: usize, b: *const f32, lines: &mut Lines) -> Sums {
    // SAFETY: the promises of `tile`: M lines of `a`, as many numbers long as there are steps, and V vectors of `b` in each. Pointers to rows
    // that are not there are not read. Registers that change are named, memory is only read.
    unsafe {
        steps!(
            [
                row!(0, "zmm0", "zmm1", "{a}"),
                row!(1, "zmm2", "zmm3", "{a} + {apart}"),
                row!(2, "zmm4", "zmm5", "{a} + 2*{apart}"),
                row!(3, "zmm6", "zmm7", "{a3}"),
                row!(4, "zmm8", "zmm9", "{a} + 4*{apart}"),
                row!(5, "zmm10", "zmm11", "{a5}"),
                row!(6, "zmm12", "zmm13", "{a5} + {apart}"),
                row!(7, "zmm14", "zmm15", "{a3} + 4*{apart}"),
                row!(8, "zmm16", "zmm17", "{a} + 8*{apart}"),
                row!(9, "zmm18", "zmm19", "{a5} + 4*{apart}"),
                row!(10, "zmm20", "zmm21", "{a10}"),
                row!(11, "zmm22", "zmm23", "{a3} + 8*{apart}"),
                row!(12, "zmm24", "zmm25", "{a10} + 2*{apart}"),
                row!(13, "zmm26", "zmm27", "{a5} + 8*{apart}")
            ],
            ["add {a}, 4", "add {a3}, 4", "add {a5}, 4", "add {a10}, 4"],
            steps, b, lines,
            a = inout(reg) a => _,
            a3 = inout(reg) a.wrapping_add(3 * apart) => _,
            a5 = inout(reg) a.wrapping_add(5 * apart) => _,
            a10 = inout(reg) a.wrapping_add(10 * apart) => _,
            apart = in(reg) 4 * apart,
        )
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn run_bf16<const M: usize, const V: usize>(t: Tile, mut a: *const f32, mut b: *const f32, c: *mut f32, ahead: &mut Ahead) {
    let mut sums = [[_mm512_setzero_ps(); V]; M];
    let mut lines = ahead.lines(b);
    // SAFETY: the promises of `tile`; a pair of bf16 fills the place of one f32.
    unsafe {
        for _ in 0..t.steps {
            ask(&mut lines);
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
        ahead.took(lines, t.steps);
        // A copy, so that the sums themselves never need a place in memory.
        let mut done: Sums = [[_mm512_setzero_ps(); 2]; ROWS];
        for (done, sums) in done.iter_mut().zip(&sums) {
            done[..V].copy_from_slice(sums);
        }
        if t.turned { store_turned::<M, V>(t, &done, c) } else { store::<M, V>(t, &done, c) }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store<const M: usize, const V: usize>(t: Tile, sums: &Sums, c: *mut f32) {
    let scale = _mm512_set1_ps(t.scale);
    for (i, sums) in sums.iter().enumerate().take(M) {
        for (v, s) in sums.iter().enumerate().take(V) {
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
unsafe fn store_turned<const M: usize, const V: usize>(t: Tile, sums: &Sums, c: *mut f32) {
    let (scale, mask) = (_mm512_set1_ps(t.scale), mask(M));
    for v in 0..V {
        let mut r = [_mm512_setzero_ps(); 16];
        for (r, s) in r.iter_mut().zip(&sums[..M]) {
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

/// The first `len` of sixteen.
pub(crate) fn mask(len: usize) -> __mmask16 {
    ((1u32 << len.min(16)) - 1) as __mmask16
}

/// Elements of a weight plus those of an adapter's `kron(w1, w2)`: `len` of them in one row, of f32, f16 or bf16 as `KIND` is 0, 1 or 2, to
/// `out`. They begin in the run of `w1[0]` times `w2.0`, at its element `w2.1`; each run takes the next number of `w1`.
///
/// # Safety
/// The CPU has AVX-512 (F, BW, VL). `base` and `out` hold `len` elements, and `w1` a number for each run.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) unsafe fn merge<const KIND: u8>(base: *const u8, w1: &[f32], w2: (&[f32], usize), out: *mut f32, len: usize) {
    let ((w2, mut q), mut done) = (w2, 0);
    for &factor in w1 {
        let (run, factor) = ((w2.len() - q).min(len - done), _mm512_set1_ps(factor));
        for h in (0..run).step_by(16) {
            let (at, m) = (done + h, mask(run - h));
            // SAFETY: masked to the run, which ends with the elements.
            unsafe {
                let element = match KIND {
                    0 => _mm512_maskz_loadu_ps(m, base.cast::<f32>().add(at)),
                    1 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, base.cast::<i16>().add(at))),
                    _ => {
                        let bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, base.cast::<i16>().add(at)));
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                    }
                };
                // Rounded twice, as in the form for other CPUs.
                let product = _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(m, w2.as_ptr().add(q + h)));
                _mm512_mask_storeu_ps(out.add(at), m, _mm512_add_ps(element, product));
            }
        }
        (q, done) = (0, done + run);
        if done == len {
            return;
        }
    }
}
