//! The configuration of captions: a TOML file, or one of the built-in rules, which a file may start from.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use toml::{Table, Value};

use super::quality::{QualityWords, RatingWords, YearWord};
use crate::{Error, Result};

/// A class of words in a caption.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// General tags that [`CaptionRules::special`] lists: how many people there are.
    Special = 0,
    /// Characters.
    Character = 1,
    /// Series.
    Copyright = 2,
    /// Artists.
    Artist = 3,
    /// All other general tags.
    General = 4,
    /// About the file or the post.
    Meta = 5,
    /// The word for the year.
    Year = 6,
    /// The words for the rating.
    Rating = 7,
    /// The word for the quality.
    Quality = 8,
}

impl Part {
    /// All parts.
    pub const ALL: [Part; 9] =
        [Part::Special, Part::Character, Part::Copyright, Part::Artist, Part::General, Part::Meta, Part::Year, Part::Rating, Part::Quality];
}

/// Parts that stand together and share a treatment. A part with an order or rate of its own is a group of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// The parts, in order.
    pub parts: Vec<Part>,
    /// Whether they stand on the kept side of the mark: never shuffled, never dropped.
    #[serde(default)]
    pub kept: bool,
    /// Shuffle the tags of all parts together, anew at each visit.
    #[serde(default)]
    pub shuffle: bool,
    /// Probability that a tag is left out of a visit's caption, 0 to 1.
    #[serde(default)]
    pub drop: f64,
    /// Parts whose tags may be dropped; if empty, all of the group's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drop_only: Vec<Part>,
}

/// How captions are made of tags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionRules {
    /// Stands between kept and other groups in the written caption, as [`crate::SubsetConfig::keep_tokens_separator`].
    pub mark: String,
    /// The order of parts. A part that no group names is left out.
    pub groups: Vec<Group>,
    /// General tags that go to [`Part::Special`].
    pub special: Vec<String>,
    /// Meta tags whose name contains one of these are left out.
    pub drop_meta_containing: Vec<String>,
    /// Artists whose name contains one of these are left out.
    pub drop_artist_containing: Vec<String>,
    /// Tags that are always left out, by their name.
    pub drop_tags: Vec<String>,
    /// Underscores become blanks in names of more than so many characters: `^_^` stays as it is.
    pub keep_underscores_up_to: usize,
    /// Words for years; the first that fits is taken.
    pub years: Vec<YearWord>,
    /// Words for ratings.
    pub ratings: RatingWords,
    /// Words for quality.
    pub quality: QualityWords,
}

impl CaptionRules {
    /// Names of the built-in rules.
    pub const BUILT_IN: [&str; 4] = ["kohaku-epsilon", "kohaku-delta", "model-card", "plain"];

    /// Built-in rules: as Kohaku XL Epsilon and Delta were trained; `model-card`, Epsilon's words in the order of prompts;
    /// `plain`, tags in Epsilon's order without words, marks or draws.
    pub fn built_in(name: &str) -> Option<Self> {
        super::built_in::rules(name)
    }

    /// Built-in rules by name, or rules from a TOML file. A file may name built-in rules as `base`; what it says itself
    /// then replaces what they say, key by key.
    ///
    /// # Errors
    /// [`Error::Rules`] for a name that is neither, a file that cannot be understood, or rules that contradict themselves.
    pub fn load(name: &str) -> Result<Self> {
        let rules: Self = load_rules("caption rules", name, &Self::BUILT_IN, Self::built_in)?;
        rules.check().map(|()| rules.clone()).map_err(|(what, way_out)| Error::Rules {
            kind: "caption rules",
            name: name.into(),
            what,
            way_out: way_out.into(),
        })
    }

    /// Whether visits differ: something is shuffled or dropped.
    pub fn draws(&self) -> bool {
        self.groups.iter().any(|g| g.shuffle || g.drop > 0.0)
    }

    fn check(&self) -> std::result::Result<(), (String, &'static str)> {
        for (i, group) in self.groups.iter().enumerate() {
            if !(0.0..=1.0).contains(&group.drop) {
                return Err((format!("groups[{i}].drop = {} is not a probability", group.drop), "use a number from 0 to 1"));
            }
            if group.kept && (group.shuffle || group.drop > 0.0) {
                let what = format!("groups[{i}] is kept, and yet it is shuffled or dropped");
                return Err((what, "remove kept = true, or shuffle and drop"));
            }
            if let Some(part) = group.drop_only.iter().find(|part| !group.parts.contains(part)) {
                return Err((format!("groups[{i}].drop_only names {part:?}, which is none of its parts"), "add it to parts"));
            }
            for part in &group.parts {
                let count = self.groups.iter().flat_map(|g| &g.parts).filter(|p| *p == part).count();
                if count > 1 {
                    return Err((format!("the part {part:?} stands {count} times in groups"), "name each part once"));
                }
            }
        }
        if self.mark.is_empty() || self.mark.contains(',') {
            return Err((format!("mark = {:?} cannot tell groups apart", self.mark), "use \"|||\""));
        }
        self.quality.check()
    }
}

/// A configuration by the name of a built-in one, or from a TOML file, laid over its `base` where it names one.
pub(crate) fn load_rules<T: Serialize + DeserializeOwned>(
    kind: &'static str,
    name: &str,
    names: &[&str],
    built_in: impl Fn(&str) -> Option<T>,
) -> Result<T> {
    if let Some(found) = built_in(name) {
        return Ok(found);
    }
    let refuse = |what: String, way_out: String| Error::Rules { kind, name: name.into(), what, way_out };
    let known = || format!("use one of {}, or the path of a TOML file", names.join(", "));
    let text = match storage::read_to_string(name.as_ref()) {
        Err(error) if error.is_not_found() => return Err(refuse("there are none of this name, and no such file".into(), known())),
        text => text?,
    };
    let mut table: Table = text.parse().map_err(|e: toml::de::Error| refuse(format!("it is no TOML: {}", e.message()), known()))?;
    let base = match table.remove("base") {
        Some(Value::String(base)) => built_in(&base).ok_or_else(|| refuse(format!("base = {base:?} is not built in"), known()))?,
        Some(other) => return Err(refuse(format!("base = {other} is no name"), known())),
        None => built_in(names[0]).ok_or_else(|| refuse("there is no default".into(), known()))?,
    };
    let mut whole = Table::try_from(&base).map_err(|e| refuse(e.to_string(), known()))?;
    lay_over(&mut whole, table);
    let understood: std::result::Result<T, toml::de::Error> = Value::Table(whole).try_into();
    understood.map_err(|e| refuse(e.message().trim().to_string(), format!("`lokr dataset rules` prints the built-in {kind} with all keys")))
}

/// Tables are merged, everything else is replaced.
fn lay_over(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(over)) => lay_over(inner, over),
            (_, value) => _ = base.insert(key, value),
        }
    }
}
