//! Signals, kills and a second process: what is saved is whole, and going on ends where an unbroken run ends.

use std::sync::OnceLock;

use crate::support::*;

/// Long enough to be interrupted several times.
const LONG: &[&str] = &["train.max_train_steps=16", "output.save_every_n_steps=1"];

/// The unbroken run that the others are compared with.
fn unbroken() -> &'static World {
    static UNBROKEN: OnceLock<World> = OnceLock::new();
    UNBROKEN.get_or_init(|| {
        let world = World::new("unbroken").kept();
        world.train(LONG).good();
        world
    })
}

/// The run has ended as the unbroken one.
fn assert_ended_alike(world: &World) {
    let whole = unbroken();
    assert_same_folder(checkpoint(&whole.run(), 16), checkpoint(&world.run(), 16));
    assert_same_file(whole.run().join("shapes.safetensors"), world.run().join("shapes.safetensors"));
    assert_eq!(steps_in_metrics(&world.run()), (1..=16).collect::<Vec<_>>(), "each step once");
}

/// Starts the run and waits until it has made `more` further steps.
fn started(world: &World, more: usize) -> Running {
    let before = steps_so_far(&world.run());
    let mut running = world.start(LONG);
    assert!(running.wait_until(|| steps_so_far(&world.run()) >= before + more), "it ended early");
    running
}

#[test]
fn the_first_signal_ends_the_step_saves_and_exits_with_3() {
    for signal in ["TERM", "INT"] {
        let world = World::new(&format!("signal-{signal}"));
        let running = started(&world, 2);
        running.signal(signal);
        let ran = running.end().ended_with(3);
        let last = *steps_in_metrics(&world.run()).last().expect("steps");
        assert_eq!(ran.err, "");
        let told = format!("stopped after step {last} of 16; run the same command to go on");
        assert_eq!(ran.out.lines().last(), Some(told.as_str()), "{}", ran.all());
        assert!(checkpoints(&world.run()).contains(&format!("step-{last:08}")), "{}", ran.all());
        let again = world.train(LONG).good();
        let what = format!("resuming from run/checkpoints/step-{last:08}: {last} of 16 steps done, {} remain", 16 - last);
        assert!(again.out.contains(&what), "{}", again.all());
        assert_ended_alike(&world);
    }
}

#[test]
fn a_second_signal_stops_at_once_without_harm() {
    let world = World::new("two-signals");
    let running = started(&world, 2);
    running.signal("TERM");
    running.signal("INT");
    running.end().ended_with(130);
    assert_eq!(world.train(LONG).good().warnings(), [""; 0]);
    assert_ended_alike(&world);
}

#[test]
fn a_signal_before_the_first_step_loses_nothing_and_doubles_nothing() {
    let world = World::new("early-signal");
    let set = [LONG, &["validation.image_dir=held-out", "validation.every_n_steps=16"]].concat();
    let mut running = world.start(&set);
    // The lock is taken after the program has begun to listen, and before the model is read.
    assert!(running.wait_until(|| world.run().join("run.lock").exists()));
    running.signal("TERM");
    let ran = running.end().ended_with(3);
    assert!(ran.out.contains("stopped after step 0 of 16"), "{}", ran.all());
    world.train(&set).good();
    for file in ["adapter.safetensors", "optimizer.safetensors", "state.json"] {
        assert_same_file(checkpoint(&unbroken().run(), 16).join(file), checkpoint(&world.run(), 16).join(file));
    }
    assert_eq!(steps_in_metrics(&world.run()), (1..=16).collect::<Vec<_>>(), "each step once");
    let validated: Vec<_> =
        metrics(&world.run()).iter().filter(|l| l.get("validation_loss").is_some()).map(|l| l["step"].as_u64()).collect();
    assert_eq!(validated, [Some(0), Some(16)], "each validation once");
}

#[test]
fn kills_at_any_moment_cost_nothing_but_time() {
    let world = World::new("killed");
    // Moments after the second further step; with a checkpoint at each step, writing takes up a good part of the time.
    for (kill, wait) in [0, 13, 29, 47, 71].into_iter().enumerate() {
        let running = started(&world, if kill == 0 { 2 } else { 1 });
        std::thread::sleep(std::time::Duration::from_millis(wait));
        running.kill();
    }
    // The next process finds nothing torn: every folder with a checkpoint's name is whole.
    let ran = world.train(LONG).good();
    assert_eq!(ran.warnings(), [""; 0]);
    assert_ended_alike(&world);
    assert!(!checkpoints(&world.run()).iter().any(|n| n.starts_with('.')), "what a killed writer left is removed");
}

#[test]
fn two_processes_on_one_run_folder_are_refused_and_a_dead_one_holds_nothing() {
    let world = World::new("locked");
    let running = started(&world, 1);
    let err = world.train(LONG).refusal();
    let pid = running.pid();
    assert_eq!(err, format!("error: `run/run.lock` is locked by process {pid}\nhint: wait until process {pid} ends, or stop it\n"));
    running.kill();
    world.train(LONG).good();
    assert_ended_alike(&world);
}
