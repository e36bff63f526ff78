//! Clipping by the global norm (`torch.nn.utils.clip_grad_norm_` over all adapter parameters together).
//!
//! # Determinism
//! Squares are summed in f64 in a fixed order: in lanes inside a piece of fixed size, pieces one after another. The norm
//! does not depend on the number of threads. Torch sums in f32, so its last digits differ.

use rayon::prelude::*;

use crate::lion8bit::BLOCK;
use crate::parallel;

/// Elements of a piece: enough that its sum costs more than the hand-over to a thread, few enough that a GPU has many.
pub(crate) const PIECE: usize = 16 * BLOCK;

/// The L2 norm over all slices as one vector. Not finite exactly if some element is not: the squares of f32 cannot
/// overflow an f64 sum. So this is the overflow check, too.
pub fn global_norm(slices: &[&[f32]]) -> f64 {
    let pieces: Vec<&[f32]> = slices.iter().flat_map(|slice| slice.chunks(PIECE)).collect();
    let sums: Vec<f64> = pieces.into_par_iter().with_min_len(8).map(sum_of_squares).collect();
    sums.iter().sum::<f64>().sqrt()
}

/// Sums of a piece: enough of them that neither a CPU nor a GPU waits for one addition to begin the next.
const LANES: usize = 64;

fn sum_of_squares(piece: &[f32]) -> f64 {
    let (chunks, rest) = piece.as_chunks::<LANES>();
    let mut lanes = [0.0f64; LANES];
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(x) * f64::from(x);
    }
    lanes.iter().sum()
}

/// What gradients are multiplied by so that their norm is at most about `max_norm`: min(1, max_norm / (norm + 1e-6)).
/// A `max_norm` of 0 switches clipping off. A norm that is not finite gives NaN: such a step must be skipped, not clipped.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if !norm.is_finite() {
        return f32::NAN;
    }
    if max_norm == 0.0 {
        return 1.0;
    }
    (max_norm / (norm + 1e-6)).min(1.0) as f32
}

/// Multiplies every element; a factor of 1 touches nothing.
pub fn scale(slice: &mut [f32], factor: f32) {
    if factor != 1.0 {
        slice.par_chunks_mut(parallel::PIECE).for_each(|piece| piece.iter_mut().for_each(|x| *x *= factor));
    }
}

/// The norm by its definition, one element after another: the measure for [`global_norm`].
pub fn reference(slices: &[&[f32]]) -> f64 {
    slices.iter().flat_map(|slice| slice.iter()).map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}
