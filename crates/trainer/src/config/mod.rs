//! The recipe of a run: a strict TOML file, read into [`RunConfig`].
//!
//! A recipe has sections; each key belongs to one, and everything that is not understood is an error that says where it
//! stands and what was probably meant. Reading ([`RunConfig::load`]) finds what cannot be understood; [`RunConfig::check`]
//! finds what does not go together, [`RunConfig::check_paths`] what does not exist, [`RunConfig::warnings`] what is odd. Keys carry sd-scripts' names where
//! it has them. Every key is declared once, with doc and default, in `sections.rs`, `train.rs` and `dataset.rs`; the
//! reference page ([`reference`]) and the [`template`] are made from those declarations.
//!
//! Relative paths start at the current working directory, as in sd-scripts, not at the recipe's folder: so a recipe can
//! be kept anywhere, and the copy beside a run's output means the same.

mod check;
mod dataset;
mod error;
mod foreign;
mod key;
mod parts;
mod read;
mod render;
mod sections;
mod suggest;
mod train;
mod warn;

#[cfg(test)]
mod tests;

use std::path::Path;

use ::dataset::DatasetConfig;

pub use self::dataset::CacheConfig;
pub use self::error::{ConfigError, Fault, Place, Problem};
pub use self::key::{Key, Origin, Section, Setting};
pub use self::render::{reference, template};
pub use self::sections::{
    ForwardPath, ModelConfig, NetworkConfig, OutputConfig, PromptConfig, Resume, SampleConfig, SavePrecision, ValidationConfig, WeightDtype,
};
pub use self::train::{Compat, Compute, DeviceChoice, MixedPrecision, OnNonFinite, StepCount, TextEncoderLr, TrainConfig};

/// A recipe, read and complete: every key has its value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunConfig {
    /// `[model]`
    pub model: ModelConfig,
    /// `[network]`
    pub network: NetworkConfig,
    /// `[train]`
    pub train: TrainConfig,
    /// `[dataset]` and `[[dataset.subsets]]`, but for the keys of `cache`
    pub dataset: DatasetConfig,
    /// The keys of `[dataset]` about cached latents
    pub cache: CacheConfig,
    /// `[output]`
    pub output: OutputConfig,
    /// `[sample]`
    pub sample: SampleConfig,
    /// `[validation]`
    pub validation: ValidationConfig,
}

impl RunConfig {
    /// Reads the recipe at `path`. `overrides` are `section.key=value` arguments, laid over the file in their order; the
    /// value is written as in TOML, a text may stand without quotes.
    ///
    /// # Errors
    /// [`ConfigError::Read`], [`ConfigError::Syntax`], or [`ConfigError::Faults`] with everything that is not understood.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        read::read(&storage::read_to_string(path)?, path, overrides)
    }

    /// Reads a recipe from `text`; messages call it `file`. Otherwise as [`Self::load`].
    ///
    /// # Errors
    /// As [`Self::load`], without [`ConfigError::Read`].
    pub fn parse(text: &str, file: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        read::read(text, file, overrides)
    }

    /// The complete recipe, defaults written out; reading it gives the same value again.
    pub fn to_toml(&self) -> String {
        render::recipe(self)
    }

    fn section_mut(&mut self, name: &str) -> Option<&mut dyn Section> {
        Some(match name {
            "model" => &mut self.model,
            "network" => &mut self.network,
            "train" => &mut self.train,
            "output" => &mut self.output,
            "sample" => &mut self.sample,
            "validation" => &mut self.validation,
            _ => return None,
        })
    }
}

/// A section with all of its keys.
#[derive(Clone, Debug)]
pub struct SectionDoc {
    /// Name, as `train`; `dataset.subsets` and `sample.prompts` are lists of tables.
    pub name: &'static str,
    /// What it is about.
    pub doc: String,
    /// Its keys, in order.
    pub keys: Vec<Key>,
}

/// Every section of a recipe, in the order of the reference page.
pub fn catalog() -> Vec<SectionDoc> {
    fn of<S: Section>() -> SectionDoc {
        SectionDoc { name: S::name(), doc: S::doc(), keys: S::keys() }
    }
    vec![
        of::<ModelConfig>(),
        of::<NetworkConfig>(),
        of::<TrainConfig>(),
        SectionDoc { keys: dataset::section_keys(), ..of::<CacheConfig>() },
        SectionDoc { name: "dataset.subsets", doc: "One folder of pictures.".into(), keys: dataset::subset_keys() },
        of::<OutputConfig>(),
        of::<SampleConfig>(),
        of::<PromptConfig>(),
        of::<ValidationConfig>(),
    ]
}
