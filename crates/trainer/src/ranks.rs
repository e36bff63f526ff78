//! The processes of a run, as one of them sees them: how they meet, and what they make sure of together. A run of one process
//! goes through the same calls; there they do nothing.
//!
//! Rank 0 alone writes: checkpoints, exports, metrics, previews. What it found on its disk it hands to the others, so that
//! machines need not share one.
//!
//! # Determinism
//! Everything that decides how a run goes on (loss, gradients, a request to stop) is the same number on all ranks before it is
//! looked at, so no rank decides alone.

use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;
use dist::{ProcessGroup, World};
use ops::F32;
use optim::{Optimizer, StateDtype, StateTensor};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::fault::Fault;
use crate::step::Trained;
use crate::sum::Sum;

/// How long ranks wait for work that only one of them does, or that takes as long as the data is large: previews, saves,
/// latents. A rank that dies meanwhile is still noticed within seconds.
const LONG: Duration = Duration::from_secs(7 * 24 * 3600);
/// Keys that say where things lie or how a process works; they may differ from machine to machine. What lies there is
/// compared by its hash.
const PLACES: &[&str] = &[
    "model.base",
    "model.vae",
    "model.disable_mmap_load_safetensors",
    "network.preset",
    "network.weights",
    "output.dir",
    "output.resume",
    "train.threads",
    "validation.image_dir",
    "image_dir",
    "index",
];

/// All processes of a run.
pub struct Ranks {
    /// This process among them.
    pub world: World,
    /// What they exchange goes through this.
    pub group: ProcessGroup,
    pub(crate) fault: Fault,
}

impl Ranks {
    /// A run of one process.
    pub fn alone() -> Self {
        Self { world: World::single(), group: ProcessGroup::Single, fault: Fault::default() }
    }

    /// Meets the other processes of `world`; those with GPUs also over NCCL, if it is built in. Recipe, data and base model must be the
    /// same everywhere.
    ///
    /// # Errors
    /// If ranks do not come, or were started for something else: the error names what differs. If two have the same GPU.
    pub fn meet(world: World, config: &RunConfig, dataset: String, base: String, device: &Device) -> Result<Self> {
        let fault = Fault::from_env(world.rank)?;
        fault.at("rendezvous", 0);
        let mut fingerprint = vec![("lokr".to_string(), env!("CARGO_PKG_VERSION").to_string())];
        fingerprint.extend(keys(&config.to_toml()));
        fingerprint.push(("the pictures and captions (fingerprint)".into(), dataset));
        fingerprint.push(("the base model (SHA-256)".into(), base));
        fingerprint.push(("where gradients are summed".into(), place_of_sums(device).into()));
        let on_wait = |wait: &dist::Wait| tracing::warn!("{wait}");
        let mut options = dist::Options { fingerprint, on_wait: Some(Arc::new(on_wait)), ..Default::default() };
        if let Some(minutes) = config.train.ddp_timeout {
            options.deadline = Duration::from_secs_f64(minutes * 60.0);
            options.rendezvous = options.deadline;
        }
        let group = match device {
            #[cfg(feature = "nccl")]
            Device::Cuda(gpu) if world.world_size > 1 => ProcessGroup::Nccl(dist::NcclGroup::join(&world, &options, gpu.cuda_stream())?),
            _ => ProcessGroup::join(&world, &options)?,
        };
        Ok(Self { world, group, fault })
    }

    /// What carries the gradients, for messages.
    pub fn carrier(&self) -> &'static str {
        match &self.group {
            ProcessGroup::Single => "nothing",
            ProcessGroup::Tcp(_) => "TCP",
            #[cfg(feature = "nccl")]
            ProcessGroup::Nccl(_) => "NCCL",
        }
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    /// Number of processes.
    pub fn count(&self) -> usize {
        self.group.world_size()
    }

    /// Whether this is rank 0, which alone writes files.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Waits for all, however long it takes them.
    ///
    /// # Errors
    /// If a rank is lost or leaves.
    pub fn wait(&self, name: &str) -> Result<()> {
        Ok(self.group.barrier_within(name, LONG)?)
    }

