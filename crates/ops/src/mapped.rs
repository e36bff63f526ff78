//! Where a layer's frozen weight lies: in a tensor, or in a file that is mapped into memory. Products on the CPU read a mapped weight in
//! place, so that its pages belong to the system's cache of files: nothing is copied at the start, processes of one machine share
//! them, and under pressure they are dropped and read again, not swapped. candle's CPU storage always owns its elements and cannot
//! hold such a weight.

use crate::linear::widen;
use crate::weight::Stored;
use bytes::Bytes;
use candle_core::{DType, Device, Result, Shape, Tensor};
use half::{bf16, f16};
use std::ops::Deref;

/// A layer's frozen weight. It derefs to its [`Shape`].
#[derive(Clone)]
pub enum Weight {
    /// In memory, on any device; of type u8 it holds the codes of [`crate::e4m3_codes`].
    Tensor(Tensor),
    /// In a mapped file.
    Mapped(Mapped),
}

impl Weight {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Tensor(t) => t.dtype(),
            Self::Mapped(m) => m.dtype,
        }
    }

    /// Where it is computed with.
    pub fn device(&self) -> &Device {
        match self {
            Self::Tensor(t) => t.device(),
            Self::Mapped(_) => &Device::Cpu,
        }
    }

    /// The tensor, or a copy of a mapped weight.
    ///
    /// # Errors
    /// None that depends on the weight.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Tensor(t) => Ok(t.clone()),
            Self::Mapped(m) => Tensor::from_raw_buffer(&m.bytes, m.dtype, m.shape.dims(), &Device::Cpu),
        }
    }

    /// In the type that the computation uses, see [`widen`].
    ///
    /// # Errors
    /// If the conversion does not exist.
    pub(crate) fn widened(&self, compute: DType) -> Result<Tensor> {
        widen(&self.tensor()?, compute)
    }
}

impl Deref for Weight {
    type Target = Shape;
    fn deref(&self) -> &Shape {
        match self {
            Self::Tensor(t) => t.shape(),
            Self::Mapped(m) => &m.shape,
        }
    }
}

impl From<Tensor> for Weight {
    fn from(weight: Tensor) -> Self {
        Self::Tensor(weight)
    }
}

impl From<&Tensor> for Weight {
    fn from(weight: &Tensor) -> Self {
        Self::Tensor(weight.clone())
    }
}

impl From<&Weight> for Weight {
    fn from(weight: &Weight) -> Self {
        weight.clone()
    }
}

/// Elements in a mapped file, contiguous in C order: f32, f16 or bf16.
#[derive(Clone)]
pub struct Mapped {
    bytes: Bytes,
    dtype: DType,
    shape: Shape,
}

impl Mapped {
    /// Takes the bytes of a weight, little endian. `None` where products cannot read them in place: if they are not f32, f16 or bf16, do
    /// not lie on a border of their elements, or are not as many as the shape says.
    pub fn new(bytes: Bytes, dtype: DType, shape: &[usize]) -> Option<Self> {
        let mapped = Self { bytes, dtype, shape: Shape::from(shape) };
        (cfg!(target_endian = "little") && mapped.stored().is_some_and(|s| s.len() == mapped.shape.elem_count())).then_some(mapped)
    }

    /// The elements; `None` where they cannot be read, which [`Mapped::new`] has excluded.
    pub(crate) fn stored(&self) -> Option<Stored<'_>> {
        let bytes = &self.bytes[..];
        match self.dtype {
            DType::F32 => bytemuck::try_cast_slice::<_, f32>(bytes).ok().map(Stored::F32),
            DType::F16 => bytemuck::try_cast_slice::<_, f16>(bytes).ok().map(Stored::F16),
            DType::BF16 => bytemuck::try_cast_slice::<_, bf16>(bytes).ok().map(Stored::Bf16),
            _ => None,
        }
    }
}
