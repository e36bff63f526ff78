//! Sums and broadcasts between GPUs by NCCL, in place on device memory, on the stream that the tensors belong to.
//!
//! A [`TcpGroup`](crate::TcpGroup) stands beside it: it hands out NCCL's unique id, and before each collective all ranks say
//! over it what they are about to do. NCCL itself waits forever for a rank that died or calls something else; the check turns
//! that into an error that names the rank. It costs a message of some hundred bytes, against megabytes of the collective.
//!
//! # Determinism
//! NCCL chooses the order of a sum by the number of ranks, the length and the links: a run on the same machines gets the same
//! bits again; two ranks always do, because the sum of two numbers has one order.

use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};
use cudarc::nccl::{Comm, Id, NcclType, ReduceOp, result::NcclError};

use crate::group::Options;
use crate::tcp::TcpGroup;
use crate::{Error, Operation, Result, World};

/// This process's membership in a group of several, each with a GPU of its own.
pub struct NcclGroup {
    tcp: TcpGroup,
    stream: Arc<CudaStream>,
    comm: Mutex<SendComm>,
}

/// NCCL's handle, which may be used from any thread, by one at a time.
struct SendComm(Comm);

// SAFETY: NCCL's documentation allows calls on a communicator from different threads if they do not overlap; the mutex around it
// sees to that.
unsafe impl Send for SendComm {}

impl NcclGroup {
    /// Meets the other ranks over TCP, then over NCCL; the calls of the group go to `stream`, and each rank's stream must be on a GPU
    /// of its own.
    ///
    /// # Errors
    /// As [`TcpGroup::join`]; [`Error::Nccl`] if NCCL finds no way between the GPUs.
    pub fn join(world: &World, options: &Options, stream: Arc<CudaStream>) -> Result<Self> {
        Self::beside(TcpGroup::join(world, options)?, stream)
    }

    /// As [`NcclGroup::join`], for ranks that have met.
    ///
    /// # Errors
    /// As [`NcclGroup::join`].
    pub fn beside(tcp: TcpGroup, stream: Arc<CudaStream>) -> Result<Self> {
        let operation = Operation::Broadcast { name: "NCCL's unique id".into(), bytes: 128, root: 0 };
        let failed = Error::nccl(&operation);
        let own = if tcp.rank() == 0 { bytes_of(&Id::new().map_err(&failed)?) } else { Vec::new() };
        let parts = tcp.exchange(operation.clone(), own, None)?;
        let mut id = [0; 128];
        id.iter_mut().zip(parts.iter().flatten()).for_each(|(to, from)| *to = *from as core::ffi::c_char);
        let comm = Comm::from_rank(stream.clone(), tcp.rank(), tcp.peers().len(), Id::uninit(id)).map_err(&failed)?;
        Ok(Self { tcp, stream, comm: Mutex::new(SendComm(comm)) })
    }

    /// The group over TCP, for whatever is on the host.
    pub fn tcp(&self) -> &TcpGroup {
        &self.tcp
    }

    /// The stream that the calls go to.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Replaces each number of `buffer` by its sum over ranks. Returns when the work is on the stream, not when it is done.
    ///
    /// # Errors
    /// [`Error::Failed`] if a rank is lost or calls something else; [`Error::Nccl`].
    pub fn all_reduce_sum<T: NcclType>(&self, name: &str, buffer: &mut impl DevicePtrMut<T>) -> Result<()> {
        let operation = Operation::AllReduceSum { name: name.into(), elements: buffer.len() as u64 };
        self.agree(&operation)?;
        if buffer.len() == 0 {
            return Ok(());
        }
        let comm = self.comm.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        comm.0.all_reduce_in_place(buffer, &ReduceOp::Sum).map_err(Error::nccl(&operation))?;
        Ok(())
    }

    /// Overwrites `buffer` with that of rank `root`. Returns when the work is on the stream.
    ///
    /// # Errors
    /// As [`NcclGroup::all_reduce_sum`].
    pub fn broadcast<T: NcclType>(&self, name: &str, buffer: &mut impl DevicePtrMut<T>, root: usize) -> Result<()> {
        let bytes = (buffer.len() * size_of::<T>()) as u64;
        let operation = Operation::Broadcast { name: name.into(), bytes, root };
        self.agree(&operation)?;
        if buffer.len() == 0 {
            return Ok(());
        }
        let comm = self.comm.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        comm.0.broadcast_in_place(buffer, root as i32).map_err(Error::nccl(&operation))?;
        Ok(())
    }

    /// Sums numbers of the host, by way of the device.
    pub(crate) fn sum_of_host(&self, name: &str, values: &[f32]) -> Result<Vec<f32>> {
        let operation = Operation::AllReduceSum { name: name.into(), elements: values.len() as u64 };
        let driver = |e: cudarc::driver::DriverError| Error::Nccl { operation: operation.clone(), what: e.to_string() };
        let mut buffer: CudaSlice<f32> = self.stream.clone_htod(values).map_err(driver)?;
        self.all_reduce_sum(name, &mut buffer)?;
        self.stream.clone_dtoh(&buffer).map_err(driver)
    }

    /// All ranks are here and are about to do the same.
    fn agree(&self, operation: &Operation) -> Result<()> {
        self.tcp.exchange(operation.clone(), Vec::new(), None).map(drop)
    }
}

fn bytes_of(id: &Id) -> Vec<u8> {
    id.internal().iter().map(|&c| c as u8).collect()
}

impl Error {
    /// Wraps an error of NCCL with what was being done.
    fn nccl(operation: &Operation) -> impl Fn(NcclError) -> Error {
        let operation = operation.clone();
        move |error| Error::Nccl { operation: operation.clone(), what: format!("{:?}", error.0) }
    }
}
