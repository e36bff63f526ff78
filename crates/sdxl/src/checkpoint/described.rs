//! Checkpoints without weights: shapes alone, of a file whose tensors are not read or of a model that is described by its
//! configurations. Networks built from one have their module trees and take no memory.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use storage::safetensors::Dtype;

use super::{Checkpoint, Entry, HeadDims, Layout, Part, View};
use crate::clip::ClipTextModel;
use crate::config::{ClipConfig, UNetConfig, VaeConfig};
use crate::error::Result;
use crate::unet::UNet;
use crate::vae::AutoencoderKL;

/// Whether there are weights, and where the shapes go that networks ask for.
#[derive(Debug, Clone, Default)]
pub(super) struct Described {
    without_weights: bool,
    recorder: Option<Recorder>,
}

type Recorder = Arc<Mutex<Vec<(Part, String, Vec<usize>)>>>;

/// The configurations of all networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shapes {
    /// The UNet.
    pub unet: UNetConfig,
    /// CLIP-L.
    pub te1: ClipConfig,
    /// OpenCLIP bigG.
    pub te2: ClipConfig,
    /// The VAE.
    pub vae: VaeConfig,
}

fn clip(width: usize, heads: usize, layers: usize, projection: Option<usize>) -> ClipConfig {
    ClipConfig { width, heads, layers, ff: 4 * width, vocabulary: 49408, positions: 77, projection }
}

impl Shapes {
    /// SDXL's own (stabilityai/stable-diffusion-xl-base-1.0).
    pub fn sdxl() -> Self {
        Self {
            unet: UNetConfig {
                in_channels: 4,
                out_channels: 4,
                block_out_channels: vec![320, 640, 1280],
                layers_per_block: 2,
                transformer_depth: vec![0, 2, 10],
                mid_depth: 10,
                context_dim: 2048,
                adm_dim: 2816,
                head_dim: 64,
                norm_num_groups: 32,
            },
            te1: clip(768, 12, 12, None),
            te2: clip(1280, 20, 32, Some(1280)),
            vae: VaeConfig { block_out_channels: vec![128, 256, 512, 512], layers_per_block: 2, latent_channels: 4, norm_num_groups: 32 },
        }
    }

    /// SDXL's topology at half the width and a fifth of the depth.
    pub fn mid() -> Self {
        let mut shapes = Self::sdxl();
        shapes.unet = UNetConfig {
            block_out_channels: vec![160, 320, 640],
            transformer_depth: vec![0, 1, 2],
            mid_depth: 2,
            context_dim: 768,
            adm_dim: 512 + 6 * 256,
            ..shapes.unet
        };
        (shapes.te1, shapes.te2) = (clip(256, 4, 6, None), clip(512, 8, 12, Some(512)));
        shapes.vae.block_out_channels = vec![64, 128, 256, 256];
        shapes
    }

    /// Small enough to train in seconds.
    pub fn tiny() -> Self {
        let mut shapes = Self::sdxl();
        shapes.unet = UNetConfig {
            block_out_channels: vec![16, 32, 64],
            transformer_depth: vec![0, 1, 2],
            mid_depth: 2,
            context_dim: 48,
            adm_dim: 32 + 6 * 256,
            head_dim: 8,
            norm_num_groups: 8,
            ..shapes.unet
        };
        (shapes.te1, shapes.te2) = (clip(16, 2, 3, None), clip(32, 4, 4, Some(32)));
        shapes.vae = VaeConfig { block_out_channels: vec![16, 16, 32, 32], norm_num_groups: 16, ..shapes.vae };
        shapes
    }

    /// What the tensors of such a model do not show.
    pub fn head_dims(&self) -> HeadDims {
        HeadDims {
            head_dim: self.unet.head_dim,
            norm_num_groups: self.unet.norm_num_groups,
            te1_heads: self.te1.heads,
            te2_heads: self.te2.heads,
            vae_norm_num_groups: self.vae.norm_num_groups,
        }
    }
}

impl Checkpoint {
    /// A checkpoint of these shapes without weights, as if its tensors were stored as `dtype`; `path` is its name in messages.
    ///
    /// # Errors
    /// None that depends on the shapes.
    pub fn described(path: &Path, shapes: &Shapes, dtype: Dtype) -> Result<Self> {
        let recorder = Recorder::default();
        let mut blank = Self::empty(path, Layout::SingleFile);
        blank.described = Described { without_weights: true, recorder: Some(recorder.clone()) };
        UNet::load(&blank, shapes.unet.clone(), DType::F32)?;
        ClipTextModel::load(&blank, Part::TextEncoder1, shapes.te1.clone(), None)?;
        ClipTextModel::load(&blank, Part::TextEncoder2, shapes.te2.clone(), None)?;
        AutoencoderKL::load(&blank, shapes.vae.clone())?;
        blank.described.recorder = None;
        for (part, name, shape) in recorder.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let entry = Entry { file: 0, name: name.clone(), view: View::Whole, dtype, shape };
            blank.parts[part.index()].insert(name, entry);
        }
        Ok(blank.with_head_dims(shapes.head_dims()))
    }

    /// The same checkpoint, of which only names and shapes are used: networks built from it take no memory and cannot compute.
    pub fn without_weights(mut self) -> Self {
        self.described.without_weights = true;
        self
    }

    /// Whether tensors can be read.
    pub fn has_weights(&self) -> bool {
        !self.described.without_weights
    }

    /// Notes the shape that a network wants, if this checkpoint is being described: then whatever is asked for is there.
    pub(crate) fn record(&self, part: Part, name: &str, shape: &[usize]) -> bool {
        let Some(recorder) = &self.described.recorder else { return false };
        recorder.lock().unwrap_or_else(PoisonError::into_inner).push((part, name.to_owned(), shape.to_vec()));
        true
    }
}

/// Zeros of any size in the memory of one.
pub(crate) fn zeros(shape: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(Tensor::zeros((), dtype, &Device::Cpu)?.broadcast_as(shape)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of parameters as counted on the published model and on the recorded tiny one (facts 1.10, tests/golden).
    #[test]
    fn described_models_have_the_tensors_of_real_ones() {
        let count = |shapes: &Shapes| {
            let c = Checkpoint::described(Path::new("described"), shapes, Dtype::F16).expect("described");
            Part::ALL.map(|part| c.names(part).map(|n| c.shape(part, n).expect("its own name").iter().product::<usize>()).sum::<usize>())
        };
        assert_eq!(count(&Shapes::sdxl()), [2_567_463_684, 123_060_480, 694_659_840, 83_653_863]);
        assert_eq!(count(&Shapes::tiny()), [2_137_380, 801_632, 1_635_424, 354_391]);
        assert_eq!(count(&Shapes::mid())[0], 208_074_564);
    }
}
