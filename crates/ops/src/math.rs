//! Elementary functions in f32 that the compiler can vectorise, and loops compiled for the CPU that runs them.

/// Runs `f` compiled for the widest vectors that are used. What `f` calls must be `#[inline(always)]`.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    crate::capability::arch().dispatch(f)
}

/// The sum of 16 lanes, halved again and again: one after the other would wait for each.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: &[f32; 16]) -> f32 {
    let mut lanes = *lanes;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// e^x; relative error under 2e-7, 0 or infinity never reached (clamped to [-87.3, 88.7]).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let (p, n) = exp_parts(if x > 88.7 { 88.7 } else { x });
    // 2^n in two factors, so that n = 128 does not overflow.
    let half = n >> 1;
    let rest = n - half;
    p * f32::from_bits(((half + 127) << 23) as u32) * f32::from_bits(((rest + 127) << 23) as u32)
}

/// [`exp`] of numbers up to 87, the same to the last bit: for scores less their row's largest.
#[inline(always)]
pub(crate) fn exp_to_87(x: f32) -> f32 {
    let (p, n) = exp_parts(x);
    p * f32::from_bits(((n + 127) << 23) as u32)
}

/// p and n so that e^x = 2^n p, for x up to 88.7; what lies below -87.3 counts as that.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, i32) {
    // Cody and Waite's reduction: x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts.
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    // Comparisons rather than `clamp`: one instruction each, and NaN stays NaN.
    let x = if x < -87.3 { -87.3 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HI - n * LN2_LO;
    let p = 1.0 / 720.0 + r * (1.0 / 5040.0);
    let p = 1.0 / 120.0 + r * p;
    let p = 1.0 / 24.0 + r * p;
    let p = 1.0 / 6.0 + r * p;
    let p = 0.5 + r * p;
    let p = 1.0 + r * (1.0 + r * p);
    // The sum's last bits are n.
    (p, shifted.to_bits() as i32 - ROUND.to_bits() as i32)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function; absolute and relative error under 4e-7. A rational minimax approximation on [-4, 4] with
/// the coefficients that Eigen publishes (`MathFunctionsImpl.h`, `generic_fast_erf_float`); outside it is 1 in f32.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let z = x * x;
    let p = -2.726_142_3e-10;
    let p = 2.770_681_4e-8 + z * p;
    let p = -2.101_024e-6 + z * p;
    let p = -5.692_506_4e-5 + z * p;
    let p = -7.349_906e-4 + z * p;
    let p = -2.954_6e-3 + z * p;
    let p = -1.609_603_3e-2 + z * p;
    let q = -1.456_607_2e-5;
    let q = -2.133_740_6e-4 + z * q;
    let q = -1.682_827e-3 + z * q;
    let q = -7.373_329e-3 + z * q;
    let q = -1.426_473_9e-2 + z * q;
    x * p / q
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_its_range() {
        let mut worst = 0f64;
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let want = (x as f64).exp();
            worst = worst.max(((exp(x) as f64 - want) / want).abs());
        }
        assert!(worst < 2e-7, "{worst}");
        assert!(exp(-1000.0) < 2e-38 && exp(1000.0) > 1e38);
        for i in -100_000..=87_000 {
            let x = i as f32 / 1000.0;
            assert_eq!(exp(x).to_bits(), exp_to_87(x).to_bits(), "{x}");
        }
        assert!(exp(f32::NAN).is_nan() && exp_to_87(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_close_everywhere() {
        for i in -6_000..=6_000 {
            let x = i as f32 / 1000.0;
            let (got, want) = (erf(x) as f64, libm::erf(x as f64));
            assert!((got - want).abs() <= 4e-7 * want.abs(), "{x}: {got} against {want}");
        }
    }

    #[test]
    fn sigmoid_has_the_right_ends() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert!(sigmoid(100.0) == 1.0 && sigmoid(-100.0) < 1e-30);
    }
}
