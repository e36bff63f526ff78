//! What a run leaves behind besides checkpoints: metrics, previews, validation losses, and the adapter for others.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use lokr::LokrNetwork;
use sdxl::checkpoint::ModelHash;
use sdxl::tokenizer::Tokenizer;
use sdxl::{GradientCheckpointing, Sdxl};

use crate::config::RunConfig;
use crate::data::Data;
use crate::error::Result;
use crate::event::{Event, Observer};
use crate::export;
use crate::metadata::{self, ModelHashes, RunFacts, SubsetFacts};
use crate::metrics::Metrics;
use crate::preview::{self, Request};
use crate::step::Objective;
use crate::validation::Validation;

/// What rank 0 writes after `step` steps while the other ranks wait, for messages; `None` if nothing is due.
pub fn due_after(config: &RunConfig, step: u64, last: bool) -> Option<String> {
    let due = |n: Option<u64>| n.is_some_and(|n| n > 0 && step.is_multiple_of(n));
    let sample = &config.sample;
    let wanted = sample.sample_at_first || sample.sample_every_n_steps.is_some();
    let parts = [
        ("a checkpoint", due(config.output.save_every_n_steps) || last),
        ("previews", due(sample.sample_every_n_steps) || (last && wanted)),
        // Whether there are held-out pictures is known to rank 0 alone.
        ("the validation loss", due(config.validation.every_n_steps)),
    ];
    let due: Vec<&str> = parts.into_iter().filter_map(|(what, due)| due.then_some(what)).collect();
    (!due.is_empty()).then(|| due.join(" and "))
}

/// The outputs of a run.
pub struct Outputs {
    config: RunConfig,
    /// The metrics file.
    pub metrics: Metrics,
    tokenizer: Tokenizer,
    requests: Vec<Request>,
    validation: Option<Validation>,
    /// The plain objective, for validation.
    objective: Objective,
    facts: RunFacts,
    data: Arc<Data>,
}

impl Outputs {
    /// Prepares previews and held-out pictures.
    ///
    /// # Errors
    /// If a held-out picture cannot be read.
    pub fn new(config: &RunConfig, model: &Sdxl, tokenizer: Tokenizer, data: &Arc<Data>, hash: &ModelHash) -> Result<Self> {
        let validation = Validation::open(config, model, &tokenizer)?;
        let facts = facts(config, data, hash, validation.as_ref().map_or(0, Validation::len));
        Ok(Self {
            metrics: Metrics::new(&config.output.dir),
            requests: config.sample.prompts.iter().map(|p| Request::of(&config.sample, p)).collect(),
            objective: Objective { gradient_checkpointing: GradientCheckpointing::None, ..Objective::new(config, &[]) },
            config: config.clone(),
            tokenizer,
            validation,
            facts,
            data: data.clone(),
        })
    }

    /// Previews and validation before the first step of a new run.
    ///
    /// # Errors
    /// If a picture cannot be drawn or a file written.
    pub fn before_first_step(&self, step: u64, model: &Sdxl, observe: &mut Observer) -> Result<()> {
        if step > 0 {
            return Ok(());
        }
        if self.config.sample.sample_at_first {
            self.preview(step, model, observe)?;
        }
        self.validate(step, model, observe)
    }

    /// Previews and validation that are due after `step` steps.
    ///
    /// # Errors
    /// If a picture cannot be drawn or a file written.
    pub fn after_step(&self, step: u64, last: bool, model: &Sdxl, observe: &mut Observer) -> Result<()> {
        let due = |n: Option<u64>| n.is_some_and(|n| n > 0 && step.is_multiple_of(n));
        let sample = &self.config.sample;
        let wanted = sample.sample_at_first || sample.sample_every_n_steps.is_some();
        if due(sample.sample_every_n_steps) || (last && wanted) {
            self.preview(step, model, observe)?;
        }
        if due(self.config.validation.every_n_steps) || last {
            self.validate(step, model, observe)?;
        }
        Ok(())
    }

    /// Makes what belongs to a checkpoint's step and is not there: a kill came between the checkpoint and its outputs.
    ///
    /// # Errors
    /// As for the outputs themselves.
    pub fn complete(&self, network: &LokrNetwork, step: u64, last: bool, model: &Sdxl, observe: &mut Observer) -> Result<()> {
        let due = |n: Option<u64>| n.is_some_and(|n| n > 0 && step.is_multiple_of(n));
        // The file of the last step has the same name whatever the step: one that is there may be of a shorter run.
        if last || (due(self.config.output.save_every_n_steps) && !self.export_path(step, last).exists()) {
            self.export(network, step, last, observe)?;
        }
        let sample = &self.config.sample;
        let wanted = sample.sample_at_first || sample.sample_every_n_steps.is_some();
        let missing = (0..self.requests.len()).any(|index| !self.preview_path(step, index).exists());
        if (due(sample.sample_every_n_steps) || (last && wanted)) && missing {
            self.preview(step, model, observe)?;
        }
        if (due(self.config.validation.every_n_steps) || last) && !self.metrics.has_validation(step)? {
            self.validate(step, model, observe)?;
        }
        Ok(())
    }

    fn export_path(&self, step: u64, last: bool) -> PathBuf {
        let name = &self.config.output.name;
        self.config.output.dir.join(if last { format!("{name}.safetensors") } else { format!("{name}-step{step:08}.safetensors") })
    }

    fn preview_path(&self, step: u64, index: usize) -> PathBuf {
        self.config.output.dir.join("previews").join(format!("step-{step:08}_{index:02}.png"))
    }

