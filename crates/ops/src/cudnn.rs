//! cuDNN's convolution and its two gradients, for f32, f16 and bf16 on the GPU. candle's own call of cuDNN sums f16 products in f16,
//! lets f32 products round to TF32, zeroes its workspace each time, and has no backward pass.
//!
//! Here products are summed in f32 for every type, and those of f32 are rounded to TF32 only where [`with_tf32`] says so. The algorithms are fixed ones whose results
//! repeat bit for bit on GPUs of one architecture. cuDNN names those that do not, `BWD_DATA_ALGO_0`, `BWD_FILTER_ALGO_0` and
//! `BWD_FILTER_ALGO_3`, under "Reproducibility" in <https://docs.nvidia.com/deeplearning/cudnn/latest/developer/misc.html>.
//!
//! Shapes: `x (n, c, h, w)`, `weight (o, c, kh, kw)`, `y (n, o, oh, ow)`.

use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{DType, Layout, Result, Storage, Tensor, WithDType};
use cudarc::cudnn::sys::{
    cudnnConvolutionBwdDataAlgo_t as DataAlgorithm, cudnnConvolutionBwdFilterAlgo_t as FilterAlgorithm,
    cudnnConvolutionFwdAlgo_t as ForwardAlgorithm, cudnnConvolutionMode_t as Mode, cudnnMathType_t as Math, cudnnStatus_t as Status,
    cudnnTensorFormat_t as Format,
};
use cudarc::cudnn::{ConvBackwardData, ConvBackwardFilter, ConvForward, Cudnn, CudnnDataType, CudnnError};
use cudarc::driver::{CudaSlice, CudaView, DeviceRepr};
use half::{bf16, f16};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

/// Tried in this order.
const FORWARD: [ForwardAlgorithm; 2] =
    [ForwardAlgorithm::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM, ForwardAlgorithm::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM];
const DATA: [DataAlgorithm; 1] = [DataAlgorithm::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1];
const FILTER: [FilterAlgorithm; 1] = [FilterAlgorithm::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1];

/// Where tensor cores begin to read, in bytes.
const ALIGNMENT: usize = 16;

thread_local! {
    static TF32: Cell<bool> = const { Cell::new(false) };
    /// A handle serves one thread at a time, so each thread has its own for each device.
    static HANDLES: RefCell<HashMap<DeviceId, Arc<Cudnn>>> = RefCell::default();
}

/// Lets this thread's convolutions of f32 round what they multiply to TF32 (10 bits behind the point, as f16 has) while `f` runs, which
/// takes a fraction of the time; PyTorch does so by default. Sums stay f32.
pub fn with_tf32<R>(f: impl FnOnce() -> R) -> R {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            TF32.set(self.0);
        }
    }
    let _before = Before(TF32.replace(true));
    f()
}

/// An element type that is served.
trait Element: CudaDType + WithDType + DeviceRepr + CudnnDataType {
    /// Which products of it are allowed.
    fn math() -> Math {
        Math::CUDNN_TENSOR_OP_MATH
    }
}

impl Element for f32 {
    fn math() -> Math {
        // The default math allows TF32.
        if TF32.get() { Math::CUDNN_DEFAULT_MATH } else { Math::CUDNN_FMA_MATH }
    }
}

impl Element for f16 {}
impl Element for bf16 {}

/// What is computed, from which two tensors.
#[derive(Clone, Copy, Debug)]
enum Pass {
    /// y from x and the weight.
    Forward,
    /// The gradient of x from that of y and the weight.
    InputGradient,
    /// The gradient of the weight from x and the gradient of y.
    WeightGradient,
}

/// Sizes of one convolution.
#[derive(Clone, Copy, Debug)]
struct Shapes {
    x: [usize; 4],
    weight: [usize; 4],
    y: [usize; 4],
    stride: usize,
    padding: usize,
}

impl Shapes {
    fn new(x: [usize; 4], weight: [usize; 4], stride: usize, padding: usize) -> Result<Self> {
        let side = |size: usize, kernel: usize| Some((size + 2 * padding).checked_sub(kernel)?.checked_div(stride)? + 1);
        let ([n, c, h, w], [o, wc, kh, kw]) = (x, weight);
        let (Some(oh), Some(ow), true) = (side(h, kh), side(w, kw), c == wc) else {
            candle_core::bail!("conv2d: input {x:?}, weight {weight:?}, stride {stride}, padding {padding}");
        };
        let out = Self { x, weight, y: [n, o, oh, ow], stride, padding };
        // cuDNN's sizes are C's int.
        if [x, weight, out.y].as_flattened().iter().chain([&stride, &padding]).any(|&size| i32::try_from(size).is_err()) {
            candle_core::bail!("conv2d: too large for cuDNN: {out:?}");
        }
        Ok(out)
    }

