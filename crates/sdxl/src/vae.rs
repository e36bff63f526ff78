//! The SDXL VAE: pixels to the moments of the latent posterior, and latents to pixels (LDM names; CompVis
//! latent-diffusion `ldm/modules/diffusionmodules/model.py`). Always frozen, so it works on plain tensors, and in f32; on a GPU its
//! convolutions round what they multiply to TF32, as they do in PyTorch by default.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Result, Tensor};
use ops::Value;

use crate::build::{Builder, Scope};
use crate::checkpoint::{Checkpoint, Part};
use crate::config::VaeConfig;
use crate::error;
use crate::layers::{Conv2d, Linear, ModuleTree, Norm};

/// SDXL's factor between VAE latents and the UNet's latents (diffusers `scaling_factor`).
pub const LATENT_SCALE: f64 = 0.13025;

const EPS: f64 = 1e-6;

struct ResnetBlock {
    norm1: Arc<Norm>,
    conv1: Arc<Conv2d>,
    norm2: Arc<Norm>,
    conv2: Arc<Conv2d>,
    nin_shortcut: Option<Arc<Conv2d>>,
}

impl ResnetBlock {
    fn new(s: &Scope, c: usize, o: usize, groups: usize) -> error::Result<Self> {
        Ok(Self {
            norm1: s.group_norm("norm1", "GroupNorm", c, groups, EPS)?,
            conv1: s.conv2d("conv1", o, c, 3, 1, 1)?,
            norm2: s.group_norm("norm2", "GroupNorm", o, groups, EPS)?,
            conv2: s.conv2d("conv2", o, o, 3, 1, 1)?,
            nin_shortcut: if c == o { None } else { Some(s.conv2d("nin_shortcut", o, c, 1, 1, 0)?) },
        })
    }

    fn forward(&self, x: &Value) -> Result<Value> {
        let h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        let h = self.conv2.forward(&self.norm2.forward_silu(&h)?)?;
        match &self.nin_shortcut {
            Some(shortcut) => ops::add(&shortcut.forward(x)?, &h),
            None => ops::add(x, &h),
        }
    }
}

/// Self attention over all pixels with one head.
struct AttnBlock {
    norm: Arc<Norm>,
    q: Arc<Linear>,
    k: Arc<Linear>,
    v: Arc<Linear>,
    proj_out: Arc<Linear>,
}

impl AttnBlock {
    fn new(s: &Scope, c: usize, groups: usize) -> error::Result<Self> {
        Ok(Self {
            norm: s.group_norm("norm", "GroupNorm", c, groups, EPS)?,
            q: s.linear("q", c, c, true)?,
            k: s.linear("k", c, c, true)?,
            v: s.linear("v", c, c, true)?,
            proj_out: s.linear("proj_out", c, c, true)?,
        })
    }

    fn forward(&self, x: &Value) -> Result<Value> {
        let (n, c, h, w) = x.tensor().dims4()?;
        let t = ops::transpose(&ops::reshape(&self.norm.forward(x)?, &[n, c, h * w])?, 1, 2)?;
        let (q, k, v) = (self.q.forward(&t)?, self.k.forward(&t)?, self.v.forward(&t)?);
        let y = self.proj_out.forward(&ops::attention(&q, &k, &v, 1, false)?)?;
        ops::add(x, &ops::reshape(&ops::transpose(&y, 1, 2)?, &[n, c, h, w])?)
    }
}

struct Middle {
    block_1: ResnetBlock,
    attn_1: AttnBlock,
    block_2: ResnetBlock,
}

impl Middle {
    fn new(s: &Scope, c: usize, groups: usize) -> error::Result<Self> {
        Ok(Self {
            block_1: ResnetBlock::new(&s.enter("block_1", "ResnetBlock"), c, c, groups)?,
            attn_1: AttnBlock::new(&s.enter("attn_1", "AttnBlock"), c, groups)?,
            block_2: ResnetBlock::new(&s.enter("block_2", "ResnetBlock"), c, c, groups)?,
        })
    }

    fn forward(&self, x: &Value) -> Result<Value> {
        self.block_2.forward(&self.attn_1.forward(&self.block_1.forward(x)?)?)
    }
}

