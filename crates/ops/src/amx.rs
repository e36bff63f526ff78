//! Products of bf16 on AMX, the matrix unit of Intel's server CPUs: tiles of 32 by 32, sums in f32. The compiler has no stable
//! intrinsics for it, so its instructions stand here as assembly.
//!
//! # Packed operands
//! Strips of 32 neighbours. For each 32 steps along k a strip holds two of AMX's tiles of 1 KiB, 16 neighbours each. A left operand's tile has
//! a line of 32 steps for each neighbour; a right operand's has a line for each two steps, with both of each neighbour beside each other.

use crate::avx512::mask;
use crate::pack::{Operand, Side, Strip, avx512::turn};
use crate::tile::{Start, Tile};
use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::LazyLock;

/// Neighbours in a strip, and steps along k in a block.
pub(crate) const SIDE: usize = 32;
/// Neighbours in a tile.
const HALF: usize = 16;
/// Numbers of 32 bits in a tile.
const TILE: usize = 256;

/// Whether this CPU has AMX for bf16, and the system lets this process use it.
pub(crate) fn has_amx() -> bool {
    static HAS: LazyLock<bool> = LazyLock::new(|| {
        let needs = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512bf16");
        // AMX-BF16 and AMX-TILE (Intel SDM volume 2, CPUID leaf 7).
        const BITS: u32 = 1 << 22 | 1 << 24;
        needs && __cpuid_count(7, 0).edx & BITS == BITS && allowed()
    });
    *HAS
}

/// Asks Linux for the tiles' state, which it keeps for a thread only then (Documentation/arch/x86/xstate.rst).
fn allowed() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: isize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XFEATURE_XTILEDATA: usize = 18;
        let result: isize;
        // SAFETY: a system call that reads two numbers; it overwrites only the registers that are named.
        unsafe {
            asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XFEATURE_XTILEDATA,
                out("rcx") _, out("r11") _, options(nostack));
        }
        result == 0
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// The calling thread's tiles, set up for as long as this lives.
pub(crate) struct Tiles(());

