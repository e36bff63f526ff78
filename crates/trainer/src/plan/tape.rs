//! The tape without numbers: what `ops` keeps, allocates and frees in one step, and how much it computes, from shapes alone.
//!
//! A [`V`] stands for a value, its [`Buffer`] for the memory behind it: buffers count themselves in and out of a [`Meter`] as
//! tensors come and go, so that the largest sum is the step's. The backward pass goes in `ops::backward`'s order, and a
//! segment that is recomputed is here recomputed too.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// What an op computes and moves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Work {
    /// Multiply-adds.
    pub macs: f64,
    /// Elements that are read and written, of activations.
    pub elements: f64,
    /// Bytes of weights that are read.
    pub weights: f64,
}

/// Speeds of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// TFLOP/s of matrix products.
    pub tflops: f64,
    /// GB/s of its memory.
    pub bandwidth: f64,
}

/// Sums over a step.
pub(super) struct Meter {
    /// Bytes of an element of the activations.
    pub element: u64,
    /// Attention by candle's ops, with the scores of many queries in memory at a time.
    pub composed: bool,
    /// Every op by candle's, with intermediates in f32, as in half precision on a CPU.
    pub half_on_cpu: bool,
    speed: Option<Speed>,
    live: Cell<u64>,
    gradients: Cell<u64>,
    peak: Cell<(u64, u64)>,
    largest: Cell<u64>,
    keys: Cell<u64>,
    macs: Cell<f64>,
    seconds: Cell<f64>,
    recording: Cell<bool>,
    next: Cell<u64>,
    with_gradient: RefCell<BTreeSet<usize>>,
}

impl Meter {
    /// `element`: bytes of an element of the activations.
    pub fn new(element: u64, on_gpu: bool, speed: Option<Speed>) -> Rc<Self> {
        let half_on_cpu = element < 4 && !on_gpu;
        Rc::new(Self {
            element,
            // Kernels serve f32 on the CPU, and half precision on GPUs.
            composed: on_gpu == (element == 4),
            half_on_cpu,
            speed,
            live: Cell::new(0),
            gradients: Cell::new(0),
            peak: Cell::new((0, 0)),
            largest: Cell::new(0),
            keys: Cell::new(0),
            macs: Cell::new(0.0),
            seconds: Cell::new(0.0),
            recording: Cell::new(true),
            next: Cell::new(0),
            with_gradient: RefCell::default(),
        })
    }

    /// The largest sum of activations and gradients, in bytes, and the gradients' part of it.
    pub fn peak(&self) -> (u64, u64) {
        self.peak.get()
    }

    /// Notes an attention to so many keys.
    pub fn attends(&self, keys: u64) {
        self.keys.set(self.keys.get().max(keys));
    }

    /// The most keys of an attention.
    pub fn keys(&self) -> usize {
        self.keys.get() as usize
    }

    /// Bytes of the largest buffer.
    pub fn largest(&self) -> u64 {
        self.largest.get()
    }

    /// Floating-point operations: two for each multiply-add.
    pub fn flops(&self) -> f64 {
        2.0 * self.macs.get()
    }

    /// The time that the work takes at least, if the device's speeds are known.
    pub fn seconds(&self) -> Option<f64> {
        self.speed.map(|_| self.seconds.get())
    }

    pub fn recording(&self) -> bool {
        self.recording.get()
    }

    pub fn without_recording<R>(&self, f: impl FnOnce() -> R) -> R {
        let before = self.recording.replace(false);
        let result = f();
        self.recording.set(before);
        result
    }

    pub fn work(&self, w: Work) {
        self.macs.set(self.macs.get() + w.macs);
        if let Some(speed) = self.speed {
            let compute = 2.0 * w.macs / (speed.tflops * 1e12);
            let memory = (w.elements * self.element as f64 + w.weights) / (speed.bandwidth * 1e9);
            self.seconds.set(self.seconds.get() + compute.max(memory));
        }
    }

    fn take(&self, bytes: u64) {
        self.live.set(self.live.get() + bytes);
        let total = self.live.get() + self.gradients.get();
        if total > self.peak.get().0 {
            self.peak.set((total, self.gradients.get()));
        }
    }

    pub fn buffer(self: &Rc<Self>, bytes: u64) -> Rc<Buffer> {
        self.take(bytes);
        self.largest.set(self.largest.get().max(bytes));
        Rc::new(Buffer { meter: self.clone(), bytes })
    }

