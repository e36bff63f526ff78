//! AdamW against torch and against the paper's algorithm in f64.

// The numbers stand as torch prints them.
#![allow(clippy::excessive_precision)]

use optim::adamw::{self, AdamW};
use proptest::prelude::*;

/// Recorded from torch 2.15.0 (CPU):
/// ```python
/// p = torch.tensor([1.0, -2.0, 0.5, 0.0], requires_grad=True)
/// opt = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, foreach=False)
/// for g in GRADS:
///     p.grad = torch.tensor(g); opt.step(); print(p)
/// print(opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"])
/// ```
#[test]
fn five_steps_equal_torch() {
    const GRADS: [[f32; 4]; 5] =
        [[0.3, -0.2, 1e-4, 0.0], [-0.1, -0.7, 2e-4, 1.0], [0.25, 0.0, -3e-4, -0.5], [1.5, 0.125, 0.0, 0.25], [-0.6, 0.3, 1e-4, 0.0]];
    const P: [[f32; 4]; 5] = [
        [0.989899993, -1.98979998, 0.489950985, 0.0],
        [0.985798776, -1.98060572, 0.480250776, -0.00744136795],
        [0.979310095, -1.97345424, 0.480868697, -0.00972702727],
        [0.972242475, -1.96862781, 0.481366098, -0.0128229363],
        [0.968617082, -1.96686184, 0.480353415, -0.0154392254],
    ];
    const M: [f32; 4] = [0.107642993, -0.022901997, 6.84099814e-06, 0.0549000017];
    const V: [f32; 4] = [0.00276973564, 0.000633981079, 1.49660284e-10, 0.00130894082];
    let (mut p, mut state) = ([1.0, -2.0, 0.5, 0.0], AdamW::new(4));
    for (g, wanted) in GRADS.iter().zip(P) {
        state.step((0.9, 0.999), 1e-8, 0.01, 1e-2, &mut p, g);
        close(&p, &wanted);
    }
    close(&state.m, &M);
    close(&state.v, &V);
    assert_eq!(state.steps, 5);
}

/// 4 units in the last place: torch may fuse a multiply and an add.
fn close(found: &[f32], wanted: &[f32]) {
    for (a, b) in found.iter().zip(wanted) {
        assert!((a - b).abs() <= 4.0 * f32::EPSILON * b.abs(), "{found:?}, torch has {wanted:?}");
    }
}

proptest! {
    #[test]
    fn steps_follow_the_paper(p0 in prop::collection::vec(-2.0f32..2.0, 1..40), steps in 1usize..12, seed in any::<u32>()) {
        let n = p0.len();
        let (betas, eps, wd, lr) = ((0.9, 0.99), 1e-6, 0.1, 1e-3f32);
        let mut p = p0.clone();
        let mut state = AdamW::new(n);
        let mut q: Vec<f64> = p0.iter().map(|&x| x.into()).collect();
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        for t in 1..=steps {
            let g: Vec<f32> = (0..n).map(|i| (((i + 1) * t) as f32 * 0.37 + seed as f32 * 1e-9).sin()).collect();
            let g64: Vec<f64> = g.iter().map(|&x| x.into()).collect();
            state.step(betas, eps, wd, lr, &mut p, &g);
            adamw::reference(betas, eps, wd, f64::from(lr), t as i32, &mut q, &g64, &mut m, &mut v);
        }
        for (a, b) in p.iter().zip(&q) {
            // f32 rounding of parameters up to 2 (1.2e-7 each step), and of an update that is 1e-3 at most.
            prop_assert!((f64::from(*a) - b).abs() <= 2.5e-7 * steps as f64, "{a} against {b}");
        }
    }
}
