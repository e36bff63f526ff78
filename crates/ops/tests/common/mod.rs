//! What the test programs share.

use candle_core::{Device, Tensor};

/// Numbers of about unit variance, the same for the same seed.
pub fn randn(shape: &[usize], seed: u64) -> Tensor {
    // A fixed sequence, so that a failure can be repeated.
    let n: usize = shape.iter().product();
    let mut s = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    let data: Vec<f32> = (0..n)
        .map(|_| {
            let mut sum = 0f32;
            for _ in 0..4 {
                s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                sum += (s >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            }
            sum * 1.7
        })
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}