    /// Checks the gradient of y.
    fn expect(self, dy: &Tensor) -> Result<Self> {
        if dy.dims() == self.y { Ok(self) } else { candle_core::bail!("conv2d backward: gradient {:?}, expected {self:?}", dy.dims()) }
    }
}

/// Whether this tensor's convolutions go to cuDNN.
pub(crate) fn serves(t: &Tensor) -> bool {
    t.device().is_cuda() && matches!(t.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// The convolution `(n, o, oh, ow)` of `x (n, c, h, w)` with `weight (o, c, kh, kw)` of the same type.
///
/// # Errors
/// If shapes, types or devices do not fit, or cuDNN or the driver refuses.
pub(crate) fn forward(x: &Tensor, weight: &Tensor, stride: usize, padding: usize) -> Result<Tensor> {
    dispatch(Pass::Forward, x, weight, Shapes::new(dims(x)?, dims(weight)?, stride, padding)?)
}

/// The gradient `(n, c, h, w)` of an input of height and width `size` from `dy (n, o, oh, ow)` and `weight (o, c, kh, kw)` of the same
/// type.
///
/// # Errors
/// If shapes, types or devices do not fit, or cuDNN or the driver refuses.
pub(crate) fn input_grad(dy: &Tensor, weight: &Tensor, size: (usize, usize), stride: usize, padding: usize) -> Result<Tensor> {
    let ([n, ..], [_, c, ..]) = (dims(dy)?, dims(weight)?);
    let shapes = Shapes::new([n, c, size.0, size.1], dims(weight)?, stride, padding)?.expect(dy)?;
    dispatch(Pass::InputGradient, dy, weight, shapes)
}

/// The gradient `(o, c, kh, kw)` of a weight from `x (n, c, h, w)` and `dy (n, o, oh, ow)` of the same type. The sums over pixels are f32;
/// the result has the tensors' type, as cuDNN offers no wider one for f16 and bf16.
///
/// # Errors
/// If shapes, types or devices do not fit, or cuDNN or the driver refuses.
pub(crate) fn weight_grad(x: &Tensor, dy: &Tensor, kernel: (usize, usize), stride: usize, padding: usize) -> Result<Tensor> {
    let ([_, c, ..], [_, o, ..]) = (dims(x)?, dims(dy)?);
    let shapes = Shapes::new(dims(x)?, [o, c, kernel.0, kernel.1], stride, padding)?.expect(dy)?;
    dispatch(Pass::WeightGradient, x, dy, shapes)
}

fn dims(t: &Tensor) -> Result<[usize; 4]> {
    t.dims4().map(Into::into)
}

fn dispatch(pass: Pass, a: &Tensor, b: &Tensor, shapes: Shapes) -> Result<Tensor> {
    if a.dtype() != b.dtype() || !a.device().same_device(b.device()) {
        candle_core::bail!("conv2d: {:?} on {:?} and {:?} on {:?}", a.dtype(), a.device(), b.dtype(), b.device());
    }
    match a.dtype() {
        DType::F32 => convolve::<f32>(pass, a, b, shapes),
        DType::F16 => convolve::<f16>(pass, a, b, shapes),
        DType::BF16 => convolve::<bf16>(pass, a, b, shapes),
        other => candle_core::bail!("conv2d: cuDNN is not asked for {other:?}"),
    }
}

fn convolve<T: Element>(pass: Pass, a: &Tensor, b: &Tensor, shapes: Shapes) -> Result<Tensor> {
    let device = a.device().as_cuda_device()?;
    let (a, b) = (aligned(a)?, aligned(b)?);
    let ((a, a_layout), (b, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
    let (a, b) = (view::<T>(&a, a_layout)?, view::<T>(&b, b_layout)?);
    let Shapes { stride, padding, .. } = shapes;
    let out_dims = match pass {
        Pass::Forward => shapes.y,
        Pass::InputGradient => shapes.x,
        Pass::WeightGradient => shapes.weight,
    };
    // SAFETY: cuDNN writes every element: what was there counts nothing, as its factor is 0.
    let mut out = unsafe { device.alloc::<T>(out_dims.iter().product())? };

    let cudnn = handle(device)?;
    // `Shapes::new` has checked the range.
    let int = |size: [usize; 4]| size.map(|size| size as i32);
    let nchw = Format::CUDNN_TENSOR_NCHW;
    let both = |size: usize| [size as i32; 2];
    let mut conv = cudnn.create_conv2d::<f32>(both(padding), both(stride), both(1), Mode::CUDNN_CROSS_CORRELATION)?;
    conv.set_math_type(T::math())?;
    let (conv, w) = (&conv, &cudnn.create_4d_filter::<T>(nchw, int(shapes.weight))?);
    let (x, y) = (&cudnn.create_4d_tensor::<T>(nchw, int(shapes.x))?, &cudnn.create_4d_tensor::<T>(nchw, int(shapes.y))?);
    let factors = (T::from_f64(1.0), T::from_f64(0.0));
    // SAFETY, of the three launches: the descriptors are those of the slices, whose lengths `view` has checked against the layouts
    // and `Shapes` against each other; all memory belongs to the device of the handle, and is used and freed on the handle's stream.
    let ran = match pass {
        Pass::Forward => {
            let op = ConvForward { conv, x, w, y };
            let launch = |algorithm, space: Option<&mut CudaSlice<u8>>| unsafe { op.launch(algorithm, space, factors, &a, &b, &mut out) };
            first(&FORWARD, device, |algorithm| op.get_workspace_size(algorithm), launch)?
        }
        Pass::InputGradient => {
            let op = ConvBackwardData { conv, dx: x, w, dy: y };
            let launch = |algorithm, space: Option<&mut CudaSlice<u8>>| unsafe { op.launch(algorithm, space, factors, &mut out, &b, &a) };
            first(&DATA, device, |algorithm| op.get_workspace_size(algorithm), launch)?
        }
        Pass::WeightGradient => {
            let op = ConvBackwardFilter { conv, x, dw: w, dy: y };
            let launch = |algorithm, space: Option<&mut CudaSlice<u8>>| unsafe { op.launch(algorithm, space, factors, &a, &mut out, &b) };
            first(&FILTER, device, |algorithm| op.get_workspace_size(algorithm), launch)?
        }
    };
    if let Err(e) = ran {
        candle_core::bail!("cuDNN refuses a convolution ({e}): {pass:?}, {:?}, {shapes:?}", T::DTYPE);
    }
    let out = CudaStorage::wrap_cuda_slice(out, device.clone());
    Ok(Tensor::from_storage(Storage::Cuda(out), &out_dims, BackpropOp::none(), false))
}

/// Runs the first algorithm that serves the sizes. The outer error is the driver's, the inner one cuDNN's.
fn first<A: Copy>(
    algorithms: &[A],
    device: &CudaDevice,
    workspace: impl Fn(A) -> std::result::Result<usize, CudnnError>,
    mut launch: impl FnMut(A, Option<&mut CudaSlice<u8>>) -> std::result::Result<(), CudnnError>,
) -> Result<std::result::Result<(), CudnnError>> {
    let mut refused = CudnnError(Status::CUDNN_STATUS_NOT_SUPPORTED);
    for &algorithm in algorithms {
        let ran = match workspace(algorithm) {
            Ok(0) => launch(algorithm, None),
            // SAFETY: cuDNN reads there only what it has written; it is freed in the stream's order, after the kernels.
            Ok(bytes) => launch(algorithm, Some(&mut unsafe { device.alloc::<u8>(bytes)? })),
            Err(e) => Err(e),
        };
        match ran {
            // All kinds of "not supported" are 3000 and up. Any other error, such as for want of memory, must not change the algorithm,
            // and with it the last digits.
            Err(e) if e.0 as u32 / 1000 == 3 => refused = e,
            ran => return Ok(ran),
        }
    }
    Ok(Err(refused))
}

/// This thread's handle, on the device's stream.
fn handle(device: &CudaDevice) -> Result<Arc<Cudnn>> {
    HANDLES.with_borrow_mut(|handles| {
        if let Some(cudnn) = handles.get(&device.id()) {
            return Ok(cudnn.clone());
        }
        let cudnn = Cudnn::new(device.cuda_stream())?;
        handles.insert(device.id(), cudnn.clone());
        Ok(cudnn)
    })
}

/// The tensor, contiguous and where tensor cores can read it; a copy if it is not.
fn aligned(t: &Tensor) -> Result<Tensor> {
    let t = t.contiguous()?;
    let start = t.layout().start_offset() * t.dtype().size_in_bytes();
    if start.is_multiple_of(ALIGNMENT) { Ok(t) } else { t.force_contiguous() }
}

/// The elements of a contiguous tensor on the GPU.
fn view<'a, T: CudaDType>(storage: &'a Storage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let (Storage::Cuda(storage), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
        candle_core::bail!("conv2d: not contiguous on a GPU: {layout:?}");
    };
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}
