//! Captions of posts by rules: written out whole, as HakuBooru writes them into files, or drawn for one visit.
//!
//! # Determinism
//! All draws of a caption come from the stream that is given, in the order of the groups: first a group's shuffle, then
//! one draw for each of its tags that may be dropped.

use std::sync::Arc;

use random::Stream;

use super::rules::{CaptionRules, Group, Part};
use crate::index::{PostInfo, TagClass, TagTable};

/// No part: the tag is always left out.
const NOWHERE: u8 = u8::MAX;

/// Rules applied to the tags of one index.
#[derive(Debug, Clone)]
pub struct Captioner {
    rules: CaptionRules,
    tags: Arc<TagTable>,
    /// Part of each tag number.
    parts: Vec<u8>,
}

/// A caption that is not drawn: its parts, and why tags were left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    /// The whole text, with marks, as HakuBooru writes it.
    pub text: String,
    /// The tags of each part that has any, in the order of the template.
    pub parts: Vec<(Part, Vec<String>)>,
    /// Tags left out by the rules.
    pub left_out: Vec<String>,
    /// How the words came about.
    pub reasons: Vec<String>,
}

/// A caption that was drawn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drawn {
    /// The text.
    pub text: String,
    /// Tags that were dropped by chance.
    pub dropped: Vec<String>,
}

impl Captioner {
    /// Sorts an index's tags into the parts of the rules.
    pub fn new(rules: CaptionRules, tags: Arc<TagTable>) -> Self {
        let part = |id: u32| match tags.get(id) {
            Some((name, class)) => part_of(&rules, name, class).map_or(NOWHERE, |part| part as u8),
            None => NOWHERE,
        };
        let mut parts = vec![NOWHERE];
        parts.extend((1..=tags.last()).map(part));
        Self { rules, tags, parts }
    }

    /// The rules.
    pub fn rules(&self) -> &CaptionRules {
        &self.rules
    }

    /// The caption as HakuBooru writes it into a file.
    pub fn text(&self, post: &PostInfo) -> String {
        let mut text = String::with_capacity(512);
        let mut before: Option<&Group> = None;
        for group in &self.rules.groups {
            let tags = self.tags_of(group, post);
            match before {
                Some(other) if other.kept != group.kept => {
                    text.push_str(", ");
                    text.push_str(&self.rules.mark);
                }
                Some(_) if !tags.is_empty() && !text.is_empty() => text.push_str(", "),
                _ => {}
            }
            self.join(&tags, &mut text);
            before = Some(group);
        }
        text
    }

    /// The caption of one visit: shuffled and dropped, without marks.
    pub fn draw(&self, post: &PostInfo, stream: &mut Stream) -> String {
        self.draw_and_tell(post, stream, &mut |_| {})
    }

    /// As [`Captioner::draw`], with what was dropped.
    pub fn explain(&self, post: &PostInfo, stream: &mut Stream) -> Drawn {
        let mut dropped = Vec::new();
        let text = self.draw_and_tell(post, stream, &mut |tag| dropped.push(self.shown(tag)));
        Drawn { text, dropped }
    }

    fn draw_and_tell(&self, post: &PostInfo, stream: &mut Stream, dropped: &mut dyn FnMut(&str)) -> String {
        let mut text = String::with_capacity(512);
        for group in &self.rules.groups {
            let mut tags = self.tags_of(group, post);
            if group.shuffle {
                stream.shuffle(&mut tags);
            }
            if group.drop > 0.0 {
                tags.retain(|(part, tag)| {
                    let may = group.drop_only.is_empty() || group.drop_only.contains(part);
                    let stays = !may || stream.uniform() >= group.drop;
                    if !stays {
                        dropped(tag);
                    }
                    stays
                });
            }
            if !tags.is_empty() && !text.is_empty() {
                text.push_str(", ");
            }
            self.join(&tags, &mut text);
        }
        text
    }

    /// The caption part by part, with reasons.
    pub fn written(&self, post: &PostInfo) -> Written {
        let mut written = Written { text: self.text(post), ..Written::default() };
        for part in self.rules.groups.iter().flat_map(|g| &g.parts) {
            let mut tags = Vec::new();
            self.collect(*part, post, &mut tags);
            if !tags.is_empty() {
                written.parts.push((*part, tags.iter().map(|(_, tag)| self.shown(tag)).collect()));
            }
        }
        let used = |id: &&u32| self.part(**id).is_none_or(|part| !self.rules.groups.iter().any(|g| g.parts.contains(&part)));
        written.left_out = post.tags.iter().filter(used).filter_map(|&id| Some(self.tags.get(id)?.0.to_string())).collect();
        written.reasons = self.reasons(post);
        written
    }

