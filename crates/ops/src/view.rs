//! Slices of CPU tensors, and which form of an op serves a tensor.

use candle_core::{CpuStorage, DType, Device, Result, Storage, StorageRef, Tensor};
use std::mem::MaybeUninit;
use std::ops::Deref;

/// Whether the fast CPU form serves this tensor, and with it a [`crate::kernel::Delta`].
pub fn fast(t: &Tensor) -> bool {
    t.dtype() == DType::F32 && t.device().is_cpu()
}

/// The f32 elements of a contiguous CPU tensor, borrowed.
pub struct F32<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl<'a> F32<'a> {
    /// Borrows the elements.
    ///
    /// # Errors
    /// If the tensor is not f32, not on the CPU, or not contiguous.
    pub fn new(t: &'a Tensor) -> Result<Self> {
        let (storage, layout) = t.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else { candle_core::bail!("not contiguous: {:?}", t.shape()) };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => {}
            _ => candle_core::bail!("not f32 on the CPU: {:?}", t.dtype()),
        }
        Ok(Self { storage, start, len: end - start })
    }
}

impl Deref for F32<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(v)) => &v[self.start..self.start + self.len],
            _ => &[],
        }
    }
}

/// How many items of `work` elementary operations each make a task that is worth handing to another thread.
pub(crate) fn grain(work: usize) -> usize {
    (1 << 17) / work.max(1) + 1
}

/// A vector of `len` numbers, all of which `write` writes.
///
/// # Safety
/// `write` initialises every element.
pub(crate) unsafe fn build(len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut out = Vec::with_capacity(len);
    write(&mut out.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is there, and the caller promises the elements.
    unsafe { out.set_len(len) };
    out
}

/// `len` numbers of a buffer that grows as needed, on the border of a cache line. They hold what they held.
pub(crate) fn reuse(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len + 16 {
        buffer.resize(len + 16, 0.0);
    }
    let aligned = buffer.as_ptr().align_offset(64).min(16);
    &mut buffer[aligned..aligned + len]
}

/// A CPU tensor that takes over `data`.
pub(crate) fn tensor(data: Vec<f32>, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape, &Device::Cpu)
}

/// A pointer that threads may share because each writes its own places.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut(*mut f32, usize);

// SAFETY: the pointer is only turned into references inside `SharedMut::at` and `room`, whose callers promise disjoint places.
unsafe impl Send for SharedMut {}
// SAFETY: as above.
unsafe impl Sync for SharedMut {}

impl SharedMut {
    pub(crate) fn new(slice: &mut [f32]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// The first `len` places of a vector that is to be filled: room is made for them. Who fills them sets the length.
    pub(crate) fn for_vec(vec: &mut Vec<f32>, len: usize) -> Self {
        vec.reserve_exact(len.saturating_sub(vec.len()));
        Self(vec.as_mut_ptr(), len)
    }

    /// A pointer to element `offset`, from which at least `len` elements lie inside the slice.
    pub(crate) fn ptr(self, offset: usize, len: usize) -> *mut f32 {
        assert!(offset + len <= self.1, "{offset} + {len} > {}", self.1);
        // SAFETY: inside the allocation by the assertion.
        unsafe { self.0.add(offset) }
    }

    /// Sets elements `offset..offset + len`, which may not be initialised yet.
    ///
    /// # Safety
    /// The slice lives on, and no other thread touches these elements meanwhile.
    pub(crate) unsafe fn fill(self, offset: usize, len: usize, value: f32) {
        let ptr = self.ptr(offset, len);
        for i in 0..len {
            // SAFETY: inside the allocation by the assertion in `ptr`.
            unsafe { ptr.add(i).write(value) };
        }
    }

    /// Elements `offset..offset + len`, which may not be initialised yet.
    ///
    /// # Safety
    /// As [`SharedMut::at`].
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn room<'b>(self, offset: usize, len: usize) -> &'b mut [MaybeUninit<f32>] {
        let ptr = self.ptr(offset, len);
        // SAFETY: inside the allocation by the assertion in `ptr`; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(ptr.cast(), len) }
    }

    /// Elements `offset..offset + len`, all initialised.
    ///
    /// # Safety
    /// The slice lives on, and no other thread touches these elements while the result is used.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn at<'b>(self, offset: usize, len: usize) -> &'b mut [f32] {
        let ptr = self.ptr(offset, len);
        // SAFETY: inside the allocation by the assertion in `ptr`; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(ptr, len) }
    }
}