    /// A parameter's gradient: it stays; one that is there is added to, which takes a second buffer for a moment.
    fn gradient(&self, id: usize, bytes: u64) {
        if self.with_gradient.borrow_mut().insert(id) {
            self.gradients.set(self.gradients.get() + bytes);
            self.take(0);
        } else {
            self.take(2 * bytes);
            self.live.set(self.live.get() - 2 * bytes);
        }
    }

    fn id(&self) -> u64 {
        self.next.set(self.next.get() + 1);
        self.next.get()
    }
}

/// Memory that counts itself.
pub(super) struct Buffer {
    meter: Rc<Meter>,
    bytes: u64,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.meter.live.set(self.meter.live.get() - self.bytes);
    }
}

/// A value: its memory, its number of elements, its place on the tape.
#[derive(Clone)]
pub(super) struct V {
    pub buffer: Rc<Buffer>,
    pub elements: u64,
    node: Option<Rc<Node>>,
}

impl V {
    pub fn requires_grad(&self) -> bool {
        self.node.is_some()
    }
}

/// What the backward pass of an op does.
#[derive(Default)]
pub(super) struct Back {
    pub saved: Vec<Rc<Buffer>>,
    /// Bytes that are needed while it runs, beside the inputs' gradients.
    pub scratch: u64,
    pub work: Work,
    /// The inputs' gradients are the output's own memory.
    pub shares: bool,
    /// Parameters that get a gradient: a number for each, and its bytes.
    pub parameters: Vec<(usize, u64)>,
}

pub(super) type Segment = Rc<dyn Fn(&[V]) -> V>;

enum Kind {
    Op(Back),
    Segment(Vec<V>, Segment),
    Leaf(Rc<RefCell<Option<Rc<Buffer>>>>),
}

struct Node {
    id: u64,
    inputs: Vec<Option<(Rc<Node>, u64)>>,
    kind: RefCell<Option<Kind>>,
}

/// A value that is there from the start.
pub(super) fn constant(meter: &Rc<Meter>, elements: u64) -> V {
    V { buffer: meter.buffer(elements * meter.element), elements, node: None }
}

/// The output of an op: `elements` of new memory, or with `share` the first input's. `trained`: parameters are inside.
pub(super) fn op(meter: &Rc<Meter>, inputs: &[&V], elements: u64, share: bool, trained: bool, back: Back) -> V {
    let buffer = if share { inputs[0].buffer.clone() } else { meter.buffer(elements * meter.element) };
    let node = (meter.recording() && (trained || inputs.iter().any(|v| v.requires_grad()))).then(|| {
        let inputs = inputs.iter().map(|v| v.node.clone().map(|n| (n, v.elements))).collect();
        Rc::new(Node { id: meter.id(), inputs, kind: RefCell::new(Some(Kind::Op(back))) })
    });
    V { buffer, elements, node }
}

/// `ops::checkpoint`, or `f` as it is.
pub(super) fn segment(meter: &Rc<Meter>, on: bool, inputs: &[&V], f: Segment) -> V {
    if !on {
        return f(&inputs.iter().map(|&v| v.clone()).collect::<Vec<_>>());
    }
    let detached: Vec<V> = inputs.iter().map(|v| V { node: None, ..(*v).clone() }).collect();
    let output = meter.without_recording(|| f(&detached));
    if !meter.recording() {
        return output;
    }
    let inputs = inputs.iter().map(|v| v.node.clone().map(|n| (n, v.elements))).collect();
    let node = Node { id: meter.id(), inputs, kind: RefCell::new(Some(Kind::Segment(detached, f))) };
    V { node: Some(Rc::new(node)), ..output }
}

#[derive(Default)]
struct Pending(BTreeMap<u64, (Rc<Node>, u64, Rc<Buffer>)>);

impl Pending {
    fn add(&mut self, meter: &Rc<Meter>, node: Rc<Node>, elements: u64, grad: Rc<Buffer>) {
        let grad = match self.0.remove(&node.id) {
            None => grad,
            Some((_, _, have)) => {
                let sum = meter.buffer(elements * meter.element);
                meter.work(Work { elements: 3.0 * elements as f64, ..Work::default() });
                drop((have, grad));
                sum
            }
        };
        self.0.insert(node.id, (node, elements, grad));
    }
}

/// The backward pass from `root`, whose gradient takes new memory.
pub(super) fn backward(meter: &Rc<Meter>, root: V) {
    let grad = meter.buffer(root.elements * meter.element);
    let mut pending = Pending::default();
    if let Some(node) = root.node.clone() {
        pending.add(meter, node, root.elements, grad);
    }
    drop(root);
    run(meter, pending);
}

