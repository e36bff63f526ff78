//! The configuration of each network, read off the tensors of the checkpoint.
//!
//! Widths, depths and which blocks exist show in names and shapes. What they cannot show (how a width divides into heads
//! and norm groups) comes from [`HeadDims`].

use crate::checkpoint::{Checkpoint, HeadDims, Part};
use crate::error::{Error, Result};

/// Shapes of a part, with errors that name what is missing.
struct Shapes<'a> {
    checkpoint: &'a Checkpoint,
    part: Part,
}

impl Shapes<'_> {
    fn get(&self, name: &str) -> Option<Vec<usize>> {
        self.checkpoint.shape(self.part, name)
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn dim(&self, name: &str, axis: usize) -> Result<usize> {
        let shape = self.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.checkpoint.path().to_path_buf(),
            part: self.part,
            name: name.to_string(),
        })?;
        shape.get(axis).copied().ok_or_else(|| Error::Mismatch {
            path: self.checkpoint.path().to_path_buf(),
            part: self.part,
            missing: vec![],
            misshapen: vec![format!("{name}: {shape:?}, expected at least {} dimensions", axis + 1)],
            extra: vec![],
        })
    }

    /// How many consecutive numbers from 0 on make `name(i)` exist.
    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..).take_while(|&i| self.has(&name(i))).count()
    }

    fn divides(&self, key: &'static str, part: usize, whole: usize) -> Result<()> {
        if part > 0 && whole.is_multiple_of(part) {
            return Ok(());
        }
        Err(Error::HeadDims {
            path: self.checkpoint.path().to_path_buf(),
            what: format!("{key} = {part} does not divide {whole} channels of the {}", self.part),
        })
    }
}

/// Configuration of the UNet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UNetConfig {
    /// Latent channels in (SDXL: 4).
    pub in_channels: usize,
    /// Latent channels out (SDXL: 4).
    pub out_channels: usize,
    /// Channels per level (SDXL: 320, 640, 1280).
    pub block_out_channels: Vec<usize>,
    /// ResNets per level on the way down (SDXL: 2); one more on the way up.
    pub layers_per_block: usize,
    /// Transformer blocks behind each ResNet, per level (SDXL: 0, 2, 10).
    pub transformer_depth: Vec<usize>,
    /// Transformer blocks in the middle (SDXL: 10).
    pub mid_depth: usize,
    /// Width of the text context (SDXL: 2048).
    pub context_dim: usize,
    /// Width of the added condition (SDXL: 2816).
    pub adm_dim: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
}

impl UNetConfig {
    /// Reads the configuration off a checkpoint's tensors.
    ///
    /// # Errors
    /// If a tensor that shows a width is missing, or `dims` does not divide the widths.
    pub fn of_checkpoint(checkpoint: &Checkpoint, dims: HeadDims) -> Result<Self> {
        let s = Shapes { checkpoint, part: Part::Unet };
        let blocks = s.count(|i| if i == 0 { "input_blocks.0.0.weight".into() } else { first_tensor(&s, i) });
        let (mut channels, mut depth, mut layers) = (vec![], vec![], 0);
        let mut level_open = false;
        for i in 1..blocks {
            if s.has(&format!("input_blocks.{i}.0.op.weight")) {
                level_open = false;
                continue;
            }
            let width = s.dim(&format!("input_blocks.{i}.0.in_layers.2.weight"), 0)?;
            if !level_open {
                channels.push(width);
                depth.push(s.count(|k| format!("input_blocks.{i}.1.transformer_blocks.{k}.norm1.weight")));
                level_open = true;
            }
            if channels.len() == 1 {
                layers += 1;
            }
        }
        if channels.is_empty() {
            s.dim("input_blocks.1.0.in_layers.2.weight", 0)?;
        }
        let mid_depth = s.count(|k| format!("middle_block.1.transformer_blocks.{k}.norm1.weight"));
        let config = Self {
            in_channels: s.dim("input_blocks.0.0.weight", 1)?,
            out_channels: s.dim("out.2.weight", 0)?,
            layers_per_block: layers,
            transformer_depth: depth,
            mid_depth,
            context_dim: s.dim("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1)?,
            adm_dim: s.dim("label_emb.0.0.weight", 1)?,
            head_dim: dims.head_dim,
            norm_num_groups: dims.norm_num_groups,
            block_out_channels: channels,
        };
        for (&width, &depth) in config.block_out_channels.iter().zip(&config.transformer_depth) {
            s.divides("norm_num_groups", config.norm_num_groups, width)?;
            if depth > 0 {
                s.divides("head_dim", config.head_dim, width)?;
            }
        }
        Ok(config)
    }
}

/// A tensor that input block `i` has whatever it is.
fn first_tensor(s: &Shapes, i: usize) -> String {
    let down = format!("input_blocks.{i}.0.op.weight");
    if s.has(&down) { down } else { format!("input_blocks.{i}.0.in_layers.2.weight") }
}

/// Configuration of a CLIP text encoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClipConfig {
    /// Features per token (SDXL: 768 and 1280).
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Transformer layers (SDXL: 12 and 32).
    pub layers: usize,
    /// Features inside the MLP (SDXL: 3072 and 5120).
    pub ff: usize,
    /// Vocabulary (49408).
    pub vocabulary: usize,
    /// Positions (77).
    pub positions: usize,
    /// Features of the pooled projection, for the second encoder (SDXL: 1280).
    pub projection: Option<usize>,
}

