//! One adapted layer: attach, run, merge. [`LokrModule`] sits in a linear layer or a convolution, [`NormModule`] in a norm.
//! The mathematics is in `functional.rs`, the shapes in `shape.rs`, the initial values in `init.rs`.

use crate::functional::{self, Path};
use crate::init;
use crate::kernel::Layer;
use crate::shape::{Factor, Form, LokrShape};
use candle_core::{DType, Device, Result, Tensor};
use ops::{Parameter, Value, Weight};
use random::{Purpose, Stream};
use sdxl::layers::{Adapter, Conv2d, Leaf, Linear, Norm};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The multiplier that all modules of a network share.
#[derive(Clone)]
pub struct Multiplier(Arc<AtomicU64>);

impl Multiplier {
    /// A multiplier of its own.
    pub fn new(value: f64) -> Self {
        Self(Arc::new(AtomicU64::new(value.to_bits())))
    }

    /// The current value.
    pub fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// Changes it for every module that shares it, from the next forward pass on.
    pub fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
}

/// A LoKr module: y = op(x, W + multiplier * scale * kron(w1, w2)) + bias.
pub struct LokrModule {
    name: String,
    shape: LokrShape,
    factors: Vec<(Factor, Parameter)>,
    /// (1, 1), in front of w1; `None` without use_scalar.
    scalar: Option<Parameter>,
    multiplier: Multiplier,
    path: Option<Path>,
}

