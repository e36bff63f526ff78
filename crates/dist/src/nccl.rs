//! Sums and broadcasts between GPUs by NCCL, in place on device memory.
//!
//! A [`TcpGroup`](crate::TcpGroup) stands beside it: it hands out NCCL's unique id, and before each collective all ranks say
//! over it what they are about to do. NCCL itself waits forever for a rank that died or calls something else; the check turns
//! that into an error that names the rank. It costs a message of some hundred bytes, against megabytes of the collective.
//!
//! NCCL's work goes to a stream of its own, so that sums travel while the caller's stream computes; events order the two. Sums that were
//! begun with [`NcclGroup::all_reduce_async`] are agreed on and started by the group's thread: the caller waits for no rank. Where a rank
//! is lost while GPUs wait for it in a collective, that thread aborts the communicator ([`crate::pending`]).
//!
//! # Determinism
//! NCCL chooses the order of a sum by the number of ranks, the length and the links: a run on the same machines gets the same
//! bits again; two ranks always do, because the sum of two numbers has one order.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtrMut, DriverError};
use cudarc::nccl::{Comm, Id, NcclType, ReduceOp, result::NcclError};

use crate::failure::{Failure, Peer};
use crate::group::Options;
use crate::pending::Work;
use crate::tcp::TcpGroup;
use crate::{Error, Operation, Result, World};

/// This process's membership in a group of several, each with a GPU of its own.
pub struct NcclGroup {
    tcp: TcpGroup,
    /// The stream of the caller's buffers.
    stream: Arc<CudaStream>,
    nccl: Arc<Nccl>,
}

/// NCCL's handle, with the stream that its work goes to; without it once it was aborted.
struct Nccl {
    stream: Arc<CudaStream>,
    comm: Mutex<Option<SendComm>>,
}

/// NCCL's handle, which may be used from any thread, by one at a time.
struct SendComm(Comm);

// SAFETY: NCCL's documentation allows calls on a communicator from different threads if they do not overlap; the mutex around it
// sees to that.
unsafe impl Send for SendComm {}

/// A sum on its way; see [`NcclGroup::all_reduce_async`].
pub struct DeviceHandle<T> {
    operation: Operation,
    me: Peer,
    told: Receiver<Result<()>>,
    buffer: Receiver<InUse<T>>,
}

impl<T> DeviceHandle<T> {
    /// Waits until the sum is on its way through the GPU and gives its buffer, which the caller's stream may use from then on: that
    /// stream waits for the sum, the host does not.
    ///
    /// # Errors
    /// [`Error::Failed`] if a rank is lost or calls something else; [`Error::Nccl`].
    pub fn wait(self) -> Result<CudaSlice<T>> {
        let left = || Error::Failed { operation: self.operation.clone(), failure: Box::new(Failure::Left { peer: self.me.clone() }) };
        self.told.recv().unwrap_or_else(|_| Err(left()))?;
        let in_use = self.buffer.recv().map_err(|_| left())?;
        in_use.release().map_err(driver(&self.operation))
    }
}

/// A buffer that NCCL's stream works on. The stream that it belongs to waits for that before it uses or frees it.
struct InUse<T> {
    buffer: Option<CudaSlice<T>>,
    until: Arc<CudaEvent>,
}

impl<T> InUse<T> {
    fn release(mut self) -> std::result::Result<CudaSlice<T>, DriverError> {
        let buffer = self.buffer.take().ok_or(DriverError(cudarc::driver::sys::CUresult::CUDA_ERROR_INVALID_HANDLE))?;
        buffer.stream().wait(&self.until)?;
        Ok(buffer)
    }
}

impl<T> Drop for InUse<T> {
    fn drop(&mut self) {
        if let Some(buffer) = &self.buffer {
            // If that fails, the device has failed, and with it every stream.
            _ = buffer.stream().wait(&self.until);
        }
    }
}

/// A collective on NCCL's stream, for the group's thread.
struct OnStream {
    nccl: Arc<Nccl>,
    from: CudaEvent,
    until: Arc<CudaEvent>,
}

impl Work for OnStream {
    fn has_begun(&self) -> bool {
        self.from.is_complete()
    }

    fn is_done(&self) -> bool {
        self.until.try_is_complete() != Ok(false)
    }

    fn give_up(&self) {
        // Dropping the handle aborts it, which ends its kernels.
        drop(self.nccl.comm.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take());
    }
}

impl Nccl {
    /// Calls NCCL, if it was not aborted.
    fn call<R>(&self, operation: &Operation, call: impl FnOnce(&Comm) -> std::result::Result<R, NcclError>) -> Result<()> {
        let comm = self.comm.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &*comm {
            Some(comm) => call(&comm.0).map(drop).map_err(Error::nccl(operation)),
            None => Err(Error::Nccl { operation: operation.clone(), what: "it was aborted".into() }),
        }
    }

    /// As [`Nccl::call`], after what is on `stream` now and before what comes there later.
    fn call_between<R>(
        &self,
        stream: &CudaStream,
        operation: &Operation,
        call: impl FnOnce(&Comm) -> std::result::Result<R, NcclError>,
    ) -> Result<()> {
        self.stream.join(stream).map_err(driver(operation))?;
        self.call(operation, call)?;
        stream.join(&self.stream).map_err(driver(operation))
    }
}

