//! Building a network from a checkpoint: each constructor takes its tensors by name and shape, every mismatch is
//! gathered, and all are reported at once.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use ops::Weight;

use crate::checkpoint::{Checkpoint, Part, zeros};
use crate::error::{Error, Result};
use crate::layers::{Conv2d, Leaf, Linear, ModuleNode, ModuleTree, Norm};

/// What was found wrong while a network was built.
#[derive(Default)]
struct Findings {
    missing: Vec<String>,
    misshapen: Vec<String>,
    used: BTreeSet<String>,
}

/// The state of one network's construction.
pub struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    part: Part,
    dtype: Option<DType>,
    findings: RefCell<Findings>,
    tree: RefCell<ModuleTree>,
}

impl<'a> Builder<'a> {
    /// Builds `part` of `checkpoint` with weights stored as `dtype`, or as they are in the file. [`DType::F8E4M3`] keeps those of linear
    /// layers and convolutions as the codes of [`ops::e4m3_codes`] and the rest as in the file.
    pub fn new(checkpoint: &'a Checkpoint, part: Part, dtype: Option<DType>) -> Self {
        Self { checkpoint, part, dtype, findings: RefCell::default(), tree: RefCell::default() }
    }

    /// The root module.
    pub fn root(&self, class: &'static str) -> Scope<'_, 'a> {
        Scope::open(self, String::new(), class)
    }

    /// The module tree, if every tensor was there, had its shape, and none was left over.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with all names and shapes.
    pub fn finish(self) -> Result<ModuleTree> {
        let Findings { missing, misshapen, used } = self.findings.into_inner();
        let extra: Vec<String> = self
            .checkpoint
            .names(self.part)
            .filter(|name| !used.contains(*name))
            .map(|name| format!("{name} {:?}", self.checkpoint.shape(self.part, name).unwrap_or_default()))
            .collect();
        if missing.is_empty() && misshapen.is_empty() && extra.is_empty() {
            return Ok(self.tree.into_inner());
        }
        Err(Error::Mismatch { path: self.checkpoint.path().to_path_buf(), part: self.part, missing, misshapen, extra })
    }

    /// Notes that the network has this tensor. Gives zeros without memory where none is to be read, or it does not fit.
    fn stand_in(&self, name: &str, shape: &[usize], dtype: Option<DType>) -> Result<Option<Tensor>> {
        if self.checkpoint.record(self.part, name, shape) {
            return zeros(shape, dtype.unwrap_or(DType::F32)).map(Some);
        }
        let found = self.checkpoint.shape(self.part, name);
        let mut findings = self.findings.borrow_mut();
        match found {
            Some(found) if found == shape => {
                findings.used.insert(name.into());
                if self.checkpoint.has_weights() {
                    return Ok(None);
                }
                let stored = self.checkpoint.dtype(self.part, name).map_or(DType::F32, weight_type);
                return zeros(shape, dtype.unwrap_or(stored)).map(Some);
            }
            Some(found) => {
                findings.misshapen.push(format!("{name}: {found:?}, expected {shape:?}"));
                findings.used.insert(name.into());
            }
            None => findings.missing.push(format!("{name} {shape:?}")),
        }
        // Construction goes on, so that all mismatches are found; nothing is computed with this tensor.
        zeros(shape, DType::U8).map(Some)
    }

    fn take(&self, name: &str, shape: &[usize], dtype: Option<DType>) -> Result<Tensor> {
        match self.stand_in(name, shape, dtype)? {
            Some(zeros) => Ok(zeros),
            None => self.read(name, dtype),
        }
    }

    fn read(&self, name: &str, dtype: Option<DType>) -> Result<Tensor> {
        let tensor = self.checkpoint.load(self.part, name)?;
        let dtype = dtype.unwrap_or_else(|| weight_type(tensor.dtype()));
        let kept = if dtype == DType::F8E4M3 { ops::e4m3_codes(&tensor)? } else { tensor.to_dtype(dtype)? };
        Ok(kept.to_device(self.checkpoint.device())?)
    }

