//! The adapter of the tiny SDXL against LyCORIS: module lists, outputs, gradients, merged weights, file hash. Bounds are
//! those of golden/README.md.

use super::{close, difference, golden};
use crate::{LokrNetwork, MergeScale, Module, NetworkConfig, ParameterGroup, Preset, SaveDtype, SaveOptions, Trees};
use candle_core::{DType, Device, Tensor};
use ops::Value;
use sdxl::checkpoint::{Checkpoint, HeadDims, Part};
use sdxl::conditioning::added_condition;
use sdxl::{GradientCheckpointing, Sdxl};
use std::collections::{BTreeMap, BTreeSet};
use storage::safetensors::SafeTensors;

/// tests/golden/tiny-sdxl.json
const TINY: HeadDims = HeadDims { head_dim: 8, norm_num_groups: 8, te1_heads: 2, te2_heads: 4, vae_norm_num_groups: 16 };

pub(super) fn checkpoint() -> Checkpoint {
    Checkpoint::open(&golden::path("tiny-sdxl.safetensors")).expect("golden file").with_head_dims(TINY)
}

pub(super) fn model() -> Sdxl {
    Sdxl::load(&checkpoint(), DType::F32).expect("loads")
}

pub(super) fn trees(model: &Sdxl) -> Trees<'_> {
    Trees { te1: Some(&model.te1.tree), te2: Some(&model.te2.tree), unet: Some(&model.unet.tree) }
}

/// LyCORIS reads the preset's `[name_algo_map."out\\.2$"]` as a pattern with two backslashes, which matches nothing, so that out.2
/// has the network's own factor; so do we.
pub(super) fn tiny_config() -> NetworkConfig {
    let bytes = storage::read(&golden::path("lokr-preset.toml")).expect("golden file");
    let text = String::from_utf8(bytes).expect("text");
    let preset = Preset::parse("lokr-preset.toml", &text).expect("reads");
    NetworkConfig { dim: 4, alpha: 1.0, factor: 8, full_matrix: true, ..NetworkConfig::new(preset) }
}

pub(super) fn delta_config(preset: Preset) -> NetworkConfig {
    NetworkConfig { dim: 10_000, alpha: 10_000.0, factor: 8, train_norm: true, ..NetworkConfig::new(preset) }
}

fn compare_list(network: &LokrNetwork, list: &serde_json::Value) -> usize {
    let list = list["modules"].as_array().expect("modules");
    assert_eq!(network.entries().len(), list.len());
    let mut total = 0;
    for (entry, want) in network.entries().iter().zip(list) {
        let name = want["name"].as_str().expect("name");
        assert_eq!(entry.module.name(), name, "the order is LyCORIS's");
        let mut ours: Vec<(String, Vec<usize>)> = entry
            .module
            .parameters()
            .iter()
            .map(|p| (p.name().rsplit('.').next().expect("a key").into(), p.tensor().dims().to_vec()))
            .collect();
        ours.sort();
        let mut theirs = golden::shapes(&want["shapes"]);
        theirs.sort();
        assert_eq!(ours, theirs, "{name}");
        total += ours.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum::<usize>();
        if let (Module::Lokr(module), Some(scale), Some(alpha)) = (&entry.module, want["scale"].as_f64(), want["alpha"].as_f64()) {
            assert_eq!((module.shape().scale, module.shape().alpha), (scale, alpha), "{name}");
        }
        if let Some(kind) = want["kind"].as_str() {
            assert_eq!(matches!(entry.module, Module::Norm(_)), kind == "NormModule", "{name}");
        }
    }
    total
}

#[test]
fn the_preset_gives_lycoris_module_list() {
    let model = model();
    let network = LokrNetwork::create(&tiny_config(), trees(&model)).expect("made");
    let total = compare_list(&network, &golden::json("lokr-tiny.json"));
    assert_eq!(network.summary().iter().map(|s| s.parameters).sum::<usize>(), total);
    assert_eq!(network.parameters().len(), network.entries().iter().map(|e| e.module.parameters().len()).sum::<usize>());
    assert_eq!(network.unmatched(), [r"name_algo_map: out\\.2$"], "which LyCORIS does not tell");
}

