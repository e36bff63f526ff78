//! A training run from top to bottom: parts are built, state is restored, the loop runs, a checkpoint is written.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use dist::World;
use lokr::ParameterGroup;
use optim::Optimizer;
use sdxl::Sdxl;
use sdxl::checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};

use crate::base::changed_file;
use crate::checkpoint::{self, RunState, Snapshot};
use crate::config::{OnNonFinite, RunConfig};
use crate::data::{self, Data, Prepared};
use crate::ddp::Buckets;
use crate::error::{Error, Result};
use crate::event::{Event, Observer, Phases, StepReport};
use crate::interrupt::Interrupt;
use crate::outputs;
use crate::precision::{self, Verdict};
use crate::ranks::Ranks;
use crate::rates::Rates;
use crate::rehearsal;
use crate::resume;
use crate::setup::{self, Parts};
use crate::step::{self, Objective, Trained};
use crate::writer::{Writer, not_saved};

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
    let mut started = false;
    let mut watch = |event: Event| {
        started |= matches!(event, Event::Start { .. });
        observe(event);
    };
    let outcome = in_pool(config.train.threads, || train_in_pool(config, options, &mut watch)).map_err(crate::device::explain);
    // By now the writer has ended, whatever ended the steps.
    if outcome.is_err() && started {
        let (found, _) = checkpoint::find_newest_whole(&config.output.dir)?;
        let last = found.map_or_else(|| "none was written yet".into(), |f| f.path.display().to_string());
        observe(Event::Note(format!("the last good checkpoint: {last}")));
    }
    outcome
}

/// Runs `work` on a thread of a pool of its own. Parallel loops that start on a thread of the pool need not wake the
/// caller at their end; started from outside, each of the many small ones would cost two changes of threads.
///
/// # Errors
/// What `work` returns, or that the threads cannot be started.
pub fn in_pool<T: Send>(threads: Option<usize>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    ops::check_cpu_capability().map_err(|what| Error::refused(what, format!("or leave {} unset", ops::CPU_CAPABILITY)))?;
    ops::keep_freed_memory();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).build();
    let pool = pool.map_err(|e| Error::refused(format!("the computing threads cannot be started: {e}"), "set train.threads lower"))?;
    pool.install(work)
}

