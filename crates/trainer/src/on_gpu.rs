//! The end of an optimizer step on a GPU: the gradients in one buffer for NCCL; and, by the kernels of [`optim::cuda`], their norm and
//! the update in place. What those compute is what `step.rs` computes on the CPU, bit for bit.

use std::cell::RefCell;

use candle_core::cuda::CudaStorage;
use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Result as TensorResult, Storage, Tensor};
use optim::Optimizer;
use optim::cuda::Kernels;

use crate::error::{Error, Result};

/// Loads the kernels on the device of the trained tensors and keeps the optimizer's states there, if there is a kernel for its rule.
///
/// # Errors
/// If the device refuses.
pub fn use_device(optimizer: &mut Optimizer, device: &Device) -> Result<()> {
    if let Device::Cuda(device) = device {
        let kernels = Kernels::new(device.cuda_stream()).map_err(optim::Error::from)?;
        optimizer.use_device(kernels)?;
    }
    Ok(())
}

/// L2 norm of all gradients together, and the place in `grads` of the first that is not finite. One copy to the host.
///
/// # Errors
/// If the device fails.
pub fn gradient_norm(kernels: &Kernels, grads: &[(usize, Tensor)]) -> Result<(f64, Option<usize>)> {
    let mut sums = kernels.sums(grads.iter().map(|(_, g)| g.elem_count())).map_err(optim::Error::from)?;
    let mut ends = Vec::with_capacity(grads.len());
    let mut at = 0;
    for (_, grad) in grads {
        let (storage, layout) = grad.storage_and_layout();
        let (Storage::Cuda(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            return Err(Error::Tensor(candle_core::Error::Msg("a gradient is not contiguous on the GPU".into())));
        };
        let slice = storage.as_cuda_slice::<f32>()?.slice(start..end);
        at = kernels.sum_of_squares(&slice, &mut sums, at).map_err(optim::Error::from)?;
        ends.push(at);
    }
    let (norm, bad) = kernels.norm(&sums).map_err(optim::Error::from)?;
    Ok((norm, bad.map(|piece| ends.partition_point(|&end| end <= piece))))
}

/// The parts of a bucket one after the other, for NCCL. The copies go to the stream on which the gradients are made.
///
/// # Errors
/// If a gradient is not f32, or the device fails.
#[cfg(feature = "nccl")]
pub fn pack(
    device: &candle_core::CudaDevice,
    parts: &[crate::sum::Part],
) -> TensorResult<candle_core::cuda::cudarc::driver::CudaSlice<f32>> {
    let mut all = device.alloc_zeros::<f32>(parts.iter().map(|(numbers, _)| numbers).sum())?;
    let mut at = 0;
    for (numbers, gradient) in parts {
        if let Some(gradient) = gradient {
            let gradient = gradient.contiguous()?;
            let (storage, layout) = gradient.storage_and_layout();
            let (Storage::Cuda(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
                candle_core::bail!("a gradient is not on the GPU")
            };
            device.memcpy_dtod(&storage.as_cuda_slice::<f32>()?.slice(start..end), &mut all.slice_mut(at..at + numbers))?;
        }
        at += numbers;
    }
    Ok(all)
}

/// A buffer as a tensor, `(numbers)`.
#[cfg(feature = "nccl")]
pub fn tensor(numbers: candle_core::cuda::cudarc::driver::CudaSlice<f32>, device: &candle_core::CudaDevice) -> Tensor {
    let n = numbers.len();
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(numbers, device.clone()));
    Tensor::from_storage(storage, n, candle_core::op::BackpropOp::none(), false)
}

/// Steps parameter `index`, `value`, in place with the gradient `factor * grad`.
///
/// # Errors
/// If the device fails.
pub fn step(optimizer: &mut Optimizer, index: usize, value: &Tensor, grad: &Tensor, factor: f32, lr: f32) -> Result<()> {
    Ok(value.inplace_op2(&grad.contiguous()?, &Step { optimizer: RefCell::new(optimizer), index, factor, lr })?)
}

/// Zero states for all parameters, as the first update makes them; none for an optimizer that is stepped on the host.
///
/// # Errors
/// If memory is short.
pub fn spare_states(optimizer: &Optimizer, trained: &[crate::step::Trained]) -> TensorResult<Vec<optim::cuda::DeviceLion8bit>> {
    let Some(kernels) = optimizer.kernels() else { return Ok(Vec::new()) };
    trained.iter().map(|t| kernels.state(t.parameter.tensor().elem_count()).map_err(candle_core::Error::wrap)).collect()
}

struct Step<'a> {
    optimizer: RefCell<&'a mut Optimizer>,
    index: usize,
    factor: f32,
    lr: f32,
}

impl InplaceOp2 for Step<'_> {
    fn name(&self) -> &'static str {
        "optimizer step"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> TensorResult<()> {
        candle_core::bail!("the optimizer's state is on a GPU, its parameter {} on the CPU", self.index)
    }

    fn cuda_fwd(&self, value: &mut CudaStorage, at: &Layout, grad: &CudaStorage, from: &Layout) -> TensorResult<()> {
        let (Some((start, end)), Some((grad_start, grad_end))) = (at.contiguous_offsets(), from.contiguous_offsets()) else {
            candle_core::bail!("parameter {} is not contiguous", self.index)
        };
        let mut value = value.as_cuda_slice_mut::<f32>()?.slice_mut(start..end);
        let grad = grad.as_cuda_slice::<f32>()?.slice(grad_start..grad_end);
        let mut optimizer = self.optimizer.borrow_mut();
        optimizer.step_on_device(self.index, &mut value, &grad, self.factor, self.lr).map_err(candle_core::Error::wrap)
    }
}
