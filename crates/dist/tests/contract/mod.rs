//! What every process group must do, whatever carries its bytes. `make(n)` gives the n members of a fresh group; each
//! check runs every member on a thread of its own, as n processes would.

use std::sync::atomic::{AtomicUsize, Ordering};

use dist::{Error, Failure, Operation, ProcessGroup};

/// Runs `work` for each member at once; results in rank order.
pub fn each<T: Send>(groups: Vec<ProcessGroup>, work: impl Fn(&ProcessGroup) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || work(&group))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank's thread panicked")).collect()
    })
}

/// All checks, for one world size.
pub fn contract(n: usize, make: &dyn Fn(usize) -> Vec<ProcessGroup>) {
    ranks_and_size(n, make(n));
    sums(n, make(n));
    sums_do_not_depend_on_the_cut(make(n));
    async_buckets(n, make(n));
    maximum_and_any(n, make(n));
    broadcasts(n, make(n));
    gathers(n, make(n));
    barriers(n, make(n));
    if n > 1 {
        different_operations(n, make(n));
        different_lengths(n, make(n));
        different_names_in_async(n, make(n));
    }
}

/// Values of one rank whose sum depends on the order: magnitudes differ by rank and element.
fn values(rank: usize, elements: usize, salt: usize) -> Vec<f32> {
    let value = |i: usize| {
        let digits = ((i * 7919 + rank * 104_729 + salt * 1_299_709) % 10_007) as f32 - 5003.0;
        digits * [1.0, 1e-3, 1e4, 1e-2][(i + 3 * rank) % 4] / 3.0
    };
    (0..elements).map(value).collect()
}