impl LokrModule {
    /// A module with LyCORIS's initial distribution, drawn under the key (`seed`, adapter init, `index`, tensor): the
    /// adapted layer equals the base layer.
    ///
    /// # Errors
    /// If a tensor cannot be made on `device`.
    pub fn init(name: String, shape: LokrShape, use_scalar: bool, seed: u64, index: u64, device: &Device) -> Result<Self> {
        let values = shape
            .tensors()
            .into_iter()
            .map(|(factor, dims)| {
                let mut stream = Stream::new(seed, Purpose::AdapterInit, index, init::sub_index(factor));
                Ok((factor, Tensor::from_vec(init::values(factor, &dims, use_scalar, &mut stream), dims, device)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut module = Self::from_values(name, shape, values);
        if use_scalar {
            let zero = Tensor::zeros((1, 1), DType::F32, device)?;
            module.scalar = Some(Parameter::new(format!("{}.scalar", module.name), zero));
        }
        Ok(module)
    }

    /// A module with the given values (f32, of the shapes of [`LokrShape::tensors`]).
    pub fn from_values(name: String, shape: LokrShape, values: Vec<(Factor, Tensor)>) -> Self {
        let factors = values.into_iter().map(|(f, t)| (f, Parameter::new(format!("{name}.{}", f.key()), t))).collect();
        Self { name, shape, factors, scalar: None, multiplier: Multiplier::new(1.0), path: None }
    }

    /// Shares the network's multiplier.
    pub fn with_multiplier(mut self, multiplier: Multiplier) -> Self {
        self.multiplier = multiplier;
        self
    }

    /// Forces a path; `None` chooses by cost.
    pub fn with_path(mut self, path: Option<Path>) -> Self {
        self.path = path;
        self
    }

    /// The module's name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its tensors, scale and alpha.
    pub fn shape(&self) -> &LokrShape {
        &self.shape
    }

    /// Its trainable tensors, in the order of the state dict, the scalar last.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.factors.iter().map(|(_, p)| p).chain(&self.scalar)
    }

    /// Its factors as they are stored.
    pub fn factors(&self) -> &[(Factor, Parameter)] {
        &self.factors
    }

    /// The trainable number in front, if there is one.
    pub fn scalar(&self) -> Option<&Parameter> {
        self.scalar.as_ref()
    }

    fn factor(&self, factor: Factor) -> Result<Value> {
        match self.factors.iter().find(|(f, _)| *f == factor) {
            Some((_, parameter)) => Ok(parameter.value()),
            None => candle_core::bail!("{}: no {}", self.name, factor.key()),
        }
    }

    /// w1 in full, (a, b), with the scalar in it.
    ///
    /// # Errors
    /// If the values have not the shapes that were promised.
    pub fn w1(&self) -> Result<Value> {
        let w1 = match self.shape.w1 {
            Form::Full => self.factor(Factor::W1)?,
            Form::LowRank { .. } | Form::Tucker { .. } => ops::matmul(&self.factor(Factor::W1A)?, &self.factor(Factor::W1B)?)?,
        };
        let Some(scalar) = &self.scalar else { return Ok(w1) };
        let (a, b) = (self.shape.a, self.shape.b);
        ops::reshape(&ops::matmul(&ops::reshape(&w1, &[a * b, 1])?, &scalar.value())?, &[a, b])
    }

    /// w2 in full, (c, d) or (c, d, kh, kw).
    ///
    /// # Errors
    /// If the values have not the shapes that were promised.
    pub fn w2(&self) -> Result<Value> {
        let dims = self.shape.w2_dims();
        match self.shape.w2 {
            Form::Full => self.factor(Factor::W2),
            Form::LowRank { .. } => ops::reshape(&ops::matmul(&self.factor(Factor::W2A)?, &self.factor(Factor::W2B)?)?, &dims),
            // w2[p, q, ..] = sum over i, j of t2[i, j, ..] w2_a[i, p] w2_b[j, q] (lycoris/functional/general.py `rebuild_tucker`).
            Form::Tucker { rank } => {
                let (c, d, area) = (self.shape.c, self.shape.d, self.shape.layer.kernel_area());
                let core = ops::reshape(&self.factor(Factor::T2)?, &[rank, rank * area])?;
                let rows = ops::matmul(&ops::transpose(&self.factor(Factor::W2A)?, 0, 1)?, &core)?;
                let rows = ops::transpose(&ops::reshape(&rows, &[c, rank, area])?, 1, 2)?;
                let both = ops::matmul(&ops::reshape(&rows, &[c * area, rank])?, &self.factor(Factor::W2B)?)?;
                ops::reshape(&ops::transpose(&ops::reshape(&both, &[c, area, d])?, 1, 2)?, &dims)
            }
        }
    }

    /// Puts the module into a linear layer.
    pub fn attach_linear(self: &Arc<Self>, layer: &Linear) {
        layer.attach(self.clone());
    }

    /// Puts the module into a convolution.
    pub fn attach_conv2d(self: &Arc<Self>, layer: &Conv2d) {
        layer.attach(self.clone());
    }

    fn run(&self, layer: Layer, x: &Value, weight: &Weight, bias: Option<&Tensor>) -> Result<Value> {
        let scale = self.shape.scale * self.multiplier.get();
        if scale == 0.0 {
            return match layer {
                Layer::Linear => ops::linear(x, weight, bias),
                Layer::Conv2d { stride, padding } => ops::conv2d(x, weight, bias, stride, padding),
            };
        }
        functional::adapted(layer, x, weight, bias, &self.w1()?, &self.w2()?, scale, self.path)
    }

    /// `base + multiplier * scale * kron(w1, w2)` in f32, in the shape of `base`.
    ///
    /// # Errors
    /// If `base` has not as many elements as the layer's weight.
    pub fn merge(&self, base: &Tensor, multiplier: f64) -> Result<Tensor> {
        let (w1, w2) = ops::no_grad(|| Ok::<_, candle_core::Error>((self.w1()?, self.w2()?)))?;
        let weight = base.reshape(self.shape.layer.weight_dims())?;
        let device = base.device();
        let (w1, w2) = (w1.tensor().to_device(device)?, w2.tensor().to_device(device)?);
        functional::merged_weight(&weight, &w1, &w2, multiplier * self.shape.scale)?.reshape(base.shape())
    }
}

impl Adapter for LokrModule {
    fn linear(&self, x: &Value, weight: &Weight, bias: Option<&Tensor>) -> Result<Value> {
        self.run(Layer::Linear, x, weight, bias)
    }

    fn conv2d(&self, x: &Value, weight: &Weight, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Value> {
        self.run(Layer::Conv2d { stride, padding }, x, weight, bias)
    }

    fn norm(&self, _: &Tensor, _: &Tensor) -> Result<(Value, Value)> {
        candle_core::bail!("{}: a LoKr module cannot stand in a norm", self.name)
    }
}

/// A trained norm: W + multiplier * w_norm, b + multiplier * b_norm, in f32 (LyCORIS, lycoris/modules/norms.py).
pub struct NormModule {
    name: String,
    weight: Parameter,
    bias: Parameter,
    multiplier: Multiplier,
}

impl NormModule {
    /// A module of zeros.
    ///
    /// # Errors
    /// If a tensor cannot be made on `device`.
    pub fn init(name: String, channels: usize, device: &Device) -> Result<Self> {
        // Two allocations: an optimizer may write in place.
        let (weight, bias) = (Tensor::zeros(channels, DType::F32, device)?, Tensor::zeros(channels, DType::F32, device)?);
        Ok(Self::from_values(name, weight, bias))
    }

    /// A module with the given values, f32, one for each channel.
    pub fn from_values(name: String, weight: Tensor, bias: Tensor) -> Self {
        let parameter = |key, value| Parameter::new(format!("{name}.{key}"), value);
        let (weight, bias) = (parameter("w_norm", weight), parameter("b_norm", bias));
        Self { name, weight, bias, multiplier: Multiplier::new(1.0) }
    }

    /// Shares the network's multiplier.
    pub fn with_multiplier(mut self, multiplier: Multiplier) -> Self {
        self.multiplier = multiplier;
        self
    }

    /// The module's name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `w_norm` and `b_norm`.
    pub fn parameters(&self) -> [&Parameter; 2] {
        [&self.weight, &self.bias]
    }

    /// Puts the module into a norm.
    pub fn attach(self: &Arc<Self>, layer: &Norm) {
        layer.attach(self.clone());
    }

    /// The norm's weight (or its bias) with the trained part, in f32.
    ///
    /// # Errors
    /// If `base` has not one value for each channel.
    pub fn merge(&self, base: &Tensor, is_bias: bool, multiplier: f64) -> Result<Tensor> {
        let delta = if is_bias { &self.bias } else { &self.weight }.tensor().to_device(base.device())?;
        base.to_dtype(DType::F32)? + (delta * multiplier)?
    }

    fn plus(&self, base: &Tensor, parameter: &Parameter) -> Result<Value> {
        let base = Value::constant(base.to_dtype(DType::F32)?);
        ops::add(&base, &ops::mul_scalar(&parameter.value(), self.multiplier.get())?)
    }
}

impl Adapter for NormModule {
    fn linear(&self, _: &Value, _: &Weight, _: Option<&Tensor>) -> Result<Value> {
        candle_core::bail!("{}: a norm's module cannot stand in a linear layer", self.name)
    }

    fn conv2d(&self, _: &Value, _: &Weight, _: Option<&Tensor>, _: usize, _: usize) -> Result<Value> {
        candle_core::bail!("{}: a norm's module cannot stand in a convolution", self.name)
    }

    fn norm(&self, weight: &Tensor, bias: &Tensor) -> Result<(Value, Value)> {
        Ok((self.plus(weight, &self.weight)?, self.plus(bias, &self.bias)?))
    }
}

/// Either kind of module.
#[derive(Clone)]
pub enum Module {
    /// In a linear layer or convolution.
    Lokr(Arc<LokrModule>),
    /// In a norm.
    Norm(Arc<NormModule>),
}

impl Module {
    /// The module's name in the file.
    pub fn name(&self) -> &str {
        match self {
            Self::Lokr(m) => m.name(),
            Self::Norm(m) => m.name(),
        }
    }

    /// Its trainable tensors.
    pub fn parameters(&self) -> Vec<&Parameter> {
        match self {
            Self::Lokr(m) => m.parameters().collect(),
            Self::Norm(m) => m.parameters().to_vec(),
        }
    }

    /// Puts the module into its layer. A kind that cannot stand there fails at the layer's next forward pass.
    pub fn attach(&self, leaf: &Leaf) {
        match (self, leaf) {
            (Self::Lokr(m), Leaf::Linear(layer)) => m.attach_linear(layer),
            (Self::Lokr(m), Leaf::Conv2d(layer)) => m.attach_conv2d(layer),
            (Self::Norm(m), Leaf::Norm(layer)) => m.attach(layer),
            (_, Leaf::Linear(_) | Leaf::Conv2d(_) | Leaf::Norm(_) | Leaf::Other) => {}
        }
    }
}
