//! Writing the diffusers layout: a folder for each part, the configs, the scheduler's and both tokenizers' files. The
//! folder is written under a scratch name beside the target and renamed at the end, so it is whole or absent.
//!
//! Tensors that diffusers has no place for (`logit_scale`, `position_ids`, `v_pred`) go as hex text into the metadata of
//! the part they stand with, so that a later export to a single file has them again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use storage::safetensors::Dtype;

use super::configs::{self, EXPORT_MARK};
use super::export::{self, Edit};
use super::{Aside, AsideBytes, Checkpoint, Part};
use crate::error::{Error, Result};
use crate::tokenizer::vocabulary::{BOS_TEXT, EOS_TEXT, Vocabulary};

/// Metadata key of a part's weights that holds the tensors without a place.
pub(super) const ASIDES: &str = "lokr.aside";
/// Larger ones are left out: nothing that programs look for in a single file is larger.
const ASIDE_LIMIT: usize = 4096;

/// What a part's weight files are called before ".safetensors".
pub(super) fn weights_stem(part: Part) -> &'static str {
    match part {
        Part::Unet | Part::Vae => "diffusion_pytorch_model",
        Part::TextEncoder1 | Part::TextEncoder2 => "model",
    }
}

/// A tensor as text, keyed by its name in a single file.
#[derive(Serialize, Deserialize)]
struct AsideText {
    dtype: Dtype,
    shape: Vec<usize>,
    hex: String,
}

/// The tensors that a folder's metadata holds.
pub(super) fn read_asides(folder: &Path, text: &str) -> Result<Vec<(String, Aside)>> {
    let fail = |source| Error::Json { path: folder.into(), what: format!("the metadata value `{ASIDES}`"), source };
    let asides: BTreeMap<String, AsideText> = serde_json::from_str(text).map_err(fail)?;
    let parse = |(name, AsideText { dtype, shape, hex }): (String, AsideText)| {
        let pairs = hex.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
        let bytes = pairs.collect::<Option<Vec<u8>>>().filter(|bytes| bytes.len() * 8 == shape.iter().product::<usize>() * dtype.bitsize());
        let bytes = bytes.ok_or_else(|| fail(serde::de::Error::custom(format!("`{name}` does not fit its shape {shape:?}"))))?;
        Ok((name, Aside { dtype, shape, bytes: AsideBytes::Held(bytes) }))
    };
    asides.into_iter().map(parse).collect()
}

fn asides_text(checkpoint: &Checkpoint, part: Part) -> Option<String> {
    let mut texts = BTreeMap::new();
    for (name, aside) in &checkpoint.asides {
        let at = Part::ALL.into_iter().find(|part| name.starts_with(part.prefix())).unwrap_or(Part::Unet);
        let bytes = checkpoint.aside_bytes(name, aside);
        if at == part && bytes.len() <= ASIDE_LIMIT {
            let hex = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            texts.insert(name, AsideText { dtype: aside.dtype, shape: aside.shape.clone(), hex });
        }
    }
    (!texts.is_empty()).then(|| json!(texts).to_string())
}

/// Writes the folder.
pub(super) fn write(
    checkpoint: &Checkpoint,
    target: &Path,
    dtype: Option<DType>,
    metadata: &BTreeMap<String, String>,
    edit: &Edit,
) -> Result<()> {
    if let Some(&part) = Part::ALL.iter().find(|&&part| !checkpoint.has_part(part)) {
        return Err(checkpoint.missing(part, ""));
    }
    refuse_foreign(target)?;
    // Derived before anything is written: a model that has no config is refused at once.
    let part_configs = Part::ALL.iter().map(|&part| configs::part_config(checkpoint, part)).collect::<Result<Vec<Value>>>()?;
    let scratch = sibling(target, "tmp")?;
    remove_if_there(&scratch)?;
    let result = write_into(checkpoint, &scratch, dtype, metadata, edit, &part_configs).and_then(|()| put_in_place(&scratch, target));
    if result.is_err() {
        // The first error is the one to tell.
        let _ = remove_if_there(&scratch);
    }
    result
}