#[test]
fn kohaku_xl_deltas_preset_gives_lycoris_module_list_as_file_and_built_in() {
    let model = model();
    let list = golden::json("delta-tiny.json");
    for preset in [golden::path("delta-preset.toml").to_str().expect("a path"), "kohaku-xl-delta"] {
        let network = LokrNetwork::create(&delta_config(Preset::load(preset).expect("reads")), trees(&model)).expect("made");
        let total = compare_list(&network, &list);
        assert_eq!(total, list["parameters"].as_u64().expect("parameters") as usize);
        let sums = network.summary().iter().fold((0, 0, 0), |s, g| (s.0 + g.modules, s.1 + g.norms, s.2 + g.parameters));
        assert_eq!(sums, (306, 97, total));
    }
}

pub(super) fn ids(name: &str) -> Vec<Vec<u32>> {
    let file = SafeTensors::open(&golden::path("forward.safetensors")).expect("golden file");
    let (info, bytes) = file.info(name).zip(file.bytes(name)).expect("ids");
    let ids = Tensor::from_raw_buffer(bytes, DType::I64, &info.shape, &Device::Cpu).and_then(|t| t.to_dtype(DType::U32));
    ids.and_then(|t| t.to_vec2()).expect("rows of ids")
}

/// te1 and te2 penultimate, te2 pooled, UNet output, on the inputs that the golden outputs were made from.
pub(super) fn forward(model: &Sdxl) -> [Value; 4] {
    let inputs = golden::tensors("forward.safetensors");
    let time_ids = SafeTensors::open(&golden::path("forward.safetensors")).expect("golden file");
    let i64s = |name: &str| {
        let (info, bytes) = time_ids.info(name).zip(time_ids.bytes(name)).expect("a tensor");
        Tensor::from_raw_buffer(bytes, DType::I64, &info.shape, &Device::Cpu).expect("a tensor")
    };
    let run = || -> candle_core::Result<[Value; 4]> {
        let (ids1, ids2) = (ids("ids1"), ids("ids2"));
        let h1 = model.te1.penultimate(&ids1, GradientCheckpointing::None)?;
        let h2 = model.te2.penultimate(&ids2, GradientCheckpointing::None)?;
        let pooled = model.te2.pooled(&model.te2.last(&h2, GradientCheckpointing::None)?, &ids2)?;
        let context = ops::cat(&[&ops::narrow(&h1, 0, 0, 2)?, &ops::narrow(&h2, 0, 0, 2)?], 2)?;
        let vector = added_condition(&ops::narrow(&pooled, 0, 0, 2)?, &i64s("unet.0.time_ids"))?;
        let timesteps = i64s("unet.0.timesteps").to_dtype(DType::F32)?;
        let latents = Value::constant(inputs["unet.0.latents"].clone());
        let out = model.unet.forward(&latents, &timesteps, &context, &vector, GradientCheckpointing::None)?;
        Ok([h1, h2, pooled, out])
    };
    run().expect("runs")
}

fn absolute(got: &Tensor, want: &Tensor, tolerance: f32, what: &str) {
    assert_eq!(got.dims(), want.dims());
    let worst = (got - want).and_then(|t| t.abs()).and_then(|t| t.flatten_all()).and_then(|t| t.max(0)).and_then(|t| t.to_scalar::<f32>());
    let worst = worst.expect("a number");
    assert!(worst <= tolerance, "{what}: {worst}");
}

const OUTPUTS: [&str; 4] = ["te1.penultimate", "te2.penultimate", "te2.pooled", "unet.out"];

