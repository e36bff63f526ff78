//! What an adapter would be, without making it: the same walk as [`crate::LokrNetwork::create`], and no tensor.

use crate::config::NetworkConfig;
use crate::error::Result;
use crate::group::ParameterGroup;
use crate::network::{Trees, nodes};
use crate::walk::{self, PlannedKind};

/// A module that a preset asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedModule {
    /// The network it belongs to.
    pub group: ParameterGroup,
    /// The layer's path.
    pub path: String,
    /// Its name in the file.
    pub name: String,
    /// What it will be.
    pub kind: PlannedKind,
}

impl PlannedModule {
    /// Elements of each of its trainable tensors, in the order of [`crate::LokrNetwork::parameters`].
    pub fn sizes(&self) -> Vec<usize> {
        match &self.kind {
            PlannedKind::Norm(channels) => vec![*channels; 2],
            PlannedKind::Lokr { shape, use_scalar, .. } => {
                let tensors = shape.tensors().into_iter().map(|(_, dims)| dims.iter().product());
                tensors.chain(use_scalar.then_some(1)).collect()
            }
        }
    }

    /// Trainable numbers in it.
    pub fn parameters(&self) -> usize {
        self.sizes().iter().sum()
    }
}

/// The modules that the preset asks for, in the order of the file, and what of it leads to no layer.
///
/// # Errors
/// As [`crate::LokrNetwork::create`].
pub fn plan(config: &NetworkConfig, trees: Trees) -> Result<(Vec<PlannedModule>, Vec<String>)> {
    config.check()?;
    let trees: Vec<_> = trees.iter().collect();
    let nodes: Vec<_> = trees.iter().map(|(group, tree)| (*group, nodes(tree))).collect();
    let plan = walk::plan(config, &nodes)?;
    let module = |p: walk::Planned| {
        let (_, tree) = trees.iter().find(|(group, _)| *group == p.group)?;
        Some(PlannedModule { group: p.group, path: tree.nodes[p.node].path.clone(), name: p.name, kind: p.kind })
    };
    Ok((plan.modules.into_iter().filter_map(module).collect(), plan.unmatched))
}
