//! A plan as people read it.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use lokr::PlannedKind;
use lokr::functional::Path;

use super::{Plan, Planned, Request};
use crate::base::{part_name, thousands};
use crate::config::{ForwardPath, RunConfig, SavePrecision};

const GIB: f64 = (1u64 << 30) as f64;

/// A plan with the recipe and the device that it is for.
pub struct Report<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// The recipe.
    pub config: &'a RunConfig,
    /// The device.
    pub request: &'a Request,
    /// Every adapted layer, not only their kinds.
    pub layers: bool,
}

fn path(planned: &Planned) -> &'static str {
    match (&planned.module.kind, planned.path) {
        (PlannedKind::Norm(_), _) => "norm",
        (_, Some(Path::Merged)) => "merged",
        (_, Some(Path::Factored)) => "factored",
        (_, None) => "unused",
    }
}

/// The preset's factor for the layer, the layer's shape, and those of its two factors.
fn shapes(planned: &Planned) -> [String; 4] {
    let join = |dims: &[usize]| dims.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
    match &planned.module.kind {
        PlannedKind::Norm(channels) => ["-".into(), channels.to_string(), "-".into(), "-".into()],
        PlannedKind::Lokr { shape, factor, .. } => {
            let tensors = shape.tensors();
            let of = |w1: bool| {
                let dims = tensors.iter().filter(|(f, _)| f.key().starts_with("lokr_w1") == w1).map(|(_, d)| join(d));
                dims.collect::<Vec<_>>().join(" ")
            };
            [factor.to_string(), join(&shape.layer.weight_dims()), of(true), of(false)]
        }
    }
}

impl Display for Report<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let plan = self.plan;
        plan.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))?;
        self.adapters(f)?;
        let (name, size) = match self.config.output.save_precision {
            SavePrecision::Float => ("f32", 4),
            SavePrecision::Fp16 => ("f16", 2),
            SavePrecision::Bf16 => ("bf16", 2),
        };
        writeln!(f, "trainable parameters: {}", thousands(plan.parameters))?;
        write!(f, "adapter file: {:.0} MB in {name}", plan.file_bytes as f64 / 1e6)?;
        if size == 4 {
            write!(f, ", {:.0} MB in f16 (output.save_precision = \"fp16\")", plan.file_bytes as f64 / 2e6)?;
        }
        writeln!(f)?;
        self.memory(f)?;
        self.time(f)
    }
}

impl Report<'_> {
    fn adapters(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.config.network.forward {
            ForwardPath::Auto => writeln!(f, "forward: the faster path for each layer (network.forward = \"auto\")")?,
            forced => writeln!(f, "forward: {0} in every layer (network.forward = \"{0}\")", forced.name())?,
        }
        writeln!(
            f,
            "{:<5} {:>6} {:>6}  {:<16} {:<10} {:<18} {:>12}  path",
            "part", "layers", "factor", "weight", "w1", "w2", "parameters"
        )?;
        if self.layers {
            for p in &self.plan.modules {
                let [factor, weight, w1, w2] = shapes(p);
                let part = part_name(p.module.group);
                let parameters = thousands(p.parameters);
                writeln!(
                    f,
                    "{part:<5} {:>6} {factor:>6}  {weight:<16} {w1:<10} {w2:<18} {parameters:>12}  {:<8} {}",
                    1,
                    path(p),
                    p.module.path
                )?;
            }
            return Ok(());
        }
        let mut kinds: BTreeMap<(usize, [String; 4], &str), (usize, usize)> = BTreeMap::new();
        for p in &self.plan.modules {
            let sum = kinds.entry((p.module.group as usize, shapes(p), path(p))).or_default();
            *sum = (sum.0 + 1, sum.1 + p.parameters);
        }
        let mut kinds: Vec<_> = kinds.into_iter().collect();
        kinds.sort_by(|(a, x), (b, y)| (a.0, y.1, &a.1).cmp(&(b.0, x.1, &b.1)));
        for ((group, [factor, weight, w1, w2], path), (count, parameters)) in kinds {
            let part = lokr::ParameterGroup::ALL.into_iter().find(|g| *g as usize == group).map_or("", part_name);
            writeln!(f, "{part:<5} {count:>6} {factor:>6}  {weight:<16} {w1:<10} {w2:<18} {:>12}  {path}", thousands(parameters))?;
        }
        Ok(())
    }

    fn memory(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (m, device, (w, h, n)) = (&self.plan.memory, self.request.device, self.plan.largest);
        writeln!(
            f,
            "memory on {}, batch {n} at {w}x{h}, gradient checkpointing {}, at its peak ({}):",
            device.name,
            self.config.train.gradient_checkpointing.name(),
            m.when
        )?;
        for (what, bytes) in [
            ("frozen weights", m.weights),
            ("adapter (f32)", m.masters),
            ("gradients (f32)", m.gradients),
            ("optimizer", m.optimizer),
            ("activations", m.activations),
            ("checkpoint's copy", m.snapshot),
            ("the program", m.program),
        ] {
            if bytes > 0 {
                writeln!(f, "  {what:<18} {:>8.3} GiB", bytes as f64 / GIB)?;
            }
        }
        write!(f, "  {:<18} {:>8.3} GiB", "total", m.total() as f64 / GIB)?;
        match device.memory {
            Some(has) if m.total() > has => writeln!(f, ", more than the {} GiB of {}", has >> 30, device.name),
            Some(has) => writeln!(f, " of {} GiB, without what the driver takes", has >> 30),
            None => writeln!(f),
        }
    }

    fn time(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (plan, t) = (self.plan, &self.config.train);
        let images = t.batch_size * t.gradient_accumulation_steps;
        writeln!(f, "compute: {:.2} TFLOP per step of {images} images at that size", plan.flops / 1e12)?;
        if let Some(line) = plan.timeline {
            if line.batches_per_epoch > 0 {
                let batches = line.batches_per_epoch;
                writeln!(f, "steps: {} per epoch ({batches} batches), {} in all", line.steps_per_epoch(), line.total_steps)?;
            } else {
                writeln!(f, "steps: {} in all", line.total_steps)?;
            }
        }
        let Some(seconds) = plan.seconds else {
            return writeln!(f, "time: give --tflops and --bandwidth of this device for the least time of a step");
        };
        write!(f, "time: at least {seconds:.2} s per step")?;
        match plan.timeline {
            Some(line) => writeln!(f, ", {:.1} hours for the run", seconds * line.total_steps as f64 / 3600.0),
            None => writeln!(f),
        }
    }
}