    /// Every rank's value, in the order of the ranks.
    ///
    /// # Errors
    /// If a rank is lost, leaves or does not come.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, name: &str, value: &T) -> Result<Vec<T>> {
        let all = self.group.all_gather(name, &serde_json::to_vec(value).unwrap_or_default())?;
        let read = |bytes: &Vec<u8>| serde_json::from_slice(bytes).map_err(|e| broken(name, &e.to_string()));
        all.iter().map(read).collect()
    }

    /// For each place, whether any rank has something other than 0 there.
    ///
    /// # Errors
    /// If a rank is lost, leaves or does not come.
    pub fn which_have(&self, name: &str, own: &[u8]) -> Result<Vec<bool>> {
        let all = self.group.all_gather(name, own)?;
        Ok((0..own.len()).map(|place| all.iter().any(|of_rank| of_rank.get(place).is_some_and(|&flag| flag != 0))).collect())
    }

    /// Where sums are taken on a GPU, waits for it, so that the time of the sums can be told from that of the rest.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn wait_for_device(&self, trained: &[Trained]) -> Result<()> {
        #[cfg(feature = "nccl")]
        if let (ProcessGroup::Nccl(_), Some(t)) = (&self.group, trained.first()) {
            t.parameter.tensor().device().synchronize()?;
        }
        let _ = trained;
        Ok(())
    }

    /// Rank 0's bytes on all ranks; the others give none.
    fn bytes_of_first(&self, name: &str, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let bytes = if self.is_first() { bytes } else { Vec::new() };
        Ok(self.group.all_gather(name, &bytes)?.into_iter().next().unwrap_or_default())
    }

    /// Rank 0's value on all ranks; what the others give is not looked at.
    ///
    /// # Errors
    /// As [`Ranks::gather`].
    pub fn value_of_first<T: Serialize + DeserializeOwned>(&self, name: &str, value: T) -> Result<T> {
        if self.count() == 1 {
            return Ok(value);
        }
        let bytes = self.bytes_of_first(name, serde_json::to_vec(&value).unwrap_or_default())?;
        serde_json::from_slice(&bytes).map_err(|e| broken(name, &e.to_string()))
    }

    /// Gives all ranks the adapter and the optimizer's state of rank 0.
    ///
    /// # Errors
    /// If a rank is lost, or its adapter is another one.
    pub fn copy_state_of_first(&self, trained: &[Trained], optimizer: &mut Optimizer) -> Result<()> {
        if self.count() == 1 {
            return Ok(());
        }
        let adapter = self.bytes_of_first("the adapter of the checkpoint", adapter_bytes(trained)?)?;
        let (described, bytes) = optimizer_state(optimizer)?;
        let described: Vec<Described> = self.value_of_first("the optimizer's tensors", described)?;
        let state = self.bytes_of_first("the optimizer's state", bytes)?;
        if self.is_first() {
            return Ok(());
        }
        let mut rest = adapter.as_slice();
        for t in trained {
            let old = t.parameter.tensor();
            let Some((own, after)) = rest.split_at_checked(old.elem_count() * 4) else { return Err(broken("adapter", "it is too short")) };
            rest = after;
            t.parameter.set(candle_core::Tensor::from_raw_buffer(own, old.dtype(), old.dims(), old.device())?)?;
        }
        let (mut rest, mut tensors) = (state.as_slice(), Vec::new());
        for d in described {
            let Some((own, after)) = rest.split_at_checked(d.bytes) else { return Err(broken("optimizer", "its state is too short")) };
            rest = after;
            let dtype = if d.eight_bit { StateDtype::U8 } else { StateDtype::F32 };
            tensors.push(StateTensor { name: d.name, dtype, shape: d.shape, bytes: own.into() });
        }
        Ok(optimizer.load_state(tensors)?)
    }

    /// Makes sure that all ranks hold the same adapter and the same optimizer state, bit for bit, by their hashes.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] on all ranks, naming the ranks and the first tensor that differs.
    pub fn check_equal(&self, trained: &[Trained], optimizer: &Optimizer, step: u64) -> Result<()> {
        if self.count() == 1 {
            return Ok(());
        }
        let mut own = vec![("the optimizer's state".to_string(), blake3::hash(&optimizer_state(optimizer)?.1).to_hex().to_string())];
        for t in trained {
            let bytes: Vec<u8> = F32::new(&t.parameter.tensor().to_device(&Device::Cpu)?)?.iter().flat_map(|v| v.to_le_bytes()).collect();
            own.push((t.parameter.name().to_string(), blake3::hash(&bytes).to_hex().to_string()));
        }
        let whole = blake3::hash(&serde_json::to_vec(&own).unwrap_or_default()).to_hex().to_string();
        let all = self.gather("hash of the weights", &whole)?;
        let differing: Vec<usize> = (0..all.len()).filter(|&rank| all[rank] != all[0]).collect();
        if differing.is_empty() {
            return Ok(());
        }
        let hashes = self.gather("hashes of the tensors", &own)?;
        let of = |rank: usize| hashes[0].iter().zip(&hashes[rank]).find(|(a, b)| a != b).map_or("?", |((name, _), _)| name);
        let differing = differing.into_iter().map(|rank| (rank, of(rank).to_string())).collect();
        Err(Error::RanksDiffer { step, differing })
    }

    /// Changes a number of the adapter where a test asks for it.
    pub(crate) fn spoil_weights(&self, trained: &[Trained], step: u64) -> Result<()> {
        if let Some(t) = trained.first().filter(|_| self.fault.changes_weights(step)) {
            t.parameter.set((t.parameter.tensor() + 1e-3)?)?;
        }
        Ok(())
    }

    /// Milliseconds that the sum of buckets of `elements` numbers of `device` takes, the middle one of five sums after a first one that
    /// opens the connections.
    ///
    /// # Errors
    /// As [`Ranks::gather`].
    pub fn measure_sum(&self, elements: &[usize], device: &Device) -> Result<f64> {
        let mut times = Vec::new();
        for round in 0..6 {
            self.group.barrier("before a measured sum")?;
            let started = std::time::Instant::now();
            let begin = |&n: &usize| Sum::begin(&self.group, "a measured sum", &[(n, None)], device);
            let sums = elements.iter().map(begin).collect::<candle_core::Result<Vec<_>>>()?;
            sums.into_iter().try_for_each(|sum| sum.wait().map(drop))?;
            device.synchronize()?;
            if round > 0 {
                times.push(started.elapsed().as_secs_f64() * 1e3);
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}

/// A tensor of the optimizer's state, without its bytes.
#[derive(Serialize, Deserialize)]
struct Described {
    name: String,
    eight_bit: bool,
    shape: Vec<usize>,
    bytes: usize,
}

fn optimizer_state(optimizer: &Optimizer) -> Result<(Vec<Described>, Vec<u8>)> {
    let (mut described, mut all) = (Vec::new(), Vec::new());
    for s in optimizer.state()? {
        all.extend_from_slice(&s.bytes);
        described.push(Described { eight_bit: s.dtype == StateDtype::U8, bytes: s.bytes.len(), name: s.name, shape: s.shape });
    }
    Ok((described, all))
}

fn adapter_bytes(trained: &[Trained]) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for t in trained {
        all.extend(F32::new(&t.parameter.tensor().to_device(&Device::Cpu)?)?.iter().flat_map(|v| v.to_le_bytes()));
    }
    Ok(all)
}

/// Where the gradients of a rank with this device are summed; it must be the same on all.
fn place_of_sums(device: &Device) -> &'static str {
    match (device.is_cuda(), cfg!(feature = "nccl")) {
        (true, true) => "GPUs, over NCCL",
        (true, false) => "GPUs, over TCP (a program without NCCL)",
        (false, _) => "CPUs, over TCP",
    }
}

