//! What can go wrong with an adapter: its options, its preset, its file. Each error holds the name of what it is about and
//! both values where two disagree; the way out is a separate line, [`Error::hint`].

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Neither a built-in preset nor a file's path.
    #[error("there is no preset named `{name}`")]
    UnknownPreset {
        /// What was asked for.
        name: String,
        /// The built-in preset with the most similar name, if one is near.
        nearest: Option<String>,
    },
    /// A preset that is not TOML.
    #[error("{origin}: not valid TOML")]
    PresetSyntax {
        /// The file, or the name the text was given.
        origin: String,
        /// What the parser found.
        source: Box<toml::de::Error>,
    },
    /// A key that no preset has. LyCORIS ignores it; a misspelt key would train something else than was asked for.
    #[error("{origin}, line {line}: unknown key `{key}`")]
    UnknownKey {
        /// The file, or the name the text was given.
        origin: String,
        /// Line of the key, from 1.
        line: usize,
        /// The key with the tables it stands in, `module_algo_map.CrossAttention.fctor`.
        key: String,
        /// The known key with the most similar name, if one is near.
        nearest: Option<String>,
    },
    /// A preset value of the wrong type or out of range.
    #[error("{origin}, line {line}: `{key}` must be {expected}, not {found}")]
    PresetValue {
        /// The file, or the name the text was given.
        origin: String,
        /// Line of the value, from 1.
        line: usize,
        /// The key with the tables it stands in.
        key: String,
        /// What is accepted.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// A target pattern that is not a regular expression.
    #[error("`{pattern}` in `{key}` is not a valid pattern")]
    Pattern {
        /// The preset's key.
        key: &'static str,
        /// The pattern.
        pattern: String,
        /// What the regular expression engine found.
        source: Box<regex::Error>,
    },
    /// An option that exists in LyCORIS and not here: an error, because to ignore it would train something else.
    #[error("`{key}` is not supported yet: {why}")]
    Unsupported {
        /// The option's key; for a preset with the tables it stands in.
        key: String,
        /// What it would need.
        why: &'static str,
    },
    /// An option whose value makes no sense.
    #[error("`{key}` = {value}: {why}")]
    Option {
        /// The option's key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A preset under which nothing would be trained.
    #[error("preset `{preset}` adapts no layer of this model")]
    NothingAdapted {
        /// The preset.
        preset: String,
        /// Its classes and patterns; none of them led to a layer.
        targets: Vec<String>,
    },
    /// Two targets of a preset claim one layer. LyCORIS stops here as well ("duplicated lora name").
    #[error("duplicated name: `{name}` (layer `{path}`) is claimed by two targets of the preset")]
    Duplicate {
        /// The module's name in the file.
        name: String,
        /// The layer's path in the model.
        path: String,
    },
    /// A file without a single LoKr tensor.
    #[error("{}: no LoKr tensors among its {keys} tensors", path.display())]
    NotLokr {
        /// The file.
        path: PathBuf,
        /// Tensors in it.
        keys: usize,
        /// What the file seems to be instead, if that can be told.
        looks_like: Option<&'static str>,
    },
    /// A LoKr file for another model: no module of it has a layer here.
    #[error("{}: none of its {modules} modules has a layer in this model (the first is `{first}`)", path.display())]
    NoLayer {
        /// The file.
        path: PathBuf,
        /// Modules in it.
        modules: usize,
        /// Name of the first.
        first: String,
    },
    /// Half of a pair is absent.
    #[error("{}: module `{module}` has `{present}` and no `{missing}`", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The module's name in the file.
        module: String,
        /// The tensor that asks for the other.
        present: String,
        /// The tensor that is absent.
        missing: String,
    },
    /// A form of LoKr, or a tensor of another method, that this reader cannot use.
    #[error("{}: module `{module}` has `{tensor}`: {why}", path.display())]
    UnsupportedTensor {
        /// The file.
        path: PathBuf,
        /// The module's name in the file.
        module: String,
        /// The tensor.
        tensor: String,
        /// Why it cannot be used.
        why: &'static str,
    },
    /// A tensor whose shape does not fit the layer, or its partner.
    #[error("{}: `{tensor}` has shape {got:?}: {why}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's key.
        tensor: String,
        /// Its shape.
        got: Vec<usize>,
        /// What it was compared with.
        why: String,
    },
    /// An element type that is no weight's.
    #[error("{}: `{tensor}` has type {dtype}, expected f32, f16, bf16 or f64", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor's key.
        tensor: String,
        /// Its type.
        dtype: String,
    },
    /// An alpha from which no scale follows, in a module where it matters.
    #[error("{}: `{tensor}` is {value}, so the strength of this module is unknown", path.display())]
    Alpha {
        /// The file.
        path: PathBuf,
        /// The tensor's key.
        tensor: String,
        /// Its value.
        value: f64,
    },
    /// Values that the file's type cannot hold, or that are not numbers.
    #[error("`{tensor}` holds {value}, which cannot be saved as {dtype}")]
    NotFinite {
        /// The tensor's key.
        tensor: String,
        /// The first such value.
        value: f32,
        /// The file's element type.
        dtype: &'static str,
    },
    /// A base tensor whose shape is not that of the layer it is merged into.
    #[error("cannot merge `{tensor}` of shape {got:?} with an adapter of shape {want:?}")]
    MergeShape {
        /// The base tensor's name.
        tensor: String,
        /// Its shape.
        got: Vec<usize>,
        /// The adapter's shape.
        want: Vec<usize>,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// The way out, where there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownPreset { nearest, .. } => Some(match nearest {
                Some(near) => format!("did you mean `{near}`? For a file, give its path (it ends in .toml)"),
                None => format!("built in are {}; for a file, give its path (it ends in .toml)", crate::Preset::BUILT_IN.join(", ")),
            }),
            // LyCORIS's reader leaves escapes in quoted keys as they are, so files with a single backslash in them exist.
            Self::PresetSyntax { source, .. } if source.message().contains("escape") => {
                Some("write patterns in single quotes, where a backslash is a backslash: 'out\\.2$'".into())
            }
            Self::UnknownKey { nearest: Some(near), .. } => Some(format!("did you mean `{near}`?")),
            Self::Pattern { .. } => Some(
                "patterns are regular expressions matched from the start of the module path (look-around and back-references are not \
                 available); with use_fnmatch = true they are shell globs on the whole path"
                    .into(),
            ),
            Self::NothingAdapted { targets, .. } if !targets.is_empty() => {
                Some(format!("none of these led to a layer: {}", targets.join(", ")))
            }
            Self::NothingAdapted { .. } => Some("the preset names no target; see the built-in preset `full`".into()),
            Self::Duplicate { .. } => Some(
                "remove one of the targets; a pattern that also matches the path of the surrounding block replaces the block's own walk"
                    .into(),
            ),
            Self::NotLokr { looks_like: Some(what), .. } => Some(format!("this looks like {what}")),
            Self::NoLayer { .. } => {
                Some("the file may belong to another architecture (SD1, Flux) or use names this reader does not know".into())
            }
            Self::NotFinite { dtype, .. } if *dtype == "f16" => Some("save as bf16 or f32, or find out where the values come from".into()),
            Self::Storage(source) => source.hint(),
            _ => None,
        }
    }
}

/// The name in `known` that is nearest to `name`, if a slip of the keyboard can explain the difference.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let (distance, near) = known.into_iter().map(|k| (strsim::damerau_levenshtein(name, k), k)).min()?;
    (distance <= 1 + name.len() / 4).then(|| near.to_string())
}
