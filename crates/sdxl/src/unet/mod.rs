//! The SDXL UNet with its added conditioning: noise prediction from latents, timestep, text context and the vector of
//! pooled text and sizes (Podell et al. 2023; sd-scripts `library/sdxl_original_unet.py`).

mod blocks;

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use ops::Value;

pub use blocks::{BasicTransformerBlock, CrossAttention, FeedForward, ResnetBlock2D, Transformer2DModel};

use crate::build::{Builder, Scope};
use crate::checkpoint::{Checkpoint, Part};
use crate::conditioning::timestep_embedding;
use crate::config::UNetConfig;
use crate::error;
use crate::layers::{Conv2d, Linear, ModuleTree, Norm};
use crate::recompute::GradientCheckpointing;

enum Layer {
    Conv(Arc<Conv2d>),
    Resnet(Arc<ResnetBlock2D>),
    Transformer(Arc<Transformer2DModel>),
    Downsample(Arc<Conv2d>),
    Upsample(Arc<Conv2d>),
}

/// The UNet.
pub struct UNet {
    time_embed: (Arc<Linear>, Arc<Linear>),
    label_emb: (Arc<Linear>, Arc<Linear>),
    input_blocks: Vec<Vec<Layer>>,
    middle_block: Vec<Layer>,
    output_blocks: Vec<Vec<Layer>>,
    out_norm: Arc<Norm>,
    out_conv: Arc<Conv2d>,
    /// Type of the activations.
    pub compute: DType,
    /// Its shape.
    pub config: UNetConfig,
    /// Its modules.
    pub tree: ModuleTree,
}

struct Maker<'c> {
    config: &'c UNetConfig,
    temb: usize,
}

impl Maker<'_> {
    fn resnet(&self, s: &Scope, name: usize, c: usize, o: usize) -> error::Result<Layer> {
        let s = s.enter(name, "ResnetBlock2D");
        Ok(Layer::Resnet(Arc::new(ResnetBlock2D::new(&s, c, o, self.temb, self.config.norm_num_groups)?)))
    }

    fn transformer(&self, s: &Scope, name: usize, width: usize, depth: usize) -> error::Result<Layer> {
        let s = s.enter(name, "Transformer2DModel");
        let UNetConfig { context_dim, head_dim, norm_num_groups, .. } = *self.config;
        Ok(Layer::Transformer(Arc::new(Transformer2DModel::new(&s, width, context_dim, head_dim, depth, norm_num_groups)?)))
    }
}

impl UNet {
    /// Builds the UNet of a checkpoint with weights stored as `dtype`, or as in the file.
    ///
    /// # Errors
    /// With the names and shapes of all tensors that are missing, misshapen or left over.
    pub fn load(checkpoint: &Checkpoint, config: UNetConfig, dtype: impl Into<Option<DType>>) -> error::Result<Self> {
        let builder = Builder::new(checkpoint, Part::Unet, dtype.into());
        let root = builder.root("SdxlUNet2DConditionModel");
        let width = config.block_out_channels[0];
        let temb = 4 * width;
        let make = Maker { config: &config, temb };

        let s = root.enter("time_embed", "Sequential");
        let time_embed = (s.linear(0, temb, width, true)?, s.linear(2, temb, temb, true)?);
        let s = root.enter("label_emb", "Sequential").enter(0, "Sequential");
        let label_emb = (s.linear(0, temb, config.adm_dim, true)?, s.linear(2, temb, temb, true)?);

        let list = root.enter("input_blocks", "ModuleList");
        let mut input_blocks = vec![vec![Layer::Conv(list.enter(0, "Sequential").conv2d(0, width, config.in_channels, 3, 1, 1)?)]];
        let (mut skips, mut c) = (vec![width], width);
        let levels = config.block_out_channels.len();
        for (level, (&o, &depth)) in config.block_out_channels.iter().zip(&config.transformer_depth).enumerate() {
            for _ in 0..config.layers_per_block {
                let s = list.enter(input_blocks.len(), "ModuleList");
                let mut layers = vec![make.resnet(&s, 0, c, o)?];
                if depth > 0 {
                    layers.push(make.transformer(&s, 1, o, depth)?);
                }
                input_blocks.push(layers);
                c = o;
                skips.push(c);
            }
            if level + 1 < levels {
                let s = list.enter(input_blocks.len(), "Sequential").enter(0, "Downsample2D");
                input_blocks.push(vec![Layer::Downsample(s.conv2d("op", c, c, 3, 2, 1)?)]);
                skips.push(c);
            }
        }

        let s = root.enter("middle_block", "ModuleList");
        let middle_block = vec![make.resnet(&s, 0, c, c)?, make.transformer(&s, 1, c, config.mid_depth)?, make.resnet(&s, 2, c, c)?];

        let list = root.enter("output_blocks", "ModuleList");
        let mut output_blocks = Vec::new();
        for level in (0..levels).rev() {
            let (o, depth) = (config.block_out_channels[level], config.transformer_depth[level]);
            for j in 0..=config.layers_per_block {
                let s = list.enter(output_blocks.len(), "ModuleList");
                let skip = skips.pop().unwrap_or(0);
                let mut layers = vec![make.resnet(&s, 0, c + skip, o)?];
                c = o;
                if depth > 0 {
                    layers.push(make.transformer(&s, 1, c, depth)?);
                }
                if j == config.layers_per_block && level > 0 {
                    let up = s.enter(layers.len(), "Upsample2D");
                    layers.push(Layer::Upsample(up.conv2d("conv", c, c, 3, 1, 1)?));
                }
                output_blocks.push(layers);
            }
        }

        let s = root.enter("out", "ModuleList");
        let out_norm = s.group_norm(0, "GroupNorm32", c, config.norm_num_groups, 1e-5)?;
        let out_conv = s.conv2d(2, config.out_channels, c, 3, 1, 1)?;
        let tree = builder.finish()?;
        let compute = DType::F32;
        Ok(Self { time_embed, label_emb, input_blocks, middle_block, output_blocks, out_norm, out_conv, compute, config, tree })
    }

