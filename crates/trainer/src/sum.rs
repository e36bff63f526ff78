//! The sum of a bucket of gradients over the ranks, taken where the gradients are: on the host over TCP, or in place on the GPUs over
//! NCCL, on a stream of its own while the backward pass goes on.

use candle_core::{Device, Tensor};
use dist::{Handle, ProcessGroup};
use ops::F32;

use crate::error::Result;

/// A part of a bucket: how many numbers, and the gradient that they are, of any shape; zeros where this rank has none.
pub type Part = (usize, Option<Tensor>);

/// A sum on its way.
pub enum Sum {
    /// Through the host; the sums belong to this device.
    Host(Handle, Device),
    /// In place on the GPU.
    #[cfg(feature = "nccl")]
    Device(dist::DeviceHandle<f32>, candle_core::CudaDevice),
}

impl Sum {
    /// Begins the sum of a bucket and returns; on a GPU nothing waits for it.
    ///
    /// # Errors
    /// If a gradient is not f32, or the device fails.
    pub fn begin(group: &ProcessGroup, name: &str, parts: &[Part], device: &Device) -> candle_core::Result<Self> {
        #[cfg(feature = "nccl")]
        if let (ProcessGroup::Nccl(group), Device::Cuda(device)) = (group, device) {
            return Ok(Self::Device(group.all_reduce_async(name, crate::on_gpu::pack(device, parts)?), device.clone()));
        }
        Ok(Self::Host(group.all_reduce_async(name, pack(parts)?), device.clone()))
    }

    /// The sums in the order of the parts, `(numbers)`, on their device. On a GPU its stream waits for them, the host only until they are
    /// on their way.
    ///
    /// # Errors
    /// If a rank is lost, leaves or does not come.
    pub fn wait(self) -> Result<Tensor> {
        match self {
            Self::Host(handle, device) => {
                let sums = handle.wait()?;
                let n = sums.len();
                Ok(Tensor::from_vec(sums, n, &device)?)
            }
            #[cfg(feature = "nccl")]
            Self::Device(handle, device) => Ok(crate::on_gpu::tensor(handle.wait()?, &device)),
        }
    }
}

/// The parts one after the other, on the host.
fn pack(parts: &[Part]) -> candle_core::Result<Vec<f32>> {
    let mut all = Vec::with_capacity(parts.iter().map(|(numbers, _)| numbers).sum());
    for (numbers, gradient) in parts {
        match gradient {
            Some(gradient) => all.extend_from_slice(&F32::new(&gradient.to_device(&Device::Cpu)?)?),
            None => all.resize(all.len() + numbers, 0.0),
        }
    }
    Ok(all)
}
