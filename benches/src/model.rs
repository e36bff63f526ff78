//! Base models to measure: SDXL's UNet in smaller widths with random weights, written once as a single-file checkpoint and
//! opened as any other.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use random::{Purpose, Stream};
use sdxl::checkpoint::{Checkpoint, HeadDims, Shapes};
use sdxl::config::UNetConfig;
use sdxl::unet::UNet;
use storage::safetensors::{Dtype, SafeTensors, TensorSource};

use crate::Result;

const UNET: &str = "model.diffusion_model.";
/// An SDXL file has text encoders; a bench gives the context itself, so one tensor stands for each.
const OTHERS: [&str; 2] =
    ["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "conditioner.embedders.1.model.ln_final.bias"];

/// Which model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Config {
    /// The golden data's tiny model, 2.1 M parameters in the UNet.
    Tiny,
    /// SDXL's topology at half the width and a fifth of the depth: 208 M parameters.
    Mid,
}

impl Config {
    /// Both, smaller first.
    pub const ALL: [Self; 2] = [Self::Tiny, Self::Mid];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Mid => "mid",
        }
    }

    /// The file, written first if it does not exist or holds other tensors.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn file(self) -> Result<PathBuf> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        if self == Self::Tiny {
            let golden = std::env::var_os("LOKR_GOLDEN").map_or_else(|| root.join("tests/golden"), PathBuf::from);
            return Ok(golden.join("tiny-sdxl.safetensors"));
        }
        let folder = std::env::var_os("LOKR_BENCH_MODELS").map_or_else(|| root.join("target/bench-models"), PathBuf::from);
        let path = folder.join("mid.safetensors");
        let wants = layout(&Shapes::mid().unet);
        if !holds(&path, &wants) {
            storage::create_dir_all(&folder)?;
            write_random(&path, &wants)?;
        }
        Ok(path)
    }

    /// The UNet, weights in f32.
    ///
    /// # Errors
    /// If the file cannot be written or read.
    pub fn unet(self) -> Result<UNet> {
        let tiny = HeadDims { head_dim: 8, norm_num_groups: 8, te1_heads: 2, te2_heads: 4, vae_norm_num_groups: 16 };
        let dims = if self == Self::Tiny { tiny } else { HeadDims::default() };
        let checkpoint = Checkpoint::open(&self.file()?)?;
        Ok(UNet::load(&checkpoint, UNetConfig::of_checkpoint(&checkpoint, dims)?, DType::F32)?)
    }
}

/// A tensor to be made up.
struct Wanted {
    name: String,
    shape: Vec<usize>,
    fill: Fill,
}

#[derive(Clone, Copy)]
enum Fill {
    Constant(f32),
    /// Uniform in `-bound..bound`.
    Uniform(f32),
}

/// Collects tensors in SGM's naming.
#[derive(Default)]
struct Layout(Vec<Wanted>);

impl Layout {
    fn push(&mut self, name: String, shape: Vec<usize>, fill: Fill) {
        self.0.push(Wanted { name: format!("{UNET}{name}"), shape, fill });
    }

    /// A weight with the bound that torch starts layers with, 1 / sqrt(fan in), and its bias.
    fn layer(&mut self, name: &str, shape: &[usize], bias: bool) {
        let fan_in: usize = shape[1..].iter().product();
        let fill = Fill::Uniform(1.0 / (fan_in as f32).sqrt());
        self.push(format!("{name}.weight"), shape.to_vec(), fill);
        if bias {
            self.push(format!("{name}.bias"), vec![shape[0]], fill);
        }
    }

    fn norm(&mut self, name: &str, channels: usize) {
        self.push(format!("{name}.weight"), vec![channels], Fill::Constant(1.0));
        self.push(format!("{name}.bias"), vec![channels], Fill::Constant(0.0));
    }

    fn resnet(&mut self, at: &str, c: usize, o: usize, temb: usize) {
        self.norm(&format!("{at}.in_layers.0"), c);
        self.layer(&format!("{at}.in_layers.2"), &[o, c, 3, 3], true);
        self.layer(&format!("{at}.emb_layers.1"), &[o, temb], true);
        self.norm(&format!("{at}.out_layers.0"), o);
        self.layer(&format!("{at}.out_layers.3"), &[o, o, 3, 3], true);
        if c != o {
            self.layer(&format!("{at}.skip_connection"), &[o, c, 1, 1], true);
        }
    }

