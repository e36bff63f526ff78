//! Reading an adapter's file: shapes tell rank and form, alpha and the metadata tell the scale. Files of LyCORIS, kohya and
//! of programs with diffusers' module names are read; anything that would be guessed is an error or is listed.
//!
//! Scale: 1 where both factors are full (alpha is ignored, as by every reader), but sqrt(dim) if the metadata says that
//! LyCORIS trained with rs_lora; else alpha over rank, 1 if there is no alpha.

use crate::error::{Error, Result};
use crate::file::{FOLDED, FOLDED_KEY};
use crate::group::ParameterGroup;
use crate::module::{LokrModule, Module, Multiplier, NormModule};
use crate::names;
use crate::network::{Entry, LokrNetwork, Trees, device, node_kind};
use crate::shape::{Factor, Form, LayerShape, LokrShape};
use crate::walk::NodeKind;
use candle_core::{DType, Device, Tensor};
use sdxl::layers::ModuleNode;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use storage::safetensors::{Dtype, SafeTensors};

/// The tensors of one module, by what follows the last dot of their keys.
pub(crate) type FileModule = BTreeMap<String, String>;

/// The file's tensors by module, modules by name.
pub(crate) fn group(file: &SafeTensors) -> BTreeMap<String, FileModule> {
    let mut modules = BTreeMap::<String, FileModule>::new();
    for key in file.names() {
        let (module, tensor) = key.rsplit_once('.').unwrap_or(("", key));
        modules.entry(module.into()).or_default().insert(tensor.into(), key.into());
    }
    modules
}

/// Whether a tensor of this name belongs to a LoKr or a trained norm.
pub(crate) fn is_ours(tensor: &str) -> bool {
    tensor == "w_norm" || tensor == "b_norm" || Factor::ALL.iter().any(|f| f.key() == tensor)
}

/// What a file without LoKr tensors seems to be.
pub(crate) fn other_kind(file: &SafeTensors) -> Option<&'static str> {
    let any = |part: &str| file.names().any(|name| name.contains(part));
    if any("lora_down") || any("lora_A") {
        Some("a LoRA")
    } else if any("hada_w1") {
        Some("a LoHa")
    } else if any("oft_blocks") || any("oft_diag") {
        Some("an OFT")
    } else if any("model.diffusion_model.") {
        Some("a whole model")
    } else {
        None
    }
}

/// A tensor's values as f32, from any type a weight has.
pub(crate) fn tensor(file: &SafeTensors, key: &str) -> Result<Tensor> {
    let missing = || Error::Dtype { path: file.path().into(), tensor: key.into(), dtype: "missing".into() };
    let (info, bytes) = file.info(key).zip(file.bytes(key)).ok_or_else(missing)?;
    let dtype = match info.dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F64 => DType::F64,
        other => return Err(Error::Dtype { path: file.path().into(), tensor: key.into(), dtype: format!("{other:?}").to_lowercase() }),
    };
    Ok(Tensor::from_raw_buffer(bytes, dtype, &info.shape, &Device::Cpu)?.to_dtype(DType::F32)?)
}

