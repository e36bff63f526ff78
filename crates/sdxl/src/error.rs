//! The crate's error: which file, which part, which tensor, and, where one exists, the way out. Messages do not repeat
//! their cause; the caller prints the chain of sources once.

use std::path::PathBuf;

use crate::checkpoint::{Kind, Part};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong with a checkpoint, its tensors or the tokenizer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// The file or folder holds something else than a whole SDXL base model.
    #[error("`{}` is not an SDXL base model: it is {kind}", path.display())]
    WrongKind {
        /// The file or folder.
        path: PathBuf,
        /// What it is.
        kind: Kind,
    },
    /// The file or folder given as VAE holds none.
    #[error("`{}` holds no SDXL VAE{}", path.display(), kind.as_ref().map(|kind| format!(": it is {kind}")).unwrap_or_default())]
    NoVae {
        /// The file or folder.
        path: PathBuf,
        /// What it is, where that is known.
        kind: Option<Kind>,
    },
    /// A network's tensors are not those of the checkpoint.
    #[error("`{}`: the {part} does not fit{}{}{}", path.display(), list("missing", missing), list("misshapen", misshapen), list("unexpected", extra))]
    Mismatch {
        /// The checkpoint.
        path: PathBuf,
        /// The part.
        part: Part,
        /// Names and expected shapes of absent tensors.
        missing: Vec<String>,
        /// Names with found and expected shapes.
        misshapen: Vec<String>,
        /// Names and shapes that no module takes.
        extra: Vec<String>,
    },
    /// A whole part is absent.
    #[error("`{}` has no {part} ({})", path.display(), part.title())]
    MissingPart {
        /// The checkpoint.
        path: PathBuf,
        /// The absent part.
        part: Part,
    },
    /// A tensor is absent.
    #[error("`{}`: the {part} has no tensor `{name}`", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The part that should have it.
        part: Part,
        /// Canonical name.
        name: String,
    },
    /// Two tensors of a file mean the same weight.
    #[error("`{}`: `{first}` and `{second}` are both the {part}'s `{name}`", path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// The part.
        part: Part,
        /// Canonical name.
        name: String,
        /// Name in the file.
        first: String,
        /// Name in the file.
        second: String,
    },
    /// A tensor has a type or shape that cannot be used.
    #[error("`{}`: tensor `{name}`: {what}", path.display())]
    BadTensor {
        /// The file.
        path: PathBuf,
        /// Name in the file.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// A JSON file, or JSON in a file's metadata, cannot be read.
    #[error("`{}`: {what} cannot be read", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Which text.
        what: String,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// The numbers that tensors do not show (heads, norm groups) are absent, or do not fit the tensors.
    #[error("`{}`: {what}", path.display())]
    HeadDims {
        /// The checkpoint.
        path: PathBuf,
        /// What does not fit, with both values.
        what: String,
    },
    /// The network cannot be described by a diffusers config.
    #[error("`{}` cannot be written as a diffusers folder: {what}", path.display())]
    NotInDiffusers {
        /// The checkpoint.
        path: PathBuf,
        /// What diffusers has no word for.
        what: String,
    },
    /// An export would overwrite something that no export has written.
    #[error("will not write to `{}`: {what}", path.display())]
    TargetTaken {
        /// The target.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// The edit of an export changed a tensor's shape.
    #[error("{part} `{name}` has shape {expected:?}; the export's edit gave {got:?}")]
    EditedShape {
        /// The part.
        part: Part,
        /// Canonical name.
        name: String,
        /// Shape in the base.
        expected: Vec<usize>,
        /// Shape after the edit.
        got: Vec<usize>,
    },
    /// The built-in vocabulary is damaged.
    #[error("the built-in CLIP vocabulary is damaged: {what}")]
    Vocabulary {
        /// What is wrong with it.
        what: String,
    },
}

impl Error {
    /// The way out, where one is known: a sentence for the line after the error.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Storage(error) => error.hint(),
            Error::WrongKind { kind, .. } => Some(kind.hint().into()),
            Error::NoVae { .. } => {
                Some("give a VAE's safetensors file (with or without `first_stage_model.`), a VAE's folder, or a whole SDXL model".into())
            }
            Error::MissingPart { part: Part::Vae, .. } => {
                Some("name a VAE file beside it, as sdxl_vae.safetensors or the fp16 fix of it".into())
            }
            Error::MissingPart { .. } => Some("use a whole SDXL base model: UNet, both text encoders and VAE".into()),
            Error::MissingTensor { .. } => Some("the file was cut or altered by the program that wrote it; fetch it again".into()),
            Error::Twice { .. } => Some("the file mixes two layouts; use the release of the model that has one".into()),
            Error::HeadDims { .. } => Some(
                "an SDXL of other dimensions carries them in the metadata key `lokr.config` (single file) or in each part's config.json"
                    .into(),
            ),
            Error::NotInDiffusers { .. } => Some("export to the single-file layout instead".into()),
            Error::TargetTaken { .. } => Some("choose another path, or remove what is there".into()),
            _ => None,
        }
    }
}

/// Names of one sort of mismatch, a line each; long lists are cut, with their length.
fn list(what: &str, names: &[String]) -> String {
    const SHOWN: usize = 20;
    if names.is_empty() {
        return String::new();
    }
    let mut text = format!("\n  {what} ({}):", names.len());
    for name in names.iter().take(SHOWN) {
        text += &format!("\n    {name}");
    }
    if names.len() > SHOWN {
        text += &format!("\n    and {} more", names.len() - SHOWN);
    }
    text
}
