//! The signed dynamic map, the 256 values that a momentum code stands for, and the search for a value's code.
//!
//! The map has seven decades; decade `i` (0..=6) splits the interval 10^(i-7)..10^(i-6) evenly into 2^i parts and takes their middles, so
//! that large values are kept finely and small ones at all. Both signs, plus 0 and 1.0: code 127 is 0, code 255 is 1.0,
//! codes 0..=126 are the negatives of 254..=128 (there is no -1.0). Source: "8-bit Optimizers via Block-wise Quantization",
//! Dettmers et al. 2022, section 2.2; bitsandbytes `bitsandbytes/functional.py`, `create_dynamic_map`.
//!
//! The search exists twice: [`reference()`] walks the map as bitsandbytes' CUDA kernel does; [`DynamicMap::code`] looks the
//! answer up. They agree for every f32 in -1..=1, which the tests prove.

use std::sync::LazyLock;

/// Code of the value 0.
pub const ZERO: u8 = 127;
/// Positive values below 1.0; rank 0 is the value 0, rank `RANKS` is 1.0.
const RANKS: usize = 128;
/// Mantissa bits that are cut off to find a value's bucket. Its sign, exponent and six mantissa bits stay: that makes a
/// bucket of the topmost octave 1/128 wide, less than the 9/640 between neighbouring codes there, so a bucket holds at
/// most one threshold.
pub(crate) const SHIFT: u32 = 17;
/// The bits cut off: a value's place in its bucket. As a threshold it is never passed.
pub(crate) const PLACE: u32 = (1 << SHIFT) - 1;
/// One bucket for each value of the bits that stay.
const BUCKETS: usize = 1 << (32 - SHIFT);

/// The map and its lookup table.
pub struct DynamicMap {
    /// The value of each code, ascending.
    pub values: [f32; 256],
    /// For each bucket: in the low byte the lower one of its two codes (the code before its only one, if negative), and
    /// above it the last place that still belongs with the bucket's start. Values in use touch 12 kB of it.
    buckets: Box<[u32; BUCKETS]>,
}

static MAP: LazyLock<DynamicMap> = LazyLock::new(DynamicMap::new);

/// The one map, built at first use.
pub fn dynamic_map() -> &'static DynamicMap {
    &MAP
}

impl DynamicMap {
    fn new() -> Self {
        let values = values();
        let magnitudes = &values[ZERO as usize..];
        // Equal distance goes to the even code (see `reference`), that is to the odd rank: there the value on the
        // threshold already belongs above.
        let last_below: Vec<u32> = (1..=RANKS)
            .map(|rank| {
                let middle = midpoint(magnitudes[rank - 1], magnitudes[rank]);
                if rank % 2 == 1 { middle.to_bits() - 1 } else { middle.to_bits() }
            })
            .collect();
        let mut buckets = Box::new([0; BUCKETS]);
        let (positive, negative) = buckets.split_at_mut(BUCKETS / 2);
        for (i, (positive, negative)) in positive.iter_mut().zip(negative).enumerate() {
            let start = (i as u32) << SHIFT;
            let rank = last_below.partition_point(|&last| last < start);
            let last = last_below.get(rank).map_or(PLACE, |last| (last - start).min(PLACE));
            *positive = (last << 8) | (u32::from(ZERO) + rank as u32);
            // Zero has no negative and -1.0 no code: both take the neighbour.
            let last = if rank == 0 || rank >= RANKS - 1 { PLACE } else { last };
            let code = ZERO - rank.clamp(1, RANKS - 1) as u8;
            *negative = (last << 8) | u32::from(code.wrapping_sub(1));
        }
        Self { values, buckets }
    }

    /// The entry of a bucket: of a number's bits above [`SHIFT`].
    #[inline(always)]
    pub(crate) fn bucket(&self, top: u32) -> u32 {
        self.buckets[top as usize % BUCKETS]
    }

    /// The code of `x` in -1..=1: the nearest value's, by the rules of [`reference()`]. A NaN gets some code.
    #[inline(always)]
    pub fn code(&self, x: f32) -> u8 {
        let bits = x.to_bits();
        let bucket = self.bucket(bits >> SHIFT);
        let beyond = u32::from(bits & PLACE > bucket >> 8);
        // Beyond the threshold comes the upper code of a positive bucket and the lower one of a negative: no branch, for
        // one on the sign is mispredicted half of the time.
        (bucket + (beyond ^ (bits >> 31))) as u8
    }
}

/// The 256 values, ascending, with torch's rounding: `linspace` goes in from both ends with one fused multiply-add per
/// boundary, means of neighbours and the product with the power of ten are f32. Other orders miss the last bit of some.
fn values() -> [f32; 256] {
    let mut positive = Vec::with_capacity(RANKS);
    for decade in 0..7u32 {
        let parts = 1usize << decade;
        let step = (1.0f32 - 0.1) / parts as f32;
        let boundary = |k: usize| {
            if k < parts.div_ceil(2) { step.mul_add(k as f32, 0.1) } else { (-step).mul_add((parts - k) as f32, 1.0) }
        };
        let scale = 10f64.powi(decade as i32 - 6) as f32;
        positive.extend((0..parts).map(|k| scale * ((boundary(k) + boundary(k + 1)) / 2.0)));
    }
    let mut values = [0.0; 256];
    for (rank, value) in positive.into_iter().enumerate() {
        values[128 + rank] = value;
        values[126 - rank] = -value;
    }
    values[255] = 1.0;
    values
}

fn midpoint(a: f32, b: f32) -> f32 {
    (a + b) * 0.5
}

/// The search as bitsandbytes' CUDA kernel makes it (`csrc/kernels.cu`, `quantize_2D`), with the sign rule of its
/// optimizers: slow, and the measure for [`DynamicMap::code`].
///
/// Seven halving steps from code 127 end on an even code; its odd neighbours bound `x`. Beyond the middle between two
/// codes the farther one is taken, in the very middle the even one. Then a code whose sign differs from that of `x` is moved by
/// one: up for positive `x`, else down, so that a tiny negative momentum keeps its sign.
pub fn reference(values: &[f32; 256], x: f32) -> u8 {
    let (mut below, mut above) = (0u8, 255u8);
    let (mut pivot, mut stride) = (127u8, 64u8);
    while stride > 0 {
        if x > values[pivot as usize] {
            below = pivot;
            pivot += stride;
        } else {
            above = pivot;
            pivot -= stride;
        }
        stride /= 2;
    }
    let value = values[pivot as usize];
    let code = if x > value {
        if x > midpoint(values[above as usize], value) { above } else { pivot }
    } else if x < midpoint(values[below as usize], value) {
        below
    } else {
        pivot
    };
    if values[code as usize].is_sign_negative() == x.is_sign_negative() {
        code
    } else if x > 0.0 {
        code + 1
    } else {
        code.wrapping_sub(1)
    }
}
