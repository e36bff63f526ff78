//! Lion with block-wise 8-bit momentum, as bitsandbytes' CUDA kernel computes it (`csrc/kernels.cu`,
//! `kOptimizerStatic8bit1StateBlockwise`; versions >= 0.50, whose decay is decoupled for every state): blocks of 256
//! consecutive elements, one f32 `absmax` each, a momentum being `values[code] * absmax`.
//!
//! Tensors under 4096 elements keep their momentum in f32 and follow [`crate::lion`].
//!
//! # Determinism
//! Blocks are independent; the result does not depend on threads or device. Gradients must be finite (the trainer skips a
//! step otherwise): an infinite or NaN one spoils its block's momentum.

#[cfg(target_arch = "x86_64")]
mod avx2;

use rayon::prelude::*;

use crate::lion::{self, LionRule};
use crate::map::{DynamicMap, dynamic_map, reference as reference_code};
use crate::parallel::PIECE;

/// Elements that share one `absmax`.
pub const BLOCK: usize = 256;
/// Tensors with fewer elements keep an f32 momentum.
pub const MIN_8BIT_SIZE: usize = 4096;

/// The momentum of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub enum Lion8bit {
    /// Under [`MIN_8BIT_SIZE`] elements: as it is.
    F32(Vec<f32>),
    /// Quantized by blocks of [`BLOCK`].
    Blockwise {
        /// One code per element, an index into [`DynamicMap::values`]. Without meaning where `absmax` is 0.
        codes: Vec<u8>,
        /// Largest magnitude of each block; the last block may be short.
        absmax: Vec<f32>,
    },
}

impl Lion8bit {
    /// The zero momentum of a parameter with `size` elements.
    pub fn new(size: usize) -> Self {
        if size < MIN_8BIT_SIZE {
            Self::F32(vec![0.0; size])
        } else {
            Self::Blockwise { codes: vec![0; size], absmax: vec![0.0; size.div_ceil(BLOCK)] }
        }
    }

    /// Elements of the parameter.
    pub fn size(&self) -> usize {
        match self {
            Self::F32(m) => m.len(),
            Self::Blockwise { codes, .. } => codes.len(),
        }
    }

    /// One step over the parameter `p` with gradient `g`. Allocates nothing.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn step(&mut self, rule: &LionRule, p: &mut [f32], g: &[f32]) {
        match self {
            Self::F32(m) => lion::step(rule, p, g, m),
            Self::Blockwise { codes, absmax } => {
                assert!(p.len() == g.len() && p.len() == codes.len(), "parameter, gradient and momentum differ in length");
                let map = dynamic_map();
                if p.len() <= PIECE {
                    return piece(map, rule, p, g, codes, absmax);
                }
                (p.par_chunks_mut(PIECE), g.par_chunks(PIECE), codes.par_chunks_mut(PIECE), absmax.par_chunks_mut(PIECE / BLOCK))
                    .into_par_iter()
                    .for_each(|(p, g, codes, absmax)| piece(map, rule, p, g, codes, absmax));
            }
        }
    }
}

fn piece(map: &DynamicMap, rule: &LionRule, p: &mut [f32], g: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    let (p, g, codes, absmax) = {
        if is_x86_feature_detected!("avx2") {
            let whole = p.len() / BLOCK;
            let ((p, p_rest), (g, g_rest)) = (p.split_at_mut(whole * BLOCK), g.split_at(whole * BLOCK));
            let ((codes, codes_rest), (absmax, absmax_rest)) = (codes.split_at_mut(whole * BLOCK), absmax.split_at_mut(whole));
            // SAFETY: the CPU has AVX2.
            unsafe { avx2::blocks(map, rule, p, g, codes, absmax) };
            (p_rest, g_rest, codes_rest, absmax_rest)
        } else {
            (p, g, codes, absmax)
        }
    };
    plain(map, rule, p, g, codes, absmax);
}

