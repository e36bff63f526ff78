//! The global norm, the clip factor, and the loss scaler's life.

use optim::{Error, LossScaler, ScalerConfig, ScalerState, clip};
use proptest::prelude::*;

#[test]
fn the_norm_goes_over_all_slices() {
    assert_eq!(clip::global_norm(&[&[3.0], &[], &[0.0, -4.0]]), 5.0);
    assert_eq!(clip::global_norm(&[]), 0.0);
    // 12 * 2^2 + 52 * 1 = 100
    assert_eq!(clip::global_norm(&[&[2.0; 12], &[1.0; 52]]), 10.0);
}

#[test]
fn the_norm_does_not_depend_on_the_number_of_threads() {
    let a: Vec<f32> = (0..200_003).map(|i| (i as f32 * 0.37).sin()).collect();
    let b: Vec<f32> = (0..77).map(|i| 1e3 / (i + 1) as f32).collect();
    let norm = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| clip::global_norm(&[&a, &b, &a[5..40_000]])).to_bits()
    };
    assert!([2, 3, 5, 8].iter().all(|&threads| norm(threads) == norm(1)));
}

#[test]
fn the_norm_is_finite_exactly_for_finite_gradients() {
    assert!(clip::global_norm(&[&[f32::MAX; 1000]]).is_finite());
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let mut slice = vec![1.0; 50_000];
        slice[40_001] = bad;
        let norm = clip::global_norm(&[&[1.0], &slice]);
        assert!(!norm.is_finite());
        assert!(clip::clip_factor(norm, 1.0).is_nan());
    }
}

#[test]
fn the_factor_never_enlarges_and_zero_switches_off() {
    assert_eq!(clip::clip_factor(0.5, 1.0), 1.0);
    assert_eq!(clip::clip_factor(4.0, 1.0), (1.0 / 4.000001) as f32);
    assert_eq!(clip::clip_factor(0.0, 1.0), 1.0);
    assert_eq!(clip::clip_factor(4.0, 0.0), 1.0);
}

#[test]
fn scaling_touches_every_element() {
    let mut x: Vec<f32> = (0..40_000).map(|i| i as f32).collect();
    clip::scale(&mut x, 0.5);
    assert!(x.iter().enumerate().all(|(i, &v)| v == i as f32 * 0.5));
    let mut nan = [f32::NAN];
    clip::scale(&mut nan, 1.0);
    assert!(nan[0].is_nan());
}

proptest! {
    #[test]
    fn the_norm_equals_its_definition(slices in prop::collection::vec(prop::collection::vec(-1e3f32..1e3, 0..300), 0..6)) {
        let slices: Vec<&[f32]> = slices.iter().map(Vec::as_slice).collect();
        let (fast, plain) = (clip::global_norm(&slices), clip::reference(&slices));
        // Two orders of summing at most 1800 positive f64.
        prop_assert!((fast - plain).abs() <= 1e-12 * plain);
    }

    #[test]
    fn clipped_gradients_have_at_most_the_norm(mut g in prop::collection::vec(-10.0f32..10.0, 1..200), max in 0.01f64..20.0) {
        let before = clip::global_norm(&[&g]);
        clip::scale(&mut g, clip::clip_factor(before, max));
        let after = clip::global_norm(&[&g]);
        // Each product is rounded to f32.
        prop_assert!(after <= max.min(before) * (1.0 + 1e-6));
        prop_assert!(before <= max || after >= max * (1.0 - 1e-6) - 1e-4 * max / before);
    }
}

fn scaler(growth_interval: u32, max_consecutive_skips: u32) -> LossScaler {
    LossScaler::new(ScalerConfig { growth_interval, max_consecutive_skips, ..ScalerConfig::default() })
}

#[test]
fn the_defaults_are_torchs() {
    let mut scaler = LossScaler::new(ScalerConfig::default());
    assert_eq!(scaler.scale(), 65536.0);
    assert_eq!(scaler.unscale_factor(), 1.0 / 65536.0);
    (0..1999).for_each(|_| scaler.update(false).unwrap());
    assert_eq!(scaler.scale(), 65536.0);
    scaler.update(false).unwrap();
    assert_eq!(scaler.scale(), 131072.0);
    scaler.update(true).unwrap();
    assert_eq!(scaler.scale(), 65536.0);
}

#[test]
fn an_overflow_resets_the_growth_counter() {
    let mut scaler = scaler(3, 10);
    for overflowed in [false, false, true, false, false] {
        scaler.update(overflowed).unwrap();
    }
    assert_eq!(scaler.state(), ScalerState { scale: 32768.0, good_steps: 2, consecutive_skips: 0, total_skips: 1 });
    scaler.update(false).unwrap();
    assert_eq!(scaler.scale(), 65536.0);
}

#[test]
fn too_many_skips_in_a_row_end_the_run() {
    let mut scaler = scaler(2000, 3);
    for overflowed in [true, true, true, false, true, true, true] {
        scaler.update(overflowed).unwrap();
    }
    let error = scaler.update(true).unwrap_err();
    assert_eq!(error.to_string(), "gradients overflowed in 4 steps in a row; the loss scale is down to 512");
    assert!(error.hint().unwrap().contains("learning rate"));
    assert_eq!(scaler.state().total_skips, 7);
}

#[test]
fn the_scale_stays_a_positive_number() {
    let mut down = scaler(1, u32::MAX);
    (0..300).for_each(|_| down.update(true).unwrap());
    assert!(down.scale() > 0.0 && down.unscale_factor().is_finite());
    let mut up = scaler(1, 0);
    (0..300).for_each(|_| up.update(false).unwrap());
    assert!(up.scale().is_finite() && up.unscale_factor() > 0.0);
}

#[test]
fn a_disabled_scaler_counts_and_leaves_the_loss() {
    let mut scaler = LossScaler::disabled();
    (0..5000).for_each(|_| scaler.update(false).unwrap());
    scaler.update(true).unwrap();
    assert_eq!((scaler.scale(), scaler.state().total_skips), (1.0, 1));
    (0..49).for_each(|_| scaler.update(true).unwrap());
    assert!(matches!(scaler.update(true), Err(Error::TooManySkips { skips: 51, .. })));
}

#[test]
fn a_saved_state_goes_on_equal() {
    let pattern = |i: u32| i % 7 == 3;
    let mut whole = scaler(4, 10);
    (0..40).for_each(|i| whole.update(pattern(i)).unwrap());
    for stop in 0..40 {
        let mut first = scaler(4, 10);
        (0..stop).for_each(|i| first.update(pattern(i)).unwrap());
        let text = serde_json::to_string(&first.state()).unwrap();
        let mut second = scaler(4, 10);
        second.load_state(serde_json::from_str(&text).unwrap()).unwrap();
        (stop..40).for_each(|i| second.update(pattern(i)).unwrap());
        assert_eq!(second.state(), whole.state(), "stopped at {stop}");
    }
}

#[test]
fn a_saved_scale_that_is_no_number_is_refused() {
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let mut scaler = scaler(4, 10);
        let state = ScalerState { scale, ..scaler.state() };
        assert!(matches!(scaler.load_state(state), Err(Error::StateValue { .. })));
        assert_eq!(scaler.scale(), 65536.0);
    }
}
