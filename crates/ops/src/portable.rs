//! The micro-kernel for any CPU, as the compiler vectorises it.

use crate::tile::{Left, Start, Tile};

const LANES: usize = 16;

/// One tile, see [`crate::tile::tile`].
///
/// # Safety
/// The promises of `tile`.
pub(crate) unsafe fn dispatch(t: Tile, a: *const f32, b: *const f32, c: *mut f32) {
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
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = *a.add(match t.left {
                    Left::Packed(width) => k * width + i,
                    Left::Lines(line) => i * line + k,
                });
                for (s, b) in sums.iter_mut().zip(b) {
                    *s += a * b;
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, s) in sums.iter().take(t.columns).enumerate() {
                let c = c.add(if t.turned { j * t.rs + i } else { i * t.rs + j });
                let old = match t.start {
                    Start::Zero => 0.0,
                    Start::Add => *c,
                    Start::Rows(p) => *p.add(i),
                    Start::Columns(p) => *p.add(j),
                };
                *c = old + t.scale * s;
            }
        }
    }
}