impl NcclGroup {
    /// Meets the other ranks over TCP, then over NCCL. Buffers of the group's calls belong to `stream`, and each rank's stream must be on
    /// a GPU of its own.
    ///
    /// # Errors
    /// As [`TcpGroup::join`]; [`Error::SharedGpu`]; [`Error::Nccl`] if NCCL finds no way between the GPUs.
    pub fn join(world: &World, options: &Options, stream: Arc<CudaStream>) -> Result<Self> {
        Self::beside(TcpGroup::join(world, options)?, stream)
    }

    /// As [`NcclGroup::join`], for ranks that have met.
    ///
    /// # Errors
    /// As [`NcclGroup::join`].
    pub fn beside(tcp: TcpGroup, stream: Arc<CudaStream>) -> Result<Self> {
        refuse_shared(&tcp, &stream)?;
        let operation = Operation::Broadcast { name: "NCCL's unique id".into(), bytes: 128, root: 0 };
        let failed = Error::nccl(&operation);
        let own = if tcp.rank() == 0 { bytes_of(&Id::new().map_err(&failed)?) } else { Vec::new() };
        let parts = tcp.exchange(operation.clone(), own, None)?;
        let mut id = [0; 128];
        id.iter_mut().zip(parts.iter().flatten()).for_each(|(to, from)| *to = *from as core::ffi::c_char);
        let own_stream = stream.context().new_stream().map_err(driver(&operation))?;
        // NCCL takes the device that is the thread's.
        stream.context().bind_to_thread().map_err(driver(&operation))?;
        let comm = Comm::from_rank(own_stream.clone(), tcp.rank(), tcp.peers().len(), Id::uninit(id)).map_err(&failed)?;
        Ok(Self { tcp, stream, nccl: Arc::new(Nccl { stream: own_stream, comm: Mutex::new(Some(SendComm(comm))) }) })
    }

    /// The group over TCP, for whatever is on the host.
    pub fn tcp(&self) -> &TcpGroup {
        &self.tcp
    }

    /// The stream that the buffers belong to.
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
        self.nccl.call_between(&self.stream, &operation, |comm| comm.all_reduce_in_place(buffer, &ReduceOp::Sum))
    }

    /// Begins to replace each number of `buffer` by its sum over ranks and returns: neither the other ranks nor the GPU are waited for.
    /// Sums are started in the order in which they were submitted; other calls queue behind them.
    pub fn all_reduce_async<T: NcclType + Send + 'static>(&self, name: &str, mut buffer: CudaSlice<T>) -> DeviceHandle<T> {
        let operation = Operation::AllReduceSum { name: name.into(), elements: buffer.len() as u64 };
        let (nccl, filled, of) = (self.nccl.clone(), self.stream.record_event(None), operation.clone());
        let (give, taken) = channel();
        let start = move || {
            let from = filled.map_err(driver(&of))?;
            nccl.stream.wait(&from).map_err(driver(&of))?;
            nccl.call(&of, |comm| comm.all_reduce_in_place(&mut buffer, &ReduceOp::Sum))?;
            let until = Arc::new(nccl.stream.record_event(None).map_err(driver(&of))?);
            // Nobody takes it if the caller has given up.
            _ = give.send(InUse { buffer: Some(buffer), until: until.clone() });
            Ok(Box::new(OnStream { nccl, from, until }) as Box<dyn Work>)
        };
        let told = self.tcp.start(operation.clone(), Box::new(start));
        DeviceHandle { operation, me: self.tcp.peers()[self.tcp.rank()].clone(), told, buffer: taken }
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
        self.nccl.call_between(&self.stream, &operation, |comm| comm.broadcast_in_place(buffer, root as i32))
    }

    /// Sums numbers of the host, by way of the device.
    pub(crate) fn sum_of_host(&self, name: &str, values: &[f32]) -> Result<Vec<f32>> {
        let operation = Operation::AllReduceSum { name: name.into(), elements: values.len() as u64 };
        let mut buffer: CudaSlice<f32> = self.stream.clone_htod(values).map_err(driver(&operation))?;
        self.all_reduce_sum(name, &mut buffer)?;
        self.stream.clone_dtoh(&buffer).map_err(driver(&operation))
    }

    /// All ranks are here and are about to do the same.
    fn agree(&self, operation: &Operation) -> Result<()> {
        self.tcp.exchange(operation.clone(), Vec::new(), None).map(drop)
    }
}

/// Refuses ranks that were started on one GPU, before NCCL does in its own words.
fn refuse_shared(tcp: &TcpGroup, stream: &CudaStream) -> Result<()> {
    let operation = Operation::AllGather { name: "the ranks' GPUs".into() };
    let uuid = stream.context().uuid().map_err(driver(&operation))?;
    let gpus = tcp.exchange(operation, uuid.bytes.map(|b| b as u8).to_vec(), None)?;
    for gpu in &gpus {
        let peers: Vec<Peer> = tcp.peers().iter().zip(&gpus).filter(|(_, other)| *other == gpu).map(|(peer, _)| peer.clone()).collect();
        if peers.len() > 1 {
            return Err(Error::SharedGpu { peers, gpu: uuid_text(gpu) });
        }
    }
    Ok(())
}

/// A GPU's identity as `nvidia-smi -L` writes it.
fn uuid_text(bytes: &[u8]) -> String {
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let parts: Vec<&str> = [0..8, 8..12, 12..16, 16..20, 20..32].into_iter().filter_map(|range| hex.get(range)).collect();
    format!("GPU-{}", parts.join("-"))
}

/// Wraps an error of the GPU's driver with what was being done.
fn driver(operation: &Operation) -> impl Fn(DriverError) -> Error {
    let operation = operation.clone();
    move |error| Error::Nccl { operation: operation.clone(), what: error.to_string() }
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