impl ClipConfig {
    /// Reads the configuration of text encoder `part` off a checkpoint's tensors.
    ///
    /// # Errors
    /// If a tensor that shows a width is missing, or `dims` does not divide the width.
    pub fn of_checkpoint(checkpoint: &Checkpoint, part: Part, dims: HeadDims) -> Result<Self> {
        let s = Shapes { checkpoint, part };
        let token = "text_model.embeddings.token_embedding.weight";
        let width = s.dim(token, 1)?;
        let (key, heads) = if part == Part::TextEncoder1 { ("te1_heads", dims.te1_heads) } else { ("te2_heads", dims.te2_heads) };
        s.divides(key, heads, width)?;
        let projection = if part == Part::TextEncoder2 { Some(s.dim("text_projection.weight", 0)?) } else { None };
        Ok(Self {
            width,
            heads,
            layers: s.count(|i| format!("text_model.encoder.layers.{i}.mlp.fc1.weight")),
            ff: s.dim("text_model.encoder.layers.0.mlp.fc1.weight", 0)?,
            vocabulary: s.dim(token, 0)?,
            positions: s.dim("text_model.embeddings.position_embedding.weight", 0)?,
            projection,
        })
    }
}

/// Configuration of the VAE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaeConfig {
    /// Channels per level (SDXL: 128, 256, 512, 512).
    pub block_out_channels: Vec<usize>,
    /// ResNets per level of the encoder (SDXL: 2); the decoder has one more.
    pub layers_per_block: usize,
    /// Latent channels (SDXL: 4).
    pub latent_channels: usize,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
}

impl VaeConfig {
    /// Reads the configuration off a checkpoint's tensors.
    ///
    /// # Errors
    /// If a tensor that shows a width is missing, or `dims` does not divide the widths.
    pub fn of_checkpoint(checkpoint: &Checkpoint, dims: HeadDims) -> Result<Self> {
        let s = Shapes { checkpoint, part: Part::Vae };
        let conv = |i: usize, j: usize| format!("encoder.down.{i}.block.{j}.conv1.weight");
        let levels = s.count(|i| conv(i, 0));
        let groups = dims.vae_norm_num_groups;
        let channels = (0..levels).map(|i| s.dim(&conv(i, 0), 0)).collect::<Result<Vec<_>>>()?;
        for &width in &channels {
            s.divides("vae_norm_num_groups", groups, width)?;
        }
        if channels.is_empty() {
            s.dim(&conv(0, 0), 0)?;
        }
        Ok(Self {
            layers_per_block: s.count(|j| conv(0, j)),
            latent_channels: s.dim("post_quant_conv.weight", 0)?,
            norm_num_groups: groups,
            block_out_channels: channels,
        })
    }
}