impl LokrNetwork {
    /// Reads a file and attaches its modules. What has no layer here is listed in [`LokrNetwork::unmatched`], key by key.
    ///
    /// # Errors
    /// [`Error::NotLokr`], [`Error::NoLayer`]; for a module with a layer [`Error::MissingTensor`], [`Error::Shape`],
    /// [`Error::Alpha`], [`Error::UnsupportedTensor`] (DoRA), [`Error::Dtype`]; [`Error::Duplicate`] if two modules of the file
    /// are one layer; [`Error::Storage`].
    pub fn from_file(path: &Path, trees: Trees) -> Result<Self> {
        let file = SafeTensors::open(path)?;
        let mut modules = group(&file);
        let is_lokr = |tensors: &FileModule| tensors.keys().any(|t| is_ours(t));
        if !modules.values().any(is_lokr) {
            let looks_like = other_kind(&file);
            return Err(Error::NotLokr { path: path.into(), keys: file.names().count(), looks_like });
        }
        let first = modules.keys().next().cloned().unwrap_or_default();
        let total = modules.len();
        let rs_lora = says_rs_lora(file.metadata());
        let reader = Reader { file: &file, rs_lora };
        let multiplier = Multiplier::new(1.0);
        let mut entries = Vec::new();
        let mut unmatched = Vec::new();
        for (group, tree) in trees.iter() {
            for node in tree.nodes.iter().filter(|node| node_kind(&node.leaf) != NodeKind::Other) {
                let kohya = group.kohya_name(&node.path);
                let mut found = names::aliases(group, &node.path).into_iter().filter_map(|n| modules.remove(&n).map(|t| (n, t)));
                let Some((name, tensors)) = found.next() else { continue };
                if found.next().is_some() {
                    return Err(Error::Duplicate { name: kohya, path: node.path.clone() });
                }
                let leftover = |t: &&String| !is_ours(t) && *t != "alpha" && *t != "dora_scale";
                unmatched.extend(tensors.keys().filter(leftover).map(|t| tensors[t].clone()));
                if let Some(module) = reader.module(kohya, &name, &tensors, node)? {
                    let module = match module {
                        Built::Lokr(m) => Module::Lokr(m.with_multiplier(multiplier.clone()).into()),
                        Built::Norm(m) => Module::Norm(m.with_multiplier(multiplier.clone()).into()),
                    };
                    entries.push(Entry { group, path: node.path.clone(), leaf: node.leaf.clone(), module });
                }
            }
        }
        unmatched.extend(modules.into_values().flat_map(BTreeMap::into_values));
        if entries.is_empty() {
            return Err(Error::NoLayer { path: path.into(), modules: total, first });
        }
        Ok(Self::from_entries(entries, multiplier, unmatched))
    }
}

/// Whether LyCORIS's arguments in the metadata ask for rs_lora, and the scale is not in the factors already.
fn says_rs_lora(metadata: &BTreeMap<String, String>) -> bool {
    if metadata.get(FOLDED_KEY).is_some_and(|v| v == FOLDED) {
        return false;
    }
    let args = metadata.get("ss_network_args").and_then(|text| serde_json::from_str::<HashMap<String, serde_json::Value>>(text).ok());
    // Any text but "false" is true there, as in LyCORIS's str_bool.
    args.and_then(|args| args.get("rs_lora").map(|v| !v.is_null() && v.to_string().trim_matches('"').to_lowercase() != "false"))
        .unwrap_or(false)
}

enum Built {
    Lokr(LokrModule),
    Norm(NormModule),
}

struct Reader<'a> {
    file: &'a SafeTensors,
    rs_lora: bool,
}

