//! The built-in rules: the numbers of Kohaku XL's recipes (HakuBooru `metainfo.py`, `tag_generator.py`, `kohaku_xl.py`).

use super::quality::{QualityWords, RatingWords, YearWord};
use super::rules::{CaptionRules, Group, Part};

fn own(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| w.to_string()).collect()
}

/// The rules of this name.
pub(super) fn rules(name: &str) -> Option<CaptionRules> {
    Some(match name {
        "kohaku-epsilon" => kohaku(0.15, epsilon_quality()),
        "kohaku-delta" => kohaku(0.1, delta_quality()),
        "model-card" => CaptionRules {
            groups: vec![
                kept(&[Part::Special, Part::Character, Part::Copyright, Part::Artist]),
                Group { parts: vec![Part::General], kept: false, shuffle: true, drop: 0.15, drop_only: Vec::new() },
                kept(&[Part::Quality, Part::Year, Part::Meta, Part::Rating]),
            ],
            ratings: RatingWords { explicit: own(&["nsfw", "explicit"]), ..ratings() },
            ..kohaku(0.15, epsilon_quality())
        },
        "plain" => CaptionRules {
            groups: vec![kept(&[Part::Special, Part::Character, Part::Copyright, Part::Artist, Part::General, Part::Meta])],
            ..kohaku(0.0, epsilon_quality())
        },
        _ => return None,
    })
}

fn kept(parts: &[Part]) -> Group {
    Group { parts: parts.to_vec(), kept: true, shuffle: false, drop: 0.0, drop_only: Vec::new() }
}

fn kohaku(drop: f64, quality: QualityWords) -> CaptionRules {
    let special = "1girl 2girls 3girls 4girls 5girls 6+girls multiple_girls 1boy 2boys 3boys 4boys 5boys 6+boys multiple_boys male_focus \
        1other 2others 3others 4others 5others 6+others multiple_others";
    let year = |from, through, word: &str| YearWord { from, through, word: word.into() };
    CaptionRules {
        mark: "|||".into(),
        groups: vec![
            kept(&[Part::Special, Part::Character, Part::Copyright, Part::Artist]),
            Group {
                parts: vec![Part::General, Part::Meta, Part::Year, Part::Rating, Part::Quality],
                kept: false,
                shuffle: true,
                drop,
                drop_only: Vec::new(),
            },
        ],
        special: special.split_whitespace().map(String::from).collect(),
        drop_meta_containing: own(&["(medium)", "commentary", "bad", "translat", "request", "mismatch", "revision", "audio", "video"]),
        drop_artist_containing: own(&["banned"]),
        drop_tags: Vec::new(),
        keep_underscores_up_to: 3,
        // Years before 2005 and dates that cannot be read fall to "early", as in the original.
        years: vec![
            year(Some(2005), 2010, "old"),
            year(None, 2014, "early"),
            year(None, 2017, "mid"),
            year(None, 2020, "recent"),
            year(None, 2024, "newest"),
        ],
        ratings: ratings(),
        quality,
    }
}

fn ratings() -> RatingWords {
    RatingWords {
        general: own(&["safe"]),
        sensitive: own(&["sensitive"]),
        questionable: own(&["nsfw"]),
        explicit: own(&["explicit", "nsfw"]),
    }
}

fn quality_words() -> Vec<String> {
    own(&["masterpiece", "best quality", "great quality", "good quality", "normal quality", "low quality", "worst quality"])
}

/// `quality_tag_new`.
fn epsilon_quality() -> QualityWords {
    QualityWords {
        words: quality_words(),
        percentiles: vec![90.0, 75.0, 60.0, 45.0, 30.0, 10.0],
        general: vec![27, 16, 10, 7, 4, 1],
        sensitive: vec![56, 30, 19, 13, 8, 2],
        questionable: vec![132, 75, 49, 33, 21, 8],
        explicit: vec![190, 106, 69, 45, 27, 9],
        last_id: 7_500_000,
    }
}

/// `quality_tag`.
fn delta_quality() -> QualityWords {
    QualityWords {
        words: quality_words(),
        percentiles: vec![95.0, 85.0, 75.0, 50.0, 25.0, 10.0],
        general: vec![37, 22, 16, 8, 3, 1],
        sensitive: vec![81, 44, 30, 15, 6, 2],
        questionable: vec![182, 105, 75, 38, 18, 8],
        explicit: vec![262, 151, 106, 52, 22, 9],
        last_id: 7_000_000,
    }
}
