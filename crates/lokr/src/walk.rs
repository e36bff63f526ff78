//! From a preset to the list of modules: which layers of a tree are adapted, in LyCORIS's order, under which name and with
//! which options (lycoris/kohya.py of lycoris-lora 4.1.3, `create_modules`, `create_modules_`, `create_single_module`).
//! Works on descriptions of layers; allocation and attachment are left to `network.rs`.

use crate::config::NetworkConfig;
use crate::error::{Error, Result};
use crate::group::ParameterGroup;
use crate::pattern::Pattern;
use crate::preset::{Overrides, Preset, Targets};
use crate::shape::{LayerShape, LokrOptions, LokrShape};
use std::collections::BTreeSet;

/// What can be adapted in a node of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A linear layer or convolution.
    Layer(LayerShape),
    /// A norm with this many channels.
    Norm(usize),
    /// A container, or something without weights.
    Other,
}

/// A module of the network: what PyTorch's `named_modules()` yields.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    /// Dotted path from the root; empty for the root.
    pub path: &'a str,
    /// Class name in sd-scripts' trees.
    pub class: &'a str,
    /// What it holds.
    pub kind: NodeKind,
}

/// What a planned module will be.
#[derive(Clone, Debug, PartialEq)]
pub enum PlannedKind {
    /// A LoKr module.
    Lokr {
        /// Tensors, scale and alpha.
        shape: LokrShape,
        /// The factor that was asked for; the sides that it gave are the shape's a and b.
        factor: i64,
        /// With the trainable number in front.
        use_scalar: bool,
        /// Always by the factored path.
        bypass: bool,
    },
    /// A trained norm of so many channels.
    Norm(usize),
}

/// One module to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// The network it belongs to.
    pub group: ParameterGroup,
    /// Index of its node in the tree.
    pub node: usize,
    /// Its name in the file.
    pub name: String,
    /// What it will be.
    pub kind: PlannedKind,
}

/// Everything a preset asks for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The modules in LyCORIS's order: first text encoder, second text encoder, UNet; each in the order of its tree.
    pub modules: Vec<Planned>,
    /// Targets, exclusions and table entries that led to no layer, as `key: text`.
    pub unmatched: Vec<String>,
}

/// Plans the modules for the given trees (nodes in pre-order, root first).
///
/// # Errors
/// [`Error::Duplicate`] if two targets claim a layer, [`Error::NothingAdapted`] if there is no module at all.
pub fn plan(config: &NetworkConfig, trees: &[(ParameterGroup, Vec<Node>)]) -> Result<Plan> {
    let mut walk = Walk { config, preset: &config.preset, used: BTreeSet::new(), modules: Vec::new() };
    for (group, nodes) in trees {
        let targets = walk.targets(*group);
        walk.root(*group, nodes, targets)?;
    }
    let unmatched = walk.unmatched(trees);
    if walk.modules.is_empty() {
        return Err(Error::NothingAdapted { preset: config.preset.name().into(), targets: unmatched });
    }
    Ok(Plan { modules: walk.modules, unmatched })
}

/// A part of the preset, for the report of what led to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Entry {
    Class(bool, usize),
    Name(bool, usize),
    ByClass(usize),
    ByName(usize),
    Exclude(usize),
}

struct Walk<'a> {
    config: &'a NetworkConfig,
    preset: &'a Preset,
    used: BTreeSet<Entry>,
    modules: Vec<Planned>,
}

/// Options for what lies under a node, and where its subtree ends.
struct Scope<'a> {
    end: usize,
    table: Option<(Entry, &'a Overrides)>,
}