    /// The weight of a layer, which stays in the file's map where nothing has to be done to it.
    fn take_weight(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        if let Some(zeros) = self.stand_in(name, shape, self.dtype)? {
            return Ok(zeros.into());
        }
        let as_stored = self.dtype.is_none() || self.dtype == self.checkpoint.dtype(self.part, name);
        let mapped = if as_stored { self.checkpoint.mapped(self.part, name) } else { None };
        mapped.map_or_else(|| Ok(self.read(name, self.dtype)?.into()), |m| Ok(Weight::Mapped(m)))
    }
}

/// In what a weight is kept if nothing else is asked for: its own type, if it can be widened a layer at a time.
fn weight_type(stored: DType) -> DType {
    if matches!(stored, DType::F16 | DType::BF16) { stored } else { DType::F32 }
}

/// A place in the tree of modules. Opening one records the module.
pub struct Scope<'b, 'a> {
    builder: &'b Builder<'a>,
    path: String,
}

impl<'b, 'a> Scope<'b, 'a> {
    fn open(builder: &'b Builder<'a>, path: String, class: &'static str) -> Self {
        builder.tree.borrow_mut().nodes.push(ModuleNode { path: path.clone(), class, leaf: Leaf::Other });
        Self { builder, path }
    }

    fn join(&self, name: impl Display) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }

    fn leaf(&self, path: String, class: &'static str, leaf: Leaf) {
        self.builder.tree.borrow_mut().nodes.push(ModuleNode { path, class, leaf });
    }

    /// The child module `name` of class `class`.
    pub fn enter(&self, name: impl Display, class: &'static str) -> Scope<'b, 'a> {
        Scope::open(self.builder, self.join(name), class)
    }

    fn weight(&self, path: &str, shape: &[usize]) -> Result<Weight> {
        self.builder.take_weight(&format!("{path}.weight"), shape)
    }

    /// A tensor that never is kept in 8 bits.
    fn plain(&self, name: String, shape: &[usize]) -> Result<Tensor> {
        let dtype = self.builder.dtype.filter(|d| *d != DType::F8E4M3);
        self.builder.take(&name, shape, dtype)
    }

    /// A bare tensor of this module, in its storage type.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.plain(self.join(name), shape)
    }

    /// A linear layer `(out, in)`.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn linear(&self, name: impl Display, out: usize, inner: usize, bias: bool) -> Result<Arc<Linear>> {
        let path = self.join(name);
        let weight = self.weight(&path, &[out, inner])?;
        let bias = if bias { Some(self.plain(format!("{path}.bias"), &[out])?) } else { None };
        let layer = Arc::new(Linear::new(weight, bias));
        self.leaf(path, "Linear", Leaf::Linear(layer.clone()));
        Ok(layer)
    }

    /// A convolution `(o, c, k, k)` with bias.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn conv2d(&self, name: impl Display, o: usize, c: usize, k: usize, stride: usize, padding: usize) -> Result<Arc<Conv2d>> {
        let path = self.join(name);
        let weight = self.weight(&path, &[o, c, k, k])?;
        let bias = self.plain(format!("{path}.bias"), &[o])?;
        let layer = Arc::new(Conv2d::new(weight, Some(bias), stride, padding));
        self.leaf(path, "Conv2d", Leaf::Conv2d(layer.clone()));
        Ok(layer)
    }

    fn norm(&self, name: impl Display, class: &'static str, channels: usize, eps: f64, groups: Option<usize>) -> Result<Arc<Norm>> {
        let path = self.join(name);
        let weight = self.builder.take(&format!("{path}.weight"), &[channels], Some(DType::F32))?;
        let bias = self.builder.take(&format!("{path}.bias"), &[channels], Some(DType::F32))?;
        let layer = Arc::new(Norm::new(weight, bias, eps, groups)?);
        self.leaf(path, class, Leaf::Norm(layer.clone()));
        Ok(layer)
    }

    /// A group norm; `class` is `GroupNorm` or, in ResNets of sd-scripts' UNet, `GroupNorm32`.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn group_norm(&self, name: impl Display, class: &'static str, channels: usize, groups: usize, eps: f64) -> Result<Arc<Norm>> {
        self.norm(name, class, channels, eps, Some(groups))
    }

    /// A layer norm.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn layer_norm(&self, name: impl Display, channels: usize, eps: f64) -> Result<Arc<Norm>> {
        self.norm(name, "LayerNorm", channels, eps, None)
    }
}
