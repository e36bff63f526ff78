//! The tape: values, parameters, and the backward pass.
//!
//! Why not candle's own: it adds every gradient into a freshly zeroed buffer, keeps all intermediates until the end,
//! and hands parameter gradients out only when everything is done. Here a node's closure is consumed and dropped as
//! soon as it has run, and a parameter's gradient is complete the moment its last use has been passed.

use crate::basic::sum;
use candle_core::{DType, Result, Tensor};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

type BackwardFn = Box<dyn FnOnce(&Tensor) -> Result<Vec<Option<Tensor>>> + Send>;
/// Told of a parameter each time that a use of it has been passed backward and its gradient added.
pub type OnGradient<'a> = dyn FnMut(&Parameter) -> Result<()> + 'a;
/// Takes the gradient of the output and what the inputs' gradients are so far, and gives what they are then.
type SegmentFn = Box<dyn FnOnce(&Tensor, Vec<Option<Tensor>>, &mut OnGradient) -> Result<Vec<Option<Tensor>>> + Send>;

enum Kind {
    Parameter(Parameter),
    /// A fresh leaf of a recomputed segment: its gradient is handed to the caller.
    Leaf(Arc<Mutex<Option<Tensor>>>),
    Op {
        name: &'static str,
        inputs: Vec<Option<Arc<Node>>>,
        backward: Mutex<Option<BackwardFn>>,
    },
    /// A segment that runs again. It goes on from its inputs' gradients, so that sums are formed in the same order as without it.
    Segment {
        inputs: Vec<Option<Arc<Node>>>,
        backward: Mutex<Option<SegmentFn>>,
    },
}

struct Node {
    /// Grows along the forward pass, so that descending order is a valid order for the backward pass.
    id: u64,
    kind: Kind,
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

thread_local! {
    static RECORDING: Cell<bool> = const { Cell::new(true) };
}

/// Whether ops on this thread are recorded.
pub fn recording() -> bool {
    RECORDING.get()
}

/// Runs `f` without recording: what it computes is constant.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            RECORDING.set(self.0);
        }
    }
    let _restore = Restore(RECORDING.replace(false));
    f()
}

/// A tensor and, if a gradient may flow through it, its place on the tape.
#[derive(Clone)]
pub struct Value {
    tensor: Tensor,
    node: Option<Arc<Node>>,
}

impl Value {
    /// A tensor that needs no gradient.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, node: None }
    }

    /// The tensor.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether a gradient flows through this value.
    pub fn requires_grad(&self) -> bool {
        self.node.is_some()
    }

    /// The shape.
    pub fn dims(&self) -> &[usize] {
        self.tensor.dims()
    }

    /// The same tensor as a constant.
    pub fn detach(&self) -> Self {
        Self::constant(self.tensor.clone())
    }

    pub(crate) fn leaf(tensor: Tensor) -> (Self, Arc<Mutex<Option<Tensor>>>) {
        let slot = Arc::new(Mutex::new(None));
        let node = Arc::new(Node { id: next_id(), kind: Kind::Leaf(slot.clone()) });
        (Self { tensor, node: Some(node) }, slot)
    }
}

/// A trainable f32 tensor with a gradient that adds up over micro-batches. A shared handle.
#[derive(Clone)]
pub struct Parameter(Arc<ParameterInner>);

