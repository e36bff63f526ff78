//! Files there and back.

use super::tiny::{forward, model, tiny_config, trees};
use super::{difference, golden};
use crate::{Error, LokrNetwork, Module, NetworkConfig, ParameterGroup, Preset, SaveDtype, SaveOptions, Trees, inspect};
use candle_core::{DType, Device, Tensor};
use random::{Purpose, Stream};
use sdxl::layers::{Conv2d, Leaf, Linear, ModuleNode, ModuleTree, Norm};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use storage::safetensors::{Dtype, SafeTensors, TensorSource};

pub(super) const F32: SaveOptions = SaveOptions { dtype: SaveDtype::F32, fold_scale: false };

/// Values that are not zero.
fn fill(network: &LokrNetwork) {
    for (i, (_, p)) in network.parameters().iter().enumerate() {
        let values = Stream::new(9, Purpose::Noise, i as u64, 0).normal(p.tensor().elem_count());
        let values = values.into_iter().map(|v| 0.1 * v).collect::<Vec<_>>();
        p.set(Tensor::from_vec(values, p.tensor().shape(), &Device::Cpu).expect("a tensor")).expect("same shape");
    }
}

/// A network of one linear layer, a 3x3 and a 1x1 convolution and a norm.
pub(super) struct Small {
    tree: ModuleTree,
}

impl Small {
    pub(super) fn new() -> Self {
        let tensor = |seed: u64, dims: &[usize]| {
            Tensor::from_vec(Stream::new(seed, Purpose::Noise, 1, 0).normal(dims.iter().product()), dims, &Device::Cpu).expect("a tensor")
        };
        let leaf = |path: &str, class, leaf| ModuleNode { path: path.into(), class, leaf };
        let ones = tensor(5, &[64]);
        let nodes = vec![
            leaf("", "Net", Leaf::Other),
            leaf("block", "Block", Leaf::Other),
            leaf("block.lin", "Linear", Leaf::Linear(Linear::new(tensor(1, &[64, 96]), None).into())),
            leaf("block.conv", "Conv2d", Leaf::Conv2d(Conv2d::new(tensor(2, &[64, 64, 3, 3]), None, 1, 1).into())),
            leaf("block.one", "Conv2d", Leaf::Conv2d(Conv2d::new(tensor(3, &[64, 64, 1, 1]), None, 1, 0).into())),
            leaf("block.norm", "LayerNorm", Leaf::Norm(Norm::new(ones.clone(), ones, 1e-5, None).expect("a norm").into())),
        ];
        Self { tree: ModuleTree { nodes } }
    }

    pub(super) fn trees(&self) -> Trees<'_> {
        Trees { unet: Some(&self.tree), ..Trees::default() }
    }

    fn config(change: impl FnOnce(&mut NetworkConfig)) -> NetworkConfig {
        let preset = Preset::parse("small", "unet_target_module = ['Block']").expect("reads");
        let mut config = NetworkConfig { dim: 2, alpha: 1.0, factor: 4, train_norm: true, ..NetworkConfig::new(preset) };
        change(&mut config);
        config
    }

    /// A filled network, saved.
    pub(super) fn saved(&self, folder: &Path, options: SaveOptions, change: impl FnOnce(&mut NetworkConfig)) -> (LokrNetwork, PathBuf) {
        let network = LokrNetwork::create(&Self::config(change), self.trees()).expect("made");
        fill(&network);
        let path = folder.join("a.safetensors");
        network.save(&path, options, &BTreeMap::new()).expect("saves");
        (network, path)
    }

    /// What the adapter makes of each layer's weight.
    fn merged(&self, network: &LokrNetwork) -> Vec<Tensor> {
        let weight = |node: &ModuleNode| match &node.leaf {
            Leaf::Linear(l) => l.weight.tensor().ok(),
            Leaf::Conv2d(l) => l.weight.tensor().ok(),
            Leaf::Norm(l) => Some(l.weight.clone()),
            Leaf::Other => None,
        };
        let merge = |node: &ModuleNode| {
            let name = format!("{}.weight", node.path);
            network.merged_weight(ParameterGroup::Unet, &name, &weight(node)?, 1.0, Default::default()).expect("merges")
        };
        self.tree.nodes.iter().filter_map(merge).collect()
    }
}

/// A copy of a file with `edit` made to each tensor; `None` leaves it out.
pub(super) fn rewrite(
    path: &Path,
    edit: impl Fn(&str, Dtype, Vec<usize>, Vec<u8>) -> Option<(String, Dtype, Vec<usize>, Vec<u8>)>,
) -> PathBuf {
    let file = SafeTensors::open(path).expect("opens");
    let source = |name: &str| {
        let (info, bytes) = file.info(name).zip(file.bytes(name)).expect("a tensor");
        let (name, dtype, shape, bytes) = edit(name, info.dtype, info.shape.clone(), bytes.to_vec())?;
        Some(TensorSource { name, dtype, shape, data: Box::new(move || Cow::Owned(bytes.clone())) })
    };
    let sources = file.names().filter_map(source).collect();
    let target = path.with_file_name("edited.safetensors");
    storage::safetensors::write(&target, sources, file.metadata()).expect("writes");
    target
}