impl Tiles {
    /// All eight tiles 16 lines of 64 bytes.
    ///
    /// # Safety
    /// The CPU has AMX.
    pub(crate) unsafe fn set_up() -> Self {
        #[repr(align(64))]
        struct Config([u8; 64]);
        let mut config = Config([0; 64]);
        config.0[0] = 1;
        for tile in 0..8 {
            config.0[16 + 2 * tile] = 64;
            config.0[48 + tile] = HALF as u8;
        }
        // SAFETY: the caller's promise; 64 bytes are read.
        unsafe { asm!("ldtilecfg [{}]", in(reg) config.0.as_ptr(), options(nostack, readonly, preserves_flags)) };
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever set them up had AMX. Without this the system would save the tiles with every switch of threads.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Steps of made lines along k that are in memory at a time, so that a strip of them stays in the first cache.
const MADE: usize = 8 * SIDE;

/// Packs strips from place `first` on, `kc` steps from `k0` on, in bf16 (rounded to nearest even); what is missing is zero. A strip takes the place
/// of `kc`, rounded up to [`SIDE`], times 32 numbers, of which it needs half.
///
/// # Safety
/// The CPU has AVX-512 and its bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(crate) unsafe fn pack(
    operand: &Operand,
    side: Side,
    strips: impl Iterator<Item = Strip> + Clone,
    first: usize,
    (k0, kc): (usize, usize),
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let strips = strips.zip((0..).step_by(kc.next_multiple_of(SIDE) * SIDE));
    let blocks = |from: usize, to: usize| (from..to).step_by(SIDE).map(move |k| (k, SIDE.min(to - k)));
    let mut put = |lines: Source, (s, at): (Strip, usize), k: usize| {
        let to = &mut out[at + k / SIDE * 2 * TILE..][..2 * TILE];
        // SAFETY: the caller's promise; each source below holds the lines that it says.
        unsafe { block(lines, side, s.len, to) };
    };
    match *operand {
        Operand::Plain { data, across, along: 1 } => {
            for s in strips {
                for (k, steps) in blocks(0, kc) {
                    let lines = data[(first + s.0.start) * across + k0 + k..].as_ptr();
                    put(Source { lines, apart: across, steps, across: false }, s, k);
                }
            }
        }
        Operand::Plain { data, across: 1, along } => {
            for (k, steps) in blocks(0, kc) {
                for s in strips.clone() {
                    let lines = data[first + s.0.start + (k0 + k) * along..].as_ptr();
                    put(Source { lines, apart: along, steps, across: true }, s, k);
                }
            }
        }
        Operand::AlongK(_) | Operand::Rows(_) => {
            scratch.resize(scratch.len().max(SIDE * MADE), 0.0);
            for s in strips {
                for from in (0..kc).step_by(MADE) {
                    let made = MADE.min(kc - from);
                    for (i, line) in scratch.chunks_exact_mut(MADE).take(s.0.len).enumerate() {
                        operand.line(first + s.0.start + i, k0 + from, &mut line[..made]);
                    }
                    for (k, steps) in blocks(from, from + made) {
                        put(Source { lines: scratch[k - from..].as_ptr(), apart: MADE, steps, across: false }, s, k);
                    }
                }
            }
        }
        Operand::Across(_) | Operand::Columns(..) | Operand::Plain { .. } => {
            let len = strips.clone().map(|(s, _)| s.start + s.len).max().unwrap_or(0);
            scratch.resize(scratch.len().max(SIDE * len), 0.0);
            for (k, steps) in blocks(0, kc) {
                for (j, line) in scratch.chunks_exact_mut(len.max(1)).take(steps).enumerate() {
                    if let Operand::Plain { data, across, along } = *operand {
                        let from = &data[first * across + (k0 + k + j) * along..];
                        line.iter_mut().zip(from.iter().step_by(across)).for_each(|(to, from)| *to = *from);
                    } else {
                        operand.line(first, k0 + k + j, line);
                    }
                }
                for s in strips.clone() {
                    put(Source { lines: scratch[s.0.start..].as_ptr(), apart: len, steps, across: true }, s, k);
                }
            }
        }
    }
}

/// Lines in memory, `apart` from each other: across neighbours, one for each of `steps`; or along k, one for each neighbour.
#[derive(Clone, Copy)]
struct Source {
    lines: *const f32,
    apart: usize,
    steps: usize,
    across: bool,
}

/// The two tiles of `len` neighbours.
///
/// # Safety
/// The CPU has AVX-512 and its bf16. The source holds `len` neighbours.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn block(s: Source, side: Side, len: usize, to: &mut [f32]) {
    for (half, to) in to.chunks_exact_mut(TILE).enumerate() {
        let count = len.saturating_sub(HALF * half).min(HALF);
        // SAFETY: the caller's promises.
        let lines = unsafe {
            if s.across {
                pairs_of_lines(s.lines.wrapping_add(HALF * half), s.apart, count, s.steps)
            } else {
                rounded_lines(s.lines.wrapping_add(HALF * half * s.apart), s.apart, count, s.steps)
            }
        };
        let lines = if s.across == (side == Side::Left) { turn(lines) } else { lines };
        for (to, line) in to.as_chunks_mut::<HALF>().0.iter_mut().zip(lines) {
            // SAFETY: sixteen numbers.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), line) };
        }
    }
}

/// Two vectors as one of bf16, `a` first.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn rounded(a: __m512, b: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes of plain bits.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)) }
}

/// `count` lines of `steps` numbers: 16 vectors of 32 bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn rounded_lines(lines: *const f32, apart: usize, count: usize, steps: usize) -> [__m512; HALF] {
    let (low, high) = (mask(steps), mask(steps.saturating_sub(16)));
    let mut out = [_mm512_setzero_ps(); HALF];
    for (i, out) in out.iter_mut().enumerate() {
        let (low, high) = if i < count { (low, high) } else { (0, 0) };
        let line = lines.wrapping_add(i * apart);
        // SAFETY: masked to the caller's lines, or to nothing.
        let (a, b) = unsafe { (_mm512_maskz_loadu_ps(low, line), _mm512_maskz_loadu_ps(high, line.wrapping_add(16))) };
        *out = _mm512_castsi512_ps(rounded(a, b));
    }
    out
}

