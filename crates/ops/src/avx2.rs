//! The micro-kernel for AVX2 and FMA, its steps in assembly as those of `avx512.rs`, and how its operands are packed. The left operand may
//! also be read where it lies, if its lines go along k: each of a tile's rows is a stream of its own, and nothing is copied.

use crate::ahead::{Ahead, LINE, Lines, ask_next};
use crate::pack::Strip;
use crate::tile::{Left, Start, Tile};
use std::arch::asm;
use std::arch::x86_64::*;

/// Rows of a full tile.
const ROWS: usize = 6;

/// The sums of a tile, two vectors for each row.
type Sums = [[__m256; 2]; ROWS];

/// One tile, see [`crate::tile::tile`].
///
/// # Safety
/// The promises of `tile`; the CPU has AVX2 and FMA.
pub(crate) unsafe fn dispatch(t: Tile, a: *const f32, b: *const f32, c: *mut f32, ahead: &mut Ahead) {
    macro_rules! by_rows {
        ($($m:literal)*) => {
            // SAFETY: the caller's promises.
            unsafe {
                match (t.rows, t.lanes) {
                    $(
                        ($m, 16) => run::<$m, 2>(t, a, b, c, ahead),
                        ($m, _) => run::<$m, 1>(t, a, b, c, ahead),
                    )*
                    _ => unreachable!("a tile of {} rows", t.rows),
                }
            }
        };
    }
    by_rows!(1 2 3 4 5 6)
}

#[target_feature(enable = "avx2,fma")]
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
            "vbroadcastss ymm14, dword ptr [",
            $at,
            "]\n",
            "vfmadd231ps ",
            $low,
            ", ymm14, ymm12\n",
            ".if {v} > 1\n",
            "vfmadd231ps ",
            $high,
            ", ymm14, ymm13\n",
            ".endif\n",
            ".endif"
        )
    };
}

/// The steps of a tile, as in `avx512.rs`.
macro_rules! steps {
    ([$($rows:expr),*], [$($on:literal),*], $steps:expr, $b:expr, $lines:expr, $($operands:tt)*) => {{
        let mut sums: Sums = [[_mm256_setzero_ps(); 2]; ROWS];
        asm!(
            "vxorps ymm0, ymm0, ymm0", "vxorps ymm1, ymm1, ymm1", "vxorps ymm2, ymm2, ymm2", "vxorps ymm3, ymm3, ymm3",
            "vxorps ymm4, ymm4, ymm4", "vxorps ymm5, ymm5, ymm5", "vxorps ymm6, ymm6, ymm6", "vxorps ymm7, ymm7, ymm7",
            "vxorps ymm8, ymm8, ymm8", "vxorps ymm9, ymm9, ymm9", "vxorps ymm10, ymm10, ymm10", "vxorps ymm11, ymm11, ymm11",
            "test {n}, {n}",
            "jz 3f",
            ".p2align 5",
            "2:",
            ask_next!(),
            "vmovups ymm12, ymmword ptr [{b}]",
            ".if {v} > 1",
            "vmovups ymm13, ymmword ptr [{b} + 32]",
            ".endif",
            $($rows,)*
            $($on,)*
            "add {b}, 32 * {v}",
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
            out("ymm0") sums[0][0], out("ymm1") sums[0][1], out("ymm2") sums[1][0], out("ymm3") sums[1][1],
            out("ymm4") sums[2][0], out("ymm5") sums[2][1], out("ymm6") sums[3][0], out("ymm7") sums[3][1],
            out("ymm8") sums[4][0], out("ymm9") sums[4][1], out("ymm10") sums[5][0], out("ymm11") sums[5][1],
            out("ymm12") _, out("ymm13") _, out("ymm14") _,
            options(nostack, readonly),
        );
        sums
    }};
}

/// The sums with a left operand that lies k by k, `width` numbers from one to the next.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn packed<const M: usize, const V: usize>(steps: usize, a: *const f32, width: usize, b: *const f32, lines: &mut Lines) -> Sums {
    // SAFETY: the promises of `tile`: M numbers of `a` and V vectors of `b` in each step. Registers that change are named, memory is only read.
    unsafe {
        steps!(
            [
                row!(0, "ymm0", "ymm1", "{a} + 0"),
                row!(1, "ymm2", "ymm3", "{a} + 4"),
                row!(2, "ymm4", "ymm5", "{a} + 8"),
                row!(3, "ymm6", "ymm7", "{a} + 12"),
                row!(4, "ymm8", "ymm9", "{a} + 16"),
                row!(5, "ymm10", "ymm11", "{a} + 20")
            ],
            ["add {a}, {apart}"],
            steps, b, lines,
            a = inout(reg) a => _,
            apart = in(reg) 4 * width,
        )
    }
}

/// The sums with a left operand in lines along k, `apart` numbers from one to the next.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn in_lines<const M: usize, const V: usize>(steps: usize, a: *const f32, apart: usize, b: *const f32, lines: &mut Lines) -> Sums {
    // SAFETY: the promises of `tile`: M lines of `a`, as many numbers long as there are steps, and V vectors of `b` in each. Pointers to rows
    // that are not there are not read. Registers that change are named, memory is only read.
    unsafe {
        steps!(
            [
                row!(0, "ymm0", "ymm1", "{a}"),
                row!(1, "ymm2", "ymm3", "{a} + {apart}"),
                row!(2, "ymm4", "ymm5", "{a} + 2*{apart}"),
                row!(3, "ymm6", "ymm7", "{a3}"),
                row!(4, "ymm8", "ymm9", "{a} + 4*{apart}"),
                row!(5, "ymm10", "ymm11", "{a3} + 2*{apart}")
            ],
            ["add {a}, 4", "add {a3}, 4"],
            steps, b, lines,
            a = inout(reg) a => _,
            a3 = inout(reg) a.wrapping_add(3 * apart) => _,
            apart = in(reg) 4 * apart,
        )
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn store<const M: usize, const V: usize>(t: Tile, sums: &Sums, c: *mut f32) {
    let scale = _mm256_set1_ps(t.scale);
    for (i, sums) in sums.iter().enumerate().take(M) {
        for (v, s) in sums.iter().enumerate().take(V) {
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
unsafe fn store_turned<const M: usize, const V: usize>(t: Tile, sums: &Sums, c: *mut f32) {
    let scale = _mm256_set1_ps(t.scale);
    for v in 0..V {
        let mut r = [_mm256_setzero_ps(); 8];
        for (r, s) in r.iter_mut().zip(&sums[..M]) {
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
