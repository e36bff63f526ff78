//! Which latents a dataset wants, and what a visit takes to the network: a latent that is there, or pixels that have yet to
//! be encoded.

use std::sync::Arc;

use rayon::prelude::*;

use super::{ItemKey, Latent, LatentCache, LatentId, LatentItem};
use crate::rows::At;
use crate::{Dataset, DecodeError, Error, Pixels, Result, View};

/// What a visit found.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// The latent was there.
    Latent(Latent),
    /// It has yet to be made of these, and then [`LatentCache::insert`] keeps it.
    Pixels(Pixels),
}

/// One visit of a sample whose latents are cached.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentVisit {
    /// What was seen of it; its key has the sample that was taken: the one asked for, or its replacement.
    pub item: LatentItem,
    /// Mirroring, crop, size conditioning.
    pub view: View,
    /// The latent, or what it is made of.
    pub source: Source,
}

impl Dataset {
    /// What a latent cache of this dataset holds: every image, and its mirror image where `flip_aug` is on.
    ///
    /// # Errors
    /// [`Error::Config`] if a subset has `random_crop`.
    pub fn latent_keys(&self) -> Result<impl Iterator<Item = ItemKey> + '_> {
        self.config().check_cacheable()?;
        Ok((0..self.len() as u32).flat_map(|sample| {
            let flips = self.row(sample).is_ok_and(|row| self.config().subsets[row.subset].flip_aug);
            (0..=u8::from(flips)).map(move |flipped| ItemKey { sample, flipped: flipped == 1 })
        }))
    }

    /// What is to be found in a cache under a key. Of an image that is a listed file, the content is read when it is first
    /// asked for; of an index's images, name, length and time stand for it.
    ///
    /// # Errors
    /// [`Error::Image`] if the file cannot be read (it is then listed in [`Dataset::broken`]); [`Error::Sqlite`].
    pub fn latent_item(&self, key: ItemKey) -> Result<LatentItem> {
        let content = self.content(key.sample)?;
        let row = self.row(key.sample)?;
        let (w, h) = row.placement.bucket;
        let (crop, method) = (row.placement.centre_crop(), self.config().resize_interpolation);
        let id = LatentId::new(&content, row.placement, crop, key.flipped, method);
        Ok(LatentItem { key, id, shape: [4, h as usize / 8, w as usize / 8] })
    }

    /// The latents of `keys` that a cache lacks, in their order; of equal images the first alone. Images that cannot be
    /// read are left out, and become [`Dataset::broken`].
    ///
    /// # Errors
    /// [`Error::Sqlite`].
    pub fn missing_latents(&self, cache: &LatentCache, keys: &[ItemKey]) -> Result<Vec<LatentItem>> {
        let look = |&key: &ItemKey| -> Result<Option<LatentItem>> {
            match self.latent_item(key) {
                Ok(item) => Ok(Some(item)),
                Err(Error::Image { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let mut missing = Vec::new();
        let mut listed = std::collections::HashSet::new();
        for found in keys.par_iter().map(look).collect::<Result<Vec<_>>>()? {
            let Some(item) = found else { continue };
            if !cache.contains(&item)? && self.npz_latent(cache, &item)?.is_none() && listed.insert(item.id) {
                missing.push(item);
            }
        }
        Ok(missing)
    }

    /// The latent of one visit, or the pixels that it is to be made of; never both. Broken images are replaced as by
    /// [`Dataset::load_pixels`].
    ///
    /// # Errors
    /// As [`Dataset::load_pixels`]; [`Error::Sqlite`] or [`Error::Storage`] if the cache cannot be read.
    pub fn load_latent(&self, cache: &LatentCache, sample: u32, seed: u64, epoch: u64, position: u64) -> Result<LatentVisit> {
        self.first_usable(sample, |candidate| {
            let view = self.view(candidate, seed, epoch, position)?;
            let item = self.latent_item(ItemKey { sample: candidate, flipped: view.flipped })?;
            let there = match cache.get(&item)? {
                None => self.npz_latent(cache, &item)?,
                there => there,
            };
            let source = match there {
                Some(latent) => Source::Latent(latent),
                None => Source::Pixels(self.cache_pixels(item.key)?),
            };
            Ok(LatentVisit { item, view, source })
        })
    }

    /// The latent that sd-scripts left beside an image that is a file of its own, in the cache's type.
    fn npz_latent(&self, cache: &LatentCache, item: &LatentItem) -> Result<Option<Latent>> {
        if !cache.npz {
            return Ok(None);
        }
        let at = self.rows.at(item.key.sample)?;
        if let At::Indexed { source, row, .. } = &at
            && source.place(row.id)?.member.is_some()
        {
            return Ok(None);
        }
        let values = super::npz::read(&at.name(), at.row(&self.rule).size, item);
        Ok(values.map(|values| Latent { shape: item.shape, data: cache.dtype.decode(&cache.dtype.encode(&values)) }))
    }

    /// What tells an image's bytes from others.
    fn content(&self, number: u32) -> Result<Arc<str>> {
        let at = self.rows.at(number)?;
        let broken = |source: DecodeError| {
            let path = at.name();
            self.mark_broken(number, &at, &source);
            Error::Image { path, source }
        };
        match &at {
            At::Listed(sample) => {
                let known = self.contents.lock().unwrap_or_else(|e| e.into_inner()).get(&number).cloned();
                if let Some(content) = known {
                    return Ok(content);
                }
                let content: Arc<str> = storage::blake3_file(&sample.path).map_err(|e| broken(e.into()))?.into();
                self.contents.lock().unwrap_or_else(|e| e.into_inner()).insert(number, content.clone());
                Ok(content)
            }
            At::Indexed { source, row, .. } => match source.content(row.id) {
                Ok(content) => Ok(content.into()),
                Err(error @ Error::NoSuchImage { .. }) => Err(broken(DecodeError::NoPlace { what: error.to_string() })),
                Err(error) => Err(error),
            },
        }
    }
}
