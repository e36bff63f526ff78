//! What can be wrong with a recipe, and where: a fault is one place in a text, a problem is a rule between keys.

use std::fmt;
use std::path::{Path, PathBuf};

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line (from 1) of a recipe.
    Line {
        /// The recipe.
        file: PathBuf,
        /// The line.
        line: usize,
    },
    /// A `--set` argument, as typed.
    Override(String),
    /// A recipe as a whole.
    File(PathBuf),
}

impl Place {
    pub(super) fn line(file: &Path, text: &str, offset: usize) -> Self {
        let line = text.as_bytes().iter().take(offset).filter(|b| **b == b'\n').count() + 1;
        Place::Line { file: file.to_owned(), line }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Line { file, line } => write!(f, "{}:{line}", file.display()),
            Place::Override(text) => write!(f, "--set {text}"),
            Place::File(file) => write!(f, "{}", file.display()),
        }
    }
}

/// One thing that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub place: Place,
    /// What.
    pub what: String,
    /// The way out, where there is one.
    pub hint: Option<String>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// A rule that a readable recipe breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The keys that the rule is about, as `train.lr_warmup_steps`.
    pub keys: Vec<String>,
    /// Their values and what does not go together.
    pub what: String,
    /// What to change.
    pub way_out: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)
    }
}

/// Why there is no usable recipe.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("the recipe cannot be read")]
    Read(#[from] storage::Error),
    /// The text is no TOML.
    #[error("{place}:{column}: not valid TOML: {what}")]
    Syntax {
        /// Line.
        place: Place,
        /// Column, from 1.
        column: usize,
        /// What the parser expected or met.
        what: String,
    },
    /// Keys or values that cannot be understood, in the order of the text.
    #[error("{}", list(.0))]
    Faults(Vec<Fault>),
    /// Values that do not go together.
    #[error("{}", list(.0))]
    Problems(Vec<Problem>),
}

impl From<Vec<Problem>> for ConfigError {
    fn from(problems: Vec<Problem>) -> Self {
        ConfigError::Problems(problems)
    }
}

impl ConfigError {
    /// The ways out, one line for each fault or problem that has one.
    pub fn hint(&self) -> Option<String> {
        let lines: Vec<String> = match self {
            ConfigError::Read(e) => e.hint().into_iter().collect(),
            ConfigError::Syntax { .. } => Vec::new(),
            ConfigError::Faults(faults) if faults.len() == 1 => faults[0].hint.iter().cloned().collect(),
            ConfigError::Faults(faults) => faults.iter().filter_map(|f| Some(format!("{}: {}", f.place, f.hint.as_ref()?))).collect(),
            ConfigError::Problems(problems) => problems.iter().map(|p| p.way_out.clone()).collect(),
        };
        (!lines.is_empty()).then(|| lines.join("\n"))
    }
}

/// One item as it is, several each on a line of its own.
fn list<T: fmt::Display>(items: &[T]) -> String {
    match items {
        [one] => one.to_string(),
        _ => items.iter().fold(format!("the recipe has {} faults", items.len()), |text, item| format!("{text}\n  {item}")),
    }
}