pub(super) fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

#[test]
fn every_form_comes_back_with_the_same_effect() {
    let small = Small::new();
    for (what, change) in [
        ("low rank", (|_: &mut NetworkConfig| {}) as fn(&mut NetworkConfig)),
        ("full", |c| c.full_matrix = true),
        ("both", |c| (c.decompose_both, c.dim) = (true, 1)),
        ("tucker", |c| c.use_tucker = true),
        ("rs_lora", |c| c.rs_lora = true),
        ("unbalanced", |c| (c.unbalanced_factorization, c.factor) = (true, 2)),
        ("unbalanced and both", |c| (c.unbalanced_factorization, c.decompose_both, c.factor, c.dim) = (true, true, 2, 7)),
        ("scalar", |c| c.use_scalar = true),
        ("alpha", |c| c.alpha = 5.0),
    ] {
        for fold_scale in [false, true] {
            let folder = folder();
            let (network, path) = small.saved(folder.path(), SaveOptions { dtype: SaveDtype::F32, fold_scale }, change);
            let before = small.merged(&network);
            let again = LokrNetwork::from_file(&path, small.trees()).expect("reads");
            assert_eq!(again.unmatched(), Vec::<String>::new());
            for (got, want) in small.merged(&again).iter().zip(&before) {
                // Folding and the scalar round once more in f32; the merged weight is some 3, a product some 0.01.
                assert!(difference(got, want) < 3e-7, "{what}, folded {fold_scale}: {}", difference(got, want));
            }
            assert_eq!(small.merged(&again).len(), 4, "{what}");
            if fold_scale {
                let scales = |m: &Module| matches!(m, Module::Norm(_)) || matches!(m, Module::Lokr(m) if m.shape().scale == 1.0);
                assert!(again.entries().iter().all(|e| scales(&e.module)), "{what}: folded, every scale is 1");
            }
        }
    }
}