#[test]
fn a_lycoris_file_gives_lycoris_outputs_and_comes_off_again() {
    let model = model();
    let want = golden::tensors("lokr-tiny-outputs.safetensors");
    let before = forward(&model);
    let network = LokrNetwork::from_file(&golden::path("lokr-tiny.safetensors"), trees(&model)).expect("reads");
    assert_eq!(network.unmatched(), Vec::<String>::new());
    compare_list(&network, &golden::json("lokr-tiny.json"));
    for (value, name) in forward(&model).iter().zip(OUTPUTS) {
        absolute(value.tensor(), &want[name], 2e-4, name);
    }
    network.set_multiplier(0.0);
    absolute(forward(&model)[3].tensor(), &want["unet.out_without_adapter"], 2e-4, "multiplier 0");
    network.set_multiplier(1.0);
    network.detach();
    for (value, before) in forward(&model).iter().zip(&before) {
        assert_eq!(difference(value.tensor(), before.tensor()), 0.0, "detached, the model is the base model");
    }
}

#[test]
fn the_initial_adapter_changes_nothing_and_depends_on_the_seed_alone() {
    let model = model();
    let before = forward(&model);
    let first = LokrNetwork::create(&tiny_config(), trees(&model)).expect("made");
    for (value, before) in forward(&model).iter().zip(&before) {
        assert_eq!(difference(value.tensor(), before.tensor()), 0.0);
    }
    let values = |network: &LokrNetwork| -> Vec<Vec<f32>> {
        network.parameters().iter().map(|(_, p)| p.tensor().flatten_all().and_then(|t| t.to_vec1()).expect("values")).collect()
    };
    let again = LokrNetwork::create(&tiny_config(), trees(&model)).expect("made");
    assert_eq!(values(&first), values(&again));
    let other = LokrNetwork::create(&NetworkConfig { seed: 1, ..tiny_config() }, trees(&model)).expect("made");
    assert_ne!(values(&first), values(&other));
}

#[test]
fn kohaku_xl_delta_gives_lycoris_outputs_and_gradients() {
    let model = model();
    let want = golden::tensors("delta-tiny-outputs.safetensors");
    let network = LokrNetwork::from_file(&golden::path("delta-tiny.safetensors"), trees(&model)).expect("reads");
    let outputs = forward(&model);
    for (value, name) in outputs.iter().zip(OUTPUTS) {
        absolute(value.tensor(), &want[name], 2e-4, name);
    }
    ops::backward(vec![(outputs[3].clone(), want["cotangent"].clone())]).expect("runs backward");
    let list = golden::json("delta-tiny.json");
    let without: BTreeSet<&str> =
        list["without_gradient"].as_array().expect("a list").iter().map(|v| v.as_str().expect("a name")).collect();
    let mut compared = 0;
    for (_, parameter) in network.parameters() {
        let name = parameter.name();
        match parameter.grad() {
            None => assert!(without.contains(name), "{name} got no gradient"),
            Some(grad) => {
                assert!(!without.contains(name), "{name} got a gradient");
                close(&grad, &want[&format!("grad.{name}")], 1e-4, name);
                compared += 1;
            }
        }
    }
    assert_eq!(compared + without.len(), network.parameters().len());
}

/// The network that a single-file name belongs to, and its canonical name.
fn canonical(name: &str) -> (ParameterGroup, String) {
    for (part, group) in [(Part::Unet, ParameterGroup::Unet), (Part::TextEncoder1, ParameterGroup::TextEncoder1)] {
        if let Some(rest) = name.strip_prefix(part.prefix()) {
            return (group, rest.into());
        }
    }
    panic!("{name} is not in a network of the recorded merges");
}

#[test]
fn merged_weights_equal_lycoris_once_and_twice() {
    let model = model();
    let want = golden::tensors("lokr-tiny-outputs.safetensors");
    let base = golden::tensors("tiny-sdxl.safetensors");
    let network = LokrNetwork::from_file(&golden::path("lokr-tiny.safetensors"), trees(&model)).expect("reads");
    let (mut merged, mut untouched) = (0, 0);
    for (name, value) in want.iter().filter_map(|(key, value)| Some((key.strip_prefix("merged_weight.")?, value))) {
        let (group, path) = canonical(name);
        match network.merged_weight(group, &path, &base[name], 1.0, MergeScale::Once).expect("merges") {
            Some(tensor) => {
                close(&tensor, value, 2e-5, name);
                merged += 1;
            }
            None => {
                close(&base[name], value, 0.0, name);
                untouched += 1;
            }
        }
    }
    assert_eq!((merged, untouched), (6, 2));
    let name = "text_model.encoder.layers.0.mlp.fc1.weight";
    let tensor = &base[&format!("{}{name}", Part::TextEncoder1.prefix())];
    let merge = |scale| network.merged_weight(ParameterGroup::TextEncoder1, name, tensor, 1.0, scale).expect("merges").expect("adapted");
    let (once, twice) = (merge(MergeScale::Once) - tensor, merge(MergeScale::LycorisTwice) - tensor);
    let half = (once.expect("same shape") * 0.5).expect("scaled");
    // The differences carry the f32 rounding of weights that are some hundred times larger.
    close(&twice.expect("same shape"), &half, 1e-4, "scale 0.5, applied twice");
}