fn train_in_pool(config: &RunConfig, options: &Options, observe: &mut Observer) -> Result<Outcome> {
    let world = World::from_env()?;
    let mut silent = |_: Event| {};
    let observe: &mut Observer = if world.rank == 0 { observe } else { &mut silent };
    let run = config.output.dir.clone();
    storage::create_dir_all(&run)?;
    let (_lock, found) = match world.rank {
        0 => (Some(storage::Lock::acquire(&run.join("run.lock"))?), resume::find_checkpoint(config, observe)?),
        _ => (None, None),
    };
    let sources = setup::open(config, observe)?;
    let (left_out, loaders) = (sources.left_out, data::loader_threads(config, world.local_world_size));
    let ranks = Ranks::meet(world, config, sources.dataset.fingerprint(), sources.hash.sha256.clone(), &sources.device)?;
    let found = ranks.value_of_first("checkpoint to go on from", found)?;
    let recipe = config.to_toml();
    let mut config = config.clone();
    config.train.gradient_accumulation_steps = resume::accumulation(&config, found.as_ref(), ranks.count(), options, observe)?;
    let Parts { model, network, trained, mut optimizer, data, outputs, objective, base, base_hash } =
        setup::build(&config, sources, &ranks, observe)?;
    let timeline = data.timeline;

    let mut state = RunState {
        format: RunState::FORMAT,
        lokr: env!("CARGO_PKG_VERSION").into(),
        world_size: ranks.count() as u64,
        batches_per_step: timeline.batches_per_step(),
        loss_scaler: precision::scaler(&config.train, None)?,
        plan_fingerprint: data.plan(0)?.fingerprint().into(),
        dataset_fingerprint: data.dataset.fingerprint(),
        base_hash: base_hash.clone(),
        ..RunState::default()
    };
    let (from, tail) = found.as_ref().map(|found| (found.path.clone(), found.metrics.clone())).unzip();
    if let Some(found) = found {
        let now = resume::position(&RunState { step: found.state.step, ..state.clone() }, &data)?;
        resume::refuse_changes(&found, &recipe, &now, options)?;
        if ranks.is_first() {
            found.restore(&trained, &mut optimizer)?;
        }
        ranks.copy_state_of_first(&trained, &mut optimizer)?;
        observe(Event::Note(resume::plan(&found, &data)?));
        let loss_scaler = precision::scaler(&config.train, found.state.loss_scaler)?;
        let RunState { lokr, world_size, batches_per_step, .. } = state;
        state = RunState { lokr, world_size, batches_per_step, loss_scaler, ..found.state };
    }
    if let Some(outputs) = &outputs {
        storage::write_whole(&run.join("recipe.toml"), recipe.as_bytes())?;
        checkpoint::clean(&run, &config.output.name)?;
        for path in checkpoint::set_aside(&run, from.as_deref(), state.step)? {
            observe(Event::Warning(format!("a checkpoint that this run does not go on from is kept as {}", path.display())));
        }
        // A kill may have come between the newest checkpoint and the deletion of older ones.
        checkpoint::delete_old(&run, config.output.keep_last, config.output.keep_every)?;
        outputs.metrics.keep_until(state.step, &tail.unwrap_or_default())?;
        outputs.before_first_step(state.step, &model, observe)?;
        if state.step > 0 {
            outputs.complete(&network, state.step, state.step == timeline.total_steps, &model, observe)?;
        }
    }
    if state.step == 0 && config.sample.sample_at_first {
        ranks.wait("rank 0 writes previews")?;
    }
    let stateless = (state.step == 0).then_some(&optimizer);
    if let Some(tried) = rehearsal::largest_batch(&config, ranks.count(), &data, &model, &objective, &trained, stateless)? {
        observe(Event::Note(tried));
    }
    let mut buckets = Buckets::new(&trained, config.train.ddp_bucket_cap_mb);
    setup::make_ready(&ranks, &trained, &optimizer, &buckets, state.step, observe)?;

    let rates = Rates::new(&config, timeline.total_steps)?;
    let mut batches = data::prefetch(&data, state.step, loaders)?;
    let mut writer = Writer::default();
    let run = Run {
        config: &config,
        ranks: &ranks,
        model: &model,
        base: (&base, &base_hash),
        objective: &objective,
        trained: &trained,
        data: &data,
        rates: &rates,
    };
    observe(Event::Start { done: state.step, total: timeline.total_steps });
    while state.step < timeline.total_steps {
        if ranks.group.any("stop", options.interrupt.requested())? {
            if let Some(outputs) = &outputs {
                save(&run, &optimizer, &state, &recipe, outputs.metrics.tail()?, &mut writer)?;
            }
            writer.finish(observe)?;
            tell_broken(&ranks, &data, left_out, &state, observe)?;
            observe(Event::Note(format!("stopped after step {} of {}; run the same command to go on", state.step, timeline.total_steps)));
            ranks.wait("the end of the run")?;
            return Ok(Outcome::Interrupted);
        }
        let report = match train_step(&run, &mut optimizer, &mut batches, &mut buckets, &mut state, observe) {
            Err(error @ Error::BaseChanged { .. }) => {
                // Nothing of that step is in the state.
                if let Some(outputs) = &outputs {
                    save(&run, &optimizer, &state, &recipe, outputs.metrics.tail()?, &mut writer)?;
                }
                writer.finish(observe)?;
                // The first process that ends takes the others with it.
                ranks.wait("rank 0 saves")?;
                return Err(error);
            }
            report => report?,
        };
        let due = |n: Option<u64>| n.is_some_and(|n| n > 0 && state.step.is_multiple_of(n));
        let last = state.step == timeline.total_steps;
        let save_due = due(config.output.save_every_n_steps) || last;
        if save_due || due(config.train.ddp_check_every_n_steps) {
            ranks.check_equal(&trained, &optimizer, state.step)?;
        }
        if let Some(outputs) = &outputs {
            outputs.metrics.write(&report)?;
            observe(Event::Step(report));
            if save_due {
                save(&run, &optimizer, &state, &recipe, outputs.metrics.tail()?, &mut writer)?;
                ranks.fault.at("checkpoint", state.step);
                match outputs.export(&network, state.step, last, observe) {
                    Err(error) if !last => observe(not_saved("LoKr file", &error)),
                    done => done?,
                }
            }
            outputs.after_step(state.step, last, &model, observe)?;
            writer.poll(observe)?;
        }
        if let Some(what) = outputs::due_after(&config, state.step, last) {
            ranks.wait(&format!("rank 0 writes {what}"))?;
        }
    }
    writer.finish(observe)?;
    if let Some(outputs) = &outputs {
        outputs.finish(observe)?;
    }
    tell_broken(&ranks, &data, left_out, &state, observe)?;
    ranks.wait("the end of the run")?;
    Ok(Outcome::Finished)
}