    fn reasons(&self, post: &PostInfo) -> Vec<String> {
        let mut reasons = Vec::new();
        if let Some(date) = post.row.date {
            let year = date / 10_000;
            let word = self.rules.years.iter().find(|y| y.fits(year)).map_or("no word", |y| &y.word);
            reasons.push(if year > 0 { format!("{word}: it is of {year}") } else { format!("{word}: its date cannot be read") });
        }
        let Some(rating) = post.row.rating else { return reasons };
        reasons.push(format!("{}: it is rated {rating:?}", self.rules.ratings.get(rating).join(", ")).to_lowercase());
        let Some(favourites) = post.row.fav_count else { return reasons };
        reasons.push(match self.rules.quality.word(post.row.id, rating, favourites) {
            None => format!("no word for quality: its id is above {}", self.rules.quality.last_id),
            Some((word, Some(threshold))) => format!("{word}: its {favourites} favourites exceed {threshold}"),
            Some((word, None)) => format!("{word}: its {favourites} favourites exceed no threshold"),
        });
        reasons
    }

    fn part(&self, tag: u32) -> Option<Part> {
        Part::ALL.get(*self.parts.get(tag as usize)? as usize).copied()
    }

    /// The tags of a group, part by part, each in the order of the post.
    fn tags_of<'a>(&'a self, group: &Group, post: &PostInfo) -> Vec<(Part, &'a str)> {
        let mut tags = Vec::with_capacity(post.tags.len() + 4);
        group.parts.iter().for_each(|&part| self.collect(part, post, &mut tags));
        tags
    }

    fn collect<'a>(&'a self, part: Part, post: &PostInfo, tags: &mut Vec<(Part, &'a str)>) {
        match (part, post.row.rating) {
            (Part::Year, _) => {
                let word = post.row.date.and_then(|date| self.rules.years.iter().find(|y| y.fits(date / 10_000)));
                tags.extend(word.map(|y| (part, y.word.as_str())));
            }
            (Part::Rating, Some(rating)) => tags.extend(self.rules.ratings.get(rating).iter().map(|w| (part, w.as_str()))),
            (Part::Quality, Some(rating)) => {
                let word = post.row.fav_count.and_then(|n| self.rules.quality.word(post.row.id, rating, n));
                tags.extend(word.map(|(word, _)| (part, word)));
            }
            (Part::Rating | Part::Quality, None) => {}
            _ => {
                let of_part = post.tags.iter().filter(|&&id| self.parts.get(id as usize) == Some(&(part as u8)));
                tags.extend(of_part.filter_map(|&id| Some((part, self.tags.get(id)?.0))));
            }
        }
    }

    fn join(&self, tags: &[(Part, &str)], text: &mut String) {
        for (i, (_, tag)) in tags.iter().enumerate() {
            if i > 0 {
                text.push_str(", ");
            }
            self.push_shown(tag, text);
        }
    }

    fn shown(&self, tag: &str) -> String {
        let mut text = String::new();
        self.push_shown(tag, &mut text);
        text
    }

    /// A name with its underscores as blanks, unless it is one of the short ones that are faces.
    fn push_shown(&self, tag: &str, text: &mut String) {
        // Fewer bytes than the limit are fewer characters too, and most names are far longer.
        let short = tag.len() <= 4 * self.rules.keep_underscores_up_to && tag.chars().count() <= self.rules.keep_underscores_up_to;
        if short || !tag.contains('_') {
            text.push_str(tag);
        } else {
            tag.split('_').enumerate().for_each(|(i, part)| {
                if i > 0 {
                    text.push(' ');
                }
                text.push_str(part);
            });
        }
    }
}

fn part_of(rules: &CaptionRules, name: &str, class: TagClass) -> Option<Part> {
    let contains = |list: &[String]| list.iter().any(|piece| name.contains(piece.as_str()));
    if rules.drop_tags.iter().any(|tag| tag == name) {
        return None;
    }
    match class {
        TagClass::General if rules.special.iter().any(|tag| tag == name) => Some(Part::Special),
        TagClass::General => Some(Part::General),
        TagClass::Character => Some(Part::Character),
        TagClass::Copyright => Some(Part::Copyright),
        TagClass::Artist => (!contains(&rules.drop_artist_containing)).then_some(Part::Artist),
        TagClass::Meta => (!contains(&rules.drop_meta_containing)).then_some(Part::Meta),
    }
}
