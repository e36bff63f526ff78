//! What is in an adapter's file, without a model: for `lokr inspect` and for checks after saving. Says what is suspicious
//! rather than failing on it.

use crate::error::{Error, Result};
use crate::group::ParameterGroup;
use crate::load::{FileModule, group, group_of, is_ours, other_kind, tensor};
use crate::shape::Factor;
use std::collections::BTreeMap;
use std::path::Path;
use storage::safetensors::SafeTensors;

/// What one network has in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileGroup {
    /// The network; `None` for modules whose name tells none.
    pub group: Option<ParameterGroup>,
    /// LoKr modules.
    pub modules: usize,
    /// Trained norms.
    pub norms: usize,
    /// Numbers in both, without alphas.
    pub parameters: usize,
}

/// A file at a glance.
#[derive(Clone, Debug)]
pub struct FileSummary {
    /// `lokr`, or `lokr + norm` with trained norms.
    pub algo: &'static str,
    /// By network, in the order of files; networks without modules are left out.
    pub groups: Vec<FileGroup>,
    /// How many modules have each rank; 0 stands for two full factors.
    pub ranks: BTreeMap<usize, usize>,
    /// How many modules have a w1 of each shape (a, b): the factor, where it divides.
    pub factors: BTreeMap<(usize, usize), usize>,
    /// How many tensors have each element type.
    pub dtypes: BTreeMap<String, usize>,
    /// The file's metadata.
    pub metadata: BTreeMap<String, String>,
    /// Values that are no numbers, infinite alphas, halves of pairs, keys of no known meaning: one line each.
    pub suspicious: Vec<String>,
}

/// Looks through a file.
///
/// # Errors
/// [`Error::Storage`] if it cannot be read, [`Error::NotLokr`] if there is no LoKr in it.
pub fn inspect(path: &Path) -> Result<FileSummary> {
    let file = SafeTensors::open(path)?;
    let modules = group(&file);
    if !modules.values().any(|tensors| tensors.keys().any(|t| is_ours(t))) {
        return Err(Error::NotLokr { path: path.into(), keys: file.names().count(), looks_like: other_kind(&file) });
    }
    let mut summary = FileSummary {
        algo: "lokr",
        groups: Vec::new(),
        ranks: BTreeMap::new(),
        factors: BTreeMap::new(),
        dtypes: BTreeMap::new(),
        metadata: file.metadata().clone(),
        suspicious: Vec::new(),
    };
    let mut groups = BTreeMap::new();
    for (name, tensors) in &modules {
        // Unknown names last.
        let group = group_of(name);
        let counts =
            groups.entry(group.map_or(usize::MAX, |g| g as usize)).or_insert(FileGroup { group, modules: 0, norms: 0, parameters: 0 });
        summary.module(&file, name, tensors, counts);
    }
    summary.groups = groups.into_values().collect();
    if summary.groups.iter().any(|g| g.norms > 0) {
        summary.algo = "lokr + norm";
    }
    Ok(summary)
}

impl FileSummary {
    fn module(&mut self, file: &SafeTensors, name: &str, tensors: &FileModule, counts: &mut FileGroup) {
        let dims = |f: Factor| tensors.get(f.key()).and_then(|key| file.info(key)).map(|i| i.shape.clone());
        let side = |f: Factor, at: usize| dims(f).and_then(|d| d.get(at).copied());
        let is_norm = tensors.contains_key("w_norm");
        if is_norm {
            counts.norms += 1;
        } else if tensors.keys().any(|t| is_ours(t)) {
            counts.modules += 1;
            let t2 = tensors.contains_key(Factor::T2.key());
            let rank = if t2 { side(Factor::W2A, 0) } else { side(Factor::W2A, 1) }.or_else(|| side(Factor::W1A, 1));
            *self.ranks.entry(rank.unwrap_or(0)).or_default() += 1;
            let w1 = dims(Factor::W1).and_then(|d| Some((*d.first()?, *d.get(1)?)));
            if let Some(w1) = w1.or_else(|| side(Factor::W1A, 0).zip(side(Factor::W1B, 1))) {
                *self.factors.entry(w1).or_default() += 1;
            }
            self.pairs(name, tensors);
            let full = tensors.contains_key(Factor::W1.key()) && tensors.contains_key(Factor::W2.key());
            if let Some(alpha) = tensors.get("alpha").and_then(|key| tensor(file, key).ok()?.flatten_all().ok()?.to_vec1::<f32>().ok())
                && alpha.iter().any(|a| !a.is_finite())
            {
                let effect = if full { "readers ignore it, both factors being full" } else { "the strength is unknown" };
                self.suspicious.push(format!("{name}.alpha is {:?}: {effect}", alpha));
            }
        }
        for (short, key) in tensors {
            let Some(info) = file.info(key) else { continue };
            *self.dtypes.entry(format!("{:?}", info.dtype).to_lowercase()).or_default() += 1;
            if short == "alpha" {
                continue;
            }
            if !is_ours(short) {
                self.suspicious.push(format!("{key}: no tensor of a LoKr"));
                continue;
            }
            counts.parameters += info.shape.iter().product::<usize>();
            match tensor(file, key).and_then(|t| Ok(t.flatten_all()?.to_vec1::<f32>()?)) {
                Ok(values) => {
                    let bad = values.iter().filter(|v| !v.is_finite()).count();
                    if bad > 0 {
                        self.suspicious.push(format!("{key}: {bad} of {} values are infinite or not numbers", values.len()));
                    }
                }
                Err(error) => self.suspicious.push(error.to_string()),
            }
        }
    }

    fn pairs(&mut self, name: &str, tensors: &FileModule) {
        let has = |f: Factor| tensors.contains_key(f.key());
        for (full, a, b) in [(Factor::W1, Factor::W1A, Factor::W1B), (Factor::W2, Factor::W2A, Factor::W2B)] {
            match (has(full), has(a), has(b)) {
                (true, false, false) | (false, true, true) => {}
                (true, ..) => self.suspicious.push(format!("{name}: both {} and its low-rank form", full.key())),
                (false, true, false) => self.suspicious.push(format!("{name}: {} without {}", a.key(), b.key())),
                (false, false, true) => self.suspicious.push(format!("{name}: {} without {}", b.key(), a.key())),
                (false, false, false) => self.suspicious.push(format!("{name}: no {}", full.key())),
            }
        }
    }
}