#[test]
fn a_model_of_merged_weights_gives_the_adapted_outputs() {
    let model = model();
    let folder = tempfile::tempdir().expect("a folder");
    for adapter in ["lokr-tiny", "delta-tiny"] {
        let network = LokrNetwork::from_file(&golden::path(&format!("{adapter}.safetensors")), trees(&model)).expect("reads");
        let target = folder.path().join(format!("{adapter}.safetensors"));
        let edit = |part: Part, name: &str, tensor: Tensor| {
            let tensor = tensor.to_dtype(DType::F32)?;
            let Some(group) = ParameterGroup::of(part) else { return Ok(tensor) };
            let merged = network.merged_weight(group, name, &tensor, 1.0, MergeScale::Once).expect("merges");
            Ok(merged.unwrap_or(tensor))
        };
        sdxl::checkpoint::export(&checkpoint(), &target, sdxl::checkpoint::Layout::SingleFile, Some(DType::F32), &BTreeMap::new(), &edit)
            .expect("exports");
        network.detach();
        let merged = Sdxl::load(&Checkpoint::open(&target).expect("opens").with_head_dims(TINY), DType::F32).expect("loads");
        let want = golden::tensors(&format!("{adapter}-outputs.safetensors"));
        for (value, name) in forward(&merged).iter().zip(OUTPUTS) {
            absolute(value.tensor(), &want[name], 2e-4, &format!("{adapter} {name}"));
        }
    }
}

#[test]
fn a_base_tensor_of_another_shape_is_refused() {
    let model = model();
    let network = LokrNetwork::from_file(&golden::path("lokr-tiny.safetensors"), trees(&model)).expect("reads");
    let wrong = Tensor::zeros((3, 5), DType::F32, &Device::Cpu).expect("zeros");
    let merge = |name: &str| network.merged_weight(ParameterGroup::Unet, name, &wrong, 1.0, MergeScale::Once);
    let error = merge("input_blocks.4.1.proj_in.weight").expect_err("another shape");
    assert_eq!(error.to_string(), "cannot merge `input_blocks.4.1.proj_in.weight` of shape [3, 5] with an adapter of shape [32, 32]");
    assert!(merge("input_blocks.4.1.proj_in.bias").expect("no module").is_none());
    assert!(merge("nowhere.weight").expect("no module").is_none());
}

#[test]
fn a_saved_lycoris_file_has_lycoris_hash_and_alphas() {
    let model = model();
    let path = golden::path("lokr-tiny.safetensors");
    let original = SafeTensors::open(&path).expect("golden file");
    let network = LokrNetwork::from_file(&path, trees(&model)).expect("reads");
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("again.safetensors");
    let mut metadata = original.metadata().clone();
    let hash = metadata.remove("sshs_model_hash").expect("a hash");
    let options = SaveOptions { dtype: SaveDtype::F32, fold_scale: false };
    assert_eq!(network.save(&target, options, &metadata).expect("saves"), hash);
    let again = SafeTensors::open(&target).expect("opens");
    assert_eq!(again.metadata(), original.metadata());
    assert_eq!(again.names().collect::<Vec<_>>(), original.names().collect::<Vec<_>>());
    for name in original.names() {
        assert_eq!((again.info(name), again.bytes(name)), (original.info(name), original.bytes(name)), "{name}");
    }
}
