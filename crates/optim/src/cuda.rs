//! The optimizer step on an NVIDIA GPU: launches of kernels/optim.cu on the stream that the tensors belong to. The arithmetic is
//! that of [`crate::lion8bit`], [`crate::lion`] and [`crate::clip`], and so are the results, bit for bit.

use std::sync::Arc;

use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
    sys::CUdevice_attribute,
};
use cudarc::nvrtc::Ptx;

use crate::clip::PIECE;
use crate::lion::LionRule;
use crate::lion8bit::{BLOCK, Lion8bit, MIN_8BIT_SIZE};
use crate::map::dynamic_map;

/// PTX by compute capability, newest first.
const PTX: [(i32, &str); 3] = [
    (90, include_str!(concat!(env!("OUT_DIR"), "/optim.sm_90.ptx"))),
    (89, include_str!(concat!(env!("OUT_DIR"), "/optim.sm_89.ptx"))),
    (86, include_str!(concat!(env!("OUT_DIR"), "/optim.sm_86.ptx"))),
];

/// Pieces that one block of threads of `sum_of_squares` takes.
const PIECES_PER_BLOCK: usize = 4;

/// The kernels' `LionRule`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rule {
    beta1: f32,
    beta2: f32,
    gradient1: f32,
    gradient2: f32,
    lr: f32,
    decay: f32,
    factor: f32,
}

// SAFETY: seven f32 in C layout, the struct `LionRule` of kernels/lion8bit.h, which kernels take by value.
unsafe impl DeviceRepr for Rule {}

/// The kernels, loaded on one device.
#[derive(Debug, Clone)]
pub struct Kernels {
    stream: Arc<CudaStream>,
    lion8bit: CudaFunction,
    lion: CudaFunction,
    squares: CudaFunction,
    /// [`crate::map::DynamicMap::values`].
    values: Arc<CudaSlice<f32>>,
}

/// The momentum of one parameter, in the device's memory; see [`Lion8bit`].
#[derive(Debug, Clone)]
pub enum DeviceLion8bit {
    /// Under [`MIN_8BIT_SIZE`] elements: as it is.
    F32(CudaSlice<f32>),
    /// Quantized by blocks.
    Blockwise {
        /// One code per element.
        codes: CudaSlice<u8>,
        /// Largest magnitude of each block.
        absmax: CudaSlice<f32>,
    },
}

