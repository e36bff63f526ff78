//! NCCL between GPUs: the contract, and what is special to device memory. With one GPU per rank this runs on NCCL itself; on a
//! machine without GPUs it runs on the stand-ins of tools/dry-gpu (scripts/check-cuda.sh).
#![cfg(feature = "nccl")]

mod contract;

use std::sync::Arc;
use std::time::Duration;

use contract::contract;
use cudarc::driver::{CudaContext, CudaStream};
use dist::launch::free_port;
use dist::{Error, Launcher, NcclGroup, Options, ProcessGroup, World};
use half::f16;

/// Ranks that there are GPUs for.
fn gpus() -> usize {
    CudaContext::device_count().map_or(0, |n| n.max(0) as usize)
}

fn stream(rank: usize) -> Arc<CudaStream> {
    CudaContext::new(rank).expect("a GPU for each rank").new_stream().expect("a stream")
}

fn nccl_group(n: usize) -> Vec<NcclGroup> {
    let port = free_port().unwrap();
    let options = Options { rendezvous: Duration::from_secs(60), deadline: Duration::from_secs(60), ..Options::default() };
    let join = |rank| {
        let (world, options) = (World::on_this_machine(rank, n, port, Launcher::None), options.clone());
        std::thread::spawn(move || NcclGroup::join(&world, &options, stream(rank)).unwrap())
    };
    let threads: Vec<_> = (0..n).map(join).collect();
    threads.into_iter().map(|thread| thread.join().expect("a rank's thread panicked")).collect()
}

fn group(n: usize) -> Vec<ProcessGroup> {
    nccl_group(n).into_iter().map(ProcessGroup::Nccl).collect()
}

/// Two ranks need two GPUs; where there are fewer, says so.
fn enough(n: usize) -> bool {
    let found = gpus();
    if found < n {
        eprintln!("skipped: {n} ranks need {n} GPUs, there are {found}");
    }
    found >= n
}

#[test]
fn contract_of_two() {
    if enough(2) {
        contract(2, &group);
    }
}

#[test]
fn contract_of_four() {
    // NCCL may add four numbers in another order than that of the ranks; the contract's own sums are exact in two ranks only. The
    // stand-in adds in rank order.
    if enough(4) && std::env::var_os("LOKR_DRY_GPU").is_some() {
        contract(4, &group);
    }
}

fn scoped<T: Send>(groups: Vec<NcclGroup>, work: impl Fn(&NcclGroup) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || work(&group))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank's thread panicked")).collect()
    })
}

#[test]
fn sums_and_broadcasts_in_place_in_both_number_formats() {
    if !enough(2) {
        return;
    }
    scoped(nccl_group(2), |group| {
        let (rank, stream) = (group.tcp().rank(), group.stream().clone());
        // Longer than one piece of any ring, and of no round length.
        let n = 3_000_001;
        let mut wide = stream.clone_htod(&(0..n).map(|i| (i % 1000 * (rank + 1)) as f32).collect::<Vec<_>>()).unwrap();
        group.all_reduce_sum("wide", &mut wide).unwrap();
        let got = stream.clone_dtoh(&wide).unwrap();
        assert!((0..n).all(|i| got[i] == (i % 1000 * 3) as f32));

        let mut narrow = stream.clone_htod(&vec![f16::from_f32(0.5 + rank as f32); 1001]).unwrap();
        // A part of a buffer, as one tensor of many in it.
        group.all_reduce_sum("narrow", &mut narrow.slice_mut(1..1000)).unwrap();
        let got = stream.clone_dtoh(&narrow).unwrap();
        assert!(got[1..1000].iter().all(|v| v.to_f32() == 2.0));
        assert_eq!((got[0].to_f32(), got[1000].to_f32()), (0.5 + rank as f32, 0.5 + rank as f32), "neighbours are untouched");

        let mut weights = stream.clone_htod(&vec![rank as f32; 777]).unwrap();
        group.broadcast("weights", &mut weights, 1).unwrap();
        assert_eq!(stream.clone_dtoh(&weights).unwrap(), vec![1.0; 777]);
    });
}

#[test]
fn ranks_that_disagree_are_told_so_before_nccl_is_asked() {
    if !enough(2) {
        return;
    }
    let errors = scoped(nccl_group(2), |group| {
        let rank = group.tcp().rank();
        let mut buffer = group.stream().clone_htod(&vec![1f32; 100 + rank]).unwrap();
        group.all_reduce_sum("gradient", &mut buffer).unwrap_err().to_string()
    });
    assert!(errors[0] == errors[1] && errors[0].contains("of 100 numbers") && errors[0].contains("of 101 numbers"), "{errors:?}");
}

#[test]
fn a_rank_that_left_is_named() {
    if !enough(2) {
        return;
    }
    let errors = scoped(nccl_group(2), |group| {
        (group.tcp().rank() == 0).then(|| {
            let mut buffer = group.stream().clone_htod(&[1f32; 10]).unwrap();
            group.all_reduce_sum("gradient", &mut buffer).unwrap_err()
        })
    });
    let error = errors[0].as_ref().expect("rank 0 waited");
    assert!(matches!(error, Error::Failed { .. }) && error.to_string().contains("rank 1"), "{error}");
}

#[test]
fn a_rank_alone_sums_with_itself_in_place_and_behind_the_backward_pass() {
    if !enough(1) {
        return;
    }
    scoped(nccl_group(1), |group| {
        let stream = group.stream().clone();
        let values: Vec<f32> = (0..100_003).map(|i| i as f32).collect();
        let mut buffer = stream.clone_htod(&values).unwrap();
        group.all_reduce_sum("alone", &mut buffer).unwrap();
        group.broadcast("alone", &mut buffer, 0).unwrap();
        let handles: Vec<_> = (0..4).map(|i| group.all_reduce_async(&format!("bucket {i}"), stream.clone_htod(&values).unwrap())).collect();
        assert_eq!(stream.clone_dtoh(&buffer).unwrap(), values);
        for handle in handles {
            assert_eq!(stream.clone_dtoh(&handle.wait().unwrap()).unwrap(), values);
        }
    });
}
