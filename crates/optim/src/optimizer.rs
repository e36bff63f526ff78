//! One optimizer over many parameters: which rule, its numbers, and a state per parameter that is made at the first step.
//!
//! A parameter whose gradient does not exist is simply not stepped: no decay, no state. A gradient of zeros is a gradient:
//! the decay applies and the sign comes from the momentum.

use std::str::FromStr;

use crate::adamw::AdamW;
use crate::lion::{self, LionRule};
use crate::lion8bit::{BLOCK, Lion8bit, MIN_8BIT_SIZE};
use crate::state::{Incoming, StateTensor};
use crate::{Error, Result};

/// Which rule; the names are those of sd-scripts' `optimizer_type`, in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptimizerKind {
    /// [`crate::lion`].
    Lion,
    /// [`crate::lion8bit`].
    Lion8bit,
    /// [`crate::adamw`].
    AdamW,
}

impl OptimizerKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Lion, Self::Lion8bit, Self::AdamW];

    /// The name as sd-scripts writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lion => "Lion",
            Self::Lion8bit => "Lion8bit",
            Self::AdamW => "AdamW",
        }
    }
}

impl FromStr for OptimizerKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(name)).ok_or_else(|| Error::UnknownName {
            kind: "optimizer",
            name: name.into(),
            known: Self::ALL.map(Self::name).to_vec(),
        })
    }
}

/// The numbers that stay the same over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyper {
    /// Decay rates of the moments.
    pub betas: (f64, f64),
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// AdamW: added to the denominator. Lion ignores it.
    pub eps: f64,
}