/// What a step works with and does not change as a whole.
struct Run<'a> {
    config: &'a RunConfig,
    ranks: &'a Ranks,
    model: &'a Sdxl,
    /// The base model's files and their SHA-256.
    base: (&'a Checkpoint, &'a str),
    objective: &'a Objective,
    trained: &'a [Trained],
    data: &'a Data,
    rates: &'a Rates,
}

/// One optimizer step: this rank's micro-batches, the sum of the gradients over all ranks, their check, the update.
fn train_step(
    run: &Run,
    optimizer: &mut Optimizer,
    batches: &mut impl Iterator<Item = Option<Result<Prepared>>>,
    buckets: &mut Buckets,
    state: &mut RunState,
    observe: &mut Observer,
) -> Result<StepReport> {
    let Run { config, ranks, model, base: (base, base_hash), objective, trained, data, rates } = *run;
    let started = Instant::now();
    let samples = data.samples_of(state.step)?;
    let scale = precision::loss_scale(state);
    let (mut loss, mut seen, mut replaced, mut phases) = (0.0, Vec::new(), 0, Phases::default());
    let (mut losses, mut numbers) = (Vec::new(), Vec::new());
    let turns = data.timeline.accumulation;
    for turn in 0..turns {
        let waiting = Instant::now();
        let Some(next) = batches.next() else { return Err(candle_core::Error::Msg("the plan ended before the run".into()).into()) };
        let Some(prepared) = next.transpose()? else { continue };
        seen.extend_from_slice(&prepared.samples);
        replaced += prepared.replaced;
        numbers.extend(data.timeline.batch_of(state.step, turn, ranks.rank() as u64));
        let batch = data.finish(prepared, &model.vae)?;
        phases.data += waiting.elapsed().as_secs_f64();
        let computing = Instant::now();
        ranks.fault.at("forward", state.step);
        buckets.begin_pass();
        let last = turn + 1 == turns || data.timeline.batch_of(state.step, turn + 1, ranks.rank() as u64).is_none();
        let share = batch.len() as f64 / samples as f64 * scale * ranks.fault.gradient_factor(state.step);
        let on_gradient = &mut |parameter: &_| buckets.gradient_added(ranks, trained, parameter, last);
        losses.push(step::begin_micro_step(model, objective, &batch, share, on_gradient)?);
        phases.compute += computing.elapsed().as_secs_f64();
    }
    // The first look at the window's losses: until here a GPU was given work and not waited for.
    let computing = Instant::now();
    let mut first_bad = None;
    for (per_sample, &number) in step::read_losses(&losses)?.iter().zip(&numbers) {
        let share = per_sample.iter().sum::<f64>() / samples as f64;
        if !share.is_finite() && first_bad.is_none() {
            // The batch comes out of the plan again as it was.
            let batch = data.finish(data.prepare(number)?, &model.vae)?;
            first_bad = Some(step::locate_non_finite(model, objective, &batch)?);
        }
        loss += share;
    }
    drop(losses);
    phases.compute += computing.elapsed().as_secs_f64();
    phases.reduce = buckets.finish(ranks, trained, state.step)?;
    let base_changed = changed_file(base, base_hash)?.map(Path::to_path_buf);
    let shares = ranks.gather("loss of the step", &Share { loss: loss.to_bits(), replaced, first_bad, base_changed, phases })?;
    if let Some(path) = shares.iter().find_map(|s| s.base_changed.clone()) {
        return Err(Error::BaseChanged { path, step: state.step + 1 });
    }
    // The same number on all ranks, and so is the norm: what follows from them is decided by all alike.
    let loss: f64 = shares.iter().map(|s| f64::from_bits(s.loss)).sum();
    if state.step == 0 {
        setup::check_gradients(config, trained)?;
    }
    let (norm, bad) = step::gradient_norm(trained, optimizer)?;
    let norm = norm / scale;
    let verdict = precision::judge(state, loss, norm);
    let factors = rates.at(state.step);
    if verdict != Verdict::Apply {
        // Nothing of this step reaches the weights or the optimizer's state.
        trained.iter().for_each(|t| t.parameter.zero_grad());
        state.withheld_steps += 1;
        state.consecutive_withheld += 1;
        let first_bad = shares.iter().find_map(|s| s.first_bad.clone());
        let what = first_bad.unwrap_or_else(|| format!("the gradient of {}", bad.unwrap_or_default()));
        let names: Vec<String> = seen.iter().map(|&s| data.path(s).display().to_string()).collect();
        let names = ranks.gather("samples of the step", &names)?.concat();
        let (step, in_a_row) = (state.step + 1, state.consecutive_withheld);
        let too_many = in_a_row >= config.train.max_withheld_steps;
        if verdict == Verdict::Overflow {
            let now = precision::loss_scale(state);
            if too_many {
                return Err(Error::Overflow { step, in_a_row, scale: now, checkpoint: last_checkpoint(config) });
            }
            observe(Event::Note(format!("step {step} is skipped: its gradient overflows at loss scale {scale}; the next takes {now}")));
        } else {
            let found = Error::NotFinite { what, step, samples: names.join(", "), checkpoint: last_checkpoint(config) };
            if config.train.on_non_finite == OnNonFinite::Stop || too_many {
                return Err(found);
            }
            observe(Event::Warning(format!("the step is withheld: {found}")));
        }
    } else {
        step::update(trained, optimizer, (norm, scale), config.train.max_grad_norm, |group| factors.of(group))?;
        state.consecutive_withheld = 0;
        state.loss_average = if state.step == state.withheld_steps { loss } else { 0.98 * state.loss_average + 0.02 * loss };
    }
    let (epoch, _) = data.timeline.window(state.step);
    state.step += 1;
    state.samples_seen += samples as u64;
    state.replaced += shares.iter().map(|s| s.replaced).sum::<u64>();
    ranks.spoil_weights(trained, state.step)?;
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
        withheld: verdict != Verdict::Apply,
        loss_scale: state.loss_scaler.map(|_| scale),
        overflows: state.loss_scaler.map(|s| s.total_skips),
        replaced: state.replaced,
        phases: shares.into_iter().map(|s| s.phases).collect(),
    })
}

