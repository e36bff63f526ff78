//! The batch plan: every visit exactly once, one bucket per batch, a pure function of its key.

use std::collections::{HashMap, HashSet};

use dataset::{BatchPlan, BucketContents};
use proptest::prelude::*;

fn buckets(counts: &[(u32, u32)]) -> Vec<BucketContents> {
    let mut next = 0;
    let bucket = |(i, &(count, repeats)): (usize, &(u32, u32))| {
        let samples = (next..next + count).map(|s| (s, repeats)).collect();
        next += count;
        BucketContents { size: (64 + 32 * i as u32, 128), samples }
    };
    counts.iter().enumerate().map(bucket).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn every_visit_once_in_batches_of_one_bucket(
        counts in prop::collection::vec((0u32..20, 1u32..4), 0..6),
        batch_size in 1usize..9, seed in any::<u64>(), epoch in 0u64..1000,
    ) {
        let buckets = buckets(&counts);
        let plan = BatchPlan::new(seed, epoch, &buckets, batch_size).unwrap();
        let home: HashMap<u32, (u32, u32)> = buckets.iter().flat_map(|b| b.samples.iter().map(|s| (s.0, b.size))).collect();
        let mut visits = HashSet::new();
        let mut short = HashMap::new();
        let mut position = 0;
        for k in 0..plan.len() {
            let batch = plan.batch(k).unwrap();
            prop_assert!(!batch.entries.is_empty() && batch.entries.len() <= batch_size);
            *short.entry(batch.bucket).or_insert(0) += usize::from(batch.entries.len() < batch_size);
            for entry in batch.entries {
                prop_assert_eq!(home[&entry.sample], batch.bucket);
                prop_assert_eq!(entry.position, position);
                position += 1;
                prop_assert!(visits.insert((entry.sample, entry.repeat)), "twice: {:?}", entry);
            }
        }
        let expected: HashSet<_> = buckets.iter().flat_map(|b| &b.samples).flat_map(|&(s, n)| (0..n).map(move |r| (s, r))).collect();
        prop_assert_eq!(visits, expected);
        prop_assert!(short.values().all(|&n| n <= 1), "a bucket has two short batches");
        prop_assert!(plan.batch(plan.len()).is_none());
        prop_assert_eq!(plan.visits() as u64, position);
    }
}

fn order(plan: &BatchPlan) -> Vec<(u32, u32)> {
    plan.iter().flat_map(|b| b.entries.iter().map(|e| (e.sample, e.repeat))).collect()
}

#[test]
fn same_key_same_plan_and_each_part_of_the_key_counts() {
    let contents = buckets(&[(40, 1), (30, 2), (7, 1)]);
    let base = BatchPlan::new(1, 0, &contents, 4).unwrap();
    let again = BatchPlan::new(1, 0, &contents, 4).unwrap();
    assert_eq!((order(&base), base.fingerprint()), (order(&again), again.fingerprint()));
    let more = buckets(&[(40, 1), (30, 2), (8, 1)]);
    for other in [
        BatchPlan::new(2, 0, &contents, 4).unwrap(),
        BatchPlan::new(1, 1, &contents, 4).unwrap(),
        BatchPlan::new(1, 0, &contents, 5).unwrap(),
        BatchPlan::new(1, 0, &more, 4).unwrap(),
    ] {
        assert_ne!(order(&base), order(&other));
        assert_ne!(base.fingerprint(), other.fingerprint());
    }
}

/// The plan of a resumed run must be that of the run before: its first batches are pinned.
#[test]
fn plan_is_pinned() {
    let plan = BatchPlan::new(42, 3, &buckets(&[(6, 1), (3, 2)]), 4).unwrap();
    let got: Vec<Vec<u32>> = plan.iter().map(|b| b.entries.iter().map(|e| e.sample).collect()).collect();
    assert_eq!(got, PINNED);
}
const PINNED: [&[u32]; 4] = [&[0, 1, 2, 5], &[6, 7], &[4, 3], &[8, 7, 6, 8]];

/// A bucket's own order does not depend on which other buckets exist.
#[test]
fn buckets_are_shuffled_independently() {
    let all = buckets(&[(9, 1), (5, 1)]);
    let of_second = |plan: &BatchPlan| {
        let mut batches: Vec<Vec<u32>> =
            plan.iter().filter(|b| b.bucket == all[1].size).map(|b| b.entries.iter().map(|e| e.sample).collect()).collect();
        batches.sort();
        batches
    };
    let (both, alone) = (BatchPlan::new(5, 0, &all, 2).unwrap(), BatchPlan::new(5, 0, &all[1..], 2).unwrap());
    assert_eq!(of_second(&both), of_second(&alone));
}

#[test]
fn batch_size_zero_is_an_error() {
    let error = BatchPlan::new(0, 0, &[], 0).unwrap_err();
    assert_eq!(error.to_string(), "dataset config: batch_size = 0");
    assert!(error.hint().is_some());
}

/// The size of Kohaku XL Epsilon's epoch.
#[test]
fn five_million_visits() {
    let contents = buckets(&[(1_000_000, 5), (37, 1)]);
    let plan = BatchPlan::new(0, 0, &contents, 16).unwrap();
    assert_eq!((plan.visits(), plan.len()), (5_000_037, 312_500 + 3));
}