fn expected(n: usize, elements: usize, salt: usize) -> Vec<f32> {
    let mut total = values(0, elements, salt);
    for rank in 1..n {
        total.iter_mut().zip(values(rank, elements, salt)).for_each(|(total, value)| *total += value);
    }
    total
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn ranks_and_size(n: usize, groups: Vec<ProcessGroup>) {
    let seen = each(groups, |group| (group.rank(), group.world_size()));
    assert_eq!(seen, (0..n).map(|rank| (rank, n)).collect::<Vec<_>>());
}

fn sums(n: usize, groups: Vec<ProcessGroup>) {
    // On both sides of the border between small and large messages, less than one element per rank, none.
    let sizes = [0, 1, 3, 4096, 4097, 100_003];
    let results = each(groups, |group| {
        let sum = |&elements: &usize| {
            let mut once = values(group.rank(), elements, 0);
            group.all_reduce_sum("once", &mut once).unwrap();
            let mut again = values(group.rank(), elements, 0);
            group.all_reduce_sum("again", &mut again).unwrap();
            assert_eq!(bits(&once), bits(&again));
            bits(&once)
        };
        sizes.iter().map(sum).collect::<Vec<_>>()
    });
    for result in &results {
        for (sum, &elements) in result.iter().zip(&sizes) {
            assert!(*sum == bits(&expected(n, elements, 0)), "{n} ranks, {elements} elements: not the sum in rank order");
        }
    }
    if n > 2 {
        let mut reverse = values(n - 1, 1000, 0);
        for rank in (0..n - 1).rev() {
            reverse.iter_mut().zip(values(rank, 1000, 0)).for_each(|(total, value)| *total += value);
        }
        assert_ne!(bits(&reverse), bits(&expected(n, 1000, 0)), "these values do not show the order");
    }
}

fn sums_do_not_depend_on_the_cut(groups: Vec<ProcessGroup>) {
    each(groups, |group| {
        let mut whole = values(group.rank(), 20_000, 5);
        let mut parts = whole.clone();
        group.all_reduce_sum("whole", &mut whole).unwrap();
        let (small, large) = parts.split_at_mut(1234);
        group.all_reduce_sum("small part", small).unwrap();
        group.all_reduce_sum("large part", large).unwrap();
        assert!(bits(&whole) == bits(&parts));
    });
}

fn async_buckets(n: usize, groups: Vec<ProcessGroup>) {
    let sizes = [10, 9000, 0, 4097, 1, 30_000, 5000, 12];
    each(groups, |group| {
        let begin =
            |(salt, &elements): (usize, &usize)| group.all_reduce_async(&format!("bucket {salt}"), values(group.rank(), elements, salt));
        let handles: Vec<_> = sizes.iter().enumerate().map(begin).collect();
        // Queued behind the buckets, and so complete only after them.
        group.barrier("after the buckets").unwrap();
        for (salt, handle) in handles.into_iter().enumerate().rev() {
            assert!(bits(&handle.wait().unwrap()) == bits(&expected(n, sizes[salt], salt)), "bucket {salt}");
        }
    });
}

fn maximum_and_any(n: usize, groups: Vec<ProcessGroup>) {
    each(groups, |group| {
        let rank = group.rank();
        assert_eq!(group.all_reduce_max("rising", rank as f32 - 10.0).unwrap(), n as f32 - 11.0);
        assert_eq!(group.all_reduce_max("falling", -(rank as f32)).unwrap(), 0.0);
        for sick in 0..n {
            let value = if rank == sick { f32::NAN } else { 1.0 };
            assert!(group.all_reduce_max("sick", value).unwrap().is_nan(), "NaN of rank {sick} was lost");
            assert!(group.any("overflow", rank == sick).unwrap());
        }
        assert!(!group.any("overflow", false).unwrap());
        assert_eq!(group.all_reduce_max("none", f32::NEG_INFINITY).unwrap(), f32::NEG_INFINITY);
    });
}

fn broadcasts(n: usize, groups: Vec<ProcessGroup>) {
    let content = |root: usize, length: usize| (0..length).map(|i| (i * 31 + root * 7) as u8).collect::<Vec<u8>>();
    each(groups, |group| {
        for root in 0..n {
            for length in [0, 1, 3 << 20] {
                let mut bytes = if group.rank() == root { content(root, length) } else { vec![0xee; length] };
                group.broadcast("weights", &mut bytes, root).unwrap();
                assert!(bytes == content(root, length), "{length} bytes of rank {root} at rank {}", group.rank());
            }
        }
        let error = group.broadcast("weights", &mut [0; 4], n).unwrap_err();
        assert!(matches!(error, Error::Option { .. }), "{error}");
    });
}

fn gathers(n: usize, groups: Vec<ProcessGroup>) {
    each(groups, |group| {
        // Rank 0 brings nothing, the last one a megabyte per rank.
        let content = |rank: usize| vec![rank as u8; if rank == n - 1 { rank << 20 } else { rank * 3 }];
        let all = group.all_gather("hash", &content(group.rank())).unwrap();
        assert!(all == (0..n).map(content).collect::<Vec<_>>());
        assert_eq!(group.all_gather("nothing", &[]).unwrap(), vec![Vec::<u8>::new(); n]);
    });
}

fn barriers(n: usize, groups: Vec<ProcessGroup>) {
    let came = AtomicUsize::new(0);
    each(groups, |group| {
        for round in 1..=5 {
            if group.rank() == round % n {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            came.fetch_add(1, Ordering::SeqCst);
            group.barrier("round").unwrap();
            assert!(came.load(Ordering::SeqCst) >= round * n, "a barrier let a rank through");
            group.barrier("round is over").unwrap();
        }
    });
}

/// The failure of every rank, which must be the same.
fn common(errors: Vec<Error>) -> Failure {
    let mut failures = errors.into_iter().map(|error| match error {
        Error::Failed { failure, .. } => *failure,
        other => panic!("{other}"),
    });
    let first = failures.next().expect("there is a rank 0");
    failures.for_each(|failure| assert_eq!(failure, first));
    first
}

fn different_operations(n: usize, groups: Vec<ProcessGroup>) {
    let errors = each(groups, |group| {
        let result = match group.rank() {
            rank if rank == n - 1 => group.barrier("save"),
            _ => group.all_reduce_sum("grads", &mut [1.0; 10]),
        };
        let error = result.unwrap_err();
        // The group is of no more use, and says why again.
        assert_eq!(group.barrier("later").unwrap_err().to_string(), error.to_string());
        error
    });
    let Failure::Mismatch { calls } = common(errors) else { panic!("not seen as a mismatch") };
    for (peer, operation) in &calls {
        let same = match operation {
            Operation::Barrier { name } => peer.rank == n - 1 && name == "save",
            Operation::AllReduceSum { name, elements: 10 } => peer.rank < n - 1 && name == "grads",
            _ => false,
        };
        assert!(same, "rank {peer}: {operation}");
    }
    assert!(calls.len() >= 2, "{calls:?}");
}

fn different_lengths(n: usize, groups: Vec<ProcessGroup>) {
    let errors = each(groups, |group| {
        let elements = if group.rank() == n - 1 { 50_001 } else { 50_000 };
        group.all_reduce_sum("grads", &mut vec![1.0; elements]).unwrap_err()
    });
    let text = common(errors).to_string();
    assert!(text.contains("all-reduce \"grads\" of 50000 numbers") && text.contains("of 50001 numbers"), "{text}");
}

fn different_names_in_async(n: usize, groups: Vec<ProcessGroup>) {
    let errors = each(groups, |group| {
        let names = if group.rank() == n - 1 { ["b", "a"] } else { ["a", "b"] };
        let handles = names.map(|name| group.all_reduce_async(name, vec![0.0; 3]));
        let [first, second] = handles.map(|handle| handle.wait().unwrap_err());
        assert_eq!(first.to_string(), second.to_string());
        first
    });
    assert!(matches!(common(errors), Failure::Mismatch { .. }));
}
