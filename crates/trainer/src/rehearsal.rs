//! The largest batch once before the first step, so that a GPU's memory runs out at the start or never. On the CPU, where memory
//! is the system's, nothing happens.

use candle_core::{DType, Tensor};
use optim::Optimizer;
use sdxl::Sdxl;

use crate::config::RunConfig;
use crate::data::Data;
use crate::error::{Error, Result};
use crate::latents;
use crate::step::{self, Objective, Trained};

/// Runs forward and backward of the largest batch and throws the gradients away. Nothing of the run's state changes. Gives the line
/// that says what was tried, if anything was. `stateless` is the optimizer if it has no state yet.
///
/// # Errors
/// [`Error::Refused`] naming the batch and the keys that make it smaller, if it does not fit.
pub fn largest_batch(
    config: &RunConfig,
    ranks: usize,
    data: &Data,
    model: &Sdxl,
    objective: &Objective,
    trained: &[Trained],
    stateless: Option<&Optimizer>,
) -> Result<Option<String>> {
    if model.device().is_cpu() {
        return Ok(None);
    }
    let Some(((width, height), batch)) = data.largest_batch(&model.vae)? else { return Ok(None) };
    let n = batch.len();
    let run = || -> Result<()> {
        // The optimizer makes its state in the first update, and all later batches have it beside them.
        #[cfg(feature = "cuda")]
        let _states = stateless.map(|optimizer| crate::on_gpu::spare_states(optimizer, trained)).transpose()?;
        #[cfg(not(feature = "cuda"))]
        let _ = stateless;
        // Pictures that are encoded when they are visited: all of a batch, or, with a cache, one at a time.
        let encoded = if !data.caches_latents() { n } else { usize::from(!latents::encodes_ahead(config, ranks)) };
        if encoded > 0 {
            let pixels = Tensor::zeros((encoded, 3, height as usize, width as usize), DType::F32, model.device())?;
            model.vae.encode(&pixels)?;
        }
        // With accumulation the second backward pass has the gradients of the first beside it.
        for _ in 0..config.train.gradient_accumulation_steps.min(2) {
            step::begin_micro_step(model, objective, &batch, 0.0, &mut |_| Ok(()))?;
        }
        Ok(model.device().synchronize()?)
    };
    let done = run();
    trained.iter().for_each(|t| t.parameter.zero_grad());
    done.map_err(|error| explain(error, config, (n, width, height)))?;
    Ok(Some(format!("the largest batch, {n} pictures of {width}x{height}, fits into the GPU's memory (tried)")))
}

/// An error for want of memory, with the batch and what makes it smaller; any other as it is.
fn explain(error: Error, config: &RunConfig, (n, width, height): (usize, u32, u32)) -> Error {
    let text = error.to_string();
    // The driver's word, and those of cuBLAS and cuDNN.
    let Some(code) =
        ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"].into_iter().find(|c| text.contains(c))
    else {
        return error;
    };
    let pictures = if n == 1 { "picture" } else { "pictures" };
    let what =
        format!("the GPU has not enough free memory for a batch of {n} {pictures} of {width}x{height}, the largest of this run ({code})");
    let mut ways = Vec::new();
    if config.train.gradient_checkpointing == sdxl::GradientCheckpointing::None {
        ways.push("set train.gradient_checkpointing = true".to_string());
    }
    if n > 1 {
        ways.push(format!("lower train.batch_size below {n} (and raise train.gradient_accumulation_steps instead)"));
    }
    ways.push("lower dataset.resolution or dataset.max_bucket_reso".into());
    ways.push("keep the base model in 8 bits (train.fp8_base)".into());
    Error::refused(what, format!("{}; nvidia-smi shows whether another program holds memory of it", ways.join(", or ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn want_of_memory_is_told_with_the_batch_and_the_keys_and_other_errors_are_left_alone() {
        let config = RunConfig::default();
        let error = |text: &str| explain(Error::Tensor(candle_core::Error::Msg(text.into())), &config, (4, 1024, 960));
        let memory = error("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        let what =
            "the GPU has not enough free memory for a batch of 4 pictures of 1024x960, the largest of this run (CUDA_ERROR_OUT_OF_MEMORY)";
        assert_eq!(memory.to_string(), what);
        let hint = memory.hint().unwrap_or_default();
        assert!(hint.contains("lower train.batch_size below 4") && hint.contains("dataset.max_bucket_reso"), "{hint}");
        assert_eq!(error("shapes differ").to_string(), "shapes differ");
    }
}