impl Kernels {
    /// Loads the kernels for launches on `stream`.
    ///
    /// # Errors
    /// If the device refuses the PTX: it is older than compute capability 8.6.
    pub fn new(stream: Arc<CudaStream>) -> Result<Self, DriverError> {
        let context = stream.context();
        let of = |attribute| context.attribute(attribute);
        let capability = 10 * of(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + of(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        // An older device than any here gets the oldest PTX, and refuses it with the driver's own words.
        let (_, ptx) = PTX.iter().find(|(made_for, _)| *made_for <= capability).unwrap_or(&PTX[PTX.len() - 1]);
        let module = context.load_module(Ptx::from_src(*ptx))?;
        let values = Arc::new(stream.clone_htod(&dynamic_map().values[..])?);
        let [lion8bit, lion, squares] = ["lion8bit", "lion", "sum_of_squares"].map(|name| module.load_function(name));
        Ok(Self { lion8bit: lion8bit?, lion: lion?, squares: squares?, values, stream })
    }

    /// The zero momentum of a parameter with `size` elements.
    ///
    /// # Errors
    /// If memory is short.
    pub fn state(&self, size: usize) -> Result<DeviceLion8bit, DriverError> {
        if size < MIN_8BIT_SIZE {
            return Ok(DeviceLion8bit::F32(self.stream.alloc_zeros(size)?));
        }
        Ok(DeviceLion8bit::Blockwise { codes: self.stream.alloc_zeros(size)?, absmax: self.stream.alloc_zeros(size.div_ceil(BLOCK))? })
    }

    /// A momentum that was read from a file.
    ///
    /// # Errors
    /// If memory is short.
    pub fn upload(&self, state: &Lion8bit) -> Result<DeviceLion8bit, DriverError> {
        Ok(match state {
            Lion8bit::F32(m) => DeviceLion8bit::F32(self.stream.clone_htod(m)?),
            Lion8bit::Blockwise { codes, absmax } => {
                DeviceLion8bit::Blockwise { codes: self.stream.clone_htod(codes)?, absmax: self.stream.clone_htod(absmax)? }
            }
        })
    }

    /// A copy of the momentum for a file.
    ///
    /// # Errors
    /// If work before it on the stream failed.
    pub fn download(&self, state: &DeviceLion8bit) -> Result<Lion8bit, DriverError> {
        Ok(match state {
            DeviceLion8bit::F32(m) => Lion8bit::F32(self.stream.clone_dtoh(m)?),
            DeviceLion8bit::Blockwise { codes, absmax } => {
                Lion8bit::Blockwise { codes: self.stream.clone_dtoh(codes)?, absmax: self.stream.clone_dtoh(absmax)? }
            }
        })
    }

    /// One step over the parameter `p` with gradient `factor * g`.
    ///
    /// # Errors
    /// If the launch fails.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn step(
        &self,
        rule: &LionRule,
        factor: f32,
        state: &mut DeviceLion8bit,
        p: &mut CudaViewMut<f32>,
        g: &CudaView<f32>,
    ) -> Result<(), DriverError> {
        let &LionRule { beta1, beta2, gradient1, gradient2, lr, decay } = rule;
        let rule = Rule { beta1, beta2, gradient1, gradient2, lr, decay, factor };
        let n = p.len() as u64;
        match state {
            DeviceLion8bit::F32(m) => {
                assert!(p.len() == g.len() && p.len() == m.len(), "parameter, gradient and momentum differ in length");
                let config = config(p.len().div_ceil(BLOCK));
                // SAFETY: `lion` reads and writes elements below `n` of three buffers of `n` f32.
                unsafe { self.stream.launch_builder(&self.lion).arg(&n).arg(&rule).arg(p).arg(g).arg(m).launch(config)? };
            }
            DeviceLion8bit::Blockwise { codes, absmax } => {
                let fits = p.len() == g.len() && p.len() == codes.len() && absmax.len() == p.len().div_ceil(BLOCK);
                assert!(fits, "parameter, gradient and momentum differ in length");
                let (config, values) = (config(absmax.len()), &*self.values);
                let mut launch = self.stream.launch_builder(&self.lion8bit);
                launch.arg(&n).arg(&rule).arg(values).arg(p).arg(g).arg(codes).arg(absmax);
                // SAFETY: a block of threads for each `absmax`; `lion8bit` touches elements below `n` of p, g and codes, the 256 values,
                // and its own block's absmax.
                unsafe { launch.launch(config)? };
            }
        }
        Ok(())
    }

    /// Room for the sums of squares of gradients with `sizes` elements together.
    ///
    /// # Errors
    /// If memory is short.
    pub fn sums(&self, sizes: impl Iterator<Item = usize>) -> Result<CudaSlice<f64>, DriverError> {
        self.stream.alloc_zeros(sizes.map(|n| n.div_ceil(PIECE)).sum())
    }

    /// Writes the sum of squares of each piece of `g` to `sums` from `at` on, and gives the place behind them.
    ///
    /// # Errors
    /// If the launch fails.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn sum_of_squares(&self, g: &CudaView<f32>, sums: &mut CudaSlice<f64>, at: usize) -> Result<usize, DriverError> {
        let pieces = g.len().div_ceil(PIECE);
        let n = g.len() as u64;
        let mut own = sums.slice_mut(at..at + pieces);
        if pieces > 0 {
            let mut launch = self.stream.launch_builder(&self.squares);
            launch.arg(&n).arg(g).arg(&mut own);
            // SAFETY: `sum_of_squares` reads elements below `n` of g and writes a sum for each of its pieces.
            unsafe { launch.launch(config(pieces.div_ceil(PIECES_PER_BLOCK)))? };
        }
        Ok(at + pieces)
    }

    /// The norm from the sums, and the number of the first piece whose sum is not finite: as [`crate::clip::global_norm`].
    ///
    /// # Errors
    /// If work before it on the stream failed.
    pub fn norm(&self, sums: &CudaSlice<f64>) -> Result<(f64, Option<usize>), DriverError> {
        let sums = self.stream.clone_dtoh(sums)?;
        Ok((sums.iter().sum::<f64>().sqrt(), sums.iter().position(|s| !s.is_finite())))
    }
}

/// So many blocks of 256 threads.
fn config(blocks: usize) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (BLOCK as u32, 1, 1), shared_mem_bytes: 0 }
}
