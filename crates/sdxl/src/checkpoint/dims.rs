//! The numbers of a network that its tensors do not show: how many heads, how many groups. SDXL's own are the default;
//! small models for tests and the quickstart carry theirs in a single file's metadata or in the folders' config.json.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Checkpoint, Part};
use crate::error::{Error, Result};

/// Metadata key of a single file that holds [`HeadDims`] as JSON.
pub(super) const LOKR_CONFIG: &str = "lokr.config";

/// Heads and groups, which tensors do not show. As JSON (metadata key `lokr.config`) an object of these fields, where an
/// absent one has SDXL's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeadDims {
    /// Channels of each attention head of the UNet.
    pub head_dim: usize,
    /// Groups of the UNet's GroupNorms.
    pub norm_num_groups: usize,
    /// Heads of te1.
    pub te1_heads: usize,
    /// Heads of te2.
    pub te2_heads: usize,
    /// Groups of the VAE's GroupNorms.
    pub vae_norm_num_groups: usize,
}

impl Default for HeadDims {
    /// SDXL's.
    fn default() -> Self {
        HeadDims { head_dim: 64, norm_num_groups: 32, te1_heads: 12, te2_heads: 20, vae_norm_num_groups: 32 }
    }
}

impl Checkpoint {
    /// Heads and groups: those given by [`Checkpoint::with_head_dims`], else the single file's `lokr.config`, else the
    /// folders' config.json, else SDXL's. A VAE's folder that replaced the checkpoint's VAE speaks for the VAE.
    ///
    /// # Errors
    /// [`Error::Json`] if `lokr.config` cannot be read, [`Error::HeadDims`] if the UNet's config.json gives heads that do
    /// not fit its channels.
    pub fn head_dims(&self) -> Result<HeadDims> {
        if let Some(dims) = self.head_dims {
            return Ok(dims);
        }
        let mut dims: HeadDims = match self.lokr_config() {
            Some(text) => serde_json::from_str(text).map_err(|source| Error::Json {
                path: self.path.clone(),
                what: format!("the metadata value `{LOKR_CONFIG}`"),
                source,
            })?,
            None => HeadDims::default(),
        };
        let number = |part: Part, key: &str| self.diffusers_config(part)?.get(key)?.as_u64().and_then(|n| usize::try_from(n).ok());
        if let Some(unet) = self.diffusers_config(Part::Unet) {
            dims.head_dim = self.config_head_dim(unet)?.unwrap_or(dims.head_dim);
        }
        for (part, key, field) in [
            (Part::Unet, "norm_num_groups", &mut dims.norm_num_groups),
            (Part::TextEncoder1, "num_attention_heads", &mut dims.te1_heads),
            (Part::TextEncoder2, "num_attention_heads", &mut dims.te2_heads),
            (Part::Vae, "norm_num_groups", &mut dims.vae_norm_num_groups),
        ] {
            *field = number(part, key).unwrap_or(*field);
        }
        Ok(dims)
    }

    /// Says what tensors, metadata and configs do not: heads and groups.
    pub fn with_head_dims(mut self, dims: HeadDims) -> Checkpoint {
        self.head_dims = Some(dims);
        self
    }

    /// Channels of a head from a UNet's config.json, whose `attention_head_dim` is, by an old mistake that diffusers keeps,
    /// the number of heads of each level.
    fn config_head_dim(&self, unet: &Value) -> Result<Option<usize>> {
        let list = |value: &Value| match value {
            Value::Array(values) => values.iter().map(Value::as_u64).collect::<Option<Vec<_>>>(),
            value => value.as_u64().map(|n| vec![n]),
        };
        let get = |key: &str| unet.get(key).filter(|value| !value.is_null()).and_then(list);
        let (Some(channels), Some(heads)) = (get("block_out_channels"), get("num_attention_heads").or_else(|| get("attention_head_dim")))
        else {
            return Ok(None);
        };
        let (Some(&channels), Some(&heads)) = (channels.last(), heads.last()) else { return Ok(None) };
        if heads == 0 || channels % heads != 0 {
            let what = format!("the UNet's config.json splits {channels} channels into {heads} heads");
            return Err(Error::HeadDims { path: self.path.clone(), what });
        }
        Ok(usize::try_from(channels / heads).ok())
    }
}
