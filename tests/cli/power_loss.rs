//! Power loss: what the system was asked to put on the disk, in which order. `support/shim.c` records the calls; here they are replayed
//! against a disk that keeps nothing it was not asked to.

use std::collections::BTreeSet;

use crate::support::*;

/// What a power loss at this moment would take.
#[derive(Default)]
struct Disk {
    /// Files with content that was not synced.
    content: BTreeSet<String>,
    /// Folders with entries that were not synced.
    entries: BTreeSet<String>,
    /// What was relied on too early.
    faults: Vec<String>,
    checkpoints: usize,
    deletions: usize,
}

fn folder_of(path: &str) -> String {
    path.rsplit_once('/').map_or("", |(folder, _)| folder).to_string()
}

impl Disk {
    fn call(&mut self, line: &str) {
        let fields: Vec<&str> = line.split('\t').collect();
        match fields[..] {
            // Metrics are never relied on: a checkpoint holds their last lines. What is in the lock means nothing after its process.
            ["write", path] if path.ends_with("/metrics.jsonl") || path.ends_with("/run.lock") => {}
            ["write", path] => _ = self.content.insert(path.into()),
            ["sync", path] => {
                self.content.remove(path);
                self.entries.remove(path);
            }
            ["mkdir", path] => _ = self.entries.insert(folder_of(path)),
            ["rename", from, to] => self.rename(from, to),
            _ => self.faults.push(format!("no call: {line}")),
        }
    }

    fn rename(&mut self, from: &str, to: &str) {
        let inside = |path: &String| path == from || path.starts_with(&format!("{from}/"));
        for lost in self.content.iter().chain(&self.entries).filter(|p| inside(p)) {
            self.faults.push(format!("{to} got its name before {lost} was synced"));
        }
        if to.ends_with(".old.tmp") {
            // A checkpoint goes: its successor must be on the disk, with its name.
            self.deletions += 1;
            for lost in self.entries.iter().filter(|p| **p == folder_of(to)) {
                self.faults.push(format!("{from} was deleted before the names in {lost} were synced"));
            }
        } else {
            self.checkpoints += usize::from(to.contains("/checkpoints/step-") && from.ends_with(".tmp"));
        }
        self.entries.insert(folder_of(from));
        self.entries.insert(folder_of(to));
    }
}

fn replay(log: &str, below: &str) -> Disk {
    let mut disk = Disk::default();
    let above = format!("sync\t{}", folder_of(below));
    log.lines().filter(|l| l.contains(below) || *l == above).for_each(|line| disk.call(line));
    disk
}

#[test]
fn nothing_is_relied_on_before_it_is_on_the_disk() {
    let world = World::new("power-loss");
    let log = world.path("calls.log");
    let set = [PREVIEWS, &["output.save_every_n_steps=1", "output.keep_last=1"]].concat();
    let Some(ran) = lokr_with_shim(&world.folder, &[("LOKR_SHIM_LOG", &log.display().to_string())], &arguments(&set)) else { return };
    ran.good();
    let (calls, run) = (text(&log), world.run().display().to_string());
    let disk = replay(&calls, &run);
    assert_eq!(disk.faults, [""; 0]);
    assert_eq!((disk.checkpoints, disk.deletions), (7, 6), "all were seen:\n{calls}");
    assert!(disk.content.is_empty(), "never synced: {:?}", disk.content);
    // The last deletion may come back after a power loss, by a name that the next run removes.
    let checkpoints = format!("{run}/checkpoints");
    assert!(disk.entries.iter().all(|p| *p == checkpoints), "names never synced: {:?}", disk.entries);
    // Each sync counts: without any one of those of files and folders, a fault is found or something is left.
    let syncs: Vec<&str> = calls.lines().filter(|l| l.starts_with("sync\t") && l.contains("/checkpoints/.step-00000003.tmp/")).collect();
    assert_eq!(syncs.len(), 6, "five files and the manifest: {syncs:?}");
    for sync in syncs {
        let without: String = calls.lines().filter(|l| *l != sync).map(|l| l.to_string() + "\n").collect();
        assert!(!replay(&without, &run).faults.is_empty(), "without {sync}");
    }
    let without: String = calls.lines().filter(|l| *l != format!("sync\t{checkpoints}")).map(|l| l.to_string() + "\n").collect();
    assert!(replay(&without, &run).faults.iter().any(|f| f.contains("was deleted before")), "without the sync of the names");
}
