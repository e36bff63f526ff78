//! The adapter of a whole model: made from a preset or from a file, attached, trained, merged. The walk is in `walk.rs`,
//! one layer in `module.rs`, files in `file.rs` and `load.rs`.

use crate::config::NetworkConfig;
use crate::error::{Error, Result};
use crate::functional::Path;
use crate::group::ParameterGroup;
use crate::module::{LokrModule, Module, Multiplier, NormModule};
use crate::shape::LayerShape;
use crate::walk::{self, Node, NodeKind, PlannedKind};
use candle_core::{Device, Tensor};
use ops::Parameter;
use sdxl::layers::{Leaf, ModuleTree};
use std::collections::HashMap;

/// The networks to adapt; one that is not given stays as it is.
#[derive(Clone, Copy, Default)]
pub struct Trees<'a> {
    /// CLIP-L.
    pub te1: Option<&'a ModuleTree>,
    /// OpenCLIP bigG.
    pub te2: Option<&'a ModuleTree>,
    /// The UNet.
    pub unet: Option<&'a ModuleTree>,
}

impl<'a> Trees<'a> {
    /// Those that are given, in the order of files.
    pub fn iter(&self) -> impl Iterator<Item = (ParameterGroup, &'a ModuleTree)> {
        let all = [(ParameterGroup::TextEncoder1, self.te1), (ParameterGroup::TextEncoder2, self.te2), (ParameterGroup::Unet, self.unet)];
        all.into_iter().filter_map(|(group, tree)| Some((group, tree?)))
    }
}

/// A module in its place.
pub struct Entry {
    /// The network it belongs to.
    pub group: ParameterGroup,
    /// The layer's path.
    pub path: String,
    /// The layer.
    pub leaf: Leaf,
    /// What sits in it.
    pub module: Module,
}

/// What one network got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSummary {
    /// The network.
    pub group: ParameterGroup,
    /// LoKr modules.
    pub modules: usize,
    /// Trained norms.
    pub norms: usize,
    /// Trainable numbers in both.
    pub parameters: usize,
}

/// The adapter of a model. Its modules sit in the model's layers until [`LokrNetwork::detach`].
pub struct LokrNetwork {
    entries: Vec<Entry>,
    by_path: HashMap<(ParameterGroup, String), usize>,
    multiplier: Multiplier,
    unmatched: Vec<String>,
}

impl LokrNetwork {
    /// Makes the modules that the preset asks for, in LyCORIS's order, with initial values under which the adapted model
    /// equals the base model, and attaches them.
    ///
    /// # Errors
    /// What [`NetworkConfig::check`] finds; [`Error::Duplicate`]; [`Error::NothingAdapted`]; a failing allocation.
    pub fn create(config: &NetworkConfig, trees: Trees) -> Result<Self> {
        config.check()?;
        let trees: Vec<_> = trees.iter().collect();
        let nodes: Vec<_> = trees.iter().map(|(group, tree)| (*group, nodes(tree))).collect();
        let plan = walk::plan(config, &nodes)?;
        let multiplier = Multiplier::new(1.0);
        let mut entries = Vec::with_capacity(plan.modules.len());
        for (index, planned) in plan.modules.into_iter().enumerate() {
            let Some((_, tree)) = trees.iter().find(|(group, _)| *group == planned.group) else { continue };
            let node = &tree.nodes[planned.node];
            let device = device(&node.leaf);
            let module = match planned.kind {
                PlannedKind::Lokr { shape, use_scalar, bypass, .. } => {
                    let module = LokrModule::init(planned.name, shape, use_scalar, config.seed, index as u64, &device)?;
                    let path = config.path.or(bypass.then_some(Path::Factored));
                    Module::Lokr(module.with_multiplier(multiplier.clone()).with_path(path).into())
                }
                PlannedKind::Norm(channels) => {
                    Module::Norm(NormModule::init(planned.name, channels, &device)?.with_multiplier(multiplier.clone()).into())
                }
            };
            entries.push(Entry { group: planned.group, path: node.path.clone(), leaf: node.leaf.clone(), module });
        }
        Ok(Self::from_entries(entries, multiplier, plan.unmatched))
    }

    pub(crate) fn from_entries(entries: Vec<Entry>, multiplier: Multiplier, unmatched: Vec<String>) -> Self {
        let by_path = entries.iter().enumerate().map(|(i, e)| ((e.group, e.path.clone()), i)).collect();
        let network = Self { entries, by_path, multiplier, unmatched };
        network.attach();
        network
    }

    /// Puts the modules into their layers; done already by the constructors.
    pub fn attach(&self) {
        for entry in &self.entries {
            entry.module.attach(&entry.leaf);
        }
    }

    /// Takes the modules out: the model is the base model again.
    pub fn detach(&self) {
        for entry in &self.entries {
            match &entry.leaf {
                Leaf::Linear(layer) => layer.detach(),
                Leaf::Conv2d(layer) => layer.detach(),
                Leaf::Norm(layer) => layer.detach(),
                Leaf::Other => {}
            }
        }
    }

