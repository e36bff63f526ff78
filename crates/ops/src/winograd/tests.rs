//! Winograd's filtering against the definition.

use super::*;
use crate::gemm::tests::numbers;

/// The definition, in f64.
fn plain(s: &Winograd, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f64> {
    let at = |i: usize, ch: usize, y: usize, x_: usize| x[((i * s.c + ch) * s.h + y) * s.w + x_] as f64;
    let mut out = Vec::new();
    for (i, o) in (0..s.n).flat_map(|i| (0..s.o).map(move |o| (i, o))) {
        for (y, x) in (0..s.h).flat_map(|y| (0..s.w).map(move |x| (y, x))) {
            let mut sum = bias[o] as f64;
            for (ch, tap) in (0..s.c).flat_map(|ch| (0..9).map(move |tap| (ch, tap))) {
                let (yy, xx) = ((y + tap / 3).wrapping_sub(1), (x + tap % 3).wrapping_sub(1));
                if yy < s.h && xx < s.w {
                    let tap = if s.flipped { 8 - tap } else { tap };
                    sum += at(i, ch, yy, xx) * weight[(o * s.c + ch) * 9 + tap] as f64;
                }
            }
            out.push(sum);
        }
    }
    out
}

fn taps_of(weight: &[f32], c: usize, rows: Strip, (k0, kc): (usize, usize), out: &mut [f32]) {
    for (k, to) in out.chunks_exact_mut(rows.width).take(9 * kc).enumerate() {
        for (i, to) in to[..rows.len].iter_mut().enumerate() {
            *to = weight[((rows.start + i) * c + k0) * 9 + k];
        }
    }
}

#[test]
fn equals_the_definition_at_every_edge() {
    for (n, c, o, h, w) in [(1, 3, 5, 4, 4), (2, 130, 15, 8, 8), (1, 20, 45, 7, 5), (3, 4, 2, 3, 19), (1, 5, 31, 34, 70), (2, 7, 14, 1, 1)]
    {
        for (flipped, kernel) in [false, true].into_iter().flat_map(|f| Kernel::all().into_iter().map(move |k| (f, k))) {
            let s = Winograd { kernel, n, c, o, h, w, flipped };
            let (x, weight, bias) = (numbers(n * c * h * w, 1), numbers(o * c * 9, 2), numbers(o, 3));
            let taps = |rows: Strip, (k0, kc): (usize, usize), out: &mut [f32], _: &mut Vec<f32>| {
                taps_of(&weight, c, rows, (k0, kc), out);
            };
            let mut out = vec![f32::NAN; n * o * h * w];
            // SAFETY: `out` is borrowed exclusively.
            unsafe { s.run(&x, (&taps, &|_, _| Ahead::none()), Some(&bias), SharedMut::new(&mut out)) };
            for (got, want) in out.iter().zip(plain(&s, &x, &weight, &bias)) {
                // Sums of 9 c products of order one third; the transforms add and take away a few of their size.
                assert!((*got as f64 - want).abs() < 1e-6 * (c as f64 + 4.0), "{s:?}: {got}, {want}");
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<(), rayon::ThreadPoolBuildError> {
    let s = Winograd { kernel: Kernel::f32(), n: 1, c: 70, o: 50, h: 40, w: 40, flipped: false };
    let (x, weight) = (numbers(s.c * s.h * s.w, 1), numbers(s.o * s.c * 9, 2));
    let taps = |rows: Strip, (k0, kc): (usize, usize), out: &mut [f32], _: &mut Vec<f32>| {
        taps_of(&weight, s.c, rows, (k0, kc), out);
    };
    let mut results = Vec::new();
    for threads in [1, 2, 3, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let mut out = vec![0f32; s.o * s.h * s.w];
        // SAFETY: `out` is borrowed exclusively.
        pool.install(|| unsafe { s.run(&x, (&taps, &|_, _| Ahead::none()), None, SharedMut::new(&mut out)) });
        results.push(out);
    }
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    Ok(())
}

#[test]
fn is_taken_for_the_layers_of_sdxl_and_not_for_small_ones() {
    let of = |n, c, o, side| Winograd { kernel: Kernel::f32(), n, c, o, h: side, w: side, flipped: false }.pays();
    assert!(of(1, 320, 320, 128) && of(1, 640, 640, 64) && of(4, 1280, 1280, 32));
    assert!(!of(1, 4, 320, 128) && !of(1, 320, 4, 128) && !of(1, 1280, 1280, 2));
}
