//! Which images of an index a run takes: ranges of ids, each whole or with a sample of a given size, and conditions on
//! rating, score, tags, format and state. Written in TOML, or one of the built-in selections.
//!
//! # Determinism
//! A selection is a function of the index's rows and of the configuration. The keyed choice takes the images whose
//! blake3 hash of (seed, id) is smallest: an image that is added to the index or leaves it moves no other one but at the
//! edge. `python-choices` draws what Python's `random.choices` draws, with replacement, in the order of the ranges.

mod python;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::index::{FileFormat, Index, Rating, Row, State};
use crate::{Error, Result};

pub use python::PythonRandom;

/// Which images to take. The default takes every image that has a file and is not deleted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SelectionConfig {
    /// Ranges of ids; if empty, all ids.
    pub ranges: Vec<IdRange>,
    /// How a range's sample is drawn.
    pub rule: SampleRule,
    /// What it is drawn from.
    pub sample_from: SampleFrom,
    /// Seed of the samples.
    pub seed: u64,
    /// Ratings to take; if empty, all, also unknown ones.
    pub ratings: Vec<Rating>,
    /// The least score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_min: Option<i32>,
    /// The highest score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_max: Option<i32>,
    /// The fewest favourites.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fav_count_min: Option<i32>,
    /// The first year.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub year_min: Option<i32>,
    /// The last year.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub year_max: Option<i32>,
    /// Tags that an image must have, all of them.
    pub tags_all: Vec<String>,
    /// Tags of which an image must have one or more; if empty, none is needed.
    pub tags_any: Vec<String>,
    /// Tags that an image must not have.
    pub tags_none: Vec<String>,
    /// Formats to take; if empty, all that can be decoded.
    pub formats: Vec<FileFormat>,
    /// The shortest side that an image may have, in pixels.
    pub min_side: u32,
    /// Take images of deleted posts, where they have a file.
    pub deleted: bool,
    /// Take images of banned posts, where they have a file.
    pub banned: bool,
}

/// A range of ids.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IdRange {
    /// The first id.
    pub from: u32,
    /// The last id; absent: no end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<u32>,
    /// Take so many at random; absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<usize>,
}

/// How a sample is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SampleRule {
    /// By a hash of (seed, id), without replacement: a sample has the size asked for, and hardly changes when the index
    /// grows.
    Keyed,
    /// As Python's `random.choices`, with replacement: what is drawn twice counts once, so a sample is smaller.
    PythonChoices,
}

/// What a sample is drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SampleFrom {
    /// Images that fulfil every condition.
    Matching,
    /// All images of the range, also those without a file; the conditions come afterwards. So Kohaku XL was made.
    All,
}

impl Default for SelectionConfig {
    fn default() -> Self {
        Self {
            ranges: Vec::new(),
            rule: SampleRule::Keyed,
            sample_from: SampleFrom::Matching,
            seed: 1,
            ratings: Vec::new(),
            score_min: None,
            score_max: None,
            fav_count_min: None,
            year_min: None,
            year_max: None,
            tags_all: Vec::new(),
            tags_any: Vec::new(),
            tags_none: Vec::new(),
            formats: Vec::new(),
            min_side: 0,
            deleted: false,
            banned: true,
        }
    }
}

impl SelectionConfig {
    /// Names of the built-in selections.
    pub const BUILT_IN: [&str; 3] = ["all", "kohaku-epsilon", "kohaku-delta"];

    /// A built-in selection: `all` (the default), and those of Kohaku XL Epsilon (its published text) and Delta
    /// (HakuBooru `kohaku_xl.py`).
    pub fn built_in(name: &str) -> Option<Self> {
        let range = |from, to, sample| IdRange { from, to, sample };
        let million = 1_000_000;
        Some(match name {
            "all" => Self::default(),
            "kohaku-epsilon" => Self {
                ranges: vec![
                    range(0, Some(1_999_999), Some(million)),
                    range(2_000_000, Some(4_999_999), Some(2 * million)),
                    range(5_000_000, None, None),
                ],
                sample_from: SampleFrom::All,
                ..Self::default()
            },
            "kohaku-delta" => Self {
                ranges: vec![
                    range(5_000_000, None, None),
                    range(3_000_000, Some(4_999_999), Some(million)),
                    range(0, Some(2_999_999), Some(million)),
                ],
                rule: SampleRule::PythonChoices,
                sample_from: SampleFrom::All,
                // Its code looks for files only, not for deletions.
                deleted: true,
                ..Self::default()
            },
            _ => return None,
        })
    }

