//! Where a run computes: the CPU, or the GPU of this process. Weights and batches are moved there where they are made (the
//! base model's loader, [`crate::data`], previews, validation); everything behind follows its tensors.

use candle_core::Device;

use crate::config::DeviceChoice;
use crate::error::{Error, Result};

/// The device that a recipe asks for.
///
/// # Errors
/// If it asks for a GPU and the program was built without, or there is none of that number.
pub fn choose(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda => gpu(local_rank()?),
        DeviceChoice::Auto => match gpus() {
            0 => Ok(Device::Cpu),
            _ => gpu(local_rank()?),
        },
    }
}

/// Number of this process on its machine, as torchrun and `lokr launch` set it.
fn local_rank() -> Result<usize> {
    let Ok(text) = std::env::var("LOCAL_RANK") else { return Ok(0) };
    let hint = "start processes with `lokr launch` or torchrun, which set LOCAL_RANK to 0, 1, 2 ...";
    text.parse().map_err(|_| Error::refused(format!("LOCAL_RANK is \"{text}\", no number of a process"), hint))
}

/// GPUs that this process sees.
#[cfg(feature = "cuda")]
pub fn gpus() -> usize {
    use candle_core::cuda::cudarc::driver::CudaContext;
    CudaContext::device_count().map_or(0, |n| n.max(0) as usize)
}

/// GPUs that this process sees: none, for the program was built without.
#[cfg(not(feature = "cuda"))]
pub fn gpus() -> usize {
    0
}

#[cfg(feature = "cuda")]
fn gpu(number: usize) -> Result<Device> {
    let found = gpus();
    if number >= found {
        let what = format!("there is no GPU number {number}: this process sees {found} (nvidia-smi -L lists them)");
        return Err(Error::refused(
            what,
            "start as many processes on a machine as CUDA_VISIBLE_DEVICES leaves GPUs, or set train.device = \"cpu\"",
        ));
    }
    ops::gpu(number).map_err(|e| {
        let hint = "check with nvidia-smi that the driver is loaded and the GPU is free, or set train.device = \"cpu\"";
        Error::refused(format!("GPU {number} cannot be used: {}", reason(&e)), hint)
    })
}

#[cfg(not(feature = "cuda"))]
fn gpu(_number: usize) -> Result<Device> {
    let hint = "build it with `cargo build --release --features cuda,cudnn,nccl` (docs/cuda.md), or set train.device = \"cpu\"";
    Err(Error::refused("train.device is \"cuda\", and this program was built without GPUs", hint))
}

/// The first line of an error of the driver, without the place in the program that candle adds.
#[cfg(feature = "cuda")]
fn reason(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

/// An error of the GPU's driver in a user's words, with the way out; any other error as it is.
pub fn explain(error: Error) -> Error {
    if matches!(error, Error::Refused { .. }) {
        return error;
    }
    // Each part of a run wraps the driver's error in its own.
    let text = error.to_string();
    let Some(at) = text.find("CUDA_ERROR_") else { return error };
    let code: String = text[at..].chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect();
    if code == "CUDA_ERROR_OUT_OF_MEMORY" {
        let hint = "set train.gradient_checkpointing = true, lower train.batch_size or dataset.resolution (raise \
                    train.gradient_accumulation_steps instead), or see with nvidia-smi whether another program holds memory of it";
        return Error::refused(format!("the GPU has not enough free memory for this recipe ({code})"), hint);
    }
    let hint = "the last checkpoint is good: run the same command to go on from it; if it happens again, `dmesg` (lines with Xid) and \
                nvidia-smi tell whether the GPU is at fault";
    Error::refused(format!("the GPU failed ({code}): {}", text.lines().next().unwrap_or_default()), hint)
}

/// The device in words, for the lines at the start of a run.
pub fn describe(device: &Device) -> String {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            let context = cuda.cuda_stream().context().clone();
            let name = context.name().unwrap_or_else(|_| "a GPU".into());
            let memory = context
                .mem_get_info()
                .map_or_else(|_| String::new(), |(_, all)| format!(" with {:.1} GiB", all as f64 / f64::from(1 << 30)));
            let cudnn = if cfg!(feature = "cudnn") { "cuDNN" } else { "no cuDNN" };
            format!("{name}{memory} (GPU {}, {cudnn})", context.ordinal())
        }
        _ => format!("{} threads", rayon::current_num_threads()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_driver_are_told_with_a_way_out_and_others_are_left_alone() {
        let driver = |code: &str| explain(Error::Tensor(candle_core::Error::Msg(format!("DriverError({code}, \"words\")\n   0: a frame"))));
        let memory = driver("CUDA_ERROR_OUT_OF_MEMORY");
        assert_eq!(memory.to_string(), "the GPU has not enough free memory for this recipe (CUDA_ERROR_OUT_OF_MEMORY)");
        assert!(memory.hint().unwrap_or_default().contains("train.batch_size"));
        let launch = driver("CUDA_ERROR_LAUNCH_FAILED");
        assert_eq!(launch.to_string(), "the GPU failed (CUDA_ERROR_LAUNCH_FAILED): DriverError(CUDA_ERROR_LAUNCH_FAILED, \"words\")");
        assert!(launch.hint().unwrap_or_default().contains("checkpoint"));
        assert_eq!(explain(Error::Tensor(candle_core::Error::Msg("shapes".into()))).to_string(), "shapes");
    }

    #[test]
    fn the_cpu_is_there_and_a_program_without_gpus_says_how_to_get_them() {
        assert!(choose(DeviceChoice::Cpu).expect("a CPU").is_cpu());
        if cfg!(not(feature = "cuda")) {
            assert!(choose(DeviceChoice::Auto).expect("a CPU").is_cpu());
            let error = choose(DeviceChoice::Cuda).expect_err("no GPU");
            assert!(error.to_string().contains("train.device"), "{error}");
            assert!(error.hint().unwrap_or_default().contains("--features cuda"), "{error}");
        }
    }
}
