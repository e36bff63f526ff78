//! Lion: the sign of an interpolated momentum ("Symbolic Discovery of Optimization Algorithms", Chen et al. 2023, program
//! 1), with decoupled weight decay, f32 state. Equal to lion_pytorch 0.2.5 and to bitsandbytes >= 0.50 with f32 state;
//! older bitsandbytes added the decay of f32-state tensors to the gradient instead.

use rayon::prelude::*;

use crate::parallel::PIECE;

/// The numbers of one step, in the arithmetic in which they are used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LionRule {
    /// Weight of the momentum in the update's sign.
    pub beta1: f32,
    /// Weight of the momentum in the next momentum.
    pub beta2: f32,
    /// Weight of the gradient in the update's sign, 1 - `beta1`.
    pub gradient1: f32,
    /// Weight of the gradient in the next momentum, 1 - `beta2`.
    pub gradient2: f32,
    /// Learning rate.
    pub lr: f32,
    /// What a parameter is multiplied by before the update, 1 - lr * weight_decay.
    pub decay: f32,
}

impl LionRule {
    /// The rule for betas, weight decay and learning rate.
    pub fn new(betas: (f64, f64), weight_decay: f64, lr: f32) -> Self {
        let (beta1, beta2) = (betas.0 as f32, betas.1 as f32);
        Self { beta1, beta2, gradient1: 1.0 - beta1, gradient2: 1.0 - beta2, lr, decay: 1.0 - lr * weight_decay as f32 }
    }

    /// One element: the parameter and the momentum after the step.
    #[inline(always)]
    pub(crate) fn element(&self, p: f32, g: f32, m: f32) -> (f32, f32) {
        let update = self.beta1 * m + self.gradient1 * g;
        // Two selections and a subtraction: this form becomes masks on whole vectors.
        let (up, down) = (if update > 0.0 { 1.0 } else { 0.0 }, if update < 0.0 { 1.0 } else { 0.0 });
        (p * self.decay - self.lr * (up - down), self.beta2 * m + self.gradient2 * g)
    }
}

/// One step over a parameter `p` with gradient `g` and momentum `m`, all of one length.
///
/// # Panics
/// If the lengths differ.
pub fn step(rule: &LionRule, p: &mut [f32], g: &[f32], m: &mut [f32]) {
    assert!(p.len() == g.len() && p.len() == m.len(), "parameter, gradient and momentum differ in length");
    if p.len() <= PIECE {
        return piece(rule, p, g, m);
    }
    (p.par_chunks_mut(PIECE), g.par_chunks(PIECE), m.par_chunks_mut(PIECE)).into_par_iter().for_each(|(p, g, m)| piece(rule, p, g, m));
}

fn piece(rule: &LionRule, p: &mut [f32], g: &[f32], m: &mut [f32]) {
    for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
        (*p, *m) = rule.element(*p, *g, *m);
    }
}

/// The rule as the paper writes it, element by element: the measure for [`step`].
pub fn reference(rule: &LionRule, p: &mut [f32], g: &[f32], m: &mut [f32]) {
    for i in 0..p.len() {
        let update = rule.beta1 * m[i] + rule.gradient1 * g[i];
        let sign = if update > 0.0 {
            1.0
        } else if update < 0.0 {
            -1.0
        } else {
            0.0
        };
        p[i] *= rule.decay;
        p[i] -= rule.lr * sign;
        m[i] = rule.beta2 * m[i] + rule.gradient2 * g[i];
    }
}