impl Reader<'_> {
    /// `None` for a module of another method, whose keys the caller lists.
    fn module(&self, kohya: String, name: &str, tensors: &FileModule, node: &ModuleNode) -> Result<Option<Built>> {
        let device = device(&node.leaf);
        match node_kind(&node.leaf) {
            NodeKind::Layer(layer) if tensors.keys().any(|t| t.starts_with("lokr_")) => {
                if tensors.contains_key("dora_scale") {
                    return Err(self.unsupported(name, "dora_scale", "DoRA is not supported yet"));
                }
                let (shape, values) = self.lokr(name, tensors, layer)?;
                let values = values.into_iter().map(|(f, t)| Ok((f, t.to_device(&device)?))).collect::<Result<_>>()?;
                Ok(Some(Built::Lokr(LokrModule::from_values(kohya, shape, values))))
            }
            NodeKind::Norm(channels) if tensors.keys().any(|t| is_ours(t)) => {
                let read = |key: &str, other: &str| -> Result<Tensor> {
                    let Some(full) = tensors.get(key) else { return Err(self.missing(name, other, key)) };
                    let t = tensor(self.file, full)?;
                    if t.dims() != [channels] {
                        return Err(self.shape(full, t.dims(), format!("the norm has {channels} channels")));
                    }
                    Ok(t.to_device(&device)?)
                };
                Ok(Some(Built::Norm(NormModule::from_values(kohya, read("w_norm", "b_norm")?, read("b_norm", "w_norm")?))))
            }
            NodeKind::Layer(_) | NodeKind::Norm(_) | NodeKind::Other => Ok(None),
        }
    }

    fn lokr(&self, name: &str, tensors: &FileModule, layer: LayerShape) -> Result<(LokrShape, Vec<(Factor, Tensor)>)> {
        let mut parts = Parts { reader: self, name, tensors, values: Vec::new() };
        let (w1, [a, b]) = parts.w1()?;
        let (w2, [c, d], w2_key) = parts.w2(layer)?;
        let values = parts.values;
        if a * c != layer.out || b * d != layer.inp {
            let why =
                format!("with w1 ({a}, {b}) it makes a layer of {} by {}, which is {} by {} here", a * c, b * d, layer.out, layer.inp);
            let got = self.file.info(w2_key).map(|i| i.shape.clone()).unwrap_or_default();
            return Err(self.shape(w2_key, &got, why));
        }
        let mut shape = LokrShape { layer, a, b, c, d, w1, w2, dim: 1, scale: 1.0, alpha: 1.0 };
        self.scale(tensors, &mut shape)?;
        Ok((shape, values))
    }

    fn scale(&self, tensors: &FileModule, shape: &mut LokrShape) -> Result<()> {
        let alpha = match tensors.get("alpha") {
            Some(key) => {
                let values = tensor(self.file, key)?.flatten_all()?.to_vec1::<f32>()?;
                let &[alpha] = values.as_slice() else {
                    return Err(self.shape(key, &[values.len()], "an alpha is one number".into()));
                };
                Some((key, f64::from(alpha)))
            }
            None => None,
        };
        if let Some(rank) = shape.rank() {
            shape.dim = rank;
            shape.scale = match alpha {
                Some((key, alpha)) if !alpha.is_finite() => {
                    return Err(Error::Alpha { path: self.file.path().into(), tensor: key.clone(), value: alpha });
                }
                Some((_, alpha)) => alpha / rank as f64,
                None => 1.0,
            };
            shape.alpha = shape.scale * rank as f64;
            return Ok(());
        }
        let finite = alpha.map(|(_, alpha)| alpha).filter(|alpha| alpha.is_finite() && *alpha > 0.0);
        shape.alpha = finite.unwrap_or(1.0);
        shape.dim = shape.alpha.round().max(1.0) as usize;
        if self.rs_lora {
            // Saved was dim * sqrt(dim), and the scale is sqrt(dim).
            let Some(alpha) = finite else {
                let key = tensors.get("alpha").cloned().unwrap_or_default();
                return Err(Error::Alpha { path: self.file.path().into(), tensor: key, value: alpha.map_or(f64::NAN, |(_, a)| a) });
            };
            shape.scale = alpha.cbrt();
            shape.dim = alpha.cbrt().powi(2).round().max(1.0) as usize;
        }
        Ok(())
    }

    fn missing(&self, module: &str, present: &str, missing: &str) -> Error {
        Error::MissingTensor { path: self.file.path().into(), module: module.into(), present: present.into(), missing: missing.into() }
    }

    fn shape(&self, key: &str, got: &[usize], why: String) -> Error {
        Error::Shape { path: self.file.path().into(), tensor: key.into(), got: got.to_vec(), why }
    }

    fn unsupported(&self, module: &str, tensor: &str, why: &'static str) -> Error {
        Error::UnsupportedTensor { path: self.file.path().into(), module: module.into(), tensor: tensor.into(), why }
    }
}

/// Reads one module's factors.
struct Parts<'a> {
    reader: &'a Reader<'a>,
    name: &'a str,
    tensors: &'a FileModule,
    values: Vec<(Factor, Tensor)>,
}

impl<'a> Parts<'a> {
    fn has(&self, factor: Factor) -> bool {
        self.tensors.contains_key(factor.key())
    }

    /// Reads a factor, whose presence `because` asks for, and keeps it in the shape that `fit` gives.
    fn take(
        &mut self,
        factor: Factor,
        because: &str,
        fit: impl Fn(&[usize]) -> Option<Vec<usize>>,
        want: &str,
    ) -> Result<(Vec<usize>, &'a str)> {
        let Some(key) = self.tensors.get(factor.key()) else { return Err(self.reader.missing(self.name, because, factor.key())) };
        let value = tensor(self.reader.file, key)?;
        let Some(dims) = fit(value.dims()).filter(|dims| dims.iter().all(|&n| n > 0)) else {
            return Err(self.reader.shape(key, value.dims(), want.into()));
        };
        self.values.push((factor, value.reshape(dims.as_slice())?));
        Ok((dims, key))
    }

    /// A matrix; trailing ones are dropped.
    fn matrix(&mut self, factor: Factor, because: &str) -> Result<([usize; 2], &'a str)> {
        let fit = |dims: &[usize]| match dims {
            [r, c, ones @ ..] if ones.iter().all(|&n| n == 1) => Some(vec![*r, *c]),
            _ => None,
        };
        let (dims, key) = self.take(factor, because, fit, "a matrix was expected")?;
        Ok(([dims[0], dims[1]], key))
    }