impl Hyper {
    /// The defaults of bitsandbytes (Lion8bit), lion_pytorch (Lion) and torch (AdamW).
    pub fn defaults(kind: OptimizerKind) -> Self {
        match kind {
            OptimizerKind::Lion | OptimizerKind::Lion8bit => Self { betas: (0.9, 0.99), weight_decay: 0.0, eps: 0.0 },
            OptimizerKind::AdamW => Self { betas: (0.9, 0.999), weight_decay: 0.01, eps: 1e-8 },
        }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Range`] for a beta outside 0..1, or a negative or infinite `weight_decay` or `eps`.
    pub fn check(&self) -> Result<()> {
        for beta in [self.betas.0, self.betas.1] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::Range { key: "betas", value: beta, wants: "at least 0 and less than 1" });
            }
        }
        for (key, value) in [("weight_decay", self.weight_decay), ("eps", self.eps)] {
            if !(0.0..f64::INFINITY).contains(&value) {
                return Err(Error::Range { key, value, wants: "a number of at least 0" });
            }
        }
        Ok(())
    }
}

/// The state of one parameter.
#[derive(Debug, Clone)]
enum State {
    Lion(Vec<f32>),
    Lion8bit(Lion8bit),
    AdamW(AdamW),
    #[cfg(feature = "cuda")]
    OnDevice(crate::cuda::DeviceLion8bit),
}

/// One rule over many parameters.
#[derive(Debug, Clone)]
pub struct Optimizer {
    kind: OptimizerKind,
    hyper: Hyper,
    sizes: Vec<usize>,
    states: Vec<Option<State>>,
    #[cfg(feature = "cuda")]
    kernels: Option<crate::cuda::Kernels>,
}

impl Optimizer {
    /// An optimizer of parameters with these numbers of elements. `hyper` should have passed [`Hyper::check`].
    pub fn new(kind: OptimizerKind, hyper: Hyper, sizes: &[usize]) -> Self {
        Self {
            kind,
            hyper,
            sizes: sizes.to_vec(),
            states: vec![None; sizes.len()],
            #[cfg(feature = "cuda")]
            kernels: None,
        }
    }

    /// Which rule.
    pub fn kind(&self) -> OptimizerKind {
        self.kind
    }

    /// Its numbers.
    pub fn hyper(&self) -> Hyper {
        self.hyper
    }

    /// Steps parameter `index` with its gradient. Allocates only at the parameter's first step.
    ///
    /// # Panics
    /// If there is no such parameter, `param` or `grad` has another number of elements than it was announced with, or its state is on
    /// a device.
    pub fn step(&mut self, index: usize, param: &mut [f32], grad: &[f32], lr: f32) {
        let size = self.sizes[index];
        assert!(
            param.len() == size && grad.len() == size,
            "parameter {index} was announced with {size} elements; it is stepped with {} and a gradient of {}",
            param.len(),
            grad.len()
        );
        let Hyper { betas, weight_decay, eps } = self.hyper;
        match self.states[index].get_or_insert_with(|| State::new(self.kind, size)) {
            State::Lion(m) => lion::step(&LionRule::new(betas, weight_decay, lr), param, grad, m),
            State::Lion8bit(state) => state.step(&LionRule::new(betas, weight_decay, lr), param, grad),
            State::AdamW(state) => state.step(betas, eps, weight_decay, lr, param, grad),
            #[cfg(feature = "cuda")]
            State::OnDevice(_) => panic!("the state of parameter {index} is on a device"),
        }
    }

    /// Bytes that the states of all parameters take once each was stepped.
    pub fn state_bytes(&self) -> usize {
        let bytes = |&size: &usize| match self.kind {
            OptimizerKind::Lion8bit if size >= MIN_8BIT_SIZE => size + 4 * size.div_ceil(BLOCK),
            OptimizerKind::Lion | OptimizerKind::Lion8bit => 4 * size,
            OptimizerKind::AdamW => 8 * size,
        };
        self.sizes.iter().map(bytes).sum()
    }

    /// The state as named tensors, by parameter; codes are borrowed, f32 values copied. Parameters that were never stepped
    /// have none.
    ///
    /// # Errors
    /// If a state cannot be copied from a device.
    pub fn state(&self) -> Result<Vec<StateTensor<'_>>> {
        let mut tensors = Vec::new();
        for (index, state) in self.states.iter().enumerate() {
            let name = |part: &str| format!("{index}.{part}");
            match state {
                None => {}
                #[cfg(feature = "cuda")]
                Some(State::OnDevice(state)) => tensors.extend(self.read_device(state, name)?),
                Some(State::Lion(m) | State::Lion8bit(Lion8bit::F32(m))) => tensors.push(StateTensor::f32(name("state1"), m)),
                Some(State::Lion8bit(Lion8bit::Blockwise { codes, absmax })) => {
                    tensors.push(StateTensor::u8(name("state1"), codes));
                    tensors.push(StateTensor::f32(name("absmax1"), absmax));
                }
                Some(State::AdamW(AdamW { m, v, steps })) => {
                    tensors.push(StateTensor::f32(name("state1"), m));
                    tensors.push(StateTensor::f32(name("state2"), v));
                    // Exact up to 2^24 steps, as in torch's own state.
                    tensors.push(StateTensor::scalar(name("step"), *steps as f32));
                }
            }
        }
        Ok(tensors)
    }

    /// Replaces the whole state by what [`Optimizer::state`] of an equal optimizer gave. A parameter without tensors
    /// counts as never stepped. On an error nothing has changed.
    ///
    /// # Errors
    /// A tensor that is missing, of another type or shape, given twice, or without a parameter; a step count that is none.
    pub fn load_state<'a>(&mut self, tensors: impl IntoIterator<Item = StateTensor<'a>>) -> Result<()> {
        let mut incoming = Incoming::new(tensors)?;
        let mut states = Vec::with_capacity(self.sizes.len());
        for (index, &size) in self.sizes.iter().enumerate() {
            let any = ["state1", "absmax1", "state2", "step"].iter().any(|part| incoming.has(&format!("{index}.{part}")));
            states.push(if any { Some(State::load(self.kind, index, size, &mut incoming)?) } else { None });
        }
        if let Some(name) = incoming.first_left() {
            return Err(Error::StateUnknown { name, kind: self.kind.name(), parameters: self.sizes.len() });
        }
        #[cfg(feature = "cuda")]
        let states = self.to_device(states)?;
        self.states = states;
        Ok(())
    }
}

impl State {
    fn new(kind: OptimizerKind, size: usize) -> Self {
        match kind {
            OptimizerKind::Lion => Self::Lion(vec![0.0; size]),
            OptimizerKind::Lion8bit => Self::Lion8bit(Lion8bit::new(size)),
            OptimizerKind::AdamW => Self::AdamW(AdamW::new(size)),
        }
    }

    fn load(kind: OptimizerKind, index: usize, size: usize, incoming: &mut Incoming) -> Result<Self> {
        let name = |part: &str| format!("{index}.{part}");
        Ok(match kind {
            OptimizerKind::Lion => Self::Lion(incoming.f32(name("state1"), size)?),
            OptimizerKind::Lion8bit if size < MIN_8BIT_SIZE => Self::Lion8bit(Lion8bit::F32(incoming.f32(name("state1"), size)?)),
            OptimizerKind::Lion8bit => Self::Lion8bit(Lion8bit::Blockwise {
                codes: incoming.u8(name("state1"), size)?,
                absmax: incoming.f32(name("absmax1"), size.div_ceil(BLOCK))?,
            }),
            OptimizerKind::AdamW => {
                let (m, v, steps) =
                    (incoming.f32(name("state1"), size)?, incoming.f32(name("state2"), size)?, incoming.scalar(name("step"))?);
                if steps.fract() != 0.0 || !(0.0..=16_777_216.0).contains(&steps) {
                    return Err(Error::StateValue { name: name("step"), value: steps.into(), wants: "a whole number of at most 2^24" });
                }
                Self::AdamW(AdamW { m, v, steps: steps as u32 })
            }
        })
    }
}

#[cfg(feature = "cuda")]
mod device {
    //! States in a device's memory.

    use cudarc::driver::{CudaView, CudaViewMut};

    use super::{Lion8bit, LionRule, Optimizer, OptimizerKind, State, StateTensor};
    use crate::cuda::Kernels;
    use crate::{Error, Result};

    impl Optimizer {
        /// Keeps the states where `kernels` run, if there is a kernel for this rule: [`Optimizer::step_on_device`] then serves. Says
        /// whether it does.
        ///
        /// # Errors
        /// If the states do not fit there.
        pub fn use_device(&mut self, kernels: Kernels) -> Result<bool> {
            if self.kind == OptimizerKind::Lion8bit {
                self.kernels = Some(kernels);
                let states = std::mem::take(&mut self.states);
                self.states = self.to_device(states)?;
            }
            Ok(self.kernels.is_some())
        }

        /// The kernels of [`Optimizer::use_device`].
        pub fn kernels(&self) -> Option<&Kernels> {
            self.kernels.as_ref()
        }

        /// Steps parameter `index` with the gradient `factor * grad`.
        ///
        /// # Errors
        /// If the device fails.
        ///
        /// # Panics
        /// If there is no such parameter, a length is not that announced, or [`Optimizer::use_device`] did not say yes.
        pub fn step_on_device(
            &mut self,
            index: usize,
            param: &mut CudaViewMut<f32>,
            grad: &CudaView<f32>,
            factor: f32,
            lr: f32,
        ) -> Result<()> {
            let kernels = self.kernels.as_ref().expect("use_device said yes");
            let rule = LionRule::new(self.hyper.betas, self.hyper.weight_decay, lr);
            let state = &mut self.states[index];
            if state.is_none() {
                *state = Some(State::OnDevice(kernels.state(self.sizes[index])?));
            }
            let Some(State::OnDevice(state)) = state else { panic!("the state of parameter {index} is on the host") };
            Ok(kernels.step(&rule, factor, state, param, grad)?)
        }

        pub(super) fn to_device(&self, states: Vec<Option<State>>) -> Result<Vec<Option<State>>> {
            let Some(kernels) = &self.kernels else { return Ok(states) };
            let upload = |state| match state {
                Some(State::Lion8bit(host)) => Ok(Some(State::OnDevice(kernels.upload(&host)?))),
                other => Ok(other),
            };
            states.into_iter().map(upload).collect()
        }

        pub(super) fn read_device(
            &self,
            state: &crate::cuda::DeviceLion8bit,
            name: impl Fn(&str) -> String,
        ) -> Result<Vec<StateTensor<'static>>> {
            let Some(kernels) = &self.kernels else { return Ok(Vec::new()) };
            Ok(match kernels.download(state)? {
                Lion8bit::F32(m) => vec![StateTensor::f32(name("state1"), &m)],
                Lion8bit::Blockwise { codes, absmax } => {
                    let codes = StateTensor::u8(name("state1"), &codes);
                    let codes =
                        StateTensor { bytes: codes.bytes.into_owned().into(), name: codes.name, dtype: codes.dtype, shape: codes.shape };
                    vec![codes, StateTensor::f32(name("absmax1"), &absmax)]
                }
            })
        }
    }

    impl From<cudarc::driver::DriverError> for Error {
        fn from(error: cudarc::driver::DriverError) -> Self {
            Self::Device { what: error.to_string() }
        }
    }
}
