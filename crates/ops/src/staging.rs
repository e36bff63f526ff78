//! How batches come to the device that computes.

use candle_core::{Device, Result, Tensor};

/// Takes tensors of the CPU to a device. To a GPU they go through page-locked memory that is kept for the next ones, so that the copy is
/// submitted and the host goes on.
#[derive(Default)]
pub struct Staging {
    #[cfg(feature = "cuda")]
    buffers: crate::cuda::staging::Buffers,
}

impl Staging {
    /// `t` on `device`. What page-locked memory does not serve (other types than f32, more than a bound, a driver that locks none) goes
    /// by the ordinary copy.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_device(&self, t: &Tensor, device: &Device) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(gpu) = device
            && t.device().is_cpu()
            && let Some(there) = self.buffers.send(t, gpu)?
        {
            return Ok(there);
        }
        t.to_device(device)
    }

    /// Why no memory can be locked, once.
    pub fn refusal(&self) -> Option<String> {
        #[cfg(feature = "cuda")]
        return self.buffers.refusal();
        #[cfg(not(feature = "cuda"))]
        None
    }
}
