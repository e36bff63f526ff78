//! How much of the forward pass is kept for the backward pass, and how much of it runs again (activation checkpointing).

use candle_core::Result;
use ops::Value;

/// Granularity of activation checkpointing. Gradients are the same to the last bit in all three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GradientCheckpointing {
    /// Every activation is kept.
    #[default]
    None,
    /// Each ResNet, transformer block and text encoder layer keeps its inputs only and runs again: the forward pass is
    /// computed twice (what sd-scripts and diffusers do).
    Block,
    /// While a block runs again, its layers (each attention, the feed-forward, each half of a ResNet) keep their inputs
    /// only and run a third time: the least memory.
    Layer,
}

impl GradientCheckpointing {
    /// All names that a recipe may use, in the order of the variants.
    pub const NAMES: &'static [&'static str] = &["none", "block", "layer"];

    /// The name in recipes.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    /// The variant of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::None, Self::Block, Self::Layer].into_iter().find(|g| g.name() == name)
    }

    /// Runs a block: a segment of its own unless nothing is recomputed.
    ///
    /// # Errors
    /// What `f` returns.
    pub fn block(self, inputs: &[&Value], f: impl Fn(&[Value]) -> Result<Value> + Send + 'static) -> Result<Value> {
        run(self != Self::None, inputs, f)
    }

    /// Runs a layer of a block: a segment inside the block's with [`GradientCheckpointing::Layer`].
    ///
    /// # Errors
    /// What `f` returns.
    pub fn layer(self, inputs: &[&Value], f: impl Fn(&[Value]) -> Result<Value> + Send + 'static) -> Result<Value> {
        run(self == Self::Layer, inputs, f)
    }
}

fn run(segment: bool, inputs: &[&Value], f: impl Fn(&[Value]) -> Result<Value> + Send + 'static) -> Result<Value> {
    if segment {
        return ops::checkpoint(inputs, f);
    }
    f(&inputs.iter().map(|&v| v.clone()).collect::<Vec<_>>())
}