/// A message of another rank that cannot be understood. Ranks of one build, which the meeting makes sure of, send none.
fn broken(name: &str, why: &str) -> Error {
    candle_core::Error::Msg(format!("another rank's message \"{name}\" cannot be read: {why}")).into()
}

/// Every key of a recipe that must be the same on all ranks, with its value.
fn keys(recipe: &str) -> Vec<(String, String)> {
    fn visit(key: &str, value: &toml::Value, found: &mut Vec<(String, String)>) {
        let last = key.rsplit('.').next().unwrap_or(key);
        if PLACES.contains(&key) || (key.starts_with("dataset.") && PLACES.contains(&last)) {
            return;
        }
        match value {
            toml::Value::Table(table) => {
                for (name, value) in table {
                    visit(&if key.is_empty() { name.clone() } else { format!("{key}.{name}") }, value, found);
                }
            }
            toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
                items.iter().enumerate().for_each(|(i, item)| visit(&format!("{key}[{i}]"), item, found));
            }
            value => found.push((key.to_string(), value.to_string())),
        }
    }
    let mut found = Vec::new();
    // What was rendered from a recipe can be read.
    if let Ok(table) = recipe.parse::<toml::Table>() {
        visit("", &toml::Value::Table(table), &mut found);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_differ_between_machines_is_left_out_and_the_rest_is_not() {
        let text = "[model]\nbase = \"/a\"\nhead_dim = 8\n[train]\nthreads = 3\nunet_lr = 1e-4\n[dataset]\nresolution = 64\n\
                    [[dataset.subsets]]\nimage_dir = \"/b\"\nkeep_tokens = 1\n[output]\ndir = \"c\"\nname = \"n\"\n";
        let want = [
            ("dataset.resolution", "64"),
            ("dataset.subsets[0].keep_tokens", "1"),
            ("model.head_dim", "8"),
            ("output.name", "\"n\""),
            ("train.unet_lr", "0.0001"),
        ];
        assert_eq!(keys(text), want.map(|(k, v)| (k.to_string(), v.to_string())));
    }
}