fn run(meter: &Rc<Meter>, mut pending: Pending) {
    while let Some((_, (node, _, dy))) = pending.0.pop_last() {
        let Some(kind) = node.kind.borrow_mut().take() else { continue };
        match kind {
            Kind::Leaf(slot) => *slot.borrow_mut() = Some(dy),
            Kind::Op(back) => {
                meter.work(back.work);
                let scratch = meter.buffer(back.scratch);
                let grads: Vec<_> = node
                    .inputs
                    .iter()
                    .map(|input| {
                        let (_, elements) = input.as_ref()?;
                        Some(if back.shares { dy.clone() } else { meter.buffer(elements * meter.element) })
                    })
                    .collect();
                back.parameters.iter().for_each(|&(id, bytes)| meter.gradient(id, bytes));
                drop((scratch, back.saved, dy));
                for (input, grad) in node.inputs.iter().zip(grads) {
                    if let (Some((input, elements)), Some(grad)) = (input, grad) {
                        pending.add(meter, input.clone(), *elements, grad);
                    }
                }
            }
            Kind::Segment(detached, f) => {
                let mut inner = Pending::default();
                let (mut slots, mut leaves) = (Vec::new(), Vec::new());
                for (value, input) in detached.into_iter().zip(&node.inputs) {
                    let Some((outer, elements)) = input else {
                        leaves.push(value);
                        continue;
                    };
                    let slot = Rc::new(RefCell::new(None));
                    let leaf = Rc::new(Node { id: meter.id(), inputs: vec![], kind: RefCell::new(Some(Kind::Leaf(slot.clone()))) });
                    if let Some((_, _, so_far)) = pending.0.remove(&outer.id) {
                        inner.add(meter, leaf.clone(), *elements, so_far);
                    }
                    leaves.push(V { node: Some(leaf), ..value });
                    slots.push((outer.clone(), *elements, slot));
                }
                let output = f(&leaves);
                drop((leaves, f));
                if let Some(last) = output.node.clone() {
                    inner.add(meter, last, output.elements, dy.clone());
                }
                drop((output, dy));
                run(meter, inner);
                for (outer, elements, slot) in slots {
                    if let Some(grad) = slot.borrow_mut().take() {
                        pending.add(meter, outer, elements, grad);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An op of 10 elements that keeps its input, as an activation does.
    fn keeps(meter: &Rc<Meter>, x: &V) -> V {
        meter.work(Work { macs: 1.0, ..Work::default() });
        let back = Back { saved: vec![x.buffer.clone()], work: Work { macs: 2.0, ..Work::default() }, ..Back::default() };
        op(meter, &[x], 10, false, true, back)
    }

    fn chain(ops: usize, segments: usize) -> (u64, f64) {
        let meter = Meter::new(4, false, None);
        let mut x = constant(&meter, 10);
        for _ in 0..segments {
            let m = meter.clone();
            x = segment(&meter, segments > 1, &[&x], Rc::new(move |v| (0..ops / segments).fold(v[0].clone(), |x, _| keeps(&m, &x))));
        }
        backward(&meter, x);
        assert_eq!(meter.live.get(), 0, "all is given back");
        (meter.peak().0, meter.flops())
    }

    /// Counted by hand. All kept: the input and twelve outputs, of which the last is let go before the first gradient's successor is
    /// made; then two gradients at most. In three segments: the input and two boundaries, and inside the last one four more.
    #[test]
    fn peaks_are_those_of_the_real_tape() {
        let (whole, flops) = chain(12, 1);
        assert_eq!((whole, flops), (14 * 40, 72.0));
        let (parts, flops) = chain(12, 3);
        assert!(parts < whole, "{parts} against {whole}");
        assert_eq!(flops, 72.0 + 24.0);
    }

    #[test]
    fn a_gradient_stays_and_is_added_to() {
        let meter = Meter::new(4, false, None);
        for _ in 0..2 {
            let x = constant(&meter, 10);
            let back = Back { parameters: vec![(0, 1000)], ..Back::default() };
            let y = op(&meter, &[&x], 10, false, true, back);
            backward(&meter, y);
        }
        assert_eq!((meter.gradients.get(), meter.live.get()), (1000, 0));
        assert!(meter.peak().0 >= 3000, "the second gradient and the sum stand beside the first");
    }
}
