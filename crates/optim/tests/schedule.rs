//! Schedules by values computed by hand, their borders, and the messages.

use optim::{Error, Schedule, ScheduleKind, ScheduleOptions};
use proptest::prelude::*;

fn schedule(kind: ScheduleKind, options: ScheduleOptions) -> Schedule {
    Schedule::new(kind, options).unwrap()
}

/// Ten steps of warmup, 110 in all: progress is (step - 10) / 100.
fn options() -> ScheduleOptions {
    ScheduleOptions { warmup_steps: 10, total_steps: 110, ..ScheduleOptions::default() }
}

#[track_caller]
fn is(schedule: Schedule, values: &[(u64, f64)]) {
    for &(step, wanted) in values {
        let found = schedule.factor(step);
        assert!((found - wanted).abs() < 1e-12, "step {step}: {found}, by hand {wanted}");
    }
}

const HALF_SQRT2: f64 = std::f64::consts::FRAC_1_SQRT_2;

#[test]
fn constant_is_one() {
    is(schedule(ScheduleKind::Constant, ScheduleOptions { warmup_steps: 0, ..options() }), &[(0, 1.0), (5, 1.0), (1000, 1.0)]);
}

#[test]
fn constant_with_warmup_rises_and_stays() {
    is(schedule(ScheduleKind::ConstantWithWarmup, options()), &[(0, 0.0), (1, 0.1), (9, 0.9), (10, 1.0), (500, 1.0)]);
    is(schedule(ScheduleKind::ConstantWithWarmup, ScheduleOptions { warmup_steps: 0, ..options() }), &[(0, 1.0)]);
}

#[test]
fn linear_falls_to_zero() {
    is(schedule(ScheduleKind::Linear, options()), &[(5, 0.5), (10, 1.0), (35, 0.75), (109, 0.01), (110, 0.0), (111, 0.0)]);
}

#[test]
fn cosine_is_half_a_wave() {
    let quarter = (1.0 + HALF_SQRT2) / 2.0;
    is(schedule(ScheduleKind::Cosine, options()), &[(5, 0.5), (10, 1.0), (35, quarter), (60, 0.5), (85, 1.0 - quarter), (110, 0.0)]);
}

#[test]
fn cosine_with_restarts_starts_again() {
    let twice = ScheduleOptions { num_cycles: 2.0, ..options() };
    is(schedule(ScheduleKind::CosineWithRestarts, twice), &[(10, 1.0), (35, 0.5), (60, 1.0), (85, 0.5), (110, 0.0), (200, 0.0)]);
    is(schedule(ScheduleKind::CosineWithRestarts, options()), &[(10, 1.0), (60, 0.5), (110, 0.0)]);
}

#[test]
fn polynomial_ends_at_1e_7_of_the_global_rate() {
    let end = 1e-7 / 1e-5;
    let options = ScheduleOptions { learning_rate: 1e-5, power: 2.0, ..options() };
    is(schedule(ScheduleKind::Polynomial, options), &[(5, 0.5), (10, 1.0), (60, 0.99 * 0.25 + 0.01), (110, end), (111, end)]);
    let linear = ScheduleOptions { power: 1.0, ..options };
    is(schedule(ScheduleKind::Polynomial, linear), &[(35, 0.99 * 0.75 + 0.01)]);
}

#[test]
fn cosine_with_min_lr_stops_at_its_ratio() {
    let options = ScheduleOptions { min_lr_ratio: 0.2, ..options() };
    is(schedule(ScheduleKind::CosineWithMinLr, options), &[(5, 0.5), (10, 1.0), (60, 0.6), (110, 0.2)]);
    let twice = ScheduleOptions { num_cycles: 2.0, ..options };
    is(schedule(ScheduleKind::CosineWithMinLr, twice), &[(10, 1.0), (35, 0.6), (60, 0.2), (110, 1.0)]);
}

#[test]
fn inverse_sqrt_counts_in_its_timescale() {
    // By default the unit is the warmup: 1 / sqrt(step / 10).
    is(schedule(ScheduleKind::InverseSqrt, options()), &[(5, 0.5), (10, 1.0), (40, 0.5), (90, 1.0 / 3.0)]);
    let given = ScheduleOptions { timescale: Some(100), ..options() };
    is(schedule(ScheduleKind::InverseSqrt, given), &[(10, 1.0), (310, 0.5)]);
    let bare = ScheduleOptions { warmup_steps: 0, ..options() };
    is(schedule(ScheduleKind::InverseSqrt, bare), &[(0, 1.0), (30_000, 0.5)]);
}

