//! Initial values: LyCORIS's distributions (lycoris/modules/lokr.py; kaiming_uniform with a = sqrt 5, that is
//! U(-1/sqrt(fan_in), 1/sqrt(fan_in))), so that w2, or w2_b, is zero and the adapted model equals the base model.
//!
//! # Determinism
//! The key is (seed, adapter init, number of the module in the network, tensor): values do not depend on the device, on the
//! order of construction, or on other tensors of the module. They are not PyTorch's.

use crate::shape::Factor;
use random::Stream;

/// The tensor's number in the key. Never renumber: it would change what a seed means.
pub(crate) fn sub_index(factor: Factor) -> u64 {
    match factor {
        Factor::W1 => 0,
        Factor::W1A => 1,
        Factor::W1B => 2,
        Factor::W2 => 3,
        Factor::W2A => 4,
        Factor::W2B => 5,
        Factor::T2 => 6,
    }
}

/// Values for a tensor of shape `dims`. With use_scalar the scalar is the zero, and everything else is drawn.
pub(crate) fn values(factor: Factor, dims: &[usize], use_scalar: bool, stream: &mut Stream) -> Vec<f32> {
    let count = dims.iter().product();
    if matches!(factor, Factor::W2 | Factor::W2B) && !use_scalar {
        return vec![0.0; count];
    }
    let fan_in: usize = dims.iter().skip(1).product();
    let bound = 1.0 / (fan_in.max(1) as f64).sqrt();
    (0..count).map(|_| stream.uniform_in(-bound, bound) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use random::Purpose;

    fn draw(factor: Factor, dims: &[usize], use_scalar: bool) -> Vec<f32> {
        values(factor, dims, use_scalar, &mut Stream::new(7, Purpose::AdapterInit, 3, sub_index(factor)))
    }

    #[test]
    fn the_bounds_are_those_of_kaiming_uniform() {
        for (factor, dims, fan_in) in [
            (Factor::W1, vec![80, 64], 64.0),
            (Factor::W1A, vec![400, 4], 4.0),
            (Factor::W2A, vec![400, 9], 9.0),
            (Factor::T2, vec![8, 8, 3, 3], 72.0),
        ] {
            let values = draw(factor, &dims, false);
            let bound = 1.0 / f32::sqrt(fan_in);
            let (max, mean) = (values.iter().fold(0f32, |m, v| m.max(v.abs())), values.iter().sum::<f32>() / values.len() as f32);
            // Of 576 draws or more the largest lies within 2 % of the bound but for once in 10^5 seeds.
            assert!(max <= bound && max > 0.98 * bound, "{factor:?}: {max} of {bound}");
            // Five standard errors of the mean of a uniform distribution.
            assert!(mean.abs() < 5.0 * bound / 3f32.sqrt() / (values.len() as f32).sqrt(), "{factor:?}: mean {mean}");
        }
    }

    #[test]
    fn what_starts_at_zero() {
        assert!(draw(Factor::W2, &[8, 8], false).iter().all(|&v| v == 0.0));
        assert!(draw(Factor::W2B, &[2, 8], false).iter().all(|&v| v == 0.0));
        assert!(draw(Factor::W2, &[8, 8], true).iter().all(|&v| v != 0.0));
        assert_ne!(draw(Factor::W1, &[8, 8], false), draw(Factor::W1A, &[8, 8], false));
    }
}
