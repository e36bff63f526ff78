//! Whole blocks on AVX2: the same operations on the same numbers as the plain form, eight elements at a time, so that the
//! results are equal bit for bit. Codes become values, and values codes, by plain look-ups in the two tables of the map, in loops of
//! their own: a CPU that gathers slowly (AMD's, and Intel's since its gathers were made safe) takes twice as long for gathers.

use std::arch::x86_64::*;

use super::BLOCK;
use crate::lion::LionRule;
use crate::map::{DynamicMap, PLACE, SHIFT};

/// One step over whole blocks. `absmax` has one element for each.
///
/// # Safety
/// The CPU has AVX2.
///
/// # Panics
/// If the lengths are not `absmax.len()` blocks.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn blocks(map: &DynamicMap, rule: &LionRule, p: &mut [f32], g: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    let len = absmax.len() * BLOCK;
    assert!(p.len() == len && g.len() == len && codes.len() == len, "parameter, gradient and momentum differ in length");
    let chunks = p.chunks_exact_mut(BLOCK).zip(g.chunks_exact(BLOCK)).zip(codes.chunks_exact_mut(BLOCK));
    for (((p, g), codes), absmax) in chunks.zip(absmax) {
        let mut m = [0.0f32; BLOCK];
        // SAFETY: the CPU has AVX2 by the caller's promise; all four hold BLOCK elements.
        unsafe {
            *absmax = update(map, rule, p.as_mut_ptr(), g.as_ptr(), codes.as_ptr(), *absmax, &mut m);
            if *absmax == 0.0 {
                codes.fill(0);
            } else {
                quantize(map, &m, *absmax, codes.as_mut_ptr());
            }
        }
    }
}

/// Steps the parameters of a block and gives its new momentum, with the largest magnitude in it.
///
/// # Safety
/// The CPU has AVX2; the pointers lead to BLOCK elements, `p` exclusively.
#[target_feature(enable = "avx2")]
unsafe fn update(
    map: &DynamicMap,
    rule: &LionRule,
    p: *mut f32,
    g: *const f32,
    codes: *const u8,
    absmax: f32,
    m: &mut [f32; BLOCK],
) -> f32 {
    let [absmax, beta1, beta2, gradient1, gradient2, lr, decay] =
        [absmax, rule.beta1, rule.beta2, rule.gradient1, rule.gradient2, rule.lr, rule.decay].map(|v| _mm256_set1_ps(v));
    let (zero, one, magnitude) = (_mm256_setzero_ps(), _mm256_set1_ps(1.0), _mm256_set1_epi32(i32::MAX));
    for (i, m) in m.iter_mut().enumerate() {
        // SAFETY: i is below BLOCK.
        *m = map.values[usize::from(unsafe { *codes.add(i) })];
    }
    let mut largest = _mm256_setzero_si256();
    for i in (0..BLOCK).step_by(8) {
        // SAFETY: i + 8 is at most BLOCK.
        unsafe {
            let old = _mm256_mul_ps(_mm256_loadu_ps(m.as_ptr().add(i)), absmax);
            let (g, at) = (_mm256_loadu_ps(g.add(i)), p.add(i));
            let update = _mm256_add_ps(_mm256_mul_ps(beta1, old), _mm256_mul_ps(gradient1, g));
            let up = _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(update, zero), one);
            let down = _mm256_and_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(update, zero), one);
            let moved = _mm256_mul_ps(lr, _mm256_sub_ps(up, down));
            _mm256_storeu_ps(at, _mm256_sub_ps(_mm256_mul_ps(_mm256_loadu_ps(at), decay), moved));
            let new = _mm256_add_ps(_mm256_mul_ps(beta2, old), _mm256_mul_ps(gradient2, g));
            _mm256_storeu_ps(m.as_mut_ptr().add(i), new);
            largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(new), magnitude));
        }
    }
    let mut lanes = [0i32; 8];
    // SAFETY: eight lanes of four bytes.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), largest) };
    f32::from_bits(lanes.into_iter().fold(0, i32::max) as u32)
}

/// The codes of `m / absmax`.
///
/// # Safety
/// The CPU has AVX2; `codes` leads to BLOCK elements, exclusively.
#[target_feature(enable = "avx2")]
unsafe fn quantize(map: &DynamicMap, m: &[f32; BLOCK], absmax: f32, codes: *mut u8) {
    let (absmax, place, low) = (_mm256_set1_ps(absmax), _mm256_set1_epi32(PLACE as i32), _mm256_set1_epi32(0xff));
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let (mut scaled, mut buckets) = ([0u32; BLOCK], [0u32; BLOCK]);
    for i in (0..BLOCK).step_by(8) {
        // SAFETY: i + 8 is at most BLOCK.
        unsafe {
            let x = _mm256_castps_si256(_mm256_div_ps(_mm256_loadu_ps(m.as_ptr().add(i)), absmax));
            _mm256_storeu_si256(scaled.as_mut_ptr().add(i).cast(), x);
            _mm256_storeu_si256(buckets.as_mut_ptr().add(i).cast(), _mm256_srli_epi32::<{ SHIFT as i32 }>(x));
        }
    }
    for bucket in &mut buckets {
        *bucket = map.bucket(*bucket);
    }
    for i in (0..BLOCK).step_by(32) {
        let mut four = [_mm256_setzero_si256(); 4];
        for (k, four) in four.iter_mut().enumerate() {
            let at = i + 8 * k;
            // SAFETY: i + 8 k + 8 is at most BLOCK.
            let (x, bucket) =
                unsafe { (_mm256_loadu_si256(scaled.as_ptr().add(at).cast()), _mm256_loadu_si256(buckets.as_ptr().add(at).cast())) };
            // All ones where the threshold is passed; against the sign as in `DynamicMap::code`.
            let beyond = _mm256_cmpgt_epi32(_mm256_and_si256(x, place), _mm256_srli_epi32::<8>(bucket));
            let add = _mm256_xor_si256(beyond, _mm256_srai_epi32::<31>(x));
            *four = _mm256_and_si256(_mm256_sub_epi32(bucket, add), low);
        }
        let halves = [_mm256_packus_epi32(four[0], four[1]), _mm256_packus_epi32(four[2], four[3])];
        let bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(halves[0], halves[1]), order);
        // SAFETY: i + 32 is at most BLOCK.
        unsafe { _mm256_storeu_si256(codes.add(i).cast(), bytes) };
    }
}