impl<'a> Walk<'a> {
    fn targets(&self, group: ParameterGroup) -> &'a Targets {
        if group.is_text_encoder() { &self.preset.text_encoder } else { &self.preset.unet }
    }

    /// One network (`create_modules`).
    fn root(&mut self, group: ParameterGroup, nodes: &[Node], targets: &Targets) -> Result<()> {
        let text = group.is_text_encoder();
        let mut claimed = BTreeSet::new();
        for (i, node) in nodes.iter().enumerate() {
            if self.excluded(node.path) {
                continue;
            }
            let named: Vec<Entry> = matching(&targets.names, node.path).map(|k| Entry::Name(text, k)).collect();
            let class = targets.classes.iter().position(|class| class == node.class);
            let before = self.modules.len();
            let reasons = match class {
                Some(class) if named.is_empty() => {
                    self.block(group, nodes, i);
                    vec![Entry::Class(text, class)]
                }
                _ if !named.is_empty() => {
                    let table = match self.preset.name_options(node.path) {
                        Some((k, options)) => Some((Entry::ByName(k), options)),
                        None => self.class_table(node.class),
                    };
                    self.single(group, i, node, table);
                    named
                }
                _ => continue,
            };
            if self.modules.len() > before {
                self.used.extend(reasons);
            }
            for module in &self.modules[before..] {
                if !claimed.insert(module.node) {
                    return Err(Error::Duplicate { name: module.name.clone(), path: nodes[module.node].path.into() });
                }
            }
        }
        Ok(())
    }

    /// A targeted block and everything in it (`create_modules_`). LyCORIS starts a nested walk at every inner module whose
    /// class has a table and skips what such a walk has already made; in pre-order this comes to: the table of the
    /// innermost such module around a layer holds.
    fn block(&mut self, group: ParameterGroup, nodes: &[Node], start: usize) {
        let mut scopes = vec![Scope { end: subtree_end(nodes, start), table: self.class_table(nodes[start].class) }];
        for (i, node) in nodes.iter().enumerate().take(scopes[0].end).skip(start) {
            // An excluded module opens no scope either; what lies below it is tested by itself.
            if self.excluded(node.path) {
                continue;
            }
            scopes.retain(|scope| i < scope.end);
            if i != start
                && let table @ Some(_) = self.class_table(node.class)
            {
                scopes.push(Scope { end: subtree_end(nodes, i), table });
            }
            let table = scopes.last().and_then(|scope| scope.table);
            self.single(group, i, node, table);
        }
    }

    /// One layer, if it is one and its kind is trained (`create_single_module`).
    fn single(&mut self, group: ParameterGroup, index: usize, node: &Node, table: Option<(Entry, &'a Overrides)>) {
        let none = Overrides::default();
        let options = table.map_or(&none, |(_, o)| o);
        let kind = match node.kind {
            NodeKind::Norm(channels) if self.config.train_norm && node.class.contains("Norm") => PlannedKind::Norm(channels),
            NodeKind::Layer(layer) => match self.lokr(layer, options) {
                Some(kind) => kind,
                None => return,
            },
            _ => return,
        };
        self.used.extend(table.map(|(entry, _)| entry));
        self.modules.push(Planned { group, node: index, name: group.kohya_name(node.path), kind });
    }

    fn lokr(&self, layer: LayerShape, o: &Overrides) -> Option<PlannedKind> {
        let config = self.config;
        let conv_dim = if self.preset.enable_conv { config.conv_dim.unwrap_or(config.dim) } else { 0 };
        let conv_alpha = config.conv_alpha.unwrap_or(config.alpha);
        let (dim, alpha) = if !layer.is_spatial() && config.dim > 0 {
            (o.dim.unwrap_or(config.dim), o.alpha.unwrap_or(config.alpha))
        } else if layer.kernel.is_some() && (conv_dim > 0 || o.dim.is_some()) {
            (o.dim.unwrap_or(conv_dim), o.alpha.unwrap_or(conv_alpha))
        } else {
            return None;
        };
        let options = LokrOptions {
            dim,
            alpha: Some(alpha),
            factor: o.factor.unwrap_or(config.factor),
            full_matrix: o.full_matrix.unwrap_or(config.full_matrix),
            decompose_both: o.decompose_both.unwrap_or(config.decompose_both),
            use_tucker: o.use_tucker.unwrap_or(config.use_tucker),
            rs_lora: o.rs_lora.unwrap_or(config.rs_lora),
            unbalanced_factorization: o.unbalanced_factorization.unwrap_or(config.unbalanced_factorization),
        };
        let use_scalar = o.use_scalar.unwrap_or(config.use_scalar);
        let bypass = o.bypass_mode.unwrap_or(config.bypass_mode);
        Some(PlannedKind::Lokr { shape: LokrShape::new(layer, &options), factor: options.factor, use_scalar, bypass })
    }

    fn class_table(&self, class: &str) -> Option<(Entry, &'a Overrides)> {
        let preset = self.preset;
        let index = preset.by_class.iter().position(|(name, _)| name == class)?;
        Some((Entry::ByClass(index), &preset.by_class[index].1))
    }

    fn excluded(&mut self, path: &str) -> bool {
        if path.is_empty() {
            return false;
        }
        let hits: Vec<Entry> = matching(&self.preset.exclude, path).map(Entry::Exclude).collect();
        let hit = !hits.is_empty();
        self.used.extend(hits);
        hit
    }

    fn unmatched(&self, trees: &[(ParameterGroup, Vec<Node>)]) -> Vec<String> {
        let preset = self.preset;
        let mut out = Vec::new();
        let mut report = |entry: Entry, key: &str, text: &str| {
            if !self.used.contains(&entry) {
                out.push(format!("{key}: {text}"));
            }
        };
        for (text, targets, part) in [(false, &preset.unet, "unet"), (true, &preset.text_encoder, "text_encoder")] {
            // A network that was not given cannot be missed.
            if !trees.iter().any(|(group, _)| group.is_text_encoder() == text) {
                continue;
            }
            for (i, class) in targets.classes.iter().enumerate() {
                report(Entry::Class(text, i), &format!("{part}_target_module"), class);
            }
            for (i, pattern) in targets.names.iter().enumerate() {
                report(Entry::Name(text, i), &format!("{part}_target_name"), pattern.text());
            }
        }
        if trees.iter().any(|(group, _)| group.is_text_encoder()) && trees.iter().any(|(group, _)| !group.is_text_encoder()) {
            for (i, (class, _)) in preset.by_class.iter().enumerate() {
                report(Entry::ByClass(i), "module_algo_map", class);
            }
            for (i, (pattern, _)) in preset.by_name.iter().enumerate() {
                report(Entry::ByName(i), "name_algo_map", pattern.text());
            }
            for (i, pattern) in preset.exclude.iter().enumerate() {
                report(Entry::Exclude(i), "exclude_name", pattern.text());
            }
        }
        out
    }
}

fn matching<'p>(patterns: &'p [Pattern], path: &'p str) -> impl Iterator<Item = usize> + 'p {
    patterns.iter().enumerate().filter(move |(_, p)| p.matches(path)).map(|(i, _)| i)
}

/// First index behind the subtree of node `start`.
fn subtree_end(nodes: &[Node], start: usize) -> usize {
    let root = nodes[start].path;
    let inside = |node: &&Node| root.is_empty() || node.path.strip_prefix(root).is_some_and(|rest| rest.starts_with('.'));
    start + 1 + nodes[start + 1..].iter().take_while(inside).count()
}