/// `steps` lines of `count` numbers: 16 vectors, each two lines' numbers in turn, in bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn pairs_of_lines(lines: *const f32, apart: usize, count: usize, steps: usize) -> [__m512; HALF] {
    // Places 0, 16, 1, 17, ... of 32.
    let low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    let order = _mm512_or_si512(low, _mm512_slli_epi32::<16>(_mm512_add_epi32(low, _mm512_set1_epi32(16))));
    let m = mask(count);
    let mut out = [_mm512_setzero_ps(); HALF];
    for (j, out) in out.iter_mut().enumerate() {
        let line = |k: usize| {
            let m = if k < steps { m } else { 0 };
            // SAFETY: masked to the caller's lines, or to nothing.
            unsafe { _mm512_maskz_loadu_ps(m, lines.wrapping_add(k * apart)) }
        };
        *out = _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, rounded(line(2 * j), line(2 * j + 1))));
    }
    out
}

/// One tile of 32 by 32, see [`crate::tile::tile`].
///
/// # Safety
/// The promises of `tile`, `a` and `b` packed by [`pack`] and `t.steps` counting blocks of [`SIDE`]; the calling thread's [`Tiles`] are set up.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn tile(t: Tile, a: *const f32, b: *const f32, c: *mut f32) {
    #[repr(align(64))]
    struct Sums([f32; SIDE * SIDE]);
    let mut sums = Sums([0.0; SIDE * SIDE]);
    let blocks = t.steps;
    if blocks > 0 {
        let to = sums.0.as_mut_ptr();
        // SAFETY: two tiles of each operand for each block, and the sums' 4 KiB. The compiler itself uses no tiles.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {line}*1]",
                "tileloadd tmm6, [{b} + {line}*1]",
                "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                "tileloadd tmm5, [{a} + {line}*1 + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "dec {blocks}",
                "jnz 2b",
                "tilestored [{to} + {line}*2], tmm0",
                "tilestored [{to} + {line}*2 + 64], tmm1",
                "tilestored [{to} + {line}*2 + 2048], tmm2",
                "tilestored [{to} + {line}*2 + 2112], tmm3",
                a = inout(reg) a => _,
                b = inout(reg) b => _,
                blocks = inout(reg) blocks => _,
                line = in(reg) 64usize,
                to = in(reg) to,
                out("tmm0") _,
                out("tmm1") _,
                out("tmm2") _,
                out("tmm3") _,
                out("tmm4") _,
                out("tmm5") _,
                out("tmm6") _,
                out("tmm7") _,
                options(nostack),
            );
        }
    }
    let scale = _mm512_set1_ps(t.scale);
    // Blocks of 16 by 16: turned ones are written column by column.
    for (i0, j0) in [(0, 0), (0, HALF), (HALF, 0), (HALF, HALF)] {
        let (rows, columns) = (t.rows.saturating_sub(i0).min(HALF), t.columns.saturating_sub(j0).min(HALF));
        if rows == 0 || columns == 0 {
            continue;
        }
        // SAFETY: inside the sums.
        let mut block: [__m512; HALF] = std::array::from_fn(|i| unsafe { _mm512_load_ps(sums.0.as_ptr().add((i0 + i) * SIDE + j0)) });
        let (lines, len) = if t.turned { (columns, rows) } else { (rows, columns) };
        if t.turned {
            block = turn(block);
        }
        // Of the result's lines: the first one, and the first place in it.
        let (line0, place0) = if t.turned { (j0, i0) } else { (i0, j0) };
        let m = mask(len);
        for (i, sum) in block.iter().enumerate().take(lines) {
            // SAFETY: masked to the result's places; a start has a number for each row or column.
            unsafe {
                let at = c.add((line0 + i) * t.rs + place0);
                let old = match (t.start, t.turned) {
                    (Start::Zero, _) => _mm512_setzero_ps(),
                    (Start::Add, _) => _mm512_maskz_loadu_ps(m, at),
                    (Start::Rows(p), false) | (Start::Columns(p), true) => _mm512_set1_ps(*p.add(line0 + i)),
                    (Start::Rows(p), true) | (Start::Columns(p), false) => _mm512_maskz_loadu_ps(m, p.add(place0)),
                };
                _mm512_mask_storeu_ps(at, m, _mm512_fmadd_ps(scale, *sum, old));
            }
        }
    }
}
