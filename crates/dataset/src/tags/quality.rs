//! Words for year, rating and quality (`hakubooru/tag_generator.py`, `metainfo.py`): which word a post gets, and tables of
//! percentiles for posts of one's own.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::index::{Index, Rating};

/// A word for the years up to one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct YearWord {
    /// The first year; absent: no bound. A date that cannot be read counts as the year 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<i32>,
    /// The last year.
    pub through: i32,
    /// The word.
    pub word: String,
}

impl YearWord {
    /// Whether it is for this year.
    pub fn fits(&self, year: i32) -> bool {
        year <= self.through && self.from.is_none_or(|from| year >= from)
    }
}

/// Words for each rating.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RatingWords {
    /// General.
    pub general: Vec<String>,
    /// Sensitive.
    pub sensitive: Vec<String>,
    /// Questionable.
    pub questionable: Vec<String>,
    /// Explicit.
    pub explicit: Vec<String>,
}

impl RatingWords {
    /// The words of one rating.
    pub fn get(&self, rating: Rating) -> &[String] {
        match rating {
            Rating::General => &self.general,
            Rating::Sensitive => &self.sensitive,
            Rating::Questionable => &self.questionable,
            Rating::Explicit => &self.explicit,
        }
    }
}

/// Words by favourites: a post gets the first word whose threshold its favourites exceed, else the last word.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QualityWords {
    /// The words, the best first, one more than there are thresholds.
    pub words: Vec<String>,
    /// The percentile that each threshold stands for; for the reader, and for [`percentile_table`].
    pub percentiles: Vec<f64>,
    /// Thresholds of posts rated general, descending.
    pub general: Vec<i32>,
    /// Of those rated sensitive.
    pub sensitive: Vec<i32>,
    /// Of those rated questionable.
    pub questionable: Vec<i32>,
    /// Of those rated explicit.
    pub explicit: Vec<i32>,
    /// Posts above this id get no word: they are too new to have their favourites. 0: all get one.
    pub last_id: u32,
}

impl QualityWords {
    /// The thresholds of one rating.
    pub fn thresholds(&self, rating: Rating) -> &[i32] {
        match rating {
            Rating::General => &self.general,
            Rating::Sensitive => &self.sensitive,
            Rating::Questionable => &self.questionable,
            Rating::Explicit => &self.explicit,
        }
    }

    /// The word of a post, and the threshold that it exceeds (none for the last word).
    pub fn word(&self, id: u32, rating: Rating, fav_count: i32) -> Option<(&str, Option<i32>)> {
        if self.words.is_empty() || (self.last_id > 0 && id > self.last_id) {
            return None;
        }
        let thresholds = self.thresholds(rating);
        match thresholds.iter().position(|&t| fav_count > t) {
            Some(i) => Some((&self.words[i], Some(thresholds[i]))),
            None => Some((self.words.last()?, None)),
        }
    }

    pub(super) fn check(&self) -> std::result::Result<(), (String, &'static str)> {
        if self.words.is_empty() {
            return Ok(());
        }
        for rating in Rating::ALL {
            let thresholds = self.thresholds(rating);
            if thresholds.len() + 1 != self.words.len() || !thresholds.is_sorted_by(|a, b| a >= b) {
                let what = format!("quality has {} words, and the thresholds {thresholds:?} for {rating:?}", self.words.len());
                return Err((what, "give each rating one threshold less than there are words, descending; or no words at all"));
            }
        }
        Ok(())
    }
}

/// The favourites at each percentile of an index's posts, by rating ([`Rating::ALL`]), as `numpy.percentile` with method
/// "lower" has them: thresholds for [`QualityWords`] from one's own data. A rating without posts has none.
///
/// # Errors
/// [`crate::Error::Sqlite`].
pub fn percentile_table(index: &Index, percentiles: &[f64]) -> Result<[Vec<i32>; 4]> {
    let mut counts = index.scan(|row| Some((row.rating?, row.fav_count?)))?;
    counts.par_sort_unstable();
    Ok(Rating::ALL.map(|rating| {
        let start = counts.partition_point(|(r, _)| *r < rating);
        let of_rating = &counts[start..counts.partition_point(|(r, _)| *r <= rating)];
        let at = |p: &f64| of_rating.get((p.clamp(0.0, 100.0) / 100.0 * (of_rating.len().max(1) - 1) as f64) as usize).map(|(_, n)| *n);
        percentiles.iter().filter_map(at).collect()
    }))
}