    /// Strength of the adapter in forward passes, 1 at first. At 0 the layers give the base model's output.
    pub fn set_multiplier(&self, multiplier: f64) {
        self.multiplier.set(multiplier);
    }

    /// The modules, in the order of the file.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The trainable tensors, in the order of the file, named as there.
    pub fn parameters(&self) -> Vec<(ParameterGroup, Parameter)> {
        self.entries.iter().flat_map(|e| e.module.parameters().into_iter().map(|p| (e.group, p.clone()))).collect()
    }

    /// What asked for a layer and got none: targets of the preset, or keys of the file.
    pub fn unmatched(&self) -> &[String] {
        &self.unmatched
    }

    /// Modules and parameters of each network that has any.
    pub fn summary(&self) -> Vec<GroupSummary> {
        let summarize = |group| {
            let mut summary = GroupSummary { group, modules: 0, norms: 0, parameters: 0 };
            for entry in self.entries.iter().filter(|e| e.group == group) {
                match entry.module {
                    Module::Lokr(_) => summary.modules += 1,
                    Module::Norm(_) => summary.norms += 1,
                }
                summary.parameters += entry.module.parameters().iter().map(|p| p.tensor().elem_count()).sum::<usize>();
            }
            summary
        };
        ParameterGroup::ALL.into_iter().map(summarize).filter(|s| s.parameters > 0).collect()
    }

    /// The tensor `name` (path of the layer and `weight` or `bias`, as in `input_blocks.4.1.proj_in.weight`) with the adapter
    /// merged at strength `multiplier`, or `None` if no module changes it. Accumulated in f32 and rounded once, to the type
    /// of `tensor`; the scale is applied once, or twice under [`MergeScale::LycorisTwice`].
    ///
    /// # Errors
    /// [`Error::MergeShape`] if `tensor` is not the layer's.
    pub fn merged_weight(
        &self,
        group: ParameterGroup,
        name: &str,
        tensor: &Tensor,
        multiplier: f64,
        scale: MergeScale,
    ) -> Result<Option<Tensor>> {
        let Some((path, kind)) = name.rsplit_once('.') else { return Ok(None) };
        let Some(&index) = self.by_path.get(&(group, path.to_string())) else { return Ok(None) };
        let refuse = |want: Vec<usize>| Err(Error::MergeShape { tensor: name.into(), got: tensor.dims().to_vec(), want });
        let merged = match (&self.entries[index].module, kind) {
            (Module::Lokr(module), "weight") => {
                let want = module.shape().layer.weight_dims();
                if tensor.elem_count() != want.iter().product::<usize>() || tensor.dims().first() != want.first() {
                    return refuse(want);
                }
                let twice = if scale == MergeScale::LycorisTwice { module.shape().scale } else { 1.0 };
                module.merge(tensor, multiplier * twice)?
            }
            (Module::Norm(module), "weight" | "bias") => {
                let want = module.parameters()[0].tensor().dims().to_vec();
                if tensor.dims() != want {
                    return refuse(want);
                }
                module.merge(tensor, kind == "bias", multiplier)?
            }
            _ => return Ok(None),
        };
        Ok(Some(merged.to_dtype(tensor.dtype())?))
    }
}

/// How often a module's scale enters a merge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MergeScale {
    /// As in training.
    #[default]
    Once,
    /// As LyCORIS 3 and 4 merge (`get_diff_weight` multiplies by a scale that `get_weight` has applied): another model than
    /// the trained one wherever the scale is not 1. For comparison with files merged there.
    LycorisTwice,
}

pub(crate) fn nodes(tree: &ModuleTree) -> Vec<Node<'_>> {
    tree.nodes.iter().map(|node| Node { path: &node.path, class: node.class, kind: node_kind(&node.leaf) }).collect()
}

pub(crate) fn node_kind(leaf: &Leaf) -> NodeKind {
    match leaf {
        Leaf::Linear(layer) => match layer.weight.dims() {
            &[out, inp] => NodeKind::Layer(LayerShape::linear(out, inp)),
            _ => NodeKind::Other,
        },
        Leaf::Conv2d(layer) => match layer.weight.dims() {
            &[out, inp, h, w] => NodeKind::Layer(LayerShape::conv(out, inp, (h, w))),
            _ => NodeKind::Other,
        },
        Leaf::Norm(layer) => NodeKind::Norm(layer.weight.elem_count()),
        Leaf::Other => NodeKind::Other,
    }
}

pub(crate) fn device(leaf: &Leaf) -> Device {
    match leaf {
        Leaf::Linear(layer) => layer.weight.device().clone(),
        Leaf::Conv2d(layer) => layer.weight.device().clone(),
        Leaf::Norm(layer) => layer.weight.device().clone(),
        Leaf::Other => Device::Cpu,
    }
}
