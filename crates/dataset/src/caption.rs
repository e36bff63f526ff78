//! From the caption in the file to the caption of one visit: sd-scripts' pipeline (`library/train_util.py`
//! `process_caption`), step by step in its order, with keyed randomness in place of Python's global generator.
//!
//! Left to others: reading files (`source`), tokens, emphasis and BREAK (`sdxl`).
//!
//! # Determinism
//! All draws come from one stream keyed by (seed, [`Purpose::Caption`], epoch, position in the epoch). Token warmup also
//! looks at the optimizer step, which is a function of the position.

use random::{Purpose, Stream};

use crate::SubsetConfig;
use crate::config::set;

/// What the caption of one visit depends on besides the text and the subset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaptionContext {
    /// The run's seed.
    pub seed: u64,
    /// Epoch, counted from 0 (sd-scripts counts from 1).
    pub epoch: u64,
    /// Position of the sample in the epoch, [`crate::Entry::position`].
    pub position: u64,
    /// Optimizer step, counted from 0.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub max_train_steps: u64,
}

/// The caption of one visit.
///
/// In order: prefix and suffix; dropout of the whole caption (then "", without the prefix too); a random line and
/// wildcards, else the first line; split into kept and flexible tags, warmup, shuffle and dropout of the flexible ones
/// (only if `shuffle_caption`, `token_warmup_step` or `caption_tag_dropout_rate` asks for it: else the text stays as it
/// is, a `keep_tokens_separator` included); `secondary_separator` becomes `caption_separator`.
pub fn process_caption(raw: &str, subset: &SubsetConfig, context: CaptionContext) -> String {
    let mut stream = Stream::new(context.seed, Purpose::Caption, context.epoch, context.position);
    let mut caption = with_affixes(raw, subset);
    if is_dropped(subset, context.epoch, &mut stream) {
        return String::new();
    }
    if subset.enable_wildcard {
        let lines: Vec<&str> = caption.split('\n').collect();
        let line = if lines.len() > 1 { lines[stream.below(lines.len() as u64) as usize] } else { &caption };
        caption = choose_alternatives(line, &mut stream);
    } else if let Some(end) = caption.find('\n') {
        caption.truncate(end);
    }
    if subset.shuffle_caption || subset.token_warmup_step > 0.0 || subset.caption_tag_dropout_rate > 0.0 {
        caption = draw_tags(&caption, subset, context, &mut stream);
    }
    match set(&subset.secondary_separator) {
        Some(secondary) => caption.replace(secondary, &subset.caption_separator),
        None => caption,
    }
}

/// Whether [`process_caption`] gives "" for a visit, whatever the caption is.
pub(crate) fn is_dropped_whole(subset: &SubsetConfig, context: CaptionContext) -> bool {
    is_dropped(subset, context.epoch, &mut Stream::new(context.seed, Purpose::Caption, context.epoch, context.position))
}

fn with_affixes(raw: &str, subset: &SubsetConfig) -> String {
    let mut caption = String::with_capacity(raw.len());
    if let Some(prefix) = set(&subset.caption_prefix) {
        caption.push_str(prefix);
        caption.push(' ');
    }
    caption.push_str(raw);
    if let Some(suffix) = set(&subset.caption_suffix) {
        caption.push(' ');
        caption.push_str(suffix);
    }
    caption
}

fn is_dropped(subset: &SubsetConfig, epoch: u64, stream: &mut Stream) -> bool {
    let by_chance = subset.caption_dropout_rate > 0.0 && stream.uniform() < subset.caption_dropout_rate;
    let n = subset.caption_dropout_every_n_epochs;
    by_chance || (n > 0 && (epoch + 1).is_multiple_of(n))
}

/// Replaces each `{a|b|c}` by one of its alternatives; `{{` and `}}` are literal braces.
fn choose_alternatives(text: &str, stream: &mut Stream) -> String {
    // (character, whether it is an escaped brace)
    let mut chars: Vec<(char, bool)> = Vec::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let escaped = matches!(c, '{' | '}') && rest.next_if_eq(&c).is_some();
        chars.push((c, escaped));
    }
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let close = if chars[i] == ('{', false) { chars[i..].iter().position(|&c| c == ('}', false)) } else { None };
        match close {
            // An empty pair of braces is no wildcard.
            Some(length) if length > 1 => {
                let inside: String = chars[i + 1..i + length].iter().map(|c| c.0).collect();
                let alternatives: Vec<&str> = inside.split('|').collect();
                out.push_str(alternatives[stream.below(alternatives.len() as u64) as usize]);
                i += length + 1;
            }
            _ => {
                out.push(chars[i].0);
                i += 1;
            }
        }
    }
    out
}

/// Tags of a caption: (kept at the front, flexible, kept at the end).
type Parts<'a> = (Vec<&'a str>, Vec<&'a str>, Vec<&'a str>);

fn split_tags<'a>(caption: &'a str, subset: &SubsetConfig) -> Parts<'a> {
    let tags = |text: &'a str| text.split(subset.caption_separator.as_str()).map(str::trim);
    let full = |text: &'a str| tags(text).filter(|t| !t.is_empty()).collect::<Vec<_>>();
    if let Some((front, rest)) = set(&subset.keep_tokens_separator).and_then(|s| caption.split_once(s)) {
        let (middle, tail) = set(&subset.keep_tokens_separator).and_then(|s| rest.split_once(s)).unwrap_or((rest, ""));
        return (full(front), full(middle), full(tail));
    }
    // Without a separator sd-scripts keeps empty tags, and they count for keep_tokens.
    let mut front: Vec<&str> = tags(caption.trim()).collect();
    let flexible = front.split_off(subset.keep_tokens.min(front.len()));
    (front, flexible, Vec::new())
}

fn draw_tags(caption: &str, subset: &SubsetConfig, context: CaptionContext, stream: &mut Stream) -> String {
    let (mut tags, mut flexible, tail) = split_tags(caption, subset);
    if let Some(count) = warmup_count(flexible.len(), subset, context) {
        flexible.truncate(count);
    }
    if subset.shuffle_caption {
        stream.shuffle(&mut flexible);
    }
    let rate = subset.caption_tag_dropout_rate;
    if rate > 0.0 {
        flexible.retain(|_| stream.uniform() >= rate);
    }
    tags.extend(flexible);
    tags.extend(tail);
    tags.join(", ")
}

/// How many flexible tags the warmup leaves at this step; `None` when it is over or off.
fn warmup_count(tags: usize, subset: &SubsetConfig, context: CaptionContext) -> Option<usize> {
    let given = subset.token_warmup_step;
    let warmup = if given < 1.0 { (given * context.max_train_steps as f64).floor() } else { given };
    let step = context.step as f64;
    if warmup <= 0.0 || step >= warmup {
        return None;
    }
    let min = subset.token_warmup_min as f64;
    let count = (step * ((tags as f64 - min) / warmup)).floor() + min;
    Some(count.max(0.0) as usize)
}