#[test]
fn a_run_that_is_all_warmup_ends_cleanly() {
    for kind in ScheduleKind::ALL.into_iter().filter(|&kind| kind != ScheduleKind::Constant) {
        for (warmup_steps, total_steps) in [(10, 10), (10, 5), (0, 0), (1, 1)] {
            let schedule = schedule(kind, ScheduleOptions { warmup_steps, total_steps, ..options() });
            for step in 0..20 {
                let factor = schedule.factor(step);
                assert!((0.0..=1.0).contains(&factor), "{} {warmup_steps}/{total_steps} step {step}: {factor}", kind.name());
            }
        }
    }
}

#[test]
fn names_are_those_of_sd_scripts() {
    for kind in ScheduleKind::ALL {
        assert_eq!(kind.name().parse::<ScheduleKind>().unwrap(), kind);
    }
}

#[test]
fn an_unknown_name_is_told_with_the_nearest() {
    let error = "cosine_with_restart".parse::<ScheduleKind>().unwrap_err();
    assert_eq!(error.to_string(), "no learning-rate schedule is called `cosine_with_restart`");
    assert!(error.hint().unwrap().starts_with("did you mean `cosine_with_restarts`?"), "{:?}", error.hint());
    let error = "Constant-With-Warmup".parse::<ScheduleKind>().unwrap_err();
    assert!(error.hint().unwrap().starts_with("did you mean `constant_with_warmup`?"), "{:?}", error.hint());
    let error = "zzz".parse::<ScheduleKind>().unwrap_err();
    assert!(error.hint().unwrap().starts_with("there are: constant, "), "{:?}", error.hint());
}

#[test]
fn warmup_with_constant_is_refused() {
    let error = Schedule::new(ScheduleKind::Constant, options()).unwrap_err();
    assert_eq!(error.to_string(), "`lr_scheduler = \"constant\"` has no warmup, but `lr_warmup_steps` is 10");
    assert!(error.hint().unwrap().contains("constant_with_warmup"));
}

#[test]
fn options_outside_their_range_are_refused() {
    use ScheduleKind::*;
    let o = options();
    for (kind, options, key) in [
        (CosineWithRestarts, ScheduleOptions { num_cycles: 0.0, ..o }, "lr_scheduler_num_cycles"),
        (CosineWithMinLr, ScheduleOptions { num_cycles: f64::NAN, ..o }, "lr_scheduler_num_cycles"),
        (CosineWithMinLr, ScheduleOptions { min_lr_ratio: 1.5, ..o }, "lr_scheduler_min_lr_ratio"),
        (Polynomial, ScheduleOptions { power: -1.0, ..o }, "lr_scheduler_power"),
        (Polynomial, ScheduleOptions { learning_rate: 1e-7, ..o }, "learning_rate"),
        (InverseSqrt, ScheduleOptions { timescale: Some(0), ..o }, "lr_scheduler_timescale"),
    ] {
        match Schedule::new(kind, options) {
            Err(Error::Range { key: found, .. }) => assert_eq!(found, key),
            other => panic!("{}: {other:?}", kind.name()),
        }
        // An option that the curve does not use is not looked at.
        assert!(Schedule::new(Linear, options).is_ok());
    }
}

proptest! {
    /// Every factor lies in 0..=1 within the run; warmup is a straight line; the falling curves fall.
    #[test]
    fn factors_stay_in_bounds(index in 0usize..8, warmup in 0u64..50, rest in 1u64..500) {
        let kind = ScheduleKind::ALL[index];
        let warmup = if kind == ScheduleKind::Constant { 0 } else { warmup };
        let s = schedule(kind, ScheduleOptions { warmup_steps: warmup, total_steps: warmup + rest, min_lr_ratio: 0.1, ..options() });
        let factors: Vec<f64> = (0..=warmup + rest).map(|step| s.factor(step)).collect();
        prop_assert!(factors.iter().all(|f| (0.0..=1.0 + 1e-12).contains(f)));
        for (step, factor) in factors.iter().enumerate().take(warmup as usize) {
            prop_assert_eq!(*factor, step as f64 / warmup as f64);
        }
        prop_assert!(factors[warmup as usize..].windows(2).all(|pair| pair[1] <= pair[0] + 1e-12));
    }
}
