//! Frozen weights in 8 bits: OCP's float8 E4M3 without infinities (Micikevicius et al. 2022, table 1; torch's `float8_e4m3fn`), one byte for each
//! element, in tensors of type u8. [`crate::widen`] takes them back to the type of a computation, a layer at a time.

use candle_core::{CpuStorage, DType, Device, DeviceLocation, Result, Storage, Tensor, WithDType};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};

/// The largest finite value.
pub const E4M3_MAX: f32 = 448.0;

/// What a code means: a sign bit, 4 bits of exponent with bias 7, 3 of mantissa; exponent 0 is subnormal, 0x7f and 0xff are NaN.
pub fn e4m3_decode(code: u8) -> f32 {
    TABLE[code as usize]
}

static TABLE: [f32; 256] = table();

const fn table() -> [f32; 256] {
    let mut values = [0f32; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code >> 3) & 15, code & 7);
        // In units of 2^-9, the least subnormal, every finite value is a whole number below 2^18.
        let units = if exponent == 0 { mantissa } else { (8 + mantissa) << (exponent - 1) };
        let value = if exponent == 15 && mantissa == 7 { f32::NAN } else { units as f32 / 512.0 };
        values[code] = if code & 128 == 0 { value } else { -value };
        code += 1;
    }
    values
}

