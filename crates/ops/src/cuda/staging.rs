//! Page-locked memory of the host, through which batches go to the GPU. From any other memory the driver first copies into such memory of
//! its own, and may wait for the stream to come to the copy; from this one it reads when the stream is there, and nobody waits.
//!
//! A buffer is in one of two places: in the list, or owned by the call that fills it. Whoever takes one out of the list has seen that its
//! last copy is over, so that nothing reads what is about to be overwritten. cudarc's own event of such a buffer guards nothing here: it is
//! recorded only where cudarc tracks events, which [`super::gpu`] switches off.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaDevice, CudaStorage, Error, Result, Storage, Tensor};
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, PinnedHostSlice};

/// Bytes that are locked at most: memory that the system cannot use for anything else. A batch of latents takes some MB, and as many are
/// under way as the accumulation window has batches.
const MOST: usize = 256 << 20;
/// Numbers of the smallest buffer: a page.
const LEAST: usize = 1024;

/// Buffers that are kept from step to step.
#[derive(Default)]
pub(crate) struct Buffers(Mutex<State>);

#[derive(Default)]
struct State {
    kept: Vec<Buffer>,
    bytes: usize,
    /// Why the driver locks no memory; it is not asked again.
    refused: Option<Error>,
    told: bool,
}

struct Buffer {
    memory: PinnedHostSlice<f32>,
    /// Behind the last copy out of `memory`.
    copied: CudaEvent,
    stream: Arc<CudaStream>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // The memory is given back next. If the driver fails here, it makes no more copies.
        let _ = self.copied.synchronize();
    }
}

impl Buffer {
    fn new(numbers: usize, stream: &Arc<CudaStream>) -> std::result::Result<Self, cudarc::driver::DriverError> {
        let copied = stream.context().new_event(None)?;
        // SAFETY: nothing is read that `copy` did not write before.
        let memory = unsafe { stream.context().alloc_pinned(numbers) }?;
        Ok(Self { memory, copied, stream: stream.clone() })
    }

    /// Submits the copy of `numbers` into memory of the GPU. No copy out of this buffer may be under way.
    fn copy(&mut self, numbers: &[f32]) -> std::result::Result<CudaSlice<f32>, cudarc::driver::DriverError> {
        let own = &mut self.memory.as_mut_slice()?[..numbers.len()];
        own.copy_from_slice(numbers);
        let there = self.stream.clone_htod(&*own)?;
        self.copied.record(&self.stream)?;
        Ok(there)
    }
}

impl Buffers {
    /// A copy of `t` on the GPU, submitted; `None` if it is not f32 on the CPU, or no buffer is to be had.
    pub(crate) fn send(&self, t: &Tensor, gpu: &CudaDevice) -> Result<Option<Tensor>> {
        let t = t.contiguous()?;
        let (storage, layout) = t.storage_and_layout();
        let (Storage::Cpu(CpuStorage::F32(all)), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else { return Ok(None) };
        let Some(mut buffer) = self.take(end - start, &gpu.cuda_stream())? else { return Ok(None) };
        let there = buffer.copy(&all[start..end]).map_err(|error| {
            // A copy may be under way that the event does not stand behind.
            let _ = buffer.stream.synchronize();
            Error::wrap(error)
        })?;
        self.state().kept.push(buffer);
        let there = Storage::Cuda(CudaStorage::wrap_cuda_slice(there, gpu.clone()));
        Ok(Some(Tensor::from_storage(there, t.shape(), BackpropOp::none(), false)))
    }

    /// Why the driver locks no memory, the first time that this is asked after it refused.
    pub(crate) fn refusal(&self) -> Option<String> {
        let mut state = self.state();
        let refused = state.refused.as_ref().filter(|_| !state.told).map(ToString::to_string);
        state.told |= refused.is_some();
        refused
    }

    /// A buffer for so many numbers out of which no copy is under way: a kept one, or a new one.
    fn take(&self, numbers: usize, stream: &Arc<CudaStream>) -> Result<Option<Buffer>> {
        // Pictures of different buckets have sizes near each other.
        let size = numbers.next_power_of_two().max(LEAST);
        let mut state = self.state();
        stream.context().bind_to_thread().map_err(Error::wrap)?;
        for i in 0..state.kept.len() {
            let buffer = &state.kept[i];
            if buffer.memory.len() == size && buffer.copied.try_is_complete().map_err(Error::wrap)? {
                return Ok(Some(state.kept.swap_remove(i)));
            }
        }
        let bytes = size * size_of::<f32>();
        if numbers == 0 || state.refused.is_some() || state.bytes + bytes > MOST {
            return Ok(None);
        }
        match Buffer::new(size, stream) {
            Ok(buffer) => {
                state.bytes += bytes;
                Ok(Some(buffer))
            }
            Err(error) => {
                state.refused = Some(Error::wrap(error));
                Ok(None)
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
