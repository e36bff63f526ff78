//! NVIDIA GPUs: the device, and launches of the kernels in `kernels/` on candle's tensors. Each op has its launches in a module of
//! its own; what no kernel serves goes by the composed forms.

pub(crate) mod attention;
pub(crate) mod mix;
pub(crate) mod norm;
pub(crate) mod pointwise;
pub(crate) mod staging;

use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Error, Result, Shape, Storage, Tensor};
use cudarc::driver::result;
use cudarc::driver::sys::{CUdevice_attribute, CUmemPool_attribute};
use cudarc::driver::{CudaFunction, CudaStream, DevicePtr, LaunchArgs, LaunchConfig};
use half::{bf16, f16};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

/// A source file of kernels: its name, and its PTX by compute capability, newest first.
pub(crate) struct File(&'static str, [(i32, &'static str); 3]);

macro_rules! file {
    ($name:literal) => {
        File(
            concat!("ops_", $name),
            [
                (90, include_str!(concat!(env!("OUT_DIR"), "/", $name, ".sm_90.ptx"))),
                (89, include_str!(concat!(env!("OUT_DIR"), "/", $name, ".sm_89.ptx"))),
                (86, include_str!(concat!(env!("OUT_DIR"), "/", $name, ".sm_86.ptx"))),
            ],
        )
    };
}

pub(crate) const ATTENTION: File = file!("attention");
pub(crate) const NORM: File = file!("norm");
pub(crate) const POINTWISE: File = file!("pointwise");

/// Threads of a block, where nothing speaks for another number.
pub(crate) const THREADS: usize = 256;

/// GPU number `ordinal`. All work goes to one stream of its own, so that what one thread submits is done before what another
/// submits after it; candle's default is a stream for each thread.
///
/// # Errors
/// If the driver refuses it.
pub fn gpu(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    keep_memory(device.as_cuda_device()?)?;
    // Recording an event before and after each use of a tensor costs more than many kernels take, and orders streams.
    // SAFETY: every tensor of the process is made on, used on and freed on this one stream; NCCL's is ordered with it by events.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}

/// Lets the driver keep the memory that tensors gave back, for the next ones. By default it returns all of it to the system at each
/// synchronisation, and maps it again afterwards.
fn keep_memory(device: &CudaDevice) -> Result<()> {
    let mut all = u64::MAX;
    let stream = device.cuda_stream();
    // SAFETY: the device exists; the attribute is a 64-bit number, and so is `all`.
    unsafe {
        let pool = result::device::get_default_mem_pool(stream.context().cu_device()).map_err(Error::wrap)?;
        let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut all).cast()).map_err(Error::wrap)
    }
}

/// Most bytes that tensors have held at once since the last call, and since the start that the driver's pool has held for them.
///
/// # Errors
/// If the device is no GPU, or the driver refuses.
pub fn gpu_memory_peak(device: &Device) -> Result<(u64, u64)> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let (mut used, mut reserved, mut none) = (0u64, 0u64, 0u64);
    // SAFETY: the device exists; all three attributes are 64-bit numbers, and so are the places.
    unsafe {
        let pool = result::device::get_default_mem_pool(stream.context().cu_device()).map_err(Error::wrap)?;
        let high = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        result::mem_pool::get_attribute(pool, high, (&raw mut used).cast()).map_err(Error::wrap)?;
        let held = CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH;
        result::mem_pool::get_attribute(pool, held, (&raw mut reserved).cast()).map_err(Error::wrap)?;
        result::mem_pool::set_attribute(pool, high, (&raw mut none).cast()).map_err(Error::wrap)?;
    }
    Ok((used, reserved))
}

/// The device of a tensor that kernels serve: f32, f16 or bf16 on a GPU.
pub(crate) fn device(t: &Tensor) -> Option<CudaDevice> {
    match t.device() {
        Device::Cuda(device) if suffix(t.dtype()).is_ok() => Some(device.clone()),
        _ => None,
    }
}

/// What the names of a type's kernels end in.
fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        other => candle_core::bail!("no kernel takes {other:?}"),
    }
}

/// A kernel, and the stream that it is submitted to.
pub(crate) struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    /// Takes its arguments.
    pub(crate) fn builder(&self) -> LaunchArgs<'_> {
        self.stream.launch_builder(&self.function)
    }
}