    fn preview(&self, step: u64, model: &Sdxl, observe: &mut Observer) -> Result<()> {
        storage::create_dir_all(&self.config.output.dir.join("previews"))?;
        for (index, request) in self.requests.iter().enumerate() {
            let picture = preview::draw(model, &self.tokenizer, &self.objective.schedule, self.objective.prediction, request)?;
            let path = self.preview_path(step, index);
            preview::write_png(&path, &picture)?;
            observe(Event::Wrote("preview", path));
        }
        if self.data.caches_latents() {
            model.vae.release();
        }
        ops::give_back_freed_memory();
        Ok(())
    }

    fn validate(&self, step: u64, model: &Sdxl, observe: &mut Observer) -> Result<()> {
        let Some(validation) = &self.validation else { return Ok(()) };
        let loss = validation.loss(model, &self.objective)?;
        self.metrics.write_validation(step, loss, validation.len())?;
        observe(Event::Note(format!("step {step}: loss on {} held-out pictures {loss:.5}", validation.len())));
        Ok(())
    }

    /// Writes the adapter for others: under its name at the end, under the step's before.
    ///
    /// # Errors
    /// If a value does not fit the precision, or the file cannot be written.
    pub fn export(&self, network: &LokrNetwork, step: u64, last: bool, observe: &mut Observer) -> Result<()> {
        let path = self.export_path(step, last);
        export::write_lokr(network, &path, self.config.output.save_precision, &self.metadata(step, last))?;
        observe(Event::Wrote("LoKr", path));
        Ok(())
    }

    fn metadata(&self, step: u64, last: bool) -> BTreeMap<String, String> {
        let timeline = self.data.timeline;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let epoch = if last { self.facts.num_epochs } else { timeline.window(step.saturating_sub(1)).0 };
        let facts = RunFacts { steps: step, epoch, finished_at: now, date: date(now as i64), ..self.facts.clone() };
        let mut metadata = metadata::metadata(&self.config, &facts);
        if !self.config.output.timestamps {
            for key in ["ss_training_started_at", "ss_training_finished_at", "modelspec.date"] {
                metadata.remove(key);
            }
        }
        metadata
    }

    /// Puts all preview rounds on one sheet.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(&self, observe: &mut Observer) -> Result<()> {
        let folder = self.config.output.dir.join("previews");
        if !folder.exists() {
            return Ok(());
        }
        let mut rounds: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        for path in storage::list_dir(&folder)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some((round, rest)) = name.split_once('_')
                && round.starts_with("step-")
                && rest.ends_with(".png")
            {
                rounds.entry(round.to_string()).or_default().push(path);
            }
        }
        let path = self.config.output.dir.join("previews.png");
        preview::write_sheet(&path, &rounds.into_values().collect::<Vec<_>>())?;
        observe(Event::Wrote("all previews", path));
        Ok(())
    }
}

/// What the metadata tells of the run and its data.
fn facts(config: &RunConfig, data: &Data, hash: &ModelHash, held_out: usize) -> RunFacts {
    let (dataset, timeline) = (&data.dataset, data.timeline);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let mut subsets = vec![SubsetFacts::default(); config.dataset.subsets.len()];
    let mut error = 0.0;
    let (mut visits, ratio) = (0, |(w, h): (u32, u32)| f64::from(w) / f64::from(h.max(1)));
    for row in dataset.rows() {
        subsets[row.subset].img_count += 1;
        visits += u64::from(row.repeats);
        error += (ratio(row.size) - ratio(row.placement.bucket)).abs();
    }
    // Tags of an index are not counted: it may hold millions of captions, and they would make the file's header huge.
    for sample in dataset.listed() {
        let facts = &mut subsets[sample.subset];
        for tag in sample.caption.split(',').map(str::trim).filter(|t| !t.is_empty()) {
            *facts.tag_frequency.entry(tag.to_string()).or_default() += 1;
        }
    }
    RunFacts {
        session_id: u64::from_str_radix(&blake3::hash(config.to_toml().as_bytes()).to_hex()[..8], 16).unwrap_or_default(),
        started_at: now,
        num_train_images: visits,
        num_validation_images: held_out as u64,
        num_batches_per_epoch: timeline.batches_per_epoch,
        num_epochs: timeline.total_steps.div_ceil(timeline.steps_per_epoch()),
        max_train_steps: timeline.total_steps,
        model: Some(ModelHashes { short: hash.short.clone(), whole: hash.sha256.clone() }),
        subsets,
        buckets: dataset.bucket_counts().iter().map(|b| (b.size.0, b.size.1, b.visits)).collect(),
        mean_img_ar_error: error / dataset.len().max(1) as f64,
        ..RunFacts::default()
    }
}

/// A Unix time as `2024-05-19T01:30:25` (UTC), by the days-to-civil algorithm for the proleptic Gregorian calendar.
fn date(seconds: i64) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years begin in March, so that the leap day is the last of its year; eras have 400 years, 146,097 days.
    let z = days + 719_468;
    let (era, doe) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::{date, due_after};
    use crate::config::RunConfig;

    #[test]
    fn waits_for_rank_0_are_named_by_what_it_writes() {
        let mut config = RunConfig::default();
        assert_eq!((due_after(&config, 4, false), due_after(&config, 4, true)), (None, Some("a checkpoint".into())));
        config.sample.sample_every_n_steps = Some(2);
        config.validation.every_n_steps = Some(3);
        config.output.save_every_n_steps = Some(6);
        let after = |step| due_after(&config, step, false);
        assert_eq!((after(1), after(2), after(3)), (None, Some("previews".into()), Some("the validation loss".into())));
        assert_eq!(after(6), Some("a checkpoint and previews and the validation loss".into()));
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, want) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_716_082_225, "2024-05-19T01:30:25"),
            (4_107_542_399, "2100-02-28T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            assert_eq!(date(seconds), want);
        }
    }
}
