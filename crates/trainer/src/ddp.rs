//! The gradient of a step, summed over the ranks in buckets: once per step, a bucket as soon as the last backward pass has
//! completed it, while the rest of that pass goes on.
//!
//! Buckets hold the parameters from the last to the first, which is about the order in which a backward pass completes them;
//! all ranks send all buckets in the same order. How often a pass adds to a parameter's gradient is learned from the passes
//! before, so the first pass of a run overlaps nothing. At the end the ranks tell each other which gradients they have: a parameter
//! that got none on any rank keeps none, and gets no update and no decay.
//!
//! # Determinism
//! Over TCP, sums are taken in rank order, whatever the cut into buckets (`dist`); over NCCL, as NCCL chooses. All ranks hold the same
//! bits afterwards. Another number of ranks adds the same numbers in another order and may round differently.

use std::collections::HashMap;
use std::time::Instant;

use candle_core::Device;
use ops::Parameter;

use crate::error::Result;
use crate::ranks::Ranks;
use crate::step::Trained;
use crate::sum::{Part, Sum};

/// The buckets of a run, and how far those of the running step are.
pub struct Buckets {
    /// Numbers of parameters, in the order in which they are sent.
    buckets: Vec<Vec<usize>>,
    sizes: Vec<usize>,
    by_name: HashMap<String, usize>,
    /// The bucket of each parameter.
    bucket_of: Vec<usize>,
    /// Whether a pass has shown how often each parameter is used.
    learned: bool,
    /// Most gradients that one backward pass added to each parameter so far.
    uses: Vec<u32>,
    /// Gradients that the running pass has added.
    seen: Vec<u32>,
    /// Sums under way, of the first buckets.
    sent: Vec<Sum>,
    /// For each parameter whose gradient was sent, 1 if this rank had one.
    present: Vec<u8>,
}

impl Buckets {
    /// Divides the parameters into buckets of at most `cap_mb` MiB, or of one parameter that is larger.
    pub fn new(trained: &[Trained], cap_mb: f64) -> Self {
        let sizes: Vec<usize> = trained.iter().map(|t| t.parameter.tensor().elem_count()).collect();
        let cap = (cap_mb * 1024.0 * 1024.0 / 4.0) as usize;
        let (mut buckets, mut filled): (Vec<Vec<usize>>, _) = (Vec::new(), usize::MAX);
        for index in (0..sizes.len()).rev() {
            let size = sizes[index];
            if filled.saturating_add(size) > cap {
                buckets.push(Vec::new());
                filled = 0;
            }
            filled += size;
            if let Some(bucket) = buckets.last_mut() {
                bucket.push(index);
            }
        }
        let mut bucket_of = vec![0; sizes.len()];
        buckets.iter().enumerate().for_each(|(number, bucket)| bucket.iter().for_each(|&index| bucket_of[index] = number));
        let by_name = trained.iter().enumerate().map(|(i, t)| (t.parameter.name().to_string(), i)).collect();
        let none = vec![0; sizes.len()];
        let present = vec![0; sizes.len()];
        Self { buckets, by_name, bucket_of, learned: false, uses: none.clone(), seen: none, sizes, sent: Vec::new(), present }
    }

    /// Numbers in each bucket.
    pub fn lengths(&self) -> Vec<usize> {
        self.buckets.iter().map(|b| b.iter().map(|&i| self.sizes[i]).sum()).collect()
    }

    /// Before each backward pass.
    pub fn begin_pass(&mut self) {
        self.learned |= self.seen.iter().any(|&n| n > 0);
        for (uses, seen) in self.uses.iter_mut().zip(&mut self.seen) {
            *uses = (*uses).max(*seen);
            *seen = 0;
        }
    }

    /// A gradient was added to `parameter`. In the `last` pass of a step, sends what has become complete.
    ///
    /// # Errors
    /// If a parameter's gradient grows that was sent already: it is used more often than in any pass before.
    pub fn gradient_added(&mut self, ranks: &Ranks, trained: &[Trained], parameter: &Parameter, last: bool) -> candle_core::Result<()> {
        let Some(&index) = self.by_name.get(parameter.name()) else { return Ok(()) };
        self.seen[index] += 1;
        if !last || !self.learned || ranks.count() == 1 {
            return Ok(());
        }
        if self.bucket_of[index] < self.sent.len() {
            candle_core::bail!("{}: its gradient grew after it was sent to the other ranks; this is a bug", parameter.name());
        }
        while self.buckets.get(self.sent.len()).is_some_and(|b| b.iter().all(|&i| self.seen[i] >= self.uses[i])) {
            self.send_next(ranks, trained)?;
        }
        Ok(())
    }

    /// Begins the sum of the next bucket. Its gradients are taken away: the sum comes in their place.
    fn send_next(&mut self, ranks: &Ranks, trained: &[Trained]) -> candle_core::Result<()> {
        let number = self.sent.len();
        let take = |&index: &usize| -> Part {
            let gradient = trained[index].parameter.take_grad();
            self.present[index] = gradient.is_some().into();
            (self.sizes[index], gradient)
        };
        let parts: Vec<Part> = self.buckets[number].iter().map(take).collect();
        let device = trained.first().map_or(Device::Cpu, |t| t.parameter.tensor().device().clone());
        self.sent.push(Sum::begin(&ranks.group, &format!("gradient bucket {number}"), &parts, &device)?);
        Ok(())
    }