struct ParameterInner {
    name: String,
    value: Mutex<Tensor>,
    grad: Mutex<Option<Tensor>>,
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Parameter {
    /// A parameter with its initial value (f32).
    pub fn new(name: impl Into<String>, value: Tensor) -> Self {
        Self(Arc::new(ParameterInner { name: name.into(), value: Mutex::new(value), grad: Mutex::new(None) }))
    }

    /// The key under which it is saved.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The current value.
    pub fn tensor(&self) -> Tensor {
        lock(&self.0.value).clone()
    }

    /// Replaces the value.
    ///
    /// # Errors
    /// If the shape or the type changes.
    pub fn set(&self, t: Tensor) -> Result<()> {
        let mut value = lock(&self.0.value);
        if value.dims() != t.dims() || value.dtype() != t.dtype() {
            candle_core::bail!("{}: {:?} {:?} cannot replace {:?} {:?}", self.name(), t.dims(), t.dtype(), value.dims(), value.dtype());
        }
        *value = t;
        Ok(())
    }

    /// The parameter as the start of a computation.
    pub fn value(&self) -> Value {
        let node = recording().then(|| Arc::new(Node { id: next_id(), kind: Kind::Parameter(self.clone()) }));
        Value { tensor: self.tensor(), node }
    }

    /// The gradient added up since [`Parameter::zero_grad`]; `None` if nothing reached it.
    pub fn grad(&self) -> Option<Tensor> {
        lock(&self.0.grad).clone()
    }

    /// Takes the gradient away, leaving `None`.
    pub fn take_grad(&self) -> Option<Tensor> {
        lock(&self.0.grad).take()
    }

    /// Forgets the gradient.
    pub fn zero_grad(&self) {
        *lock(&self.0.grad) = None;
    }

    /// Adds `g` to the gradient, in f32.
    ///
    /// # Errors
    /// If the shape differs.
    pub fn accumulate(&self, g: &Tensor) -> Result<()> {
        let g = if g.dtype() == DType::F32 { g.clone() } else { g.to_dtype(DType::F32)? };
        let mut grad = lock(&self.0.grad);
        *grad = Some(match grad.take() {
            None => g,
            Some(so_far) => sum(&so_far, &g)?,
        });
        Ok(())
    }
}

/// The output of a hand-written op. `backward` takes the gradient of `output` and gives one gradient per input, `None`
/// where the input needs none. Nothing is recorded, and `backward` is dropped, if no input requires a gradient or
/// recording is off.
pub fn custom(
    name: &'static str,
    inputs: &[&Value],
    output: Tensor,
    backward: impl FnOnce(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + 'static,
) -> Value {
    if !recording() || !inputs.iter().any(|v| v.requires_grad()) {
        return Value::constant(output);
    }
    let inputs = inputs.iter().map(|v| v.node.clone()).collect();
    node(output, Kind::Op { name, inputs, backward: Mutex::new(Some(Box::new(backward))) })
}

/// The output of a segment that runs again in the backward pass; recorded whatever the inputs are, because parameters may
/// be inside.
pub(crate) fn segment(
    inputs: &[&Value],
    output: Tensor,
    backward: impl FnOnce(&Tensor, Vec<Option<Tensor>>, &mut OnGradient) -> Result<Vec<Option<Tensor>>> + Send + 'static,
) -> Value {
    let inputs = inputs.iter().map(|v| v.node.clone()).collect();
    node(output, Kind::Segment { inputs, backward: Mutex::new(Some(Box::new(backward))) })
}

fn node(tensor: Tensor, kind: Kind) -> Value {
    Value { tensor, node: Some(Arc::new(Node { id: next_id(), kind })) }
}

/// Runs the backward pass from `roots` (a value and the gradient of the loss with respect to it) and adds into the
/// gradients of all parameters behind them. A graph can be passed once.
///
/// # Errors
/// If an op's backward fails, or a gradient's shape is not its value's, or the graph was passed before.
pub fn backward(roots: Vec<(Value, Tensor)>) -> Result<()> {
    backward_with(roots, &mut |_| Ok(()))
}

/// As [`backward`]; tells `on_gradient` of each parameter as soon as the gradient of one of its uses has been added, so that
/// what is complete can be sent to other processes while the rest is computed. A parameter that the forward pass used `n`
/// times is told `n` times.
///
/// # Errors
/// As [`backward`], and what `on_gradient` returns.
pub fn backward_with(roots: Vec<(Value, Tensor)>, on_gradient: &mut OnGradient) -> Result<()> {
    backward_from(roots, Vec::new(), on_gradient)
}

/// As [`backward_with`]; the gradients of `seeds` start from the given ones.
pub(crate) fn backward_from(roots: Vec<(Value, Tensor)>, seeds: Vec<(Value, Tensor)>, on_gradient: &mut OnGradient) -> Result<()> {
    let mut pending = Pending::default();
    for (value, grad) in seeds.into_iter().chain(roots) {
        if value.dims() != grad.dims() {
            candle_core::bail!("gradient of shape {:?} for a value of shape {:?}", grad.dims(), value.dims());
        }
        if let Some(node) = value.node {
            pending.add(node, grad)?;
        }
    }
    while let Some((node, grad)) = pending.pop_last() {
        match &node.kind {
            Kind::Parameter(p) => {
                p.accumulate(&grad)?;
                on_gradient(p)?;
            }
            Kind::Leaf(slot) => *lock(slot) = Some(grad),
            Kind::Op { name, inputs, backward } => {
                let Some(f) = lock(backward).take() else { candle_core::bail!("{name}: the graph was already passed backward") };
                let grads = f(&grad)?;
                if grads.len() != inputs.len() {
                    candle_core::bail!("{name}: {} gradients for {} inputs", grads.len(), inputs.len());
                }
                for (input, grad) in inputs.iter().zip(grads) {
                    if let (Some(input), Some(grad)) = (input, grad) {
                        pending.add(input.clone(), grad)?;
                    }
                }
            }
            Kind::Segment { inputs, backward } => {
                let Some(f) = lock(backward).take() else { candle_core::bail!("the graph was already passed backward") };
                let so_far = inputs.iter().map(|input| input.as_ref().and_then(|n| pending.take(n.id))).collect();
                for (input, grad) in inputs.iter().zip(f(&grad, so_far, on_gradient)?) {
                    if let (Some(input), Some(grad)) = (input, grad) {
                        pending.add(input.clone(), grad)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Nodes with the gradient gathered so far, in order of their place on the tape.
#[derive(Default)]
struct Pending {
    order: BTreeMap<u64, Arc<Node>>,
    grads: HashMap<u64, Tensor>,
}

impl Pending {
    fn add(&mut self, node: Arc<Node>, grad: Tensor) -> Result<()> {
        let id = node.id;
        let total = match self.grads.remove(&id) {
            None => grad,
            Some(have) => sum(&have, &grad)?,
        };
        self.grads.insert(id, total);
        self.order.insert(id, node);
        Ok(())
    }

    /// Takes the gradient gathered so far for a node, if there is any.
    fn take(&mut self, id: u64) -> Option<Tensor> {
        self.order.remove(&id)?;
        self.grads.remove(&id)
    }

    fn pop_last(&mut self) -> Option<(Arc<Node>, Tensor)> {
        let (id, node) = self.order.pop_last()?;
        let grad = self.grads.remove(&id)?;
        Some((node, grad))
    }
}
