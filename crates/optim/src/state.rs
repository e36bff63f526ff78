//! The optimizer's state as named byte tensors, the form in which a trainer writes it to safetensors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use crate::{Error, Result};

/// Element type of a state tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDtype {
    /// Codes of a quantized moment.
    U8,
    /// Little-endian f32.
    F32,
}

impl fmt::Display for StateDtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::U8 => "U8",
            Self::F32 => "F32",
        })
    }
}

/// One named tensor of the state.
///
/// | name | type, shape | what |
/// |---|---|---|
/// | `{index}.state1` | F32 or U8 `[n]` | first moment, or its codes (with `absmax1`) |
/// | `{index}.absmax1` | F32 `[ceil(n / 256)]` | Lion8bit: largest magnitude of each block |
/// | `{index}.state2` | F32 `[n]` | AdamW: second moment |
/// | `{index}.step` | F32 `[]` | AdamW: steps taken |
///
/// `index` is the parameter's place in the optimizer, `n` its number of elements; the names are those of bitsandbytes'
/// state dict, numbers are little endian. A parameter that was never stepped has no tensors and counts as zero.
#[derive(Debug, Clone, PartialEq)]
pub struct StateTensor<'a> {
    /// `{index}.state1`, `{index}.absmax1`, `{index}.state2` or `{index}.step`.
    pub name: String,
    /// Element type.
    pub dtype: StateDtype,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
    /// The elements' bytes, little endian.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> StateTensor<'a> {
    pub(crate) fn u8(name: String, values: &'a [u8]) -> Self {
        Self { name, dtype: StateDtype::U8, shape: vec![values.len()], bytes: Cow::Borrowed(values) }
    }

    pub(crate) fn f32(name: String, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name, dtype: StateDtype::F32, shape: vec![values.len()], bytes: Cow::Owned(bytes) }
    }

    pub(crate) fn scalar(name: String, value: f32) -> Self {
        Self { shape: vec![], ..Self::f32(name, &[value]) }
    }
}

/// State tensors by name, taken out one after another; what is left at the end has no place.
pub(crate) struct Incoming<'a>(BTreeMap<String, StateTensor<'a>>);

impl<'a> Incoming<'a> {
    pub fn new(tensors: impl IntoIterator<Item = StateTensor<'a>>) -> Result<Self> {
        let mut map = BTreeMap::new();
        for tensor in tensors {
            if let Some(twice) = map.insert(tensor.name.clone(), tensor) {
                return Err(Error::StateTwice { name: twice.name });
            }
        }
        Ok(Self(map))
    }

    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub fn first_left(self) -> Option<String> {
        self.0.into_keys().next()
    }

    pub fn u8(&mut self, name: String, len: usize) -> Result<Vec<u8>> {
        Ok(self.take(name, StateDtype::U8, &[len])?.into_owned())
    }

    pub fn f32(&mut self, name: String, len: usize) -> Result<Vec<f32>> {
        Ok(floats(&self.take(name, StateDtype::F32, &[len])?))
    }

    pub fn scalar(&mut self, name: String) -> Result<f32> {
        Ok(floats(&self.take(name, StateDtype::F32, &[])?)[0])
    }

    fn take(&mut self, name: String, dtype: StateDtype, shape: &[usize]) -> Result<Cow<'a, [u8]>> {
        let Some(tensor) = self.0.remove(&name) else { return Err(Error::StateMissing { name }) };
        if tensor.dtype != dtype {
            return Err(Error::StateDtype { name, found: tensor.dtype, wants: dtype });
        }
        if tensor.shape != shape {
            return Err(Error::StateShape { name, found: tensor.shape, wants: shape.to_vec() });
        }
        let width = if dtype == StateDtype::F32 { 4 } else { 1 };
        let wants = width * shape.iter().product::<usize>();
        if tensor.bytes.len() != wants {
            return Err(Error::StateBytes { name, found: tensor.bytes.len(), wants });
        }
        Ok(tensor.bytes)
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}
