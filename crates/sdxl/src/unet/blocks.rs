//! The UNet's blocks, under sd-scripts' class names and SGM's field names (sd-scripts `library/sdxl_original_unet.py`).

use std::sync::Arc;

use candle_core::Result;
use ops::Value;

use crate::build::Scope;
use crate::error;
use crate::layers::{Conv2d, Linear, Norm};
use crate::recompute::GradientCheckpointing;

/// Group norm, SiLU, convolution, twice; the time embedding is added in between.
pub struct ResnetBlock2D {
    in_norm: Arc<Norm>,
    in_conv: Arc<Conv2d>,
    emb_proj: Arc<Linear>,
    out_norm: Arc<Norm>,
    out_conv: Arc<Conv2d>,
    skip_connection: Option<Arc<Conv2d>>,
}

impl ResnetBlock2D {
    /// `c` channels in, `o` out, `temb` features of the time embedding.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn new(s: &Scope, c: usize, o: usize, temb: usize, groups: usize) -> error::Result<Self> {
        let in_layers = s.enter("in_layers", "Sequential");
        let in_norm = in_layers.group_norm(0, "GroupNorm32", c, groups, 1e-5)?;
        let in_conv = in_layers.conv2d(2, o, c, 3, 1, 1)?;
        let emb_proj = s.enter("emb_layers", "Sequential").linear(1, o, temb, true)?;
        let out_layers = s.enter("out_layers", "Sequential");
        let out_norm = out_layers.group_norm(0, "GroupNorm32", o, groups, 1e-5)?;
        let out_conv = out_layers.conv2d(3, o, o, 3, 1, 1)?;
        let skip_connection = if c == o { None } else { Some(s.conv2d("skip_connection", o, c, 1, 1, 0)?) };
        Ok(Self { in_norm, in_conv, emb_proj, out_norm, out_conv, skip_connection })
    }

    /// `x (n, c, h, w)`, `emb (n, temb)` with SiLU already applied.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(self: &Arc<Self>, x: &Value, emb: &Value, checkpointing: GradientCheckpointing) -> Result<Value> {
        let (first, second) = (self.clone(), self.clone());
        let h = checkpointing.layer(&[x, emb], move |v| {
            let h = first.in_conv.forward(&first.in_norm.forward_silu(&v[0])?)?;
            ops::add_bias_nc(&h, &first.emb_proj.forward(&v[1])?)
        })?;
        let h = checkpointing.layer(&[&h], move |v| second.out_conv.forward(&second.out_norm.forward_silu(&v[0])?))?;
        match &self.skip_connection {
            Some(skip) => ops::add(&skip.forward(x)?, &h),
            None => ops::add(x, &h),
        }
    }
}

/// Multi-head attention; with a context, cross attention.
pub struct CrossAttention {
    to_q: Arc<Linear>,
    to_k: Arc<Linear>,
    to_v: Arc<Linear>,
    to_out: Arc<Linear>,
    heads: usize,
}

impl CrossAttention {
    fn new(s: &Scope, width: usize, context: usize, heads: usize) -> error::Result<Self> {
        let to_q = s.linear("to_q", width, width, false)?;
        let to_k = s.linear("to_k", width, context, false)?;
        let to_v = s.linear("to_v", width, context, false)?;
        let to_out = s.enter("to_out", "ModuleList").linear(0, width, width, true)?;
        Ok(Self { to_q, to_k, to_v, to_out, heads })
    }

    fn forward(&self, x: &Value, context: &Value) -> Result<Value> {
        let (q, k, v) = (self.to_q.forward(x)?, self.to_k.forward(context)?, self.to_v.forward(context)?);
        self.to_out.forward(&ops::attention(&q, &k, &v, self.heads, false)?)
    }
}

/// GEGLU, then linear.
pub struct FeedForward {
    proj: Arc<Linear>,
    out: Arc<Linear>,
}

impl FeedForward {
    fn new(s: &Scope, width: usize) -> error::Result<Self> {
        let net = s.enter("net", "ModuleList");
        let proj = net.enter(0, "GEGLU").linear("proj", 8 * width, width, true)?;
        let out = net.linear(2, width, 4 * width, true)?;
        Ok(Self { proj, out })
    }