    /// Noise (or v) prediction, in f32 whatever the compute type. `latents (n, 4, h, w)`, `timesteps (n)`, `context (n, tokens, context_dim)`,
    /// `vector (n, adm_dim)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(
        &self,
        latents: &Value,
        timesteps: &Tensor,
        context: &Value,
        vector: &Value,
        checkpointing: GradientCheckpointing,
    ) -> Result<Value> {
        self.forward_with(latents, timesteps, context, vector, checkpointing, &mut |_, _| {})
    }

    /// As [`UNet::forward`]; `tap` sees `emb` and the output of each block under its SGM name.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward_with(
        &self,
        latents: &Value,
        timesteps: &Tensor,
        context: &Value,
        vector: &Value,
        checkpointing: GradientCheckpointing,
        tap: &mut dyn FnMut(&str, &Value),
    ) -> Result<Value> {
        let width = self.config.block_out_channels[0];
        let [latents, context, vector] = [latents, context, vector].map(|v| ops::to_dtype(v, self.compute));
        let (latents, context, vector) = (latents?, &context?, &vector?);
        let time = Value::constant(timestep_embedding(timesteps, width)?.to_dtype(self.compute)?);
        let mlp = |(first, second): &(Arc<Linear>, Arc<Linear>), x: &Value| second.forward(&ops::silu(&first.forward(x)?)?);
        let emb = ops::add(&mlp(&self.time_embed, &time)?, &mlp(&self.label_emb, vector)?)?;
        tap("emb", &emb);
        // Every ResNet starts its time projection with the same SiLU.
        let emb = ops::silu(&emb)?;

        let run = |layers: &[Layer], mut h: Value, skip_size: Option<(usize, usize)>| -> Result<Value> {
            for layer in layers {
                h = match layer {
                    Layer::Conv(conv) | Layer::Downsample(conv) => conv.forward(&h)?,
                    Layer::Resnet(block) => {
                        let block = block.clone();
                        checkpointing.block(&[&h, &emb], move |v| block.forward(&v[0], &v[1], checkpointing))?
                    }
                    Layer::Transformer(model) => model.forward(&h, context, checkpointing)?,
                    Layer::Upsample(conv) => {
                        let (_, _, height, width) = h.tensor().dims4()?;
                        // Odd sizes were rounded up on the way down, so the skip knows the size to come back to.
                        let size = skip_size.unwrap_or((2 * height, 2 * width));
                        conv.forward(&ops::upsample_nearest(&h, size)?)?
                    }
                };
            }
            Ok(h)
        };

        let mut skips = Vec::with_capacity(self.input_blocks.len());
        let mut h = latents;
        for (i, layers) in self.input_blocks.iter().enumerate() {
            h = run(layers, h, None)?;
            tap(&format!("input_blocks.{i}"), &h);
            skips.push(h.clone());
        }
        h = run(&self.middle_block, h, None)?;
        tap("middle_block", &h);
        for (i, layers) in self.output_blocks.iter().enumerate() {
            let Some(skip) = skips.pop() else { candle_core::bail!("output block {i} has no skip connection") };
            let next = skips.last().map(|s| (s.dims()[2], s.dims()[3]));
            h = run(layers, ops::cat(&[&h, &skip], 1)?, next)?;
            tap(&format!("output_blocks.{i}"), &h);
        }
        ops::to_dtype(&self.out_conv.forward(&self.out_norm.forward_silu(&h)?)?, DType::F32)
    }
}