    /// After the last backward pass: sends the other buckets, and puts the sums in the place of the gradients. Gives the
    /// seconds that it waited.
    ///
    /// # Errors
    /// If a rank is lost, leaves or does not come.
    pub fn finish(&mut self, ranks: &Ranks, trained: &[Trained], step: u64) -> Result<f64> {
        let started = Instant::now();
        if ranks.count() == 1 {
            return Ok(0.0);
        }
        while self.sent.len() < self.buckets.len() {
            self.send_next(ranks, trained)?;
        }
        ranks.fault.at("all-reduce", step);
        let present = ranks.which_have("gradients of the step", &self.present)?;
        for (bucket, sum) in self.buckets.iter().zip(std::mem::take(&mut self.sent)) {
            let sums = sum.wait()?;
            let mut at = 0;
            for &index in bucket {
                if present[index] {
                    let parameter = &trained[index].parameter;
                    // A tensor of its own, so that the bucket is freed.
                    let sum = sums.narrow(0, at, self.sizes[index])?.force_contiguous()?;
                    parameter.accumulate(&sum.reshape(parameter.tensor().shape())?)?;
                }
                at += self.sizes[index];
            }
        }
        ranks.wait_for_device(trained)?;
        Ok(started.elapsed().as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Tensor};
    use dist::{Launcher, Options, ProcessGroup, World, launch::free_port};
    use lokr::ParameterGroup;
    use ops::Value;

    use super::*;
    use crate::fault::Fault;

    fn parameters() -> Vec<Trained> {
        let make = |(i, n): (usize, &usize)| {
            let value = Tensor::zeros(*n, DType::F32, &Device::Cpu).unwrap();
            Trained { group: ParameterGroup::Unet, parameter: Parameter::new(format!("p{i}"), value) }
        };
        [4, 3, 2, 5].iter().enumerate().map(make).collect()
    }

    /// A pass in which the parameters of `used` are used once each, the first of them first.
    fn pass(buckets: &mut Buckets, ranks: &Ranks, trained: &[Trained], used: &[usize], gradient: f64, last: bool) -> Vec<usize> {
        buckets.begin_pass();
        let mut sent = Vec::new();
        let roots = used.iter().map(|&i| {
            let value: Value = trained[i].parameter.value();
            let dy = (Tensor::ones(value.dims(), DType::F32, &Device::Cpu).unwrap() * gradient).unwrap();
            (value, dy)
        });
        ops::backward_with(roots.collect(), &mut |p| {
            buckets.gradient_added(ranks, trained, p, last)?;
            sent.push(buckets.sent.len());
            Ok(())
        })
        .unwrap();
        sent
    }

    #[test]
    fn gradients_are_summed_where_any_rank_has_one_and_buckets_leave_as_soon_as_they_are_complete() {
        let port = free_port().unwrap();
        let rank = |rank: usize| {
            let world = World::on_this_machine(rank, 2, port, Launcher::None);
            let group = ProcessGroup::join(&world, &Options::default()).unwrap();
            let ranks = Ranks { world, group, fault: Fault::default() };
            let trained = parameters();
            // 7 numbers: p3 and p2, then p1 and p0.
            let mut buckets = Buckets::new(&trained, 7.5 * 4.0 / 1024.0 / 1024.0);
            assert_eq!(buckets.lengths(), [7, 7]);
            let values = |i: usize| trained[i].parameter.grad().map(|g| g.to_vec1::<f32>().unwrap());
            // The first pass teaches. p2 is used by nobody, p1 by rank 1 alone.
            let used: &[usize] = if rank == 0 { &[0, 3] } else { &[0, 1, 3] };
            let sent = pass(&mut buckets, &ranks, &trained, used, 1.0 + rank as f64, true);
            assert!(sent.iter().all(|&n| n == 0), "nothing is known yet: {sent:?}");
            buckets.finish(&ranks, &trained, 0).unwrap();
            let want = [Some(vec![3.0; 4]), Some(vec![2.0; 3]), None, Some(vec![3.0; 5])];
            assert_eq!([0, 1, 2, 3].map(values), want);
            trained.iter().for_each(|t| t.parameter.zero_grad());
            // The second step has two passes; the first sends nothing, the last sends p3's bucket before p0's gradient is there.
            let sent = pass(&mut buckets, &ranks, &trained, used, 1.0, false);
            assert!(sent.iter().all(|&n| n == 0), "{sent:?}");
            let sent = pass(&mut buckets, &ranks, &trained, used, 1.0, true);
            assert_eq!(sent.first(), Some(&1), "{sent:?}");
            assert_eq!(sent.last(), Some(&2), "{sent:?}");
            buckets.finish(&ranks, &trained, 1).unwrap();
            assert_eq!([0, 1, 2, 3].map(values), [Some(vec![4.0; 4]), Some(vec![2.0; 3]), None, Some(vec![4.0; 5])]);
            // A rank without a batch brings nothing.
            trained.iter().for_each(|t| t.parameter.zero_grad());
            if rank == 1 {
                pass(&mut buckets, &ranks, &trained, &[0, 1, 3], 0.5, true);
            }
            buckets.finish(&ranks, &trained, 2).unwrap();
            assert_eq!([0, 1, 2, 3].map(values), [Some(vec![0.5; 4]), Some(vec![0.5; 3]), None, Some(vec![0.5; 5])]);
        };
        std::thread::scope(|scope| {
            scope.spawn(|| rank(1));
            rank(0);
        });
    }
}