    fn some_tensor(&self) -> String {
        self.tensors.keys().find(|t| t.starts_with("lokr_")).cloned().unwrap_or_default()
    }

    fn w1(&mut self) -> Result<(Form, [usize; 2])> {
        if self.has(Factor::W1) || !(self.has(Factor::W1A) || self.has(Factor::W1B)) {
            let because = self.some_tensor();
            return Ok((Form::Full, self.matrix(Factor::W1, &because)?.0));
        }
        let ([a, r], _) = self.matrix(Factor::W1A, Factor::W1B.key())?;
        let ([rank, b], key) = self.matrix(Factor::W1B, Factor::W1A.key())?;
        self.same_rank(r, rank, key, &[rank, b])?;
        Ok((Form::LowRank { rank }, [a, b]))
    }

    fn same_rank(&self, a: usize, b: usize, key: &str, got: &[usize]) -> Result<()> {
        if a == b { Ok(()) } else { Err(self.reader.shape(key, got, format!("its partner has rank {a}"))) }
    }

    /// Form, (c, d), and the key to name in a message.
    fn w2(&mut self, layer: LayerShape) -> Result<(Form, [usize; 2], &'a str)> {
        let (kernel, area) = (layer.kernel, layer.kernel_area());
        if self.has(Factor::W2) || !(self.has(Factor::W2A) || self.has(Factor::W2B)) {
            let because = self.some_tensor();
            // A 1x1 kernel is stored as (c, d) or (c, d, 1, 1); a linear layer's w2 may have the ones as well.
            let fit = |dims: &[usize]| {
                let given = match dims {
                    [_, _] => (1, 1),
                    [_, _, h, w] => (*h, *w),
                    _ => return None,
                };
                (given == kernel.unwrap_or((1, 1))).then(|| LayerShape { out: dims[0], inp: dims[1], kernel }.weight_dims())
            };
            let want = format!("the layer's kernel is {:?}", kernel.unwrap_or((1, 1)));
            let (dims, key) = self.take(Factor::W2, &because, fit, &want)?;
            return Ok((Form::Full, [dims[0], dims[1]], key));
        }
        if self.has(Factor::T2) {
            let ([r, c], _) = self.matrix(Factor::W2A, Factor::T2.key())?;
            let ([rank, d], key) = self.matrix(Factor::W2B, Factor::T2.key())?;
            let (h, w) = kernel.unwrap_or((1, 1));
            let want = format!("a core ({r}, {rank}, {h}, {w}) was expected");
            self.take(Factor::T2, Factor::W2A.key(), |dims| (dims == [r, rank, h, w]).then(|| dims.to_vec()), &want)?;
            self.same_rank(r, rank, key, &[rank, d])?;
            return Ok((Form::Tucker { rank }, [c, d], key));
        }
        let ([c, r], _) = self.matrix(Factor::W2A, Factor::W2B.key())?;
        // (r, d*kh*kw); sd-scripts' branch and older files keep the kernel's sides apart.
        let fit = |dims: &[usize]| dims.split_first().map(|(r, rest)| vec![*r, rest.iter().product()]);
        let (dims, key) = self.take(Factor::W2B, Factor::W2A.key(), fit, "a matrix was expected")?;
        self.same_rank(r, dims[0], key, &dims)?;
        if dims[1] % area != 0 {
            return Err(self.reader.shape(key, &dims, format!("its second side is no multiple of the kernel's {area} elements")));
        }
        Ok((Form::LowRank { rank: r }, [c, dims[1] / area], key))
    }
}

/// The network that a module's name belongs to.
pub(crate) fn group_of(name: &str) -> Option<ParameterGroup> {
    let any = |prefixes: &[&str]| prefixes.iter().any(|p| name.starts_with(p));
    if any(&["lora_te1_", "text_encoder."]) {
        Some(ParameterGroup::TextEncoder1)
    } else if any(&["lora_te2_", "text_encoder_2."]) {
        Some(ParameterGroup::TextEncoder2)
    } else if any(&["lora_unet_", "lycoris_", "diffusion_model.", "unet."]) {
        Some(ParameterGroup::Unet)
    } else {
        None
    }
}
