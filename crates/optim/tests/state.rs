//! The optimizer's state: export and import go on equal; each way to be wrong is told by name.

use std::borrow::Cow;

use optim::{Error, Hyper, Optimizer, OptimizerKind, StateDtype, StateTensor};

/// Under and over Lion8bit's limit, with a short last block.
const SIZES: [usize; 3] = [300, 5001, 4096];
const LR: f32 = 1e-3;

fn hyper() -> Hyper {
    Hyper { betas: (0.9, 0.95), weight_decay: 0.1, eps: 1e-8 }
}

fn new(kind: OptimizerKind) -> Optimizer {
    Optimizer::new(kind, hyper(), &SIZES)
}

fn grad(n: usize, step: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7 + step * 131) as f32 * 0.61).sin() * 10f32.powi(-((i % 5) as i32))).collect()
}

/// Steps the first two parameters; the third never has a gradient.
fn steps(optimizer: &mut Optimizer, params: &mut [Vec<f32>], steps: std::ops::Range<usize>) {
    for step in steps {
        for index in 0..2 {
            optimizer.step(index, &mut params[index], &grad(SIZES[index], step), LR);
        }
    }
}

fn start() -> Vec<Vec<f32>> {
    SIZES.iter().map(|&n| (0..n).map(|i| (i as f32 * 0.1).cos()).collect()).collect()
}