/// What a rank tells the others of its part of a step.
#[derive(Serialize, Deserialize)]
struct Share {
    /// Bits of its part of the loss, which may be no number.
    loss: u64,
    /// Samples that took a broken one's place.
    replaced: u64,
    /// Where that began, if it is none.
    first_bad: Option<String>,
    /// The base model's file, if it was changed.
    base_changed: Option<PathBuf>,
    phases: Phases,
}

/// At the end, how many pictures could not be used, on all ranks together; nothing if there were none.
fn tell_broken(ranks: &Ranks, data: &Data, left_out: usize, state: &RunState, observe: &mut Observer) -> Result<()> {
    let own: Vec<u32> = data.dataset.broken().into_keys().collect();
    let found: BTreeSet<u32> = ranks.gather("broken pictures", &own)?.into_iter().flatten().collect();
    if left_out + found.len() == 0 && state.replaced == 0 {
        return Ok(());
    }
    let mut names = found.iter().take(5).map(|&sample| data.path(sample).display().to_string()).collect::<Vec<_>>().join(", ");
    if found.len() > 5 {
        names += &format!(" and {} more", found.len() - 5);
    }
    let these = if names.is_empty() { String::new() } else { format!(" ({names})") };
    observe(Event::Note(format!(
        "broken pictures: {left_out} left out at the start, {} found later{these}; another one took their place at {} of {} visits",
        found.len(),
        state.replaced,
        state.samples_seen
    )));
    Ok(())
}

/// The newest whole checkpoint, for the message of a run that stops.
fn last_checkpoint(config: &RunConfig) -> Option<PathBuf> {
    checkpoint::find_newest_whole(&config.output.dir).ok()?.0.map(|found| found.path)
}

/// Hands a snapshot to the writer.
fn save(run: &Run, optimizer: &Optimizer, state: &RunState, recipe: &str, metrics: String, writer: &mut Writer) -> Result<()> {
    let state = resume::position(state, run.data)?;
    writer.start(Snapshot::take(run.trained, optimizer, state, recipe.into(), metrics)?, &run.config.output)
}
