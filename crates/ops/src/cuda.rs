//! A GPU as candle's device, with one stream for all threads of the process.

use candle_core::{Device, Result};

/// GPU number `ordinal`. All work goes to one stream of its own, so that what one thread submits is done before what another
/// submits after it; candle's default is a stream for each thread.
///
/// # Errors
/// If the driver refuses it.
pub fn gpu(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    // Recording an event before and after each use of a tensor costs more than many kernels take, and orders streams.
    // SAFETY: every tensor of the process is made on, used on and freed on this one stream; NCCL is given the same one.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}
