//! Images of an index as a source: ids and sizes are in memory, 12 bytes an image; places, tags and captions are looked up
//! when it is an image's turn.

use std::path::PathBuf;

use random::{Purpose, Stream};

use crate::index::{Index, Place, PostInfo};
use crate::select::{Selected, SelectionConfig, select};
use crate::tags::{CaptionRules, Captioner};
use crate::{CaptionContext, Error, Report, Result, SubsetConfig};

/// Draws of a caption's tags must not be those of its other steps, which take the position alone.
const TAGS: u64 = 1 << 63;

/// The images that a subset takes of an index.
#[derive(Debug)]
pub(crate) struct Indexed {
    pub index: Index,
    pub rows: Vec<Selected>,
    pub captioner: Captioner,
    /// Whether tags make the caption where an image has one of its own too.
    tags_first: bool,
}

impl Indexed {
    /// Opens the index of `subsets[number]` and selects.
    ///
    /// # Errors
    /// The index, the selection or the rules cannot be read, contradict the subset, or leave nothing.
    pub fn open(path: &std::path::Path, subset: &SubsetConfig, number: usize, report: &mut Report) -> Result<Self> {
        let selection = SelectionConfig::load(&subset.selection)?;
        let rules = CaptionRules::load(subset.caption_rules.as_deref().unwrap_or("plain"))?;
        let drawn_twice = subset.shuffle_caption || subset.caption_tag_dropout_rate > 0.0 || subset.token_warmup_step > 0.0;
        if rules.draws() && drawn_twice {
            return Err(Error::config(
                format!(
                    "subsets[{number}].caption_rules shuffle and drop tags by their class, so shuffle_caption, \
                     caption_tag_dropout_rate and token_warmup_step would draw twice"
                ),
                "remove these keys, and set rates in the caption rules",
            ));
        }
        let mut index = Index::open(path)?;
        if !subset.image_dir.as_os_str().is_empty() {
            index = index.with_root(&subset.image_dir);
        }
        let (rows, selected) = select(&index, &selection)?;
        report.selections.push(format!("{}: {selected}", path.display()));
        if rows.is_empty() {
            return Err(Error::NothingSelected { path: path.into(), images: selected.images });
        }
        let captioner = Captioner::new(rules, index.tags()?.clone());
        Ok(Self { index, rows, captioner, tags_first: subset.caption_rules.is_some() })
    }

    /// Where an image is.
    pub fn place(&self, id: u32) -> Result<Place> {
        self.index.place(id)?.ok_or_else(|| Error::NoSuchImage { path: self.index.path().into(), id })
    }

    /// An image's place as messages name it.
    pub fn name(&self, id: u32) -> PathBuf {
        let place = self.place(id).map(|place| place.to_string());
        PathBuf::from(place.unwrap_or_else(|_| format!("image {id} of {}", self.index.path().display())))
    }

    /// Whether a post's caption is made of its tags.
    pub fn by_tags(&self, post: &PostInfo) -> bool {
        if self.tags_first { !post.tags.is_empty() || post.caption.is_none() } else { post.caption.is_none() }
    }

    /// The caption before the pipeline: drawn by the rules for a visit, or (without one) written out whole.
    pub fn caption(&self, id: u32, context: Option<CaptionContext>) -> Result<String> {
        let post = self.index.post(id)?;
        Ok(match (post.caption.as_ref(), context) {
            (Some(caption), _) if !self.by_tags(&post) => caption.clone(),
            (_, Some(context)) if self.captioner.rules().draws() => self.captioner.draw(&post, &mut Self::stream(context)),
            _ => self.captioner.text(&post),
        })
    }

    /// The stream of a visit's draws among tags.
    pub fn stream(context: CaptionContext) -> Stream {
        Stream::new(context.seed, Purpose::Caption, context.epoch, context.position | TAGS)
    }

    /// What tells an image's bytes from others without reading them: its name, length and time.
    pub fn content(&self, id: u32) -> Result<String> {
        let place = self.place(id)?;
        let name = place.member.clone().unwrap_or_else(|| place.path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        let text = format!("lokr indexed image\n{name}\n{} {}", place.len, place.modified);
        Ok(blake3::hash(text.as_bytes()).to_hex().to_string())
    }
}
