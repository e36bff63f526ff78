//! From a post's tags to its caption, as HakuBooru makes them (`hakubooru/caption.py`, `tag_generator.py`): tags by class,
//! words for year, rating and quality, a template with an order, and for each of its groups a shuffle and a drop rate.
//! [`CaptionRules`] is the configuration, [`Captioner`] applies it.
//!
//! Left to others: what else is done to a caption (prefix, dropout of the whole: `caption`), which visit it is for.

mod built_in;
mod captioner;
mod quality;
mod rules;

pub use captioner::{Captioner, Drawn, Written};
pub use quality::{QualityWords, RatingWords, YearWord, percentile_table};
pub use rules::{CaptionRules, Group, Part};

pub(crate) use rules::load_rules;