    /// A built-in selection by name, or one from a TOML file.
    ///
    /// # Errors
    /// [`Error::Rules`] for a name that is neither, or a file that cannot be understood.
    pub fn load(name: &str) -> Result<Self> {
        crate::tags::load_rules("selection", name, &Self::BUILT_IN, Self::built_in)
    }

    /// The ids that the ranges and the rule take of a population (ascending), ascending, each once. Conditions are not
    /// looked at.
    pub fn choose(&self, ids: &[u32]) -> Vec<u32> {
        if self.ranges.is_empty() {
            return ids.to_vec();
        }
        let mut random = PythonRandom::new(self.seed);
        let mut taken = vec![false; ids.len()];
        for range in &self.ranges {
            let start = ids.partition_point(|&id| id < range.from);
            let end = range.to.map_or(ids.len(), |to| ids.partition_point(|&id| id <= to)).max(start);
            match (range.sample, self.rule) {
                (None, _) => taken[start..end].fill(true),
                (Some(k), SampleRule::PythonChoices) => random.choices(end - start, k).into_iter().for_each(|i| taken[start + i] = true),
                (Some(k), SampleRule::Keyed) => keyed(self.seed, &ids[start..end], k).into_iter().for_each(|i| taken[start + i] = true),
            }
        }
        ids.iter().zip(taken).filter(|(_, taken)| *taken).map(|(&id, _)| id).collect()
    }

    /// Why an image does not fulfil the conditions on its row; `None` if it does.
    fn refusal(&self, row: &Row) -> Option<Refusal> {
        let below = |value: Option<i32>, least: Option<i32>| least.is_some_and(|least| value.is_none_or(|v| v < least));
        let above = |value: Option<i32>, most: Option<i32>| most.is_some_and(|most| value.is_none_or(|v| v > most));
        let year = row.date.map(|d| d / 10_000);
        let other_format = if self.formats.is_empty() { !row.format.is_readable() } else { !self.formats.contains(&row.format) };
        Some(match row.state {
            State::Absent => Refusal::Absent,
            State::Gone => Refusal::Gone,
            State::Broken => Refusal::Broken,
            State::Present if row.deleted && !self.deleted => Refusal::Deleted,
            State::Present if row.banned && !self.banned => Refusal::Banned,
            State::Present if other_format => Refusal::Format,
            State::Present if row.size.0.min(row.size.1) < self.min_side.max(1) => Refusal::Side,
            State::Present if !self.ratings.is_empty() && !row.rating.is_some_and(|r| self.ratings.contains(&r)) => Refusal::Rating,
            State::Present if below(row.score, self.score_min) || above(row.score, self.score_max) => Refusal::Score,
            State::Present if below(row.fav_count, self.fav_count_min) => Refusal::Favourites,
            State::Present if below(year, self.year_min) || above(year, self.year_max) => Refusal::Year,
            State::Present => return None,
        })
    }
}

/// Indices of the `k` ids whose hash with the seed is smallest.
fn keyed(seed: u64, ids: &[u32], k: usize) -> Vec<usize> {
    let hash = |id: u32| {
        let mut key = [0; 12];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..].copy_from_slice(&id.to_le_bytes());
        let hash = blake3::hash(&key);
        u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap_or_default())
    };
    let mut order: Vec<(u64, u32)> = ids.iter().zip(0..).map(|(&id, i)| (hash(id), i)).collect();
    if k < order.len() {
        order.select_nth_unstable(k);
        order.truncate(k);
    }
    order.into_iter().map(|(_, i)| i as usize).collect()
}

/// Why an image is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// No range holds it, or it was not drawn.
    NotDrawn = 0,
    /// It has no file.
    Absent = 1,
    /// Its file is gone.
    Gone = 2,
    /// Its file's header is broken.
    Broken = 3,
    /// Its post was deleted.
    Deleted = 4,
    /// Its post was banned.
    Banned = 5,
    /// It is of another format.
    Format = 6,
    /// It is too small.
    Side = 7,
    /// Its rating.
    Rating = 8,
    /// Its score.
    Score = 9,
    /// Its number of favourites.
    Favourites = 10,
    /// Its year.
    Year = 11,
    /// Its tags.
    Tags = 12,
}

impl Refusal {
    const ALL: [Refusal; 13] = {
        use Refusal::*;
        [NotDrawn, Absent, Gone, Broken, Deleted, Banned, Format, Side, Rating, Score, Favourites, Year, Tags]
    };
}