/// [`piece`] on any CPU.
fn plain(map: &DynamicMap, rule: &LionRule, p: &mut [f32], g: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    let blocks = p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).zip(codes.chunks_mut(BLOCK)).zip(absmax);
    for (((p, g), codes), absmax) in blocks {
        *absmax = block(map, rule, p, g, codes, *absmax);
    }
}

/// One block; returns its new `absmax`.
fn block(map: &DynamicMap, rule: &LionRule, p: &mut [f32], g: &[f32], codes: &mut [u8], absmax: f32) -> f32 {
    let mut buffer = [0.0f32; BLOCK];
    let m = &mut buffer[..p.len()];
    for (m, &code) in m.iter_mut().zip(codes.iter()) {
        *m = map.values[code as usize] * absmax;
    }
    // The largest magnitude is found on the bits: integers may be compared in any order, so this runs on whole vectors.
    let mut largest = padding(map, rule, p.len(), absmax).to_bits() as i32;
    for ((p, &g), m) in p.iter_mut().zip(g).zip(m.iter_mut()) {
        (*p, *m) = rule.element(*p, g, *m);
        largest = largest.max(m.abs().to_bits() as i32);
    }
    let absmax = f32::from_bits(largest as u32);
    if absmax == 0.0 {
        codes.fill(0);
        return 0.0;
    }
    m.iter_mut().for_each(|m| *m /= absmax);
    for (code, &x) in codes.iter_mut().zip(m.iter()) {
        *code = map.code(x);
    }
    absmax
}

/// The kernel fills a short last block with code 128 (the smallest positive value) and gradient 0, and their momentum
/// counts for `absmax`. It matters only where all real ones have shrunk below 5.5e-7 of the block's former largest.
fn padding(map: &DynamicMap, rule: &LionRule, len: usize, absmax: f32) -> f32 {
    if len < BLOCK { rule.beta2 * (map.values[128] * absmax) } else { 0.0 }
}

/// The rule step by step on a whole quantized tensor, with the walking search: the measure for [`Lion8bit::step`].
pub fn reference(rule: &LionRule, p: &mut [f32], g: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    let values = &dynamic_map().values;
    for (b, absmax) in absmax.iter_mut().enumerate() {
        let elements = b * BLOCK..p.len().min((b + 1) * BLOCK);
        let mut m: Vec<f32> = elements.clone().map(|i| values[codes[i] as usize] * *absmax).collect();
        lion::reference(rule, &mut p[elements.clone()], &g[elements.clone()], &mut m);
        let missing = if elements.len() < BLOCK { rule.beta2 * (values[128] * *absmax) } else { 0.0 };
        *absmax = m.iter().fold(missing, |largest, m| largest.max(m.abs()));
        for (i, m) in elements.zip(m) {
            codes[i] = if *absmax == 0.0 { 0 } else { reference_code(values, m / *absmax) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The public step is held against the reference elsewhere; here the plain form is, which a CPU with AVX2 does not take.
    #[test]
    fn the_plain_form_equals_the_one_of_this_cpu() {
        let n = 5 * BLOCK + 7;
        let numbers = |seed: u32| -> Vec<f32> {
            (0..n as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) as i32 as f32) * 10f32.powi(-((i % 11) as i32) - 6)).collect()
        };
        let rule = LionRule::new((0.9, 0.95), 0.1, 1e-3);
        let start = || (numbers(1), vec![0u8; n], vec![0f32; n.div_ceil(BLOCK)]);
        let ((mut p, mut codes, mut absmax), (mut q, mut other_codes, mut other_absmax)) = (start(), start());
        for step in 0..6 {
            let g = if step < 4 { numbers(100 + step) } else { vec![0.0; n] };
            piece(dynamic_map(), &rule, &mut p, &g, &mut codes, &mut absmax);
            plain(dynamic_map(), &rule, &mut q, &g, &mut other_codes, &mut other_absmax);
            assert!(p.iter().zip(&q).all(|(a, b)| a.to_bits() == b.to_bits()), "step {step}");
            assert_eq!((&codes, &absmax), (&other_codes, &other_absmax), "step {step}");
        }
    }
}
