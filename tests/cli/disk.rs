//! Disks that are full or read-only.

use crate::support::*;

/// A run in the folder `disk/run`.
fn on_disk<'a>(set: &[&'a str]) -> Vec<&'a str> {
    arguments(&[&["output.dir=disk/run"], set].concat())
}

#[test]
fn a_read_only_folder_is_named() {
    let world = World::new("read-only");
    std::fs::create_dir(world.path("disk")).expect("a folder");
    let before = "mount --bind disk disk && mount -o remount,ro,bind disk";
    let Some(ran) = lokr_in_namespace(&world.folder, before, &on_disk(&[]), "true") else { return };
    insta::assert_snapshot!(ran.refusal(), @"
    error: cannot create the folder `disk/run`
      because: Read-only file system (os error 30)
    hint: `disk/run` is on a read-only file system; choose another folder
    ");
    std::fs::create_dir(world.path("disk/run")).expect("a folder");
    let Some(ran) = lokr_in_namespace(&world.folder, before, &on_disk(&[]), "true") else { return };
    insta::assert_snapshot!(ran.refusal(), @"
    error: cannot open the lock file `disk/run/run.lock`
      because: Read-only file system (os error 30)
    hint: `disk/run/run.lock` is on a read-only file system; choose another folder
    ");
}

#[test]
fn a_full_disk_is_named_and_what_was_saved_before_stays_good() {
    let world = World::new("full-disk");
    let whole = World::new("full-disk-whole");
    whole.train(&[]).good();
    // One save takes a checkpoint and an adapter of about this size; the disk holds one save, and then some of another.
    let save: u64 = listing(checkpoint(&whole.run(), 7)).iter().map(|f| bytes(checkpoint(&whole.run(), 7).join(f)).len() as u64).sum();
    let adapter = bytes(whole.run().join("shapes.safetensors")).len() as u64;
    for (n, room) in
        [save / 2, save + adapter + adapter / 2, 2 * save + adapter, 2 * save + 2 * adapter + adapter / 2].into_iter().enumerate()
    {
        let (saved, size) = (format!("saved-{n}"), room / 1024);
        let before = format!("mkdir -p disk && mount -t tmpfs -o size={size}k tmpfs disk");
        let after = format!("cp -r disk/run {saved}");
        let Some(ran) = lokr_in_namespace(&world.folder, &before, &on_disk(&[]), &after) else { return };
        assert!(ran.all().contains("No space left on device"), "{}", ran.all());
        let err = ran.refusal();
        assert!(err.starts_with("error: cannot write `disk/run/"), "{err}");
        assert!(err.contains("hint: free some space on the disk that holds `disk/run"), "{err}");
        // With more room, the same run goes on from what is whole, and loses nothing.
        let dir = format!("output.dir={saved}");
        let again = world.train(&[&dir]).good();
        assert_eq!(again.warnings(), [""; 0], "nothing torn bears a checkpoint's name");
        assert_eq!(again.lines("resuming").is_empty(), n == 0, "{}", again.all());
        for file in ["adapter.safetensors", "optimizer.safetensors", "state.json"] {
            assert_same_file(checkpoint(&whole.run(), 7).join(file), checkpoint(&world.path(&saved), 7).join(file));
        }
    }
}

#[test]
fn a_merged_model_that_does_not_fit_on_the_disk_leaves_nothing() {
    let (finished, _) = finished();
    let world = World::new("full-disk-merge");
    let (base, lokr) = (tiny_base().display().to_string(), finished.path("run/shapes.safetensors").display().to_string());
    let args = ["export", "merged", "--base", &base, "--lokr", &lokr, "--out", "disk/merged.safetensors"];
    let before = "mkdir -p disk && mount -t tmpfs -o size=2m tmpfs disk";
    let Some(ran) = lokr_in_namespace(&world.folder, before, &args, "ls -A disk") else { return };
    assert_eq!(ran.out, "", "the disk is empty afterwards");
    insta::assert_snapshot!(ran.refusal(), @"
    error: cannot write `disk/merged.safetensors`
      because: No space left on device (os error 28)
    hint: free some space on the disk that holds `disk`, or choose another folder
    ");
}
