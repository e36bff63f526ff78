//! Presets: which layers are adapted, and with what options. The file format is LyCORIS's (docs/Preset.md there,
//! lycoris/kohya.py `apply_preset`), read strictly: a key that LyCORIS would silently ignore is an error with its line
//! and the nearest known name. And read as TOML: LyCORIS's reader (the package `toml` 0.10) leaves the escapes in quoted
//! table names as they are, so that `[name_algo_map."out\\.2$"]` never matches there; here it does. Which layers a preset reaches is decided in `walk.rs`.

use crate::error::{Error, Result};
use crate::pattern::Pattern;
use crate::preset_toml::{self, Reader};
use std::path::Path;

/// Targets of one kind of network.
#[derive(Clone, Debug)]
pub struct Targets {
    /// Class names, compared exactly: every layer inside a module of such a class is adapted.
    pub classes: Vec<String>,
    /// Patterns on module paths: the matching layer itself is adapted.
    pub names: Vec<Pattern>,
}

/// Options that a preset sets for a class or a path; `None` keeps the network's own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides {
    /// Rank, for linear layers and convolutions alike; 0 counts as absent.
    pub dim: Option<usize>,
    /// Alpha; 0 counts as absent.
    pub alpha: Option<f64>,
    /// See [`crate::factorization()`].
    pub factor: Option<i64>,
    /// Both factors full.
    pub full_matrix: Option<bool>,
    /// w1 may be low-rank.
    pub decompose_both: Option<bool>,
    /// Core tensor for larger kernels.
    pub use_tucker: Option<bool>,
    /// Trainable number in front.
    pub use_scalar: Option<bool>,
    /// Scale by sqrt(dim).
    pub rs_lora: Option<bool>,
    /// w1 tall.
    pub unbalanced_factorization: Option<bool>,
    /// The factored path, always.
    pub bypass_mode: Option<bool>,
}

/// A preset, checked.
#[derive(Clone, Debug)]
pub struct Preset {
    name: String,
    source: String,
    /// Whether kernels larger than 1x1 are adapted (a table with a `dim` adapts them all the same).
    pub enable_conv: bool,
    /// Targets in the UNet.
    pub unet: Targets,
    /// Targets in both text encoders.
    pub text_encoder: Targets,
    /// Paths that are left alone. What lies below such a path is tested by itself.
    pub exclude: Vec<Pattern>,
    /// Options by class; the innermost class around a layer wins, tables do not merge.
    pub by_class: Vec<(String, Overrides)>,
    /// Options by path, for layers that a name target reaches; the first that matches wins.
    pub by_name: Vec<(Pattern, Overrides)>,
}

impl Preset {
    /// Names of the built-in presets: LyCORIS's, without the classes of other architectures, and Kohaku XL Delta's.
    pub const BUILT_IN: [&'static str; 8] =
        ["full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only", "unet-convblock-only", "kohaku-xl-delta"];

    fn built_in_source(name: &str) -> Option<&'static str> {
        Some(match name {
            "full" => include_str!("../presets/full.toml"),
            "full-lin" => include_str!("../presets/full-lin.toml"),
            "attn-mlp" => include_str!("../presets/attn-mlp.toml"),
            "attn-only" => include_str!("../presets/attn-only.toml"),
            "unet-only" => include_str!("../presets/unet-only.toml"),
            "unet-transformer-only" => include_str!("../presets/unet-transformer-only.toml"),
            "unet-convblock-only" => include_str!("../presets/unet-convblock-only.toml"),
            "kohaku-xl-delta" => include_str!("../presets/kohaku-xl-delta.toml"),
            _ => return None,
        })
    }

