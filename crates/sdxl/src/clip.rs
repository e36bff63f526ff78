//! CLIP text encoders: CLIP-L (quick-GELU) and OpenCLIP bigG (GELU, pooled projection), under transformers' names
//! (transformers `models/clip/modeling_clip.py`).

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use ops::Value;

use crate::build::{Builder, Scope};
use crate::checkpoint::{Checkpoint, Part};
use crate::config::ClipConfig;
use crate::error;
use crate::layers::{Linear, ModuleTree, Norm};
use crate::recompute::GradientCheckpointing;

/// End of text; the pooled output is taken at the first one (sd-scripts `library/strategy_sdxl.py`).
pub const EOS: u32 = 49407;

struct ClipAttention {
    k_proj: Arc<Linear>,
    v_proj: Arc<Linear>,
    q_proj: Arc<Linear>,
    out_proj: Arc<Linear>,
    heads: usize,
}

struct ClipMlp {
    fc1: Arc<Linear>,
    fc2: Arc<Linear>,
    quick: bool,
}

struct ClipEncoderLayer {
    self_attn: ClipAttention,
    layer_norm1: Arc<Norm>,
    mlp: ClipMlp,
    layer_norm2: Arc<Norm>,
}

impl ClipEncoderLayer {
    fn new(s: &Scope, config: &ClipConfig, quick: bool) -> error::Result<Self> {
        let w = config.width;
        let a = s.enter("self_attn", "CLIPAttention");
        let self_attn = ClipAttention {
            k_proj: a.linear("k_proj", w, w, true)?,
            v_proj: a.linear("v_proj", w, w, true)?,
            q_proj: a.linear("q_proj", w, w, true)?,
            out_proj: a.linear("out_proj", w, w, true)?,
            heads: config.heads,
        };
        let layer_norm1 = s.layer_norm("layer_norm1", w, 1e-5)?;
        let m = s.enter("mlp", "CLIPMLP");
        let mlp = ClipMlp { fc1: m.linear("fc1", config.ff, w, true)?, fc2: m.linear("fc2", w, config.ff, true)?, quick };
        let layer_norm2 = s.layer_norm("layer_norm2", w, 1e-5)?;
        Ok(Self { self_attn, layer_norm1, mlp, layer_norm2 })
    }

    fn forward(self: &Arc<Self>, x: &Value, checkpointing: GradientCheckpointing) -> Result<Value> {
        let (first, second) = (self.clone(), self.clone());
        let x = checkpointing.layer(&[x], move |v| first.attend(&v[0]))?;
        checkpointing.layer(&[&x], move |v| second.feed_forward(&v[0]))
    }

    fn attend(&self, x: &Value) -> Result<Value> {
        let h = self.layer_norm1.forward(x)?;
        let a = &self.self_attn;
        let (q, k, v) = (a.q_proj.forward(&h)?, a.k_proj.forward(&h)?, a.v_proj.forward(&h)?);
        ops::add(x, &a.out_proj.forward(&ops::attention(&q, &k, &v, a.heads, true)?)?)
    }

    fn feed_forward(&self, x: &Value) -> Result<Value> {
        let h = self.mlp.fc1.forward(&self.layer_norm2.forward(x)?)?;
        let h = if self.mlp.quick { ops::quick_gelu(&h)? } else { ops::gelu(&h)? };
        ops::add(x, &self.mlp.fc2.forward(&h)?)
    }
}

/// One text encoder.
pub struct ClipTextModel {
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<Arc<ClipEncoderLayer>>,
    final_layer_norm: Arc<Norm>,
    text_projection: Option<Arc<Linear>>,
    /// Type of the activations.
    pub compute: DType,
    /// Its shape.
    pub config: ClipConfig,
    /// Its modules.
    pub tree: ModuleTree,
}

