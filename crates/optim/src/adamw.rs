//! AdamW ("Decoupled Weight Decay Regularization", Loshchilov and Hutter 2019, algorithm 2) with torch's order of
//! operations (`torch/optim/adamw.py`, without amsgrad): decay first, bias corrections in f64. For comparison with Lion.

use rayon::prelude::*;

use crate::parallel::PIECE;

/// The moments of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    /// Mean of the gradients.
    pub m: Vec<f32>,
    /// Mean of their squares.
    pub v: Vec<f32>,
    /// Steps taken, for the bias corrections.
    pub steps: u32,
}

/// The numbers of one step, in the arithmetic in which they are used.
#[derive(Clone, Copy)]
struct Rule {
    gradient1: f32,
    beta2: f32,
    gradient2: f32,
    decay: f32,
    step_size: f32,
    root_correction2: f32,
    eps: f32,
}

impl AdamW {
    /// The zero moments of a parameter with `size` elements.
    pub fn new(size: usize) -> Self {
        Self { m: vec![0.0; size], v: vec![0.0; size], steps: 0 }
    }

    /// One step over the parameter `p` with gradient `g`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn step(&mut self, betas: (f64, f64), eps: f64, weight_decay: f64, lr: f32, p: &mut [f32], g: &[f32]) {
        assert!(p.len() == g.len() && p.len() == self.m.len(), "parameter, gradient and moments differ in length");
        self.steps += 1;
        let lr = f64::from(lr);
        let correction = |beta: f64| 1.0 - beta.powi(self.steps as i32);
        let rule = Rule {
            gradient1: (1.0 - betas.0) as f32,
            beta2: betas.1 as f32,
            gradient2: (1.0 - betas.1) as f32,
            decay: (1.0 - lr * weight_decay) as f32,
            step_size: (lr / correction(betas.0)) as f32,
            root_correction2: correction(betas.1).sqrt() as f32,
            eps: eps as f32,
        };
        (p.par_chunks_mut(PIECE), g.par_chunks(PIECE), self.m.par_chunks_mut(PIECE), self.v.par_chunks_mut(PIECE))
            .into_par_iter()
            .for_each(|(p, g, m, v)| rule.piece(p, g, m, v));
    }
}

impl Rule {
    fn piece(&self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *m += self.gradient1 * (g - *m);
            *v = self.beta2 * *v + self.gradient2 * g * g;
            *p = *p * self.decay - self.step_size * *m / (v.sqrt() / self.root_correction2 + self.eps);
        }
    }
}

/// Algorithm 2 of the paper in f64, element by element: the measure for [`AdamW::step`]. `t` counts from 1.
#[allow(clippy::too_many_arguments)]
pub fn reference(betas: (f64, f64), eps: f64, weight_decay: f64, lr: f64, t: i32, p: &mut [f64], g: &[f64], m: &mut [f64], v: &mut [f64]) {
    for i in 0..p.len() {
        m[i] = betas.0 * m[i] + (1.0 - betas.0) * g[i];
        v[i] = betas.1 * v[i] + (1.0 - betas.1) * g[i] * g[i];
        let (m_hat, v_hat) = (m[i] / (1.0 - betas.0.powi(t)), v[i] / (1.0 - betas.1.powi(t)));
        p[i] -= lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * p[i]);
    }
}