fn write_into(
    checkpoint: &Checkpoint,
    folder: &Path,
    dtype: Option<DType>,
    metadata: &BTreeMap<String, String>,
    edit: &Edit,
    part_configs: &[Value],
) -> Result<()> {
    for (part, config) in Part::ALL.into_iter().zip(part_configs) {
        let inner = folder.join(part.folder());
        storage::create_dir_all(&inner)?;
        write_json(&inner.join("config.json"), config)?;
        // transformers refuses a file whose metadata does not name the format.
        let mut own = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        if part == Part::Unet {
            own.extend(metadata.clone());
        }
        own.extend(asides_text(checkpoint, part).map(|text| (ASIDES.to_owned(), text)));
        let plan = export::diffusers_plan(checkpoint, part);
        export::write_tensors(checkpoint, &inner.join(format!("{}.safetensors", weights_stem(part))), plan, &[], dtype, &own, edit)?;
    }
    let said = metadata.get("modelspec.prediction_type").map(String::as_str).or(checkpoint.prediction_type());
    let scheduler = folder.join("scheduler");
    storage::create_dir_all(&scheduler)?;
    write_json(&scheduler.join("scheduler_config.json"), &configs::scheduler(checkpoint, said.is_some_and(|word| word.starts_with('v'))))?;
    let vocabulary = Vocabulary::read()?;
    write_tokenizer(&folder.join("tokenizer"), &vocabulary, EOS_TEXT)?;
    // te2 pads with id 0.
    write_tokenizer(&folder.join("tokenizer_2"), &vocabulary, &vocabulary.tokens[0])?;
    write_json(&folder.join("model_index.json"), &configs::model_index())
}

fn write_tokenizer(folder: &Path, vocabulary: &Vocabulary, pad: &str) -> Result<()> {
    storage::create_dir_all(folder)?;
    let token = |content: &str| json!({ "content": content, "lstrip": false, "normalized": true, "rstrip": false, "single_word": false });
    let mut typed = [token(BOS_TEXT), token(EOS_TEXT)];
    write_json(
        &folder.join("special_tokens_map.json"),
        &json!({ "bos_token": typed[0], "eos_token": typed[1], "pad_token": pad, "unk_token": typed[1] }),
    )?;
    for token in &mut typed {
        token["__type"] = "AddedToken".into();
    }
    write_json(
        &folder.join("tokenizer_config.json"),
        &json!({
            "add_prefix_space": false,
            "bos_token": typed[0],
            "clean_up_tokenization_spaces": true,
            "do_lower_case": true,
            "eos_token": typed[1],
            "errors": "replace",
            "model_max_length": 77,
            "pad_token": pad,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": typed[1],
        }),
    )?;
    let ids: serde_json::Map<String, Value> = vocabulary.tokens.iter().cloned().zip((0..).map(|id: u32| Value::from(id))).collect();
    storage::write_whole(&folder.join("vocab.json"), Value::Object(ids).to_string().as_bytes())?;
    let mut merges = String::from("#version: 0.2\n");
    vocabulary.merges.iter().for_each(|(a, b)| merges.extend([a, " ", b, "\n"]));
    Ok(storage::write_whole(&folder.join("merges.txt"), merges.as_bytes())?)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    Ok(storage::write_whole(path, format!("{value:#}\n").as_bytes())?)
}

/// Only a folder that is empty, or that an export wrote, may be replaced.
fn refuse_foreign(target: &Path) -> Result<()> {
    let taken = |what| Err(Error::TargetTaken { path: target.into(), what });
    if !target.exists() {
        return Ok(());
    }
    if !target.is_dir() {
        return taken("a file is there, and the diffusers layout is a folder");
    }
    if storage::list_dir(target)?.is_empty() {
        return Ok(());
    }
    let index = storage::read_to_string(&target.join("model_index.json")).ok();
    let index: Option<Value> = index.and_then(|text| serde_json::from_str(&text).ok());
    if index.is_some_and(|index| index.get(EXPORT_MARK).is_some()) {
        return Ok(());
    }
    taken("the folder holds files that no export has written")
}

/// Renames the finished folder to the target. An older export steps aside first and is deleted last; a kill between the
/// renames leaves it under its `.old` name.
fn put_in_place(scratch: &Path, target: &Path) -> Result<()> {
    if !target.exists() {
        return Ok(storage::rename(scratch, target)?);
    }
    let old = sibling(target, "old")?;
    remove_if_there(&old)?;
    storage::rename(target, &old)?;
    if let Err(error) = storage::rename(scratch, target) {
        storage::rename(&old, target)?;
        return Err(error.into());
    }
    Ok(storage::remove_dir_all(&old)?)
}

fn remove_if_there(folder: &Path) -> Result<()> {
    match storage::remove_dir_all(folder) {
        Err(error) if !error.is_not_found() => Err(error.into()),
        _ => Ok(()),
    }
}

/// `.{name}.{word}-{pid}` beside the target.
fn sibling(target: &Path, word: &str) -> Result<PathBuf> {
    let Some(name) = target.file_name() else {
        return Err(Error::TargetTaken { path: target.into(), what: "the path names no folder" });
    };
    let mut sibling = std::ffi::OsString::from(".");
    sibling.push(name);
    sibling.push(format!(".{word}-{}", std::process::id()));
    Ok(target.with_file_name(sibling))
}
