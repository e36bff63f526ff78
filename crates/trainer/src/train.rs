//! A training run from top to bottom: parts are built, state is restored, the loop runs, a checkpoint is written.

use std::thread::JoinHandle;
use std::time::Instant;

use lokr::ParameterGroup;
use optim::{Optimizer, Schedule};
use sdxl::Sdxl;

use crate::checkpoint::{self, RunState, Snapshot};
use crate::config::{OnNonFinite, OutputConfig, Resume, RunConfig};
use crate::data::{self, Data, Prepared};
use crate::error::{Error, Result};
use crate::event::{Event, Observer, StepReport};
use crate::interrupt::Interrupt;
use crate::setup::{self, Parts};
use crate::step::{self, Objective, Trained};

/// What a run is told besides its recipe.
#[derive(Clone, Default)]
pub struct Options {
    /// Resume although the recipe differs in what changes the result.
    pub allow_recipe_change: bool,
    /// Asks the run to stop.
    pub interrupt: Interrupt,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// A signal asked for a stop; the state is saved.
    Interrupted,
}

/// Runs a recipe.
///
/// # Errors
/// Anything that keeps the run from starting or going on. What is saved by then stays good.
pub fn train(config: &RunConfig, options: &Options, observe: &mut Observer) -> Result<Outcome> {
    in_pool(config.train.threads, || train_in_pool(config, options, observe))
}

/// Runs `work` on a thread of a pool of its own. Parallel loops that start on a thread of the pool need not wake the
/// caller at their end; started from outside, each of the many small ones would cost two changes of threads.
///
/// # Errors
/// What `work` returns, or that the threads cannot be started.
pub fn in_pool<T: Send>(threads: Option<usize>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).build();
    let pool = pool.map_err(|e| Error::refused(format!("the computing threads cannot be started: {e}"), "set train.threads lower"))?;
    pool.install(work)
}

fn train_in_pool(config: &RunConfig, options: &Options, observe: &mut Observer) -> Result<Outcome> {
    let run = config.output.dir.clone();
    storage::create_dir_all(&run)?;
    let _lock = storage::Lock::acquire(&run.join("run.lock"))?;
    let resume = find_checkpoint(config, observe)?;
    let Parts { model, network, trained, mut optimizer, data, outputs, objective, base_hash } = setup::build(config, observe)?;
    let timeline = data.timeline;

    let mut state = RunState {
        format: RunState::FORMAT,
        lokr: env!("CARGO_PKG_VERSION").into(),
        step: 0,
        samples_seen: 0,
        loss_average: 0.0,
        withheld_steps: 0,
        consecutive_withheld: 0,
        plan_fingerprint: data.plan(0)?.fingerprint().into(),
        dataset_fingerprint: data.dataset.fingerprint(),
        base_hash,
    };
    let recipe = config.to_toml();
    let from = resume.as_ref().map(|found| found.path.clone());
    if let Some(found) = resume {
        refuse_changes(&found, &recipe, &state, options)?;
        found.restore(&trained, &mut optimizer)?;
        observe(Event::Note(resume_plan(&found, &data)?));
        state = RunState { lokr: state.lokr, ..found.state };
    }
    storage::write_whole(&run.join("recipe.toml"), recipe.as_bytes())?;
    checkpoint::clean(&run)?;
    for path in checkpoint::set_aside(&run, from.as_deref(), state.step)? {
        observe(Event::Warning(format!("a checkpoint that this run does not go on from is kept as {}", path.display())));
    }
    outputs.metrics.keep_until(state.step)?;
    outputs.before_first_step(state.step, &model, observe)?;
    if state.step > 0 {
        outputs.complete(&network, state.step, state.step == timeline.total_steps, &model, observe)?;
    }

    let rates = Rates::new(config, timeline.total_steps)?;
    let mut batches = data::prefetch(&data, timeline.first_batch(state.step))?;
    let mut writer = Writer::default();
    observe(Event::Start { done: state.step, total: timeline.total_steps });
    while state.step < timeline.total_steps {
        if options.interrupt.requested() {
            save(config, &trained, &optimizer, &state, &data, &recipe, &mut writer)?;
            writer.finish(observe)?;
            observe(Event::Note(format!("stopped after step {} of {}; run the same command to go on", state.step, timeline.total_steps)));
            return Ok(Outcome::Interrupted);
        }
        let report = train_step(&model, &objective, &trained, &mut optimizer, &data, &mut batches, &rates, config, &mut state, observe)?;
        outputs.metrics.write(&report)?;
        observe(Event::Step(report.clone()));
        let due = |n: Option<u64>| n.is_some_and(|n| n > 0 && state.step.is_multiple_of(n));
        let last = state.step == timeline.total_steps;
        if due(config.output.save_every_n_steps) || last {
            save(config, &trained, &optimizer, &state, &data, &recipe, &mut writer)?;
            match outputs.export(&network, state.step, last, observe) {
                Err(error) if !last => observe(not_saved("LoKr file", &error)),
                done => done?,
            }
        }
        outputs.after_step(state.step, last, &model, observe)?;
        writer.poll(observe)?;
    }
    writer.finish(observe)?;
    outputs.finish(observe)?;
    Ok(Outcome::Finished)
}