#[test]
fn rs_lora_with_full_factors_is_read_from_the_metadata_that_lycoris_trains_with() {
    let (small, folder) = (Small::new(), folder());
    let change = |c: &mut NetworkConfig| (c.rs_lora, c.full_matrix, c.dim) = (true, true, 4);
    let network = LokrNetwork::create(&Small::config(change), small.trees()).expect("made");
    fill(&network);
    let path = folder.path().join("rs.safetensors");
    for (args, fold_scale, right) in [
        (r#"{"algo": "lokr", "rs_lora": "True", "dropout": null}"#, false, true),
        (r#"{"algo": "lokr", "rs_lora": "True", "dropout": null}"#, true, true),
        // Nothing says rs_lora: as every reader, scale 1.
        (r#"{"algo": "lokr", "rs_lora": "False"}"#, false, false),
    ] {
        let metadata = BTreeMap::from([("ss_network_args".to_string(), args.to_string())]);
        let before = small.merged(&network);
        network.save(&path, SaveOptions { dtype: SaveDtype::F32, fold_scale }, &metadata).expect("saves");
        let again = LokrNetwork::from_file(&path, small.trees()).expect("reads");
        let same = small.merged(&again).iter().zip(&before).all(|(got, want)| difference(got, want) < 3e-7);
        assert_eq!(same, right, "{args}, folded {fold_scale}");
    }
}

#[test]
fn half_precision_files_come_back_rounded_once() {
    let small = Small::new();
    for dtype in [SaveDtype::F16, SaveDtype::Bf16] {
        let folder = folder();
        let (network, path) = small.saved(folder.path(), SaveOptions { dtype, fold_scale: false }, |_| {});
        let again = LokrNetwork::from_file(&path, small.trees()).expect("reads");
        let file = if dtype == SaveDtype::F16 { DType::F16 } else { DType::BF16 };
        for ((_, before), (_, after)) in network.parameters().iter().zip(again.parameters()) {
            let rounded = before.tensor().to_dtype(file).and_then(|t| t.to_dtype(DType::F32)).expect("rounded");
            assert_eq!(difference(&after.tensor(), &rounded), 0.0, "{}", before.name());
        }
    }
}

#[test]
fn a_huge_dim_gives_a_finite_alpha() {
    let (small, folder) = (Small::new(), folder());
    let f16 = SaveOptions { dtype: SaveDtype::F16, fold_scale: false };
    let (_, path) = small.saved(folder.path(), f16, |c| c.dim = 100_000);
    let summary = inspect(&path).expect("reads");
    assert_eq!(summary.suspicious, Vec::<String>::new());
    let again = LokrNetwork::from_file(&path, small.trees()).expect("reads");
    let alpha = again.entries().iter().find_map(|e| match &e.module {
        Module::Lokr(m) => Some(m.shape().alpha),
        Module::Norm(_) => None,
    });
    assert_eq!(alpha, Some(65504.0));
}

#[test]
fn an_alpha_that_does_not_fit_is_folded_into_the_factors() {
    let (small, folder) = (Small::new(), folder());
    let f16 = SaveOptions { dtype: SaveDtype::F16, fold_scale: false };
    let (network, path) = small.saved(folder.path(), f16, |c| c.alpha = 1e5);
    let again = LokrNetwork::from_file(&path, small.trees()).expect("reads");
    for (got, want) in small.merged(&again).iter().zip(small.merged(&network)) {
        // Three roundings to f16, 2^-11 each, of values that dwarf the base weight.
        assert!(difference(got, &want) < 2e-3, "{}", difference(got, &want));
    }
}

#[test]
fn values_that_do_not_fit_are_refused_and_no_file_is_left() {
    let (small, folder) = (Small::new(), folder());
    let network = LokrNetwork::create(&Small::config(|_| {}), small.trees()).expect("made");
    let (_, parameter) = &network.parameters()[0];
    parameter.set((parameter.tensor() * 0.0).and_then(|t| t + 7e4).expect("large")).expect("same shape");
    let path = folder.path().join("a.safetensors");
    let save = |dtype| network.save(&path, SaveOptions { dtype, fold_scale: false }, &BTreeMap::new());
    let error = save(SaveDtype::F16).expect_err("does not fit");
    assert_eq!(error.to_string(), "`lora_unet_block_lin.lokr_w1` holds 70000, which cannot be saved as f16");
    assert!(error.hint().is_some_and(|h| h.contains("bf16")));
    assert!(!path.exists());
    save(SaveDtype::Bf16).expect("fits");
    parameter.set((parameter.tensor() * f64::NAN).expect("NaN")).expect("same shape");
    assert!(matches!(save(SaveDtype::F32), Err(Error::NotFinite { .. })));
}

#[test]
fn one_by_one_kernels_are_read_flat_and_with_their_ones() {
    let (small, folder) = (Small::new(), folder());
    let (network, path) = small.saved(folder.path(), F32, |c| c.full_matrix = true);
    let flat = rewrite(&path, |key, dtype, shape, bytes| {
        let shape = if key.ends_with("one.lokr_w2") {
            shape[..2].to_vec()
        } else if key.ends_with("lin.lokr_w2") {
            [shape, vec![1, 1]].concat()
        } else {
            shape
        };
        Some((key.into(), dtype, shape, bytes))
    });
    let before = small.merged(&network);
    let again = LokrNetwork::from_file(&flat, small.trees()).expect("reads");
    for (got, want) in small.merged(&again).iter().zip(&before) {
        assert_eq!(difference(got, want), 0.0);
    }
}

#[test]
fn files_of_other_programs_are_read_by_their_names() {
    let model = model();
    let network = LokrNetwork::create(&tiny_config(), trees(&model)).expect("made");
    fill(&network);
    let folder = folder();
    let path = folder.path().join("a.safetensors");
    network.save(&path, F32, &BTreeMap::new()).expect("saves");
    let want = forward(&model);
    for style in 1..5 {
        let renamed = rewrite(&path, |key, dtype, shape, bytes| {
            let (module, tensor) = key.rsplit_once('.').expect("a key");
            let entry = network.entries().iter().find(|e| e.module.name() == module).expect("one of ours");
            let names = crate::names::aliases(entry.group, &entry.path);
            let name = names.get(style).unwrap_or(&names[0]);
            Some((format!("{name}.{tensor}"), dtype, shape, bytes))
        });
        let again = LokrNetwork::from_file(&renamed, trees(&model)).expect("reads");
        assert_eq!((again.unmatched().len(), again.entries().len()), (0, network.entries().len()), "style {style}");
        assert_eq!(difference(forward(&model)[3].tensor(), want[3].tensor()), 0.0, "style {style}");
    }
}

#[test]
fn a_look_into_a_file_counts_what_is_there() {
    let summary = inspect(&golden::path("lokr-tiny.safetensors")).expect("reads");
    assert_eq!(summary.algo, "lokr");
    let modules: Vec<_> = summary.groups.iter().map(|g| (g.group, g.modules, g.norms)).collect();
    assert_eq!(
        modules,
        [(Some(ParameterGroup::TextEncoder1), 18, 0), (Some(ParameterGroup::TextEncoder2), 24, 0), (Some(ParameterGroup::Unet), 260, 0)]
    );
    assert_eq!(summary.ranks.iter().map(|(&r, &n)| (r, n)).collect::<Vec<_>>(), [(0, 288), (2, 14)]);
    assert_eq!(summary.factors.values().sum::<usize>(), 302);
    assert_eq!(summary.dtypes.keys().collect::<Vec<_>>(), ["f32"]);
    assert_eq!(summary.metadata["ss_network_dim"], "4");
    assert_eq!(summary.suspicious, Vec::<String>::new());
    let delta = inspect(&golden::path("delta-tiny.safetensors")).expect("reads");
    assert_eq!((delta.algo, delta.groups.iter().map(|g| g.norms).sum::<usize>()), ("lokr + norm", 97));
    assert_eq!(delta.groups.iter().map(|g| g.parameters).sum::<usize>(), 237_368);
}