/// ResNets of one resolution and the way to the next.
struct Level {
    block: Vec<ResnetBlock>,
    resample: Option<Arc<Conv2d>>,
}

struct Encoder {
    conv_in: Arc<Conv2d>,
    down: Vec<Level>,
    mid: Middle,
    norm_out: Arc<Norm>,
    conv_out: Arc<Conv2d>,
}

struct Decoder {
    conv_in: Arc<Conv2d>,
    mid: Middle,
    /// From the coarsest level to the finest.
    up: Vec<Level>,
    norm_out: Arc<Norm>,
    conv_out: Arc<Conv2d>,
}

/// The VAE. Its weights are read when they are first needed and stay until [`AutoencoderKL::release`]: a run with cached
/// latents uses them for its previews only.
pub struct AutoencoderKL {
    checkpoint: Checkpoint,
    networks: Mutex<Option<Arc<Networks>>>,
    /// Its shape.
    pub config: VaeConfig,
}

struct Networks {
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Arc<Conv2d>,
    post_quant_conv: Arc<Conv2d>,
}

impl Networks {
    fn load(checkpoint: &Checkpoint, config: &VaeConfig) -> error::Result<(Self, ModuleTree)> {
        let builder = Builder::new(checkpoint, Part::Vae, Some(DType::F32));
        let root = builder.root("AutoencoderKL");
        let (groups, z) = (config.norm_num_groups, config.latent_channels);
        let widths = &config.block_out_channels;
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let blocks = |s: &Scope, count: usize, mut c: usize, o: usize| {
            let list = s.enter("block", "ModuleList");
            (0..count)
                .map(|j| {
                    let block = ResnetBlock::new(&list.enter(j, "ResnetBlock"), c, o, groups);
                    c = o;
                    block
                })
                .collect::<error::Result<Vec<_>>>()
        };

        let s = root.enter("encoder", "Encoder");
        let conv_in = s.conv2d("conv_in", first, 3, 3, 1, 1)?;
        let list = s.enter("down", "ModuleList");
        let (mut down, mut c) = (Vec::new(), first);
        for (i, &o) in widths.iter().enumerate() {
            let s = list.enter(i, "Module");
            let block = blocks(&s, config.layers_per_block, c, o)?;
            let resample =
                if i + 1 < widths.len() { Some(s.enter("downsample", "Downsample").conv2d("conv", o, o, 3, 2, 0)?) } else { None };
            down.push(Level { block, resample });
            c = o;
        }
        let mid = Middle::new(&s.enter("mid", "Module"), last, groups)?;
        let norm_out = s.group_norm("norm_out", "GroupNorm", last, groups, EPS)?;
        let encoder = Encoder { conv_in, down, mid, norm_out, conv_out: s.conv2d("conv_out", 2 * z, last, 3, 1, 1)? };

        let s = root.enter("decoder", "Decoder");
        let conv_in = s.conv2d("conv_in", last, z, 3, 1, 1)?;
        let mid = Middle::new(&s.enter("mid", "Module"), last, groups)?;
        let list = s.enter("up", "ModuleList");
        let (mut up, mut c) = (Vec::new(), last);
        for (i, &o) in widths.iter().enumerate().rev() {
            let s = list.enter(i, "Module");
            let block = blocks(&s, config.layers_per_block + 1, c, o)?;
            let resample = if i > 0 { Some(s.enter("upsample", "Upsample").conv2d("conv", o, o, 3, 1, 1)?) } else { None };
            up.push(Level { block, resample });
            c = o;
        }
        let norm_out = s.group_norm("norm_out", "GroupNorm", first, groups, EPS)?;
        let decoder = Decoder { conv_in, mid, up, norm_out, conv_out: s.conv2d("conv_out", 3, first, 3, 1, 1)? };

        let quant_conv = root.conv2d("quant_conv", 2 * z, 2 * z, 1, 1, 0)?;
        let post_quant_conv = root.conv2d("post_quant_conv", z, z, 1, 1, 0)?;
        let tree = builder.finish()?;
        Ok((Self { encoder, decoder, quant_conv, post_quant_conv }, tree))
    }
}