    fn transformer(&mut self, at: &str, d: usize, context: usize, depth: usize) {
        self.norm(&format!("{at}.norm"), d);
        self.layer(&format!("{at}.proj_in"), &[d, d], true);
        for k in 0..depth {
            let block = format!("{at}.transformer_blocks.{k}");
            for (attention, keys) in [("attn1", d), ("attn2", context)] {
                self.layer(&format!("{block}.{attention}.to_q"), &[d, d], false);
                self.layer(&format!("{block}.{attention}.to_k"), &[d, keys], false);
                self.layer(&format!("{block}.{attention}.to_v"), &[d, keys], false);
                self.layer(&format!("{block}.{attention}.to_out.0"), &[d, d], true);
            }
            self.layer(&format!("{block}.ff.net.0.proj"), &[8 * d, d], true);
            self.layer(&format!("{block}.ff.net.2"), &[d, 4 * d], true);
            for norm in ["norm1", "norm2", "norm3"] {
                self.norm(&format!("{block}.{norm}"), d);
            }
        }
        self.layer(&format!("{at}.proj_out"), &[d, d], true);
    }
}

fn layout(config: &UNetConfig) -> Vec<Wanted> {
    let mut all = Layout::default();
    let (width, levels) = (config.block_out_channels[0], config.block_out_channels.len());
    let temb = 4 * width;
    for (mlp, inner) in [("time_embed", width), ("label_emb.0", config.adm_dim)] {
        all.layer(&format!("{mlp}.0"), &[temb, inner], true);
        all.layer(&format!("{mlp}.2"), &[temb, temb], true);
    }
    all.layer("input_blocks.0.0", &[width, config.in_channels, 3, 3], true);
    let (mut skips, mut c, mut block) = (vec![width], width, 1);
    for (level, (&o, &depth)) in config.block_out_channels.iter().zip(&config.transformer_depth).enumerate() {
        for _ in 0..config.layers_per_block {
            all.resnet(&format!("input_blocks.{block}.0"), c, o, temb);
            if depth > 0 {
                all.transformer(&format!("input_blocks.{block}.1"), o, config.context_dim, depth);
            }
            (c, block) = (o, block + 1);
            skips.push(c);
        }
        if level + 1 < levels {
            all.layer(&format!("input_blocks.{block}.0.op"), &[c, c, 3, 3], true);
            block += 1;
            skips.push(c);
        }
    }
    all.resnet("middle_block.0", c, c, temb);
    all.transformer("middle_block.1", c, config.context_dim, config.mid_depth);
    all.resnet("middle_block.2", c, c, temb);
    let mut block = 0;
    for level in (0..levels).rev() {
        let (o, depth) = (config.block_out_channels[level], config.transformer_depth[level]);
        for j in 0..=config.layers_per_block {
            all.resnet(&format!("output_blocks.{block}.0"), c + skips.pop().unwrap_or(0), o, temb);
            c = o;
            if depth > 0 {
                all.transformer(&format!("output_blocks.{block}.1"), c, config.context_dim, depth);
            }
            if j == config.layers_per_block && level > 0 {
                let place = if depth > 0 { 2 } else { 1 };
                all.layer(&format!("output_blocks.{block}.{place}.conv"), &[c, c, 3, 3], true);
            }
            block += 1;
        }
    }
    all.norm("out.0", c);
    all.layer("out.2", &[config.out_channels, c, 3, 3], true);
    all.0.extend(OTHERS.map(|name| Wanted { name: name.into(), shape: vec![1], fill: Fill::Constant(0.0) }));
    all.0
}

fn holds(path: &Path, wants: &[Wanted]) -> bool {
    let Ok(file) = SafeTensors::open(path) else { return false };
    file.names().count() == wants.len() && wants.iter().all(|w| file.info(&w.name).is_some_and(|info| info.shape == w.shape))
}

fn write_random(path: &Path, wants: &[Wanted]) -> Result<()> {
    let source = |(index, wanted): (usize, &Wanted)| {
        let (count, fill) = (wanted.shape.iter().product::<usize>(), wanted.fill);
        let data = move || {
            let mut stream = Stream::new(0, Purpose::BaseInit, index as u64, 0);
            let mut draw = || match fill {
                Fill::Constant(value) => value,
                Fill::Uniform(bound) => stream.uniform_in(-f64::from(bound), f64::from(bound)) as f32,
            };
            Cow::Owned((0..count).flat_map(|_| draw().to_le_bytes()).collect())
        };
        TensorSource { name: wanted.name.clone(), dtype: Dtype::F32, shape: wanted.shape.clone(), data: Box::new(data) }
    };
    storage::safetensors::write(path, wants.iter().enumerate().map(source).collect(), &BTreeMap::new())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number that the PyTorch side counts for its own `mid`.
    #[test]
    fn mid_has_the_parameters_of_the_other_side() {
        let count: usize =
            layout(&Shapes::mid().unet).iter().filter(|w| w.name.starts_with(UNET)).map(|w| w.shape.iter().product::<usize>()).sum();
        assert_eq!(count, 208_074_564);
    }
}