/// One optimizer step: its micro-batches, the check of their gradient, the update.
#[allow(clippy::too_many_arguments)]
fn train_step(
    model: &Sdxl,
    objective: &Objective,
    trained: &[Trained],
    optimizer: &mut Optimizer,
    data: &Data,
    batches: &mut impl Iterator<Item = Result<Prepared>>,
    rates: &Rates,
    config: &RunConfig,
    state: &mut RunState,
    observe: &mut Observer,
) -> Result<StepReport> {
    let started = Instant::now();
    let sizes = data.window_sizes(state.step)?;
    let samples: usize = sizes.iter().sum();
    let (mut loss, mut seen) = (0.0, Vec::with_capacity(samples));
    let mut first_bad = None;
    for size in sizes {
        let Some(prepared) = batches.next() else { return Err(candle_core::Error::Msg("the plan ended before the run".into()).into()) };
        let prepared = prepared?;
        seen.extend_from_slice(&prepared.samples);
        let batch = data.finish(prepared, &model.vae)?;
        let per_sample = step::micro_step(model, objective, &batch, size as f64 / samples as f64)?;
        let share = per_sample.iter().sum::<f64>() / samples as f64;
        if !share.is_finite() && first_bad.is_none() {
            first_bad = Some(step::locate_non_finite(model, objective, &batch)?);
        }
        loss += share;
    }
    if state.step == 0 {
        setup::check_gradients(config, trained)?;
    }
    let (norm, bad) = step::gradient_norm(trained)?;
    let withheld = !loss.is_finite() || !norm.is_finite();
    let factors = rates.at(state.step);
    if withheld {
        // Nothing of this step reaches the weights or the optimizer's state.
        trained.iter().for_each(|t| t.parameter.zero_grad());
        state.withheld_steps += 1;
        state.consecutive_withheld += 1;
        let what = first_bad.unwrap_or_else(|| format!("the gradient of {}", bad.unwrap_or_default()));
        let names: Vec<String> = seen.iter().map(|&s| data.path(s).display().to_string()).collect();
        let found = Error::NotFinite { what, step: state.step + 1, samples: names.join(", ") };
        if config.train.on_non_finite == OnNonFinite::Stop || state.consecutive_withheld >= config.train.max_withheld_steps {
            return Err(found);
        }
        observe(Event::Warning(format!("the step is withheld: {found}")));
    } else {
        step::update(trained, optimizer, norm, config.train.max_grad_norm, |group| factors.of(group))?;
        state.consecutive_withheld = 0;
        state.loss_average = if state.step == 0 { loss } else { 0.98 * state.loss_average + 0.02 * loss };
    }
    let (epoch, _) = data.timeline.window(state.step);
    state.step += 1;
    state.samples_seen += samples as u64;
    let seconds = started.elapsed().as_secs_f64();
    Ok(StepReport {
        step: state.step,
        epoch,
        loss,
        loss_average: state.loss_average,
        lr_unet: factors.of(ParameterGroup::Unet),
        lr_te: [factors.of(ParameterGroup::TextEncoder1), factors.of(ParameterGroup::TextEncoder2)],
        grad_norm: norm,
        samples,
        seconds,
        images_per_second: samples as f64 / seconds,
        withheld,
    })
}

/// The learning rate of each part at each step.
struct Rates([(ParameterGroup, f64, Schedule); 3]);

/// Learning rates of one step.
struct StepRates([(ParameterGroup, f64); 3]);

impl Rates {
    fn new(config: &RunConfig, total_steps: u64) -> Result<Self> {
        let rate = |group| -> Result<_> {
            let base = crate::base::learning_rate(config, group);
            Ok((group, base, config.lr_schedule(total_steps, base)?))
        };
        Ok(Self([rate(ParameterGroup::TextEncoder1)?, rate(ParameterGroup::TextEncoder2)?, rate(ParameterGroup::Unet)?]))
    }

    fn at(&self, step: u64) -> StepRates {
        StepRates(self.0.each_ref().map(|(group, base, schedule)| (*group, base * schedule.factor(step))))
    }
}

impl StepRates {
    fn of(&self, group: ParameterGroup) -> f64 {
        self.0.iter().find(|(g, _)| *g == group).map_or(0.0, |(_, rate)| *rate)
    }
}