impl ClipTextModel {
    /// Builds text encoder `part` of a checkpoint with weights stored as `dtype`, or as in the file.
    ///
    /// # Errors
    /// With the names and shapes of all tensors that are missing, misshapen or left over.
    pub fn load(checkpoint: &Checkpoint, part: Part, config: ClipConfig, dtype: Option<DType>) -> error::Result<Self> {
        let builder = Builder::new(checkpoint, part, dtype);
        let quick = part == Part::TextEncoder1;
        let root = builder.root(if quick { "CLIPTextModel" } else { "CLIPTextModelWithProjection" });
        let s = root.enter("text_model", "CLIPTextTransformer");
        let e = s.enter("embeddings", "CLIPTextEmbeddings");
        let token_embedding = e.enter("token_embedding", "Embedding").tensor("weight", &[config.vocabulary, config.width])?;
        let position_embedding = e.enter("position_embedding", "Embedding").tensor("weight", &[config.positions, config.width])?;
        let list = s.enter("encoder", "CLIPEncoder").enter("layers", "ModuleList");
        let layers = (0..config.layers)
            .map(|i| Ok(Arc::new(ClipEncoderLayer::new(&list.enter(i, "CLIPEncoderLayer"), &config, quick)?)))
            .collect::<error::Result<_>>()?;
        let final_layer_norm = s.layer_norm("final_layer_norm", config.width, 1e-5)?;
        let text_projection = match config.projection {
            Some(projection) => Some(root.linear("text_projection", projection, config.width, false)?),
            None => None,
        };
        let tree = builder.finish()?;
        let compute = DType::F32;
        Ok(Self { token_embedding, position_embedding, layers, final_layer_norm, text_projection, compute, config, tree })
    }

    /// The input of the last layer, `(rows, tokens, width)`, from token ids of `rows` equally long rows.
    ///
    /// # Errors
    /// If rows differ in length, are longer than the position table, or hold ids outside the vocabulary.
    pub fn penultimate(&self, ids: &[Vec<u32>], checkpointing: GradientCheckpointing) -> Result<Value> {
        let tokens = ids.first().map_or(0, Vec::len);
        if ids.iter().any(|row| row.len() != tokens) || tokens > self.config.positions {
            candle_core::bail!(
                "token rows of lengths {:?}, {} positions",
                ids.iter().map(Vec::len).collect::<Vec<_>>(),
                self.config.positions
            );
        }
        let device = self.token_embedding.device();
        let compute = self.compute;
        let flat = Tensor::from_vec(ids.concat(), ids.len() * tokens, device)?;
        let x = self.token_embedding.index_select(&flat, 0)?.to_dtype(compute)?.reshape((ids.len(), tokens, self.config.width))?;
        let x = x.broadcast_add(&self.position_embedding.narrow(0, 0, tokens)?.to_dtype(compute)?)?;
        let last = self.layers.len().saturating_sub(1);
        self.layers[..last].iter().try_fold(Value::constant(x), |x, layer| run(layer, &x, checkpointing))
    }

    /// The last layer and the final norm behind [`ClipTextModel::penultimate`]'s result, `(rows, tokens, width)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn last(&self, penultimate: &Value, checkpointing: GradientCheckpointing) -> Result<Value> {
        let x = match self.layers.last() {
            Some(layer) => run(layer, penultimate, checkpointing)?,
            None => penultimate.clone(),
        };
        self.final_layer_norm.forward(&x)
    }

    /// The pooled output `(rows, projection)`: [`ClipTextModel::last`] at the first end of text, projected.
    ///
    /// # Errors
    /// If the encoder has no projection, or shapes do not fit.
    pub fn pooled(&self, last: &Value, ids: &[Vec<u32>]) -> Result<Value> {
        let Some(projection) = &self.text_projection else { candle_core::bail!("this text encoder has no text_projection") };
        let rows: Vec<usize> = ids.iter().map(|row| row.iter().position(|&id| id == EOS).unwrap_or(0)).collect();
        projection.forward(&ops::gather_rows(last, &rows)?)
    }
}

fn run(layer: &Arc<ClipEncoderLayer>, x: &Value, checkpointing: GradientCheckpointing) -> Result<Value> {
    let layer = layer.clone();
    checkpointing.block(&[x], move |v| layer.forward(&v[0], checkpointing))
}
