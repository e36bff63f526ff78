//! What a step of a run sees: which images, with which captions, and why these captions are as they are. For people who
//! want to look before they train; a run itself uses the same functions with the same keys.

use crate::index::State;
use crate::rows::At;
use crate::source::Indexed;
use crate::tags::Part;
use crate::{CaptionContext, Dataset, Error, Result};

/// The shape of a run, as far as captions depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunShape {
    /// The run's seed.
    pub seed: u64,
    /// Images of a batch.
    pub batch_size: usize,
    /// Batches of an optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Optimizer steps of the whole run; absent: of one epoch.
    pub max_train_steps: Option<u64>,
}

/// One visit of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visit {
    /// Number of the sample.
    pub sample: u32,
    /// Which of its repeats in the epoch.
    pub repeat: u32,
    /// Epoch, from 0.
    pub epoch: u64,
    /// Optimizer step of the whole run, from 0.
    pub step: u64,
    /// Place in the epoch's order.
    pub position: u64,
}

/// A visit's caption, and how it came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The visit.
    pub visit: Visit,
    /// The file, or shard and member.
    pub name: String,
    /// The caption that the network sees at this visit.
    pub caption: String,
    /// The caption before any draw.
    pub written: String,
    /// Its tags by part, if it is made of tags.
    pub parts: Vec<(Part, Vec<String>)>,
    /// Tags that the rules leave out at every visit.
    pub left_out: Vec<String>,
    /// Tags that this visit's draws left out.
    pub dropped: Vec<String>,
    /// Where the words for year, rating and quality come from.
    pub reasons: Vec<String>,
}

impl RunShape {
    /// Steps of an epoch with so many batches.
    fn steps_per_epoch(&self, batches: usize) -> u64 {
        (batches as u64).div_ceil(self.gradient_accumulation_steps.max(1) as u64).max(1)
    }
}

/// All visits of one step.
///
/// # Errors
/// [`Error::Config`] if the batch size is 0.
pub fn visits_of_step(dataset: &Dataset, run: &RunShape, step: u64) -> Result<Vec<Visit>> {
    // Every epoch has as many batches as the first.
    let first = dataset.plan(run.seed, 0, run.batch_size)?;
    let steps = run.steps_per_epoch(first.len());
    let (epoch, k) = (step / steps, (step % steps) as usize);
    let plan = if epoch == 0 { first } else { dataset.plan(run.seed, epoch, run.batch_size)? };
    let accumulation = run.gradient_accumulation_steps.max(1);
    let batches = (k * accumulation..(k + 1) * accumulation).filter_map(|k| plan.batch(k));
    let visit = |e: &crate::Entry| Visit { sample: e.sample, repeat: e.repeat, epoch, step, position: e.position };
    Ok(batches.flat_map(|b| b.entries).map(visit).collect())
}

/// The visits of a sample in the epoch that `step` belongs to; the first epoch without one.
///
/// # Errors
/// [`Error::NoSuchSample`]; [`Error::Config`] if the batch size is 0.
pub fn visits_of_sample(dataset: &Dataset, run: &RunShape, sample: u32, step: Option<u64>) -> Result<Vec<Visit>> {
    dataset.row(sample)?;
    let first = dataset.plan(run.seed, 0, run.batch_size)?;
    let steps = run.steps_per_epoch(first.len());
    let epoch = step.unwrap_or(0) / steps;
    let plan = if epoch == 0 { first } else { dataset.plan(run.seed, epoch, run.batch_size)? };
    let mut visits = Vec::new();
    for (k, batch) in plan.iter().enumerate() {
        let step = epoch * steps + (k / run.gradient_accumulation_steps.max(1)) as u64;
        let of_sample = batch.entries.iter().filter(|e| e.sample == sample);
        visits.extend(of_sample.map(|e| Visit { sample, repeat: e.repeat, epoch, step, position: e.position }));
    }
    Ok(visits)
}

/// What a visit's caption is and why.
///
/// # Errors
/// [`Error::NoSuchSample`]; [`Error::Sqlite`] if an index cannot be read.
pub fn explain(dataset: &Dataset, run: &RunShape, visit: Visit) -> Result<Explanation> {
    let context = CaptionContext {
        seed: run.seed,
        epoch: visit.epoch,
        position: visit.position,
        step: visit.step,
        max_train_steps: run.max_train_steps.unwrap_or(visit.step + 1),
    };
    let at = dataset.rows.at(visit.sample)?;
    let mut explanation = Explanation {
        visit,
        name: at.name().display().to_string(),
        caption: dataset.caption(visit.sample, context)?,
        written: at.caption()?.into_owned(),
        parts: Vec::new(),
        left_out: Vec::new(),
        dropped: Vec::new(),
        reasons: Vec::new(),
    };
    if let At::Indexed { source, row, .. } = at {
        explain_tags(&mut explanation, source, row.id, context)?;
    }
    Ok(explanation)
}

fn explain_tags(explanation: &mut Explanation, source: &Indexed, id: u32, context: CaptionContext) -> Result<()> {
    let post = source.index.post(id)?;
    if !source.by_tags(&post) {
        return Ok(());
    }
    let written = source.captioner.written(&post);
    (explanation.parts, explanation.left_out, explanation.reasons) = (written.parts, written.left_out, written.reasons);
    if explanation.caption.is_empty() {
        explanation.reasons.push("the whole caption was dropped at this visit".into());
    } else {
        explanation.dropped = source.captioner.explain(&post, &mut Indexed::stream(context)).dropped;
    }
    Ok(())
}

/// What the indexes know of an image that was not taken.
fn why_not(dataset: &Dataset, id: u32) -> &'static str {
    let row = dataset.rows.indexes().find_map(|source| source.index.row(id).ok());
    match row.map(|row| (row.state, row.deleted)) {
        None => "no index of the recipe has it",
        Some((State::Absent, _)) => "its post has no file",
        Some((State::Gone, _)) => "its file is not there any more",
        Some((State::Broken, _)) => "its file cannot be read",
        Some((State::Present, true)) => "its post was deleted, and the selection takes no such posts, or it fits no bucket",
        Some((State::Present, false)) => "the selection did not take it, or it fits no bucket",
    }
}

/// The sample that has `id` in its index; without an index, `id` is the sample's number.
///
/// # Errors
/// [`Error::NoSuchSample`].
pub fn sample_of_id(dataset: &Dataset, id: u32) -> Result<u32> {
    match dataset.find_id(id) {
        Some(sample) => Ok(sample),
        None if dataset.config().subsets.iter().all(|s| s.index.is_none()) => dataset.row(id).map(|_| id),
        None => Err(Error::NotSelected { id, why: why_not(dataset, id) }),
    }
}
