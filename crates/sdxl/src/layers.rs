//! The layers that hold weights, and where an adapter attaches to them.
//!
//! A layer's weight is frozen: a plain tensor, or mapped from the file. An [`Adapter`] sits in the layer's slot and takes over its forward
//! pass; without one the layer runs as published.

use std::sync::{Arc, RwLock};

use candle_core::{DType, Result, Tensor};
use ops::{Value, Weight};

/// What replaces a layer's forward pass. The adapter's crate implements it for LoKr and for trained norms.
pub trait Adapter: Send + Sync {
    /// Forward of a linear layer: `x (.., in)`, `weight (out, in)`, `bias (out)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn linear(&self, x: &Value, weight: &Weight, bias: Option<&Tensor>) -> Result<Value>;

    /// Forward of a convolution: `x (n, c, h, w)`, `weight (o, c, kh, kw)`, `bias (o)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn conv2d(&self, x: &Value, weight: &Weight, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Value>;

    /// The weight and bias that a norm uses in place of its own, both `(c)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn norm(&self, weight: &Tensor, bias: &Tensor) -> Result<(Value, Value)>;
}

/// The place of an adapter in a layer.
#[derive(Default)]
struct Slot(RwLock<Option<Arc<dyn Adapter>>>);

impl Slot {
    fn get(&self) -> Option<Arc<dyn Adapter>> {
        self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    fn set(&self, adapter: Option<Arc<dyn Adapter>>) {
        *self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = adapter;
    }
}

macro_rules! attachable {
    ($layer:ident) => {
        impl $layer {
            /// Puts an adapter in place; one that was there is replaced.
            pub fn attach(&self, adapter: Arc<dyn Adapter>) {
                self.adapter.set(Some(adapter));
            }

            /// Takes the adapter away: the layer is the base model's again.
            pub fn detach(&self) {
                self.adapter.set(None);
            }
        }
    };
}

/// A linear layer, weight `(out, in)`.
pub struct Linear {
    /// Frozen weight `(out, in)`.
    pub weight: Weight,
    /// Frozen bias `(out)`.
    pub bias: Option<Tensor>,
    adapter: Slot,
}

impl Linear {
    /// A layer without adapter.
    pub fn new(weight: impl Into<Weight>, bias: Option<Tensor>) -> Self {
        Self { weight: weight.into(), bias, adapter: Slot::default() }
    }

    /// `x (.., in)` to `(.., out)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Value) -> Result<Value> {
        match self.adapter.get() {
            Some(adapter) => adapter.linear(x, &self.weight, self.bias.as_ref()),
            None => ops::linear(x, &self.weight, self.bias.as_ref()),
        }
    }
}
attachable!(Linear);

/// A 2-d convolution, weight `(o, c, kh, kw)`.
pub struct Conv2d {
    /// Frozen weight `(o, c, kh, kw)`.
    pub weight: Weight,
    /// Frozen bias `(o)`.
    pub bias: Option<Tensor>,
    /// Step in pixels, both axes.
    pub stride: usize,
    /// Zeros on each side, both axes.
    pub padding: usize,
    adapter: Slot,
}

impl Conv2d {
    /// A layer without adapter.
    pub fn new(weight: impl Into<Weight>, bias: Option<Tensor>, stride: usize, padding: usize) -> Self {
        Self { weight: weight.into(), bias, stride, padding, adapter: Slot::default() }
    }

    /// `x (n, c, h, w)` to `(n, o, oh, ow)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Value) -> Result<Value> {
        match self.adapter.get() {
            Some(adapter) => adapter.conv2d(x, &self.weight, self.bias.as_ref(), self.stride, self.padding),
            None => ops::conv2d(x, &self.weight, self.bias.as_ref(), self.stride, self.padding),
        }
    }
}
attachable!(Conv2d);

/// Weight and bias of a group norm or layer norm over `c` channels, kept in f32.
pub struct Norm {
    /// Frozen weight `(c)`.
    pub weight: Tensor,
    /// Frozen bias `(c)`.
    pub bias: Tensor,
    /// Added to the variance.
    pub eps: f64,
    /// Groups of channels; `None` for a layer norm.
    pub groups: Option<usize>,
    adapter: Slot,
}

impl Norm {
    /// A layer without adapter.
    ///
    /// # Errors
    /// If the tensors cannot be widened to f32.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64, groups: Option<usize>) -> Result<Self> {
        Ok(Self { weight: weight.to_dtype(DType::F32)?, bias: bias.to_dtype(DType::F32)?, eps, groups, adapter: Slot::default() })
    }

    fn run(&self, x: &Value, silu: bool) -> Result<Value> {
        let (weight, bias) = match self.adapter.get() {
            Some(adapter) => adapter.norm(&self.weight, &self.bias)?,
            None => (Value::constant(self.weight.clone()), Value::constant(self.bias.clone())),
        };
        match self.groups {
            Some(groups) => ops::group_norm(x, &weight, &bias, groups, self.eps, silu),
            None => ops::layer_norm(x, &weight, &bias, self.eps),
        }
    }

    /// `x (n, c, ..)` with group norm, `(.., c)` with layer norm.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Value) -> Result<Value> {
        self.run(x, false)
    }

    /// Group norm with SiLU behind it.
    ///
    /// # Errors
    /// If shapes do not fit, or this is a layer norm.
    pub fn forward_silu(&self, x: &Value) -> Result<Value> {
        if self.groups.is_none() {
            candle_core::bail!("silu is fused behind group norms only");
        }
        self.run(x, true)
    }
}
attachable!(Norm);

/// A layer that can be adapted, or another module.
#[derive(Clone)]
pub enum Leaf {
    /// A linear layer.
    Linear(Arc<Linear>),
    /// A convolution.
    Conv2d(Arc<Conv2d>),
    /// A group norm or layer norm.
    Norm(Arc<Norm>),
    /// A container, or a module without adaptable weights.
    Other,
}

/// One module of a network, as sd-scripts' trees name it.
#[derive(Clone)]
pub struct ModuleNode {
    /// Dotted path from the root; empty for the root.
    pub path: String,
    /// Class name in sd-scripts or transformers.
    pub class: &'static str,
    /// The layer itself.
    pub leaf: Leaf,
}

/// All modules of a network in pre-order, the root first: the order of torch's `named_modules()`.
#[derive(Clone, Default)]
pub struct ModuleTree {
    /// The modules.
    pub nodes: Vec<ModuleNode>,
}
