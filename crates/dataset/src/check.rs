//! What would fail, or teach nothing, later: looked for in a whole dataset before a run, from a folder or an index alike.

use std::collections::HashMap;
use std::ops::ControlFlow;

use rayon::prelude::*;

use crate::image::{decode, probe};
use crate::report::Named;
use crate::source::chain;
use crate::{Dataset, Error, Result};

/// How thorough a check is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CheckOptions {
    /// Decode every image whole; else only its header is looked at.
    pub decode: bool,
    /// Enlarging by more than this, per side, is reported.
    pub most_enlarged: f64,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { decode: true, most_enlarged: 2.0 }
    }
}

/// What [`check`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Samples looked at.
    pub samples: usize,
    /// Images that cannot be read or decoded, with the reason.
    pub broken: Named,
    /// Images whose size is not the one that their bucket was chosen by.
    pub changed: Named,
    /// Samples with an empty caption.
    pub empty_captions: Named,
    /// Files with the very bytes of an earlier one, which is named too.
    pub duplicates: Named,
    /// Images that are enlarged more than asked for.
    pub enlarged: Named,
}

impl CheckReport {
    /// Whether nothing was found that costs an image: broken, changed or without caption.
    pub fn is_clean(&self) -> bool {
        self.broken.count + self.changed.count + self.empty_captions.count == 0
    }
}

impl std::fmt::Display for CheckReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} images looked at", self.samples)?;
        for (what, named) in [
            ("broken", &self.broken),
            ("changed since the index or plan was made", &self.changed),
            ("with an empty caption", &self.empty_captions),
            ("doubles", &self.duplicates),
            ("much enlarged", &self.enlarged),
        ] {
            writeln!(f, "{what}: {}", named.count)?;
            named.first.iter().try_for_each(|name| writeln!(f, "  {name}"))?;
            if named.count > named.first.len() {
                writeln!(f, "  and {} more", named.count - named.first.len())?;
            }
        }
        Ok(())
    }
}

/// Samples between two calls of `progress`.
const CHUNK: u32 = 512;

/// What one sample shows.
struct Look {
    hash: Option<[u8; 16]>,
    broken: Option<String>,
    changed: Option<((u32, u32), (u32, u32))>,
    empty: bool,
    enlarged: Option<f64>,
}

/// Reads every image of a dataset. `progress` gets (done, of all) and may break.
///
/// # Errors
/// [`Error::Stopped`] if `progress` breaks; nothing that is wrong with an image is an error.
pub fn check(dataset: &Dataset, options: &CheckOptions, progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>) -> Result<CheckReport> {
    let mut report = CheckReport { samples: dataset.len(), ..CheckReport::default() };
    let mut first_with: HashMap<[u8; 16], u32> = HashMap::new();
    let end = dataset.len() as u32;
    for from in (0..end).step_by(CHUNK as usize) {
        let numbers = from..from.saturating_add(CHUNK).min(end);
        let looks: Vec<Result<Look>> = numbers.clone().into_par_iter().map(|n| look(dataset, n, options)).collect();
        for (number, look) in numbers.clone().zip(looks) {
            let name = || dataset.name(number).display().to_string();
            let look = match look {
                Ok(look) => look,
                Err(error) => {
                    report.broken.add(format_args!("{}: {}", name(), chain(&error)));
                    continue;
                }
            };
            if let Some(why) = look.broken {
                report.broken.add(format_args!("{}: {why}", name()));
            }
            if let Some((before, now)) = look.changed {
                report.changed.add(format_args!("{}: {}x{}, was {}x{}", name(), now.0, now.1, before.0, before.1));
            }
            if look.empty {
                report.empty_captions.add(name());
            }
            if let Some(factor) = look.enlarged {
                report.enlarged.add(format_args!("{}: {factor:.1} times", name()));
            }
            match look.hash.map(|hash| *first_with.entry(hash).or_insert(number)) {
                Some(first) if first != number => {
                    report.duplicates.add(format_args!("{} is {}", name(), dataset.name(first).display()));
                }
                _ => {}
            }
        }
        if progress(u64::from(numbers.end), u64::from(end)).is_break() {
            return Err(Error::Stopped);
        }
    }
    Ok(report)
}

fn look(dataset: &Dataset, number: u32, options: &CheckOptions) -> Result<Look> {
    let at = dataset.rows.at(number)?;
    let row = at.row(&dataset.rule);
    let factor =
        (f64::from(row.placement.resized.0) / f64::from(row.size.0)).max(f64::from(row.placement.resized.1) / f64::from(row.size.1));
    let enlarged = (factor > options.most_enlarged).then_some(factor);
    let empty = at.caption()?.trim().trim_matches([',', '|', ' ']).is_empty();
    let mut look = Look { hash: None, broken: None, changed: None, empty, enlarged };
    let size = at.read().and_then(|bytes| {
        let hash = blake3::hash(&bytes);
        look.hash = hash.as_bytes()[..16].try_into().ok();
        if options.decode { decode(&bytes).map(|image| image.dimensions()) } else { probe(&bytes).map(|header| header.size) }
    });
    match size {
        Ok(size) => look.changed = (size != row.size).then_some((row.size, size)),
        Err(error) => look.broken = Some(chain(&error)),
    }
    Ok(look)
}
