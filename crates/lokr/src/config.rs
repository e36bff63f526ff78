//! The adapter's options, under the names that users of LyCORIS know (network_args, lycoris/kohya.py
//! `create_network`), with every default in one place.

use crate::error::{Error, Result};
use crate::functional::Path;
use crate::preset::Preset;

/// Options of an adapter.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// `network_dim`: the rank of linear layers and 1x1 convolutions; 0 leaves them out.
    pub dim: usize,
    /// `network_alpha`; 0 means alpha = dim. Without effect where both factors are full.
    pub alpha: f64,
    /// Rank of larger convolutions; `None` takes `dim`, 0 leaves them out.
    pub conv_dim: Option<usize>,
    /// Alpha of larger convolutions; `None` takes `alpha`.
    pub conv_alpha: Option<f64>,
    /// How widths are split, see [`crate::factorization()`].
    pub factor: i64,
    /// Both factors full, whatever the rank.
    pub full_matrix: bool,
    /// w1 may be low-rank too.
    pub decompose_both: bool,
    /// Core tensor for low-rank kernels larger than 1x1. Few readers know such files.
    pub use_tucker: bool,
    /// A trainable number in front of each product, 0 at the start.
    pub use_scalar: bool,
    /// Scale by sqrt(dim) in place of dim.
    pub rs_lora: bool,
    /// Swaps the sides of the output split. Few readers know such files.
    pub unbalanced_factorization: bool,
    /// Trains the norms inside targeted blocks.
    pub train_norm: bool,
    /// The factored path in every layer. The function is the same.
    pub bypass_mode: bool,
    /// Which layers, and options by class or path.
    pub preset: Preset,
    /// Seed of the initial values.
    pub seed: u64,
    /// Forces a path in every layer, for tests and measurements; `None` chooses by cost.
    pub path: Option<Path>,
    /// DoRA: not supported yet, must be false.
    pub dora_wd: bool,
    /// Not supported yet, must be 0 (LyCORIS's LoKr ignores it outside of bypass mode).
    pub dropout: f64,
    /// Not supported yet, must be 0.
    pub rank_dropout: f64,
    /// Not supported yet, must be 0.
    pub module_dropout: f64,
}

impl NetworkConfig {
    /// LyCORIS's defaults under a preset: dim 4, alpha 1, factor -1, everything else off; seed 0.
    pub fn new(preset: Preset) -> Self {
        Self {
            dim: 4,
            alpha: 1.0,
            conv_dim: None,
            conv_alpha: None,
            factor: -1,
            full_matrix: false,
            decompose_both: false,
            use_tucker: false,
            use_scalar: false,
            rs_lora: false,
            unbalanced_factorization: false,
            train_norm: false,
            bypass_mode: false,
            preset,
            seed: 0,
            path: None,
            dora_wd: false,
            dropout: 0.0,
            rank_dropout: 0.0,
            module_dropout: 0.0,
        }
    }

    /// Refuses what is not written and what makes no sense.
    ///
    /// # Errors
    /// [`Error::Unsupported`] and [`Error::Option`], naming the key.
    pub fn check(&self) -> Result<()> {
        let unsupported = |key: &str, why| Err(Error::Unsupported { key: key.into(), why });
        if self.dora_wd {
            return unsupported("dora_wd", "DoRA needs a forward of its own");
        }
        if self.dropout != 0.0 {
            return unsupported("dropout", "LyCORIS's LoKr ignores it unless bypass_mode is on; leave it out");
        }
        if self.rank_dropout != 0.0 {
            return unsupported("rank_dropout", "no row mask is drawn (LyCORIS's fails on a GPU)");
        }
        if self.module_dropout != 0.0 {
            return unsupported("module_dropout", "no layer is skipped at random");
        }
        for (key, value) in [("network_alpha", Some(self.alpha)), ("conv_alpha", self.conv_alpha)] {
            if let Some(value) = value.filter(|v| !v.is_finite()) {
                return Err(Error::Option { key, value: value.to_string(), why: "must be a finite number" });
            }
        }
        Ok(())
    }
}