    fn forward(&self, x: &Value) -> Result<Value> {
        self.out.forward(&ops::geglu(&self.proj.forward(x)?)?)
    }
}

/// Self attention, cross attention and feed-forward, each behind a layer norm and with a residual.
pub struct BasicTransformerBlock {
    attn1: CrossAttention,
    ff: FeedForward,
    attn2: CrossAttention,
    norm1: Arc<Norm>,
    norm2: Arc<Norm>,
    norm3: Arc<Norm>,
}

impl BasicTransformerBlock {
    fn new(s: &Scope, width: usize, context: usize, heads: usize) -> error::Result<Self> {
        let attn1 = CrossAttention::new(&s.enter("attn1", "CrossAttention"), width, width, heads)?;
        let ff = FeedForward::new(&s.enter("ff", "FeedForward"), width)?;
        let attn2 = CrossAttention::new(&s.enter("attn2", "CrossAttention"), width, context, heads)?;
        let norm1 = s.layer_norm("norm1", width, 1e-5)?;
        let norm2 = s.layer_norm("norm2", width, 1e-5)?;
        let norm3 = s.layer_norm("norm3", width, 1e-5)?;
        Ok(Self { attn1, ff, attn2, norm1, norm2, norm3 })
    }

    /// `x (n, t, d)`, `context (n, tokens, context_dim)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(self: &Arc<Self>, x: &Value, context: &Value, checkpointing: GradientCheckpointing) -> Result<Value> {
        let (first, second, third) = (self.clone(), self.clone(), self.clone());
        let x = checkpointing.layer(&[x], move |v| {
            let h = first.norm1.forward(&v[0])?;
            ops::add(&first.attn1.forward(&h, &h)?, &v[0])
        })?;
        let x =
            checkpointing.layer(&[&x, context], move |v| ops::add(&second.attn2.forward(&second.norm2.forward(&v[0])?, &v[1])?, &v[0]))?;
        checkpointing.layer(&[&x], move |v| ops::add(&third.ff.forward(&third.norm3.forward(&v[0])?)?, &v[0]))
    }
}

/// Transformer blocks over the pixels, between two projections, with a residual around all.
pub struct Transformer2DModel {
    norm: Arc<Norm>,
    proj_in: Arc<Linear>,
    transformer_blocks: Vec<Arc<BasicTransformerBlock>>,
    proj_out: Arc<Linear>,
}

impl Transformer2DModel {
    /// `width` channels, `depth` transformer blocks.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn new(s: &Scope, width: usize, context: usize, head_dim: usize, depth: usize, groups: usize) -> error::Result<Self> {
        let norm = s.group_norm("norm", "GroupNorm", width, groups, 1e-6)?;
        let proj_in = s.linear("proj_in", width, width, true)?;
        let list = s.enter("transformer_blocks", "ModuleList");
        let transformer_blocks = (0..depth)
            .map(|i| Ok(Arc::new(BasicTransformerBlock::new(&list.enter(i, "BasicTransformerBlock"), width, context, width / head_dim)?)))
            .collect::<error::Result<_>>()?;
        let proj_out = s.linear("proj_out", width, width, true)?;
        Ok(Self { norm, proj_in, transformer_blocks, proj_out })
    }

    /// `x (n, c, h, w)`, `context (n, tokens, context_dim)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Value, context: &Value, checkpointing: GradientCheckpointing) -> Result<Value> {
        let (n, c, h, w) = x.tensor().dims4()?;
        let tokens = ops::transpose(&ops::reshape(&self.norm.forward(x)?, &[n, c, h * w])?, 1, 2)?;
        let mut tokens = self.proj_in.forward(&tokens)?;
        for block in &self.transformer_blocks {
            let block = block.clone();
            tokens = checkpointing.block(&[&tokens, context], move |v| block.forward(&v[0], &v[1], checkpointing))?;
        }
        let tokens = self.proj_out.forward(&tokens)?;
        ops::add(&ops::reshape(&ops::transpose(&tokens, 1, 2)?, &[n, c, h, w])?, x)
    }
}