/// The checkpoint that the recipe wants to go on from.
fn find_checkpoint(config: &RunConfig, observe: &mut Observer) -> Result<Option<checkpoint::Found>> {
    let run = &config.output.dir;
    match &config.output.resume {
        Resume::From(path) => Ok(Some(checkpoint::open(path)?)),
        resume => {
            let (found, passed) = checkpoint::find_newest_whole(run)?;
            for why in passed {
                observe(Event::Warning(format!("passed over {why}")));
            }
            if *resume == Resume::Never && found.is_some() {
                return Err(Error::RunExists { path: run.clone() });
            }
            Ok(found)
        }
    }
}

/// Refuses a checkpoint whose recipe, data or base model is another one.
fn refuse_changes(found: &checkpoint::Found, recipe: &str, now: &RunState, options: &Options) -> Result<()> {
    let mut differences = checkpoint::differences(&found.recipe, recipe);
    if found.state.dataset_fingerprint != now.dataset_fingerprint {
        differences.push("dataset: pictures, captions or their places are not those of the checkpoint".into());
    }
    if found.state.base_hash != now.base_hash {
        differences.push("model.base: another file than the checkpoint's".into());
    }
    if differences.is_empty() || options.allow_recipe_change {
        return Ok(());
    }
    Err(Error::RecipeChanged { path: found.path.clone(), differences })
}

/// What a resume will do, before it does it.
fn resume_plan(found: &checkpoint::Found, data: &Data) -> Result<String> {
    let (step, total) = (found.state.step, data.timeline.total_steps);
    let mut text = format!("resuming from {}: {step} of {total} steps done", found.path.display());
    if step < total {
        let (epoch, range) = data.timeline.window(step);
        let plan = data.plan(epoch)?;
        let next = plan.batch(range.start as usize).and_then(|b| b.entries.first().copied());
        let name = next.map_or_else(String::new, |e| data.path(e.sample).display().to_string());
        text += &format!(", {} remain; next: epoch {epoch}, batch {} of {}, sample {name}", total - step, range.start, plan.len());
    }
    Ok(text)
}

/// Hands a snapshot to the writer.
fn save(
    config: &RunConfig,
    trained: &[Trained],
    optimizer: &Optimizer,
    state: &RunState,
    data: &Data,
    recipe: &str,
    writer: &mut Writer,
) -> Result<()> {
    let (epoch, _) = data.timeline.window(state.step);
    let state = RunState { plan_fingerprint: data.plan(epoch)?.fingerprint().into(), ..state.clone() };
    let snapshot = Snapshot::take(trained, optimizer, state, recipe.into())?;
    writer.start(snapshot, &config.output)
}

/// Writes checkpoints beside the training: one at a time, so that a step waits for the copy only.
#[derive(Default)]
struct Writer(Option<JoinHandle<Result<std::path::PathBuf>>>, Vec<Result<std::path::PathBuf>>);

impl Writer {
    fn start(&mut self, snapshot: Snapshot, output: &OutputConfig) -> Result<()> {
        self.join();
        let (run, keep_last, keep_every) = (output.dir.clone(), output.keep_last, output.keep_every);
        let write = move || {
            let path = snapshot.write(&run)?;
            checkpoint::delete_old(&run, keep_last, keep_every)?;
            Ok(path)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
        self.0 = Some(thread.map_err(|e| candle_core::Error::Msg(format!("no thread for writing checkpoints: {e}")))?);
        Ok(())
    }

    fn join(&mut self) {
        if let Some(thread) = self.0.take() {
            self.1.push(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
    }

    /// Reports what has been written. A failed save does not end the run: the last good checkpoint is untouched, and the
    /// next cadence tries again.
    fn poll(&mut self, observe: &mut Observer) -> Result<()> {
        if self.0.as_ref().is_some_and(JoinHandle::is_finished) {
            self.join();
        }
        for written in self.1.drain(..) {
            match written {
                Ok(path) => observe(Event::Wrote("checkpoint", path)),
                Err(error) => observe(not_saved("checkpoint", &error)),
            }
        }
        Ok(())
    }

    /// Waits for the last save; its failure is the run's.
    fn finish(&mut self, observe: &mut Observer) -> Result<()> {
        self.join();
        let last = self.1.pop();
        self.poll(observe)?;
        if let Some(last) = last {
            observe(Event::Wrote("checkpoint", last?));
        }
        Ok(())
    }
}

impl Drop for Writer {
    /// A run that ends with an error still finishes the checkpoint that is being written.
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            _ = thread.join();
        }
    }
}

/// A save that failed and that the next cadence tries again.
fn not_saved(what: &str, error: &Error) -> Event {
    let hint = error.hint().map_or_else(String::new, |h| format!(" ({h})"));
    Event::Warning(format!("the {what} was not saved, training goes on: {}{hint}", chain(error)))
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
