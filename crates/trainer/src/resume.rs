//! From which checkpoint a run goes on, whether it may, and with which accumulation when the number of processes is another.

use toml::Table;

use crate::checkpoint::{self, Found, RunState};
use crate::config::{Resume, RunConfig};
use crate::data::Data;
use crate::error::{Error, Result};
use crate::event::{Event, Observer};
use crate::train::Options;

/// The checkpoint that the recipe wants to go on from.
///
/// # Errors
/// If the one that it names is not whole, or there is one and the recipe says to begin anew.
pub fn find_checkpoint(config: &RunConfig, observe: &mut Observer) -> Result<Option<Found>> {
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

/// The accumulation with which `ranks` processes go on. Where the recipe's would make steps of another number of batches than
/// the checkpoint's, and the user has not changed it, it is adjusted so that the steps stay the same ones.
///
/// # Errors
/// If these processes cannot share the batches of a step evenly.
pub fn accumulation(config: &RunConfig, found: Option<&Found>, ranks: usize, options: &Options, observe: &mut Observer) -> Result<usize> {
    let now = config.train.gradient_accumulation_steps;
    let Some(found) = found.filter(|_| !options.allow_recipe_change) else { return Ok(now) };
    let (then, of_step) = (recipe_accumulation(found).unwrap_or(now), batches_per_step(found));
    if now * ranks == of_step || now != then {
        return Ok(now);
    }
    let saved_on = found.state.world_size;
    if !of_step.is_multiple_of(ranks) {
        let fits: Vec<String> = (1..=of_step).filter(|n| of_step.is_multiple_of(*n)).map(|n| n.to_string()).collect();
        return Err(Error::refused(
            format!(
                "checkpoint `{}` was saved on {saved_on} processes with {of_step} batches in each step, which {ranks} processes cannot share",
                found.path.display()
            ),
            format!(
                "start {} processes, or resume with --allow-recipe-change to go on with steps of {} batches",
                fits.join(", "),
                now * ranks
            ),
        ));
    }
    let adjusted = of_step / ranks;
    observe(Event::Note(format!(
        "saved on {saved_on} processes, going on on {ranks}: accumulation {adjusted} in place of the recipe's {now}, so that a step has \
         the same {of_step} batches"
    )));
    Ok(adjusted)
}

/// Batches of a step of the run that wrote the checkpoint.
fn batches_per_step(found: &Found) -> usize {
    match found.state.batches_per_step {
        0 => recipe_accumulation(found).unwrap_or(1),
        n => n as usize,
    }
}

fn recipe_accumulation(found: &Found) -> Option<usize> {
    let recipe: Table = found.recipe.parse().ok()?;
    usize::try_from(recipe.get("train")?.get("gradient_accumulation_steps")?.as_integer()?).ok()
}

/// The state with its place in the plan: that of the step after `state.step`.
///
/// # Errors
/// If the plan of that step's epoch cannot be made.
pub fn position(state: &RunState, data: &Data) -> Result<RunState> {
    let (epoch, range) = data.timeline.window(state.step);
    let plan = data.plan(epoch)?;
    let next_sample = plan.batch(range.start as usize).and_then(|b| b.entries.first().map(|e| e.sample));
    Ok(RunState { epoch, next_sample, plan_fingerprint: plan.fingerprint().into(), ..state.clone() })
}

/// Refuses a checkpoint whose recipe, data or base model is another one; or whose place in the plan is, though all those are the same.
/// `now`: what the checkpoint's state would be here, with [`position`].
///
/// # Errors
/// [`Error::RecipeChanged`] with all differences.
pub fn refuse_changes(found: &Found, recipe: &str, now: &RunState, options: &Options) -> Result<()> {
    let mut differences = checkpoint::differences(&found.recipe, recipe);
    if batches_per_step(found) == now.batches_per_step as usize {
        differences.retain(|d| !d.starts_with("train.gradient_accumulation_steps:"));
    }
    if found.state.dataset_fingerprint != now.dataset_fingerprint {
        differences.push("dataset: pictures, captions or their places are not those of the checkpoint".into());
    }
    if found.state.base_hash != now.base_hash {
        differences.push("model.base: another file than the checkpoint's".into());
    }
    let place = |state: &RunState| (state.plan_fingerprint.clone(), state.epoch, state.next_sample);
    if differences.is_empty() && place(&found.state) != place(now) {
        differences.push(format!("the order of the pictures: lokr {} made another plan of the same recipe and pictures", found.state.lokr));
    }
    if differences.is_empty() || options.allow_recipe_change {
        return Ok(());
    }
    Err(Error::RecipeChanged { path: found.path.clone(), differences })
}

/// What a resume will do, before it does it.
///
/// # Errors
/// If the plan of the next step's epoch cannot be made.
pub fn plan(found: &Found, data: &Data) -> Result<String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(accumulation: usize, world_size: u64) -> Found {
        let state = RunState {
            format: RunState::FORMAT,
            step: 3,
            world_size,
            batches_per_step: accumulation as u64 * world_size,
            ..RunState::default()
        };
        Found { path: "run/checkpoints/step-00000003".into(), state, recipe: with(accumulation).to_toml(), metrics: String::new() }
    }

    fn with(accumulation: usize) -> RunConfig {
        let mut config = RunConfig::default();
        config.train.gradient_accumulation_steps = accumulation;
        config
    }

    #[test]
    fn the_batches_of_a_step_stay_where_the_processes_can_share_them() {
        // Recipe then, processes then, recipe now, processes now; accumulation or refusal.
        for (then, on, now, ranks, want) in [
            (1, 4, 1, 4, Some(1)),
            (1, 4, 1, 2, Some(2)),
            (1, 4, 1, 1, Some(4)),
            (4, 1, 4, 2, Some(2)),
            (2, 4, 2, 8, Some(1)),
            (2, 4, 2, 16, None),
            (1, 4, 1, 3, None),
            // Changed by the user: to the same steps, or to others, which is for the comparison of recipes to refuse.
            (1, 4, 2, 2, Some(2)),
            (1, 4, 3, 2, Some(3)),
        ] {
            let mut told = Vec::new();
            let found = saved(then, on);
            let got = accumulation(&with(now), Some(&found), ranks, &Options::default(), &mut |event| told.push(event));
            assert_eq!(got.as_ref().ok(), want.as_ref(), "{then} on {on}, then {now} on {ranks}: {got:?}");
            assert_eq!(told.len(), usize::from(want.is_some_and(|w| w != now)), "an adjustment is told");
            if let Some(same) = got.ok().filter(|a| a * ranks == then * on as usize) {
                let now = RunState { batches_per_step: (same * ranks) as u64, ..found.state.clone() };
                refuse_changes(&found, &with(same).to_toml(), &now, &Options::default()).expect("the same steps are no change");
            }
        }
        let found = saved(1, 1);
        let other = RunState { next_sample: Some(7), ..found.state.clone() };
        let refused = refuse_changes(&found, &with(1).to_toml(), &other, &Options::default()).expect_err("another plan").to_string();
        assert!(refused.contains("the order of the pictures: "), "{refused}");
        let free = Options { allow_recipe_change: true, ..Options::default() };
        assert_eq!(accumulation(&with(1), Some(&saved(1, 4)), 3, &free, &mut |_| ()).ok(), Some(1));
        assert_eq!(accumulation(&with(5), None, 3, &Options::default(), &mut |_| ()).ok(), Some(5));
    }

    #[test]
    fn a_checkpoint_of_before_there_were_several_processes_has_its_recipes_steps() {
        let mut found = saved(4, 1);
        found.state.batches_per_step = 0;
        assert_eq!(accumulation(&with(4), Some(&found), 4, &Options::default(), &mut |_| ()).ok(), Some(1));
    }
}