    /// A built-in preset by its name, else the TOML file at that path.
    ///
    /// # Errors
    /// [`Error::UnknownPreset`] if it is neither; what [`Preset::parse`] finds; [`Error::Storage`].
    pub fn load(name_or_path: &str) -> Result<Self> {
        if let Some(source) = Self::built_in_source(name_or_path) {
            return Self::parse(name_or_path, source);
        }
        let path = Path::new(name_or_path);
        let is_path = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("toml")) || path.components().count() > 1;
        if !is_path {
            let nearest = crate::error::nearest(name_or_path, Self::BUILT_IN);
            return Err(Error::UnknownPreset { name: name_or_path.into(), nearest });
        }
        Self::parse(name_or_path, &storage::read_to_string(path)?)
    }

    /// Reads a preset from TOML text. `origin` stands for it in messages.
    ///
    /// # Errors
    /// [`Error::PresetSyntax`], [`Error::UnknownKey`], [`Error::PresetValue`], [`Error::Pattern`], and
    /// [`Error::Unsupported`] for options that lokr does not have.
    pub fn parse(origin: &str, text: &str) -> Result<Self> {
        let kept = preset_toml::keep_header_escapes(text);
        let reader = Reader::new(origin, &kept)?;
        let table = reader.table(preset_toml::PRESET_KEYS)?;
        let glob = table.bool("use_fnmatch")?.unwrap_or(false);
        let names = |key: &'static str| -> Result<Option<Vec<Pattern>>> {
            table.strings(key)?.map(|list| list.iter().map(|text| Pattern::new(key, text, glob)).collect()).transpose()
        };
        // A key that is absent means what it means in `full`.
        let strings = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let unet_default = || strings(&["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]);
        let text_default = || strings(&["CLIPAttention", "CLIPMLP"]);
        let mut by_name = Vec::new();
        for (key, overrides) in table.overrides("name_algo_map")? {
            by_name.push((Pattern::new("name_algo_map", &key, glob)?, overrides));
        }
        Ok(Self {
            name: origin.into(),
            source: text.into(),
            enable_conv: table.bool("enable_conv")?.unwrap_or(true),
            unet: Targets {
                classes: table.strings("unet_target_module")?.unwrap_or_else(unet_default),
                names: names("unet_target_name")?.unwrap_or_default(),
            },
            text_encoder: Targets {
                classes: table.strings("text_encoder_target_module")?.unwrap_or_else(text_default),
                names: names("text_encoder_target_name")?.unwrap_or_default(),
            },
            exclude: names("exclude_name")?.unwrap_or_default(),
            by_class: table.overrides("module_algo_map")?,
            by_name,
        })
    }

    /// The preset's name, or the file's path.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The TOML text it was read from, so that a run can keep it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// LyCORIS `find_conf_for_name`: the very path first, then the first pattern in file order.
    pub(crate) fn name_options(&self, path: &str) -> Option<(usize, &Overrides)> {
        let exact = self.by_name.iter().position(|(pattern, _)| pattern.text() == path);
        let index = exact.or_else(|| self.by_name.iter().position(|(pattern, _)| pattern.matches(path)))?;
        Some((index, &self.by_name[index].1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(text: &str) -> Error {
        Preset::parse("p.toml", text).expect_err("must be refused")
    }

    #[test]
    fn every_built_in_preset_reads() {
        for name in Preset::BUILT_IN {
            let preset = Preset::load(name).expect("built in");
            assert_eq!(preset.name(), name);
            assert!(!preset.unet.classes.is_empty());
        }
    }

    #[test]
    fn absent_keys_mean_what_they_mean_in_full() {
        let (empty, full) = (Preset::parse("p", "").expect("empty"), Preset::load("full").expect("full"));
        assert_eq!(empty.enable_conv, full.enable_conv);
        assert_eq!(empty.unet.classes, full.unet.classes);
        assert_eq!(empty.text_encoder.classes, full.text_encoder.classes);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_the_nearest_one() {
        let error = fails("enable_conv = true\nunet_target_modul = []\n");
        assert_eq!(error.to_string(), "p.toml, line 2: unknown key `unet_target_modul`");
        assert_eq!(error.hint().as_deref(), Some("did you mean `unet_target_module`?"));
        let error = fails("[module_algo_map.CrossAttention]\nalgo = \"lokr\"\nfctor = 4\n");
        assert_eq!(error.to_string(), "p.toml, line 3: unknown key `module_algo_map.CrossAttention.fctor`");
        assert_eq!(error.hint().as_deref(), Some("did you mean `factor`?"));
        assert_eq!(fails("wholly_different = 1").hint(), None);
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named() {
        let error = fails("enable_conv = \"yes\"");
        assert_eq!(error.to_string(), "p.toml, line 1: `enable_conv` must be true or false, not a string");
        let error = fails("unet_target_name = [\"a\",\n 3]");
        assert_eq!(error.to_string(), "p.toml, line 2: `unet_target_name` must be a list of strings, not a list with an integer");
        let error = fails("[name_algo_map.x]\ndim = -4");
        assert_eq!(error.to_string(), "p.toml, line 2: `name_algo_map.x.dim` must be a whole number, 0 or more, not -4");
        let error = fails("[name_algo_map.x]\nalpha = nan");
        assert_eq!(error.to_string(), "p.toml, line 2: `name_algo_map.x.alpha` must be a finite number, not nan");
        let error = fails("module_algo_map = 3");
        assert_eq!(error.to_string(), "p.toml, line 1: `module_algo_map` must be a table, not an integer");
    }

    #[test]
    fn what_lokr_does_not_have_is_named() {
        let error = fails("[module_algo_map.Linear]\nalgo = \"loha\"");
        assert!(error.to_string().starts_with("`module_algo_map.Linear.algo` is not supported yet"), "{error}");
        let error = fails("[module_algo_map.Linear]\nweight_decompose = true");
        assert!(error.to_string().starts_with("`module_algo_map.Linear.weight_decompose` is not supported yet"), "{error}");
        let error = fails("[module_algo_map.Linear]\nrank_dropout = 0.1");
        assert!(error.to_string().starts_with("`module_algo_map.Linear.rank_dropout` is not supported yet"), "{error}");
        assert!(Preset::parse("p", "[module_algo_map.Linear]\nweight_decompose = false\nwd_on_out = true").is_ok());
    }

    #[test]
    fn syntax_errors_name_the_file() {
        let error = fails("enable_conv = ");
        assert_eq!(error.to_string(), "p.toml: not valid TOML");
        assert_eq!(error.hint(), None);
        let error = fails("unet_target_name = [\"out\\.2$\"]");
        assert!(error.hint().is_some_and(|h| h.contains("single quotes")), "{error:?}");
    }

    /// As the Python package `toml` reads it for LyCORIS: no escape is resolved in a quoted name of a header.
    #[test]
    fn quoted_names_in_headers_are_taken_as_written() {
        let preset = Preset::parse("p", "[name_algo_map.\"out\\\\.2$\"] # a note\nfactor = 2").expect("reads");
        assert_eq!(preset.by_name[0].0.text(), "out\\\\.2$");
        assert!(!preset.by_name[0].0.matches("out.2"));
        let preset = Preset::parse("p", "[name_algo_map.'out\\.2$']\nfactor = 2").expect("reads");
        assert!(preset.by_name[0].0.matches("out.2"));
    }

    #[test]
    fn a_name_that_is_no_preset_is_told_from_a_path() {
        let error = Preset::load("atn-mlp").expect_err("misspelt");
        assert_eq!(error.to_string(), "there is no preset named `atn-mlp`");
        assert!(error.hint().is_some_and(|h| h.contains("`attn-mlp`")));
        let error = Preset::load("nowhere/p.toml").expect_err("no such file");
        assert!(error.to_string().contains("nowhere/p.toml"), "{error}");
    }

    #[test]
    fn the_first_matching_pattern_in_file_order_wins_and_the_very_path_before_it() {
        let text = "[name_algo_map.\"z.*\"]\nfactor = 1\n[name_algo_map.\"zz\"]\nfactor = 2\n[name_algo_map.\"a.*\"]\nfactor = 3\n\
                    [name_algo_map.\"ab.*\"]\nfactor = 4\n";
        let preset = Preset::parse("p", text).expect("reads");
        let factor = |path| preset.name_options(path).and_then(|(_, o)| o.factor);
        assert_eq!((factor("zy"), factor("zz"), factor("abc"), factor("q")), (Some(1), Some(2), Some(3), None));
    }
}
