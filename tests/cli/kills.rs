//! Kills at random moments. A few by default; `scripts/kill-harness.sh` asks for more. `docs/reliability.md` has its figures.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::*;

/// The runs that are killed, one after the other: each optimizer, cached and uncached pictures, all outputs, checkpoints of each step and
/// of every other.
fn recipes() -> [Vec<&'static str>; 3] {
    let each = ["train.max_train_steps=12", "output.save_every_n_steps=1"];
    let other = ["train.max_train_steps=12", "output.save_every_n_steps=2", "output.keep_last=1", "output.keep_every=4"];
    [
        [&each[..], &["train.optimizer=Lion8bit"]].concat(),
        [&each[..], &["train.optimizer=AdamW"], PREVIEWS].concat(),
        [&other[..], &["dataset.cache_latents=false", "dataset.subsets[0].random_crop=true"]].concat(),
    ]
}

/// Where kills struck, by what they left behind, and what came of it.
#[derive(Default)]
struct Tally {
    before_a_step: usize,
    between_files: usize,
    in_a_checkpoint: usize,
    in_another_file: usize,
    processes: usize,
    finished: usize,
    lost: Vec<String>,
    files: usize,
    differing: BTreeMap<String, usize>,
}

impl Tally {
    fn kills(&self) -> usize {
        self.before_a_step + self.between_files + self.in_a_checkpoint + self.in_another_file
    }

    /// Counts a kill by what it left in the run's folder.
    fn strike(&mut self, run: &Path, had_steps: bool) {
        let left = if run.exists() { listing(run) } else { Vec::new() };
        let half_checkpoint = checkpoints(run).iter().any(|n| n.starts_with('.'));
        let half_file = left.iter().any(|n| n.rsplit('/').next().is_some_and(|n| n.starts_with('.') && n.contains(".tmp-")));
        *(if half_checkpoint {
            &mut self.in_a_checkpoint
        } else if half_file {
            &mut self.in_another_file
        } else if had_steps {
            &mut self.between_files
        } else {
            &mut self.before_a_step
        }) += 1;
    }

    /// Compares all that a run left with what the unbroken one left.
    fn compare(&mut self, whole: &Path, killed: &Path) {
        let (a, b) = (without_clock(whole), without_clock(killed));
        for name in a.keys().chain(b.keys().filter(|n| !a.contains_key(*n))) {
            let [x, y] = [&a, &b].map(|c| c.get(name).map_or(&[][..], Vec::as_slice));
            let bytes = x.iter().zip(y).filter(|(p, q)| p != q).count() + x.len().abs_diff(y.len());
            self.files += 1;
            if bytes > 0 || a.contains_key(name) != b.contains_key(name) {
                *self.differing.entry(name.clone()).or_default() += bytes.max(1);
            }
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "kills                             {:6}", self.kills())?;
        writeln!(f, "  before the process made a step  {:6}", self.before_a_step)?;
        writeln!(f, "  in or between steps             {:6}", self.between_files)?;
        writeln!(f, "  in the middle of a checkpoint   {:6}", self.in_a_checkpoint)?;
        writeln!(f, "  in the middle of another file   {:6}", self.in_another_file)?;
        writeln!(f, "processes started                 {:6}", self.processes)?;
        writeln!(f, "runs finished                     {:6}", self.finished)?;
        writeln!(f, "runs lost                         {:6}", self.lost.len())?;
        writeln!(f, "files compared                    {:6}", self.files)?;
        write!(f, "bytes that differed               {:6}", self.differing.values().sum::<usize>())
    }
}

/// Content of every file of a run; of the metrics all but what a clock measured.
fn without_clock(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = contents(run);
    let mut lines = metrics(run);
    for line in &mut lines {
        let line = line.as_object_mut().expect("an object");
        ["seconds", "images_per_second", "phases"].iter().for_each(|key| _ = line.remove(*key));
    }
    files.insert("metrics.jsonl".into(), serde_json::to_vec(&lines).expect("JSON"));
    files
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end.max(1)
    }
}

/// Whether a checkpoint is being written or deleted just now.
fn writing(run: &Path) -> bool {
    checkpoints(run).iter().any(|n| n.starts_with('.'))
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{variable}={v} is no number")))
}

#[test]
fn killed_at_random_moments_a_run_ends_as_the_unbroken_one() {
    let (kills, seed) = (number("LOKR_KILLS", 9) as usize, number("LOKR_KILL_SEED", 1));
    let (mut random, mut tally) = (Random(seed), Tally::default());
    let unbroken = recipes().map(|set| {
        let world = World::new(&format!("kills-unbroken-{}", set[2].replace(['=', '.', '/'], "-")));
        let started = Instant::now();
        world.train(&set).good();
        (world, started.elapsed())
    });
    for round in 0.. {
        let which = round % 3;
        let (set, (whole, duration)) = (&recipes()[which], &unbroken[which]);
        let world = World::new(&format!("kills-{round}"));
        // A process lives for a third of the run on the average, so that a run takes several; longer if it gets nowhere.
        let (mut life, mut stuck) = (duration.as_micros() as u64 * 2 / 3, 0);
        // In the short form each recipe gets its share; what is left of a run when all kills are spent is run to its end.
        let share = kills.div_ceil(3).min(67) + tally.kills();
        loop {
            tally.processes += 1;
            let before = steps_so_far(&world.run());
            let mut running = world.start(set);
            if tally.kills() >= kills.min(share) {
                match running.end() {
                    ran if ran.status == Some(0) => tally.finished += 1,
                    ran => tally.lost.push(ran.all()),
                }
                break;
            }
            if tally.kills() % 2 == 0 {
                let moment = Instant::now() + Duration::from_micros(random.below(life));
                running.wait_until(|| Instant::now() >= moment);
            } else {
                // In one of the next checkpoints, at one of the moments that its writing takes.
                for _ in 0..=random.below(3) {
                    running.spin_until(|| !writing(&world.run()));
                    running.spin_until(|| writing(&world.run()));
                }
                let moment = Instant::now() + Duration::from_micros(random.below(6000));
                running.spin_until(|| Instant::now() >= moment);
            }
            match running.killed() {
                None => {
                    let steps = steps_so_far(&world.run());
                    tally.strike(&world.run(), steps > before);
                    stuck = if steps > before { 0 } else { stuck + 1 };
                    life += if stuck > 3 { life / 2 } else { 0 };
                }
                Some(ran) if ran.status == Some(0) => {
                    tally.finished += 1;
                    break;
                }
                Some(ran) => {
                    tally.lost.push(ran.all());
                    break;
                }
            }
        }
        if tally.lost.is_empty() {
            tally.compare(&whole.run(), &world.run());
        }
        if tally.kills() >= kills || !tally.lost.is_empty() {
            break;
        }
    }
    println!("seed {seed}\n{tally}");
    assert!(tally.lost.is_empty(), "lost: {}", tally.lost.join("\n"));
    assert!(tally.differing.is_empty(), "bytes that differ, by file: {:?}", tally.differing);
}
