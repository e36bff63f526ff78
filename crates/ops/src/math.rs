//! Elementary functions in f32 that the compiler can vectorise, and loops compiled for the CPU that runs them.

/// Runs `f` compiled for the widest vectors this CPU has. What `f` calls must be `#[inline(always)]`.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// e^x; relative error under 2e-7, 0 or infinity never reached (clamped to [-87.3, 88.7]).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Cody and Waite's reduction: x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts.
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.7);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * LN2_HI - n * LN2_LO;
    let p = 1.0 / 720.0 + r * (1.0 / 5040.0);
    let p = 1.0 / 120.0 + r * p;
    let p = 1.0 / 24.0 + r * p;
    let p = 1.0 / 6.0 + r * p;
    let p = 0.5 + r * p;
    let p = 1.0 + r * (1.0 + r * p);
    // 2^n in two factors, so that n = 128 does not overflow.
    let half = (n as i32) >> 1;
    let rest = n as i32 - half;
    p * f32::from_bits(((half + 127) << 23) as u32) * f32::from_bits(((rest + 127) << 23) as u32)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function; absolute error under 2e-7 (Abramowitz and Stegun, 7.1.26).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4))));
    let y = 1.0 - p * exp(-a * a);
    y.copysign(x)
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
    }

    #[test]
    fn erf_equals_tabled_values() {
        // Abramowitz and Stegun, table 7.1.
        for (x, want) in [(0.0, 0.0), (0.1, 0.112_462_916), (0.5, 0.520_499_878), (1.0, 0.842_700_793), (2.0, 0.995_322_265)] {
            assert!((erf(x) as f64 - want).abs() < 2e-7 && (erf(-x) as f64 + want).abs() < 2e-7, "{x}");
        }
    }

    #[test]
    fn sigmoid_has_the_right_ends() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert!(sigmoid(100.0) == 1.0 && sigmoid(-100.0) < 1e-30);
    }
}