/// The nearest code, ties to the even one. Values beyond [`E4M3_MAX`] become it, where torch's conversion gives NaN: a frozen weight must
/// not poison a model.
pub fn e4m3_encode(value: f32) -> u8 {
    let sign = u8::from(value.is_sign_negative()) << 7;
    let a = value.abs();
    if a.is_nan() {
        return sign | 0x7f;
    }
    if a >= E4M3_MAX {
        return sign | 0x7e;
    }
    // Exponent of the binade, that of the subnormals below it; a step of the binade is 2^(exponent - 3).
    let exponent = ((a.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (a * f32::from_bits(((127 + 3 - exponent) as u32) << 23)).round_ties_even() as i32;
    // A normal number has 8 to 15 steps; 16 carries into the exponent.
    sign | (((exponent + 6) << 3) + steps) as u8
}

/// The codes of a tensor, as u8, on its device.
///
/// # Errors
/// If candle fails.
pub fn e4m3_codes(t: &Tensor) -> Result<Tensor> {
    let values: Vec<f32> = t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let codes: Vec<u8> = values.par_iter().with_min_len(1 << 14).map(|&v| e4m3_encode(v)).collect();
    Tensor::from_vec(codes, t.shape(), t.device())
}

/// The values behind codes, in `dtype`. Every value is exact in f16, bf16 and f32.
pub(crate) fn widen_codes(codes: &Tensor, dtype: DType) -> Result<Tensor> {
    let codes = codes.contiguous()?;
    match dtype {
        DType::F32 if codes.device().is_cpu() => widen_cpu(&codes, |v| v),
        DType::F16 if codes.device().is_cpu() => widen_cpu(&codes, half::f16::from_f32),
        DType::BF16 if codes.device().is_cpu() => widen_cpu(&codes, half::bf16::from_f32),
        _ => select(&codes, dtype),
    }
}

fn widen_cpu<T: WithDType>(codes: &Tensor, convert: impl Fn(f32) -> T) -> Result<Tensor> {
    let table: Vec<T> = TABLE.iter().map(|&v| convert(v)).collect();
    let (storage, layout) = codes.storage_and_layout();
    let (Storage::Cpu(CpuStorage::U8(bytes)), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        candle_core::bail!("no codes on the CPU: {:?}", codes.dtype())
    };
    let values: Vec<T> = bytes[start..end].par_iter().with_min_len(1 << 14).map(|&code| table[code as usize]).collect();
    Tensor::from_vec(values, codes.shape(), &Device::Cpu)
}

/// By candle's ops, for every device: the table is uploaded once for each device and type.
fn select(codes: &Tensor, dtype: DType) -> Result<Tensor> {
    static TABLES: LazyLock<Mutex<HashMap<(DeviceLocation, DType), Tensor>>> = LazyLock::new(Mutex::default);
    let device = codes.device();
    let mut tables = TABLES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let table = match tables.entry((device.location(), dtype)) {
        std::collections::hash_map::Entry::Occupied(entry) => entry.get().clone(),
        std::collections::hash_map::Entry::Vacant(entry) => {
            entry.insert(Tensor::from_slice(&TABLE, 256, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?).clone()
        }
    };
    drop(tables);
    table.index_select(&codes.flatten_all()?, 0)?.reshape(codes.shape())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of a code by the definition, in f64.
    fn meaning(code: u8) -> f64 {
        let (sign, exponent, mantissa) = (if code >> 7 == 1 { -1.0 } else { 1.0 }, i32::from(code >> 3 & 15), f64::from(code & 7));
        match (exponent, code & 7) {
            (15, 7) => f64::NAN,
            (0, _) => sign * 2f64.powi(-6) * mantissa / 8.0,
            _ => sign * 2f64.powi(exponent - 7) * (1.0 + mantissa / 8.0),
        }
    }

    #[test]
    fn every_code_means_what_the_definition_says() {
        for code in 0..=255u8 {
            let (got, want) = (f64::from(e4m3_decode(code)), meaning(code));
            assert!(got == want || (got.is_nan() && want.is_nan()), "{code:#x}: {got} {want}");
            assert_eq!(got.is_sign_negative(), code >= 128, "{code:#x}");
            if !want.is_nan() {
                assert_eq!(e4m3_encode(want as f32), code, "{code:#x} comes back, both zeros too");
            }
        }
        let landmarks = [(0x7e, 448.0), (0x08, 2f32.powi(-6)), (0x01, 2f32.powi(-9)), (0x38, 1.0), (0xb8, -1.0)];
        assert!(landmarks.iter().all(|&(code, value)| e4m3_decode(code) == value));
    }

    /// Every f16 number, and the numbers beside each midpoint, against the nearest code by search.
    #[test]
    fn the_nearest_code_is_taken_and_ties_go_to_even() {
        let nearest = |v: f32| -> u8 {
            let distance = |c: &u8| (meaning(*c).abs() - f64::from(v.abs())).abs();
            let best = (0..0x7fu8).min_by(|a, b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))).unwrap();
            best | (u8::from(v.is_sign_negative()) << 7)
        };
        let halves = (0..=u16::MAX).map(|bits| half::f16::from_bits(bits).to_f32()).filter(|v| v.is_finite());
        let middles = (0..0x7eu8).flat_map(|c| {
            let middle = (meaning(c) + meaning(c + 1)) as f32 / 2.0;
            [middle.next_down(), middle, middle.next_up()]
        });
        for v in halves.chain(middles) {
            assert_eq!(e4m3_encode(v), nearest(v), "{v}");
        }
        for (v, code) in [(f32::INFINITY, 0x7e), (-1e9, 0xfe), (f32::NAN, 0x7f), (1e-30, 0), (-1e-30, 0x80)] {
            assert_eq!(e4m3_encode(v), code, "{v}");
        }
    }

    #[test]
    fn tensors_come_back_as_their_codes_say_in_every_type() -> Result<()> {
        let codes: Vec<u8> = (0..=255u8).filter(|c| c & 0x7f != 0x7f).cycle().take(508 * 10).collect();
        let t = Tensor::from_vec(codes.clone(), (508, 10), &Device::Cpu)?;
        let want: Vec<f32> = codes.iter().map(|&c| e4m3_decode(c)).collect();
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            for wide in [widen_codes(&t, dtype)?, select(&t, dtype)?] {
                assert_eq!((wide.dtype(), wide.dims()), (dtype, &[508, 10][..]));
                assert_eq!(wide.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?, want, "{dtype:?}");
            }
        }
        let again = e4m3_codes(&widen_codes(&t, DType::F16)?)?;
        assert_eq!(again.flatten_all()?.to_vec1::<u8>()?, codes);
        Ok(())
    }
}
