//! Activation checkpointing: a segment keeps its inputs only and runs again in the backward pass
//! (Chen et al. 2016, "Training deep nets with sublinear memory cost").

use crate::tape::{Value, backward_from, no_grad, recording, segment};
use candle_core::Result;

/// Runs `f` on `inputs` without recording its inside; the backward pass runs `f` again and differentiates it then.
/// Parameters inside `f` get their gradients too. Gradients equal those without checkpointing bit for bit, because
/// the same ops run in the same order and the inputs' gradients are summed in the same order.
///
/// # Errors
/// What `f` returns, now or when it runs again.
pub fn checkpoint(inputs: &[&Value], f: impl Fn(&[Value]) -> Result<Value> + Send + 'static) -> Result<Value> {
    let detached: Vec<Value> = inputs.iter().map(|v| v.detach()).collect();
    let output = no_grad(|| f(&detached))?.tensor().clone();
    if !recording() {
        return Ok(Value::constant(output));
    }
    let needs: Vec<bool> = inputs.iter().map(|v| v.requires_grad()).collect();
    Ok(segment(inputs, output, move |grad, so_far, on_gradient| {
        let (mut slots, mut leaves, mut seeds) = (Vec::new(), Vec::new(), Vec::new());
        for ((value, need), so_far) in detached.into_iter().zip(needs).zip(so_far) {
            if !need {
                leaves.push(value);
                slots.push(None);
                continue;
            }
            let (leaf, slot) = Value::leaf(value.tensor().clone());
            seeds.extend(so_far.map(|g| (leaf.clone(), g)));
            leaves.push(leaf);
            slots.push(Some(slot));
        }
        let output = f(&leaves)?;
        drop(leaves);
        backward_from(vec![(output, grad.clone())], seeds, on_gradient)?;
        Ok(slots.into_iter().map(|s| s.and_then(|s| s.lock().ok().and_then(|mut g| g.take()))).collect())
    }))
}