fn owned(state: Vec<StateTensor<'_>>) -> Vec<StateTensor<'static>> {
    state
        .into_iter()
        .map(|t| StateTensor { name: t.name, dtype: t.dtype, shape: t.shape, bytes: Cow::Owned(t.bytes.into_owned()) })
        .collect()
}

#[test]
fn a_saved_state_goes_on_equal() {
    for kind in OptimizerKind::ALL {
        let (mut whole, mut params) = (new(kind), start());
        steps(&mut whole, &mut params, 0..6);
        for stop in 0..6 {
            let (mut first, mut halfway) = (new(kind), start());
            steps(&mut first, &mut halfway, 0..stop);
            let mut second = new(kind);
            // What it held before is replaced.
            steps(&mut second, &mut start(), 0..2);
            second.load_state(first.state().unwrap()).unwrap();
            steps(&mut second, &mut halfway, stop..6);
            assert_eq!(halfway, params, "{} stopped at {stop}", kind.name());
            assert_eq!(second.state().unwrap(), whole.state().unwrap());
        }
    }
}

#[test]
fn a_parameter_without_gradient_has_no_state_and_no_decay() {
    for kind in OptimizerKind::ALL {
        let (mut optimizer, mut params) = (new(kind), start());
        assert!(optimizer.state().unwrap().is_empty());
        steps(&mut optimizer, &mut params, 0..2);
        assert_eq!(params[2], start()[2]);
        assert!(optimizer.state().unwrap().iter().all(|tensor| !tensor.name.starts_with("2.")));
    }
}

#[test]
fn state_that_is_made_late_counts_as_zero() {
    // A first step after others were stepped equals a first step at once.
    let (mut late, mut params) = (new(OptimizerKind::Lion8bit), start());
    steps(&mut late, &mut params, 0..3);
    let mut at_once = new(OptimizerKind::Lion8bit);
    let mut other = start();
    late.step(2, &mut params[2], &grad(SIZES[2], 9), LR);
    at_once.step(2, &mut other[2], &grad(SIZES[2], 9), LR);
    assert_eq!(params[2], other[2]);
}

#[test]
fn names_types_and_shapes_are_as_documented() {
    let layout = |kind| {
        let (mut optimizer, mut params) = (new(kind), start());
        steps(&mut optimizer, &mut params, 0..1);
        optimizer.state().unwrap().into_iter().map(|t| (t.name, t.dtype, t.shape, t.bytes.len())).collect::<Vec<_>>()
    };
    let f32s = |name: &str, n: usize| (name.to_string(), StateDtype::F32, vec![n], 4 * n);
    assert_eq!(layout(OptimizerKind::Lion), [f32s("0.state1", 300), f32s("1.state1", 5001)]);
    let codes = ("1.state1".to_string(), StateDtype::U8, vec![5001], 5001);
    assert_eq!(layout(OptimizerKind::Lion8bit), [f32s("0.state1", 300), codes, f32s("1.absmax1", 20)]);
    let adamw = layout(OptimizerKind::AdamW);
    assert_eq!(adamw[..2], [f32s("0.state1", 300), f32s("0.state2", 300)]);
    assert_eq!(adamw[2], ("0.step".to_string(), StateDtype::F32, vec![], 4));
    let bytes: Vec<usize> = OptimizerKind::ALL.map(|kind| new(kind).state_bytes()).to_vec();
    assert_eq!(bytes, [4 * 9397, 4 * 300 + 5001 + 4 * 20 + 4096 + 4 * 16, 8 * 9397]);
}

/// A good Lion8bit state, changed, must be refused, and the optimizer must be as before.
#[track_caller]
fn refused(kind: OptimizerKind, change: impl FnOnce(&mut Vec<StateTensor<'static>>)) -> Error {
    let (mut optimizer, mut params) = (new(kind), start());
    steps(&mut optimizer, &mut params, 0..2);
    let before = owned(optimizer.state().unwrap());
    let mut state = before.clone();
    change(&mut state);
    let error = optimizer.load_state(state).unwrap_err();
    assert_eq!(optimizer.state().unwrap(), before, "a refused state left traces");
    error
}

fn named<'a>(state: &'a mut [StateTensor<'static>], name: &str) -> &'a mut StateTensor<'static> {
    state.iter_mut().find(|tensor| tensor.name == name).unwrap()
}

#[test]
fn a_missing_tensor_is_told() {
    let error = refused(OptimizerKind::Lion8bit, |state| state.retain(|t| t.name != "1.absmax1"));
    assert_eq!(error.to_string(), "the optimizer state has no `1.absmax1`");
    assert!(error.hint().unwrap().contains("earlier"));
    let error = refused(OptimizerKind::Lion8bit, |state| state.retain(|t| t.name != "1.state1"));
    assert_eq!(error, Error::StateMissing { name: "1.state1".into() });
    let error = refused(OptimizerKind::AdamW, |state| state.retain(|t| t.name != "0.step"));
    assert_eq!(error, Error::StateMissing { name: "0.step".into() });
}

#[test]
fn a_wrong_shape_is_told() {
    let error = refused(OptimizerKind::Lion8bit, |state| named(state, "1.state1").shape = vec![5000]);
    assert_eq!(error.to_string(), "the optimizer state's `1.state1` has shape [5000]; its parameter wants [5001]");
    assert!(error.hint().is_some());
}

#[test]
fn a_wrong_type_is_told() {
    let error = refused(OptimizerKind::Lion8bit, |state| named(state, "1.state1").dtype = StateDtype::F32);
    assert_eq!(error.to_string(), "the optimizer state's `1.state1` is F32; U8 is wanted");
}

#[test]
fn wrong_bytes_are_told() {
    let error = refused(OptimizerKind::Lion, |state| named(state, "0.state1").bytes.to_mut().truncate(1199));
    assert_eq!(error.to_string(), "the optimizer state's `0.state1` has 1199 bytes; its shape wants 1200");
}

#[test]
fn a_tensor_without_a_place_is_told() {
    for stranger in ["3.state1", "00.state1", "state1", "0.state3", "-1.step"] {
        let error = refused(OptimizerKind::Lion8bit, |state| named(state, "0.state1").name = stranger.into());
        let text = format!("the optimizer state holds `{stranger}`, which Lion8bit with 3 parameters has no place for");
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn a_repeated_tensor_is_told() {
    let error = refused(OptimizerKind::Lion, |state| state.push(state[0].clone()));
    assert_eq!(error, Error::StateTwice { name: "0.state1".into() });
}

#[test]
fn a_state_of_another_optimizer_is_told() {
    let state_of = |kind| {
        let (mut optimizer, mut params) = (new(kind), start());
        steps(&mut optimizer, &mut params, 0..1);
        owned(optimizer.state().unwrap())
    };
    let load = |into, from| new(into).load_state(state_of(from)).unwrap_err();
    assert!(matches!(load(OptimizerKind::Lion8bit, OptimizerKind::Lion), Error::StateDtype { .. }));
    assert!(matches!(load(OptimizerKind::Lion, OptimizerKind::Lion8bit), Error::StateDtype { .. }));
    assert!(matches!(load(OptimizerKind::AdamW, OptimizerKind::Lion), Error::StateMissing { .. }));
    assert!(matches!(load(OptimizerKind::Lion, OptimizerKind::AdamW), Error::StateUnknown { .. }));
}

#[test]
fn a_step_count_that_is_none_is_told() {
    for steps in [-1.0f32, 0.5, f32::NAN, 3e7] {
        let error = refused(OptimizerKind::AdamW, |state| named(state, "1.step").bytes = Cow::Owned(steps.to_le_bytes().to_vec()));
        assert!(matches!(error, Error::StateValue { ref name, .. } if name == "1.step"), "{error}");
    }
}

#[test]
fn optimizers_are_known_by_sd_scripts_names_in_any_case() {
    for (name, kind) in [("Lion8bit", OptimizerKind::Lion8bit), ("lion8BIT", OptimizerKind::Lion8bit), ("adamw", OptimizerKind::AdamW)] {
        assert_eq!(name.parse::<OptimizerKind>().unwrap(), kind);
    }
    let error = "Lion8bits".parse::<OptimizerKind>().unwrap_err();
    assert_eq!(error.to_string(), "no optimizer is called `Lion8bits`");
    assert_eq!(error.hint().unwrap(), "did you mean `Lion8bit`? There are: Lion, Lion8bit, AdamW");
}

#[test]
fn numbers_out_of_range_are_told() {
    for kind in OptimizerKind::ALL {
        Hyper::defaults(kind).check().unwrap();
    }
    let good = hyper();
    for (bad, key) in [
        (Hyper { betas: (1.0, 0.9), ..good }, "betas"),
        (Hyper { betas: (0.9, -0.1), ..good }, "betas"),
        (Hyper { betas: (0.9, f64::NAN), ..good }, "betas"),
        (Hyper { weight_decay: -0.1, ..good }, "weight_decay"),
        (Hyper { eps: f64::INFINITY, ..good }, "eps"),
    ] {
        assert!(matches!(bad.check(), Err(Error::Range { key: found, .. }) if found == key), "{bad:?}");
    }
}