/// An image that is taken: id, width and height.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selected {
    /// Its id.
    pub id: u32,
    /// Width and height of its file.
    pub size: (u32, u32),
}

/// What a selection took and left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SelectionReport {
    /// Images of the index.
    pub images: usize,
    /// Images taken.
    pub taken: usize,
    /// Images left out, by the first reason that held.
    pub refused: BTreeMap<Refusal, usize>,
}

impl std::fmt::Display for SelectionReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} images taken", self.taken, self.images)?;
        for (why, count) in &self.refused {
            let why = match why {
                Refusal::NotDrawn => "not drawn",
                Refusal::Absent => "without a file",
                Refusal::Gone => "with a file that is gone",
                Refusal::Broken => "broken",
                Refusal::Deleted => "deleted",
                Refusal::Banned => "banned",
                Refusal::Format => "of other formats",
                Refusal::Side => "too small",
                Refusal::Rating => "of other ratings",
                Refusal::Score => "of other scores",
                Refusal::Favourites => "with too few favourites",
                Refusal::Year => "of other years",
                Refusal::Tags => "by their tags",
            };
            write!(f, ", {count} {why}")?;
        }
        Ok(())
    }
}

/// Takes the images that a selection wants, in the order of ids.
///
/// # Errors
/// [`Error::Rules`] for a tag that the index does not know, [`Error::Sqlite`].
pub fn select(index: &Index, config: &SelectionConfig) -> Result<(Vec<Selected>, SelectionReport)> {
    // An image that is refused has width 0, and the reason in its height: 12 bytes an image are enough.
    let mut rows = index.scan(|row| {
        let refused = config.refusal(&row).map(|why| (0, why as u32));
        Some(Selected { id: row.id, size: refused.unwrap_or(row.size) })
    })?;
    refuse_by_tags(index, config, &mut rows)?;
    let mut report = SelectionReport { images: rows.len(), ..SelectionReport::default() };
    if !config.ranges.is_empty() {
        let population = rows.iter().filter(|row| config.sample_from == SampleFrom::All || row.size.0 > 0);
        let chosen = config.choose(&population.map(|row| row.id).collect::<Vec<_>>());
        let mut next = chosen.into_iter().peekable();
        for row in &mut rows {
            let drawn = next.next_if_eq(&row.id).is_some();
            // What is not drawn and refused as well is counted by the refusal only where that came first.
            if !drawn && (row.size.0 > 0 || config.sample_from == SampleFrom::All) {
                row.size = (0, Refusal::NotDrawn as u32);
            }
        }
    }
    rows.retain(|row| {
        if row.size.0 == 0 {
            *report.refused.entry(Refusal::ALL[row.size.1 as usize]).or_insert(0) += 1;
        }
        row.size.0 > 0
    });
    rows.shrink_to_fit();
    report.taken = rows.len();
    Ok((rows, report))
}

fn refuse_by_tags(index: &Index, config: &SelectionConfig, rows: &mut [Selected]) -> Result<()> {
    if [&config.tags_all, &config.tags_any, &config.tags_none].iter().all(|list| list.is_empty()) {
        return Ok(());
    }
    let table = index.tags()?;
    let numbers = |names: &[String]| -> Result<Vec<u32>> {
        let find = |name: &String| {
            table.find(name).or_else(|| table.find(&name.replace(' ', "_"))).ok_or_else(|| Error::Rules {
                kind: "selection",
                name: name.clone(),
                what: "the index has no such tag".into(),
                way_out: "write tags as danbooru does, as `long_hair`".into(),
            })
        };
        names.iter().map(find).collect()
    };
    let (all, any, none) = (numbers(&config.tags_all)?, numbers(&config.tags_any)?, numbers(&config.tags_none)?);
    let fits = |list: &[u8]| {
        let tags: Vec<u32> = crate::index::numbers(list).collect();
        let has = |tag: &u32| tags.contains(tag);
        all.iter().all(has) && (any.is_empty() || any.iter().any(has)) && !none.iter().any(has)
    };
    let untagged_fits = all.is_empty() && any.is_empty();
    // Ids whose tags decide otherwise than having none would.
    let others = index.scan_tags(|id, list| (fits(list) != untagged_fits).then_some(id))?;
    let mut others = others.into_iter().peekable();
    for row in rows.iter_mut() {
        while others.next_if(|&id| id < row.id).is_some() {}
        let fits = (others.peek() == Some(&row.id)) != untagged_fits;
        if !fits && row.size.0 > 0 {
            row.size = (0, Refusal::Tags as u32);
        }
    }
    Ok(())
}