impl AutoencoderKL {
    /// The VAE of a checkpoint, in f32. Its tensors are checked now and read later.
    ///
    /// # Errors
    /// With the names and shapes of all tensors that are missing, misshapen or left over.
    pub fn load(checkpoint: &Checkpoint, config: VaeConfig) -> error::Result<Self> {
        Networks::load(&checkpoint.clone().without_weights(), &config)?;
        Ok(Self { checkpoint: checkpoint.clone(), networks: Mutex::new(None), config })
    }

    /// Its modules, without weights.
    ///
    /// # Errors
    /// As [`AutoencoderKL::load`].
    pub fn tree(&self) -> error::Result<ModuleTree> {
        Ok(Networks::load(&self.checkpoint.clone().without_weights(), &self.config)?.1)
    }

    /// Lets go of the weights; they are read again when they are needed.
    pub fn release(&self) {
        *self.slot() = None;
    }

    /// Whether the weights are in memory.
    pub fn is_loaded(&self) -> bool {
        self.slot().is_some()
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<Networks>>> {
        self.networks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn networks(&self) -> Result<Arc<Networks>> {
        let mut slot = self.slot();
        if let Some(networks) = &*slot {
            return Ok(networks.clone());
        }
        let networks = Arc::new(Networks::load(&self.checkpoint, &self.config).map_err(candle_core::Error::wrap)?.0);
        *slot = Some(networks.clone());
        Ok(networks)
    }

    /// Where its weights are, and where its inputs must be.
    pub fn device(&self) -> &Device {
        self.checkpoint.device()
    }

    /// Image pixels per latent pixel, each axis (SDXL: 8).
    pub fn factor(&self) -> usize {
        1 << (self.config.block_out_channels.len() - 1)
    }

    /// Mean and log-variance (clamped to [-30, 20]) of the posterior, each `(n, z, h/8, w/8)`, of pixels
    /// `(n, 3, h, w)` in [-1, 1]. Unscaled: the UNet's latents are these times [`LATENT_SCALE`].
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn encode(&self, pixels: &Tensor) -> Result<(Tensor, Tensor)> {
        ops::with_tf32(|| self.encoded(pixels))
    }

    fn encoded(&self, pixels: &Tensor) -> Result<(Tensor, Tensor)> {
        let networks = self.networks()?;
        let e = &networks.encoder;
        let mut h = e.conv_in.forward(&Value::constant(pixels.clone()))?;
        for level in &e.down {
            for block in &level.block {
                h = block.forward(&h)?;
            }
            if let Some(conv) = &level.resample {
                // Zeros on the right and lower side only.
                let padded = h.tensor().pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?;
                h = conv.forward(&Value::constant(padded))?;
            }
        }
        let h = e.mid.forward(&h)?;
        let moments = networks.quant_conv.forward(&e.conv_out.forward(&e.norm_out.forward_silu(&h)?)?)?;
        let z = self.config.latent_channels;
        Ok((moments.tensor().narrow(1, 0, z)?.contiguous()?, moments.tensor().narrow(1, z, z)?.clamp(-30f64, 20f64)?))
    }

    /// Pixels `(n, 3, 8h, 8w)`, about [-1, 1] and unclamped, of unscaled latents `(n, z, h, w)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        ops::with_tf32(|| self.decoded(latents))
    }

    fn decoded(&self, latents: &Tensor) -> Result<Tensor> {
        let networks = self.networks()?;
        let d = &networks.decoder;
        let h = d.conv_in.forward(&networks.post_quant_conv.forward(&Value::constant(latents.clone()))?)?;
        let mut h = d.mid.forward(&h)?;
        for level in &d.up {
            for block in &level.block {
                h = block.forward(&h)?;
            }
            if let Some(conv) = &level.resample {
                let (_, _, height, width) = h.tensor().dims4()?;
                h = conv.forward(&ops::upsample_nearest(&h, (2 * height, 2 * width))?)?;
            }
        }
        Ok(d.conv_out.forward(&d.norm_out.forward_silu(&h)?)?.tensor().clone())
    }
}