thread_local! {
    /// Kernels that were used, by device and name: the driver takes longer to find one than to launch it.
    static KERNELS: RefCell<HashMap<(DeviceId, String), CudaFunction>> = RefCell::default();
}

/// The kernel `name` for data of `dtype`.
pub(crate) fn kernel(device: &CudaDevice, file: &File, name: &str, dtype: DType) -> Result<Kernel> {
    let stream = device.cuda_stream();
    let key = (device.id(), format!("{name}_{}", suffix(dtype)?));
    if let Some(function) = KERNELS.with_borrow(|kernels| kernels.get(&key).cloned()) {
        return Ok(Kernel { function, stream });
    }
    let of = |attribute| stream.context().attribute(attribute).map_err(Error::wrap);
    let capability = 10 * of(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
        + of(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // An older device than any here gets the oldest PTX, and refuses it with the driver's own words.
    let (_, ptx) = file.1.iter().find(|(made_for, _)| *made_for <= capability).unwrap_or(&file.1[2]);
    let function = device.get_or_load_custom_func(&key.1, file.0, ptx)?.into_cuda_function();
    KERNELS.with_borrow_mut(|kernels| kernels.insert(key, function.clone()));
    Ok(Kernel { function, stream })
}

/// Where a tensor's storage lies in the device's memory. The memory stays until work submitted before the tensor is dropped is done: it
/// is freed on the same stream.
pub(crate) fn base(t: &Tensor) -> Result<u64> {
    let (storage, _) = t.storage_and_layout();
    let Storage::Cuda(data) = &*storage else { candle_core::bail!("not on a GPU: {:?}", t.device().location()) };
    let stream = data.device.cuda_stream();
    Ok(match &data.slice {
        CudaStorageSlice::F32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::BF16(s) => s.device_ptr(&stream).0,
        _ => candle_core::bail!("no kernel takes {:?}", t.dtype()),
    })
}

/// Where the elements of a contiguous tensor lie.
pub(crate) fn address(t: &Tensor) -> Result<u64> {
    let Some((start, _)) = t.layout().contiguous_offsets() else { candle_core::bail!("not contiguous: {:?}", t.layout()) };
    Ok(base(t)? + (start * t.dtype().size_in_bytes()) as u64)
}

/// Which form of a kernel serves these sizes and addresses, by the end of its name, and how many neighbours it takes as one.
pub(crate) fn neighbours(dtype: DType, sizes: &[usize], addresses: &[u64]) -> (usize, usize) {
    let together = 16 / dtype.size_in_bytes();
    let fits = sizes.iter().all(|s| s.is_multiple_of(together)) && addresses.iter().all(|a| a.is_multiple_of(16));
    if fits { (16, together) } else { (1, 1) }
}

/// A tensor whose elements a kernel is about to write, all of them.
pub(crate) fn output(device: &CudaDevice, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
    fn of<T: CudaDType + cudarc::driver::DeviceRepr>(device: &CudaDevice, count: usize) -> Result<CudaStorage> {
        // SAFETY: the caller's kernel writes every element before anything reads one.
        Ok(CudaStorage::wrap_cuda_slice(unsafe { device.alloc::<T>(count) }?, device.clone()))
    }
    let shape = shape.into();
    let count = shape.elem_count().max(1);
    let storage = match dtype {
        DType::F32 => of::<f32>(device, count)?,
        DType::F16 => of::<f16>(device, count)?,
        DType::BF16 => of::<bf16>(device, count)?,
        other => candle_core::bail!("no kernel gives {other:?}"),
    };
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
}

/// Submits a kernel over `grid` blocks of `threads` threads.
///
/// # Safety
/// The arguments are those of the kernel, in its order, and its accesses stay within the tensors whose addresses they are.
pub(crate) unsafe fn launch(mut arguments: LaunchArgs, grid: (usize, usize, usize), threads: usize) -> Result<()> {
    let (x, y, z) = grid;
    if x * y * z == 0 {
        return Ok(());
    }
    let config = LaunchConfig { grid_dim: (x as u32, y as u32, z as u32), block_dim: (threads as u32, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the caller's promise.
    unsafe { arguments.launch(config) }.map_err(Error::wrap)?;
    Ok(())
}

/// Sizes as the kernels count them, in 32 bits; `None` if one is larger.
pub(crate) fn counts(sizes: &[usize]) -> Option<Vec<i32>> {
    sizes.iter().map(|&n| i32::try_from(n).ok()).collect()
}
