//! Devices that a run can be planned for, with their makers' figures.

use super::tape::Speed;
use crate::error::{Error, Result};

/// A device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Device {
    /// Name on the command line.
    pub name: &'static str,
    /// Memory in bytes; `None`: not known here.
    pub memory: Option<u64>,
    /// TFLOP/s of dense f16 products that are summed in f32, and of f32 products.
    tflops: Option<[f64; 2]>,
    /// GB/s of its memory.
    bandwidth: Option<f64>,
}

const GIB: u64 = 1 << 30;

/// CPUs differ too much to be in a table. GPUs: NVIDIA's data sheets and architecture white papers (GA102, Ada, A100, H100 SXM),
/// without sparsity.
const DEVICES: [Device; 5] = [
    Device { name: "cpu", memory: None, tflops: None, bandwidth: None },
    Device { name: "rtx3090", memory: Some(24 * GIB), tflops: Some([71.0, 35.6]), bandwidth: Some(936.0) },
    Device { name: "rtx4090", memory: Some(24 * GIB), tflops: Some([165.2, 82.6]), bandwidth: Some(1008.0) },
    Device { name: "a100", memory: Some(80 * GIB), tflops: Some([312.0, 19.5]), bandwidth: Some(2039.0) },
    Device { name: "h100", memory: Some(80 * GIB), tflops: Some([989.0, 67.0]), bandwidth: Some(3350.0) },
];

impl Device {
    /// The device of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn named(name: &str) -> Result<Self> {
        let wanted = name.to_lowercase().replace([' ', '-', '_'], "");
        DEVICES.into_iter().find(|d| d.name == wanted).ok_or_else(|| {
            let known: Vec<&str> = DEVICES.iter().map(|d| d.name).collect();
            Error::refused(
                format!("nothing is known of a device `{name}`"),
                format!("choose one of {}, and give its figures with --tflops and --bandwidth", known.join(", ")),
            )
        })
    }

    /// Whether it is the CPU.
    pub fn is_cpu(&self) -> bool {
        self.name == "cpu"
    }

    /// Its speeds, given ones first; `None` unless both are known.
    ///
    /// # Errors
    /// If a given one is not above 0.
    pub fn speed(&self, half: bool, tflops: Option<f64>, bandwidth: Option<f64>) -> Result<Option<Speed>> {
        for (option, value) in [("--tflops", tflops), ("--bandwidth", bandwidth)] {
            if value.is_some_and(|v| !v.is_finite() || v <= 0.0) {
                return Err(Error::refused(format!("{option} must be above 0"), "give the figure of the device's data sheet"));
            }
        }
        let tflops = tflops.or(self.tflops.map(|[f16, f32]| if half { f16 } else { f32 }));
        let bandwidth = bandwidth.or(self.bandwidth);
        Ok(tflops.zip(bandwidth).map(|(tflops, bandwidth)| Speed { tflops, bandwidth }))
    }
}
