//! Which layers a preset reaches, on descriptions of SDXL's trees: the counts that LyCORIS 4.1.3 gives on sd-scripts'
//! UNet and CLIP, and the rules of the walk.

use super::sdxl_tree::{Tree, clip, unet};
use crate::config::NetworkConfig;
use crate::group::ParameterGroup::{TextEncoder1, TextEncoder2, Unet};
use crate::walk::{Plan, PlannedKind, plan};
use crate::{Error, Preset};

fn sdxl(config: &NetworkConfig) -> Result<Plan, Error> {
    let trees = [(TextEncoder1, clip(768, 12)), (TextEncoder2, clip(1280, 32)), (Unet, unet())];
    plan(config, &trees.each_ref().map(|(group, tree)| (*group, tree.nodes())))
}

fn config(preset: &str) -> NetworkConfig {
    NetworkConfig { factor: 8, full_matrix: true, ..NetworkConfig::new(Preset::load(preset).expect("built in")) }
}

fn custom(text: &str) -> NetworkConfig {
    NetworkConfig { factor: 8, full_matrix: true, ..NetworkConfig::new(Preset::parse("test", text).expect("reads")) }
}

/// Modules, norms, parameters of the networks that `keep` takes.
fn counts(plan: &Plan, text: bool) -> (usize, usize, usize) {
    let mut sums = (0, 0, 0);
    for module in plan.modules.iter().filter(|m| m.group.is_text_encoder() == text) {
        match &module.kind {
            PlannedKind::Lokr { shape, .. } => {
                sums.0 += 1;
                sums.2 += shape.parameters();
            }
            PlannedKind::Norm(channels) => {
                sums.1 += 1;
                sums.2 += 2 * channels;
            }
        }
    }
    sums
}

#[test]
fn every_preset_reaches_what_lycoris_reaches_on_sdxl() {
    for (preset, text, unet, total) in [
        ("full", 264, 788, 51_202_432),
        ("full-lin", 264, 750, 46_203_200),
        ("attn-mlp", 264, 722, 45_716_608),
        ("attn-only", 176, 560, 18_691_072),
        ("unet-only", 0, 788, 40_028_032),
        ("unet-transformer-only", 0, 722, 34_542_208),
        ("unet-convblock-only", 0, 66, 5_485_824),
    ] {
        let plan = sdxl(&config(preset)).expect("plans");
        let (te, net) = (counts(&plan, true), counts(&plan, false));
        assert_eq!((te.0, net.0, te.2 + net.2), (text, unet, total), "{preset}");
        assert_eq!(plan.unmatched, Vec::<String>::new(), "{preset}");
    }
}

#[test]
fn norms_are_those_inside_targeted_blocks() {
    let plan = sdxl(&NetworkConfig { train_norm: true, ..config("full") }).expect("plans");
    let (te, net) = (counts(&plan, true), counts(&plan, false));
    assert_eq!((te.1, net.1), (0, 255));
    assert_eq!(te.2 + net.2 - 51_202_432, 587_520);
}

#[test]
fn kohaku_xl_delta_has_the_parameters_that_were_published() {
    let preset = Preset::load("kohaku-xl-delta").expect("built in");
    let config = NetworkConfig {
        dim: 10_000,
        alpha: 10_000.0,
        conv_dim: Some(10_000),
        conv_alpha: Some(10_000.0),
        factor: 8,
        train_norm: true,
        ..NetworkConfig::new(preset)
    };
    let plan = sdxl(&config).expect("plans");
    assert_eq!(counts(&plan, true), (264, 0, 1_331_712 + 9_842_688));
    assert_eq!(counts(&plan, false), (794, 256, 372_882_800 + 588_160));
    assert_eq!(plan.unmatched, Vec::<String>::new());
    let without = sdxl(&NetworkConfig { train_norm: false, ..config }).expect("plans");
    assert_eq!(counts(&without, true).2 + counts(&without, false).2, 384_057_200);
}

#[test]
fn names_and_order_are_kohyas() {
    let plan = sdxl(&config("full")).expect("plans");
    let names: Vec<&str> = plan.modules.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names[0], "lora_te1_text_model_encoder_layers_0_self_attn_k_proj");
    assert_eq!(names[72], "lora_te2_text_model_encoder_layers_0_self_attn_k_proj");
    assert_eq!(names[264], "lora_unet_input_blocks_1_0_in_layers_2");
    assert_eq!(*names.last().expect("some"), "lora_unet_output_blocks_8_0_skip_connection");
    for name in [
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_input_blocks_4_0_emb_layers_1",
        "lora_unet_input_blocks_7_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_output_blocks_2_2_conv",
        "lora_te2_text_model_encoder_layers_31_mlp_fc2",
    ] {
        assert!(names.contains(&name), "{name}");
    }
}

/// The scales and factors that a layer got.
fn factor_of(plan: &Plan, name: &str) -> (usize, usize) {
    let module = plan.modules.iter().find(|m| m.name == name).unwrap_or_else(|| panic!("no {name}"));
    match &module.kind {
        PlannedKind::Lokr { shape, .. } => (shape.a, shape.b),
        PlannedKind::Norm(_) => panic!("{name} is a norm"),
    }
}

const Q: &str = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q";
const PROJ_IN: &str = "lora_unet_input_blocks_4_1_proj_in";
const FF: &str = "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_2";

#[test]
fn the_innermost_class_with_a_table_wins_and_tables_do_not_merge() {
    let plan = sdxl(&custom(
        "[module_algo_map.Transformer2DModel]\nfactor = 16\n[module_algo_map.BasicTransformerBlock]\nfactor = 4\n\
         [module_algo_map.CrossAttention]\nfull_matrix = false\ndim = 1\n[module_algo_map.Linear]\nfactor = 2\n",
    ))
    .expect("plans");
    assert_eq!(factor_of(&plan, PROJ_IN), (2, 2), "Linear is the innermost class");
    let plan = sdxl(&custom(
        "[module_algo_map.Transformer2DModel]\nfactor = 16\n[module_algo_map.BasicTransformerBlock]\nfactor = 4\n\
         [module_algo_map.CrossAttention]\ndim = 1\nfull_matrix = false\n",
    ))
    .expect("plans");
    assert_eq!(factor_of(&plan, PROJ_IN), (16, 16));
    assert_eq!(factor_of(&plan, FF), (4, 4));
    assert_eq!(factor_of(&plan, Q), (8, 8), "CrossAttention's table has no factor: the network's own, not the outer table's");
}

#[test]
fn a_table_ends_with_its_module() {
    let plan = sdxl(&custom("[module_algo_map.CrossAttention]\nfactor = 2\n")).expect("plans");
    assert_eq!(factor_of(&plan, Q), (2, 2));
    assert_eq!(factor_of(&plan, FF), (8, 8));
    assert_eq!(factor_of(&plan, "lora_unet_input_blocks_4_1_proj_out"), (8, 8));
}

#[test]
fn a_leaf_in_a_block_that_is_also_named_is_a_duplicate() {
    let error = sdxl(&custom("unet_target_name = ['.*proj_in']")).expect_err("twice");
    assert!(matches!(&error, Error::Duplicate { path, .. } if path == "input_blocks.4.1.proj_in"), "{error}");
    // The pattern also matches the block: the block's walk is skipped and the pattern makes every leaf.
    let plan = sdxl(&custom("unet_target_name = ['input_blocks\\.4\\.1']")).expect("plans");
    let inside = plan.modules.iter().filter(|m| m.name.starts_with("lora_unet_input_blocks_4_1")).count();
    assert_eq!(inside, 2 + 2 * 10);
}

#[test]
fn options_by_name_hold_for_named_layers_only() {
    let plan = sdxl(&custom(
        "unet_target_name = ['time_embed']\n[name_algo_map.'time_embed\\.0']\nfactor = 2\n[name_algo_map.'.*proj_in']\nfactor = 2\n\
         [module_algo_map.Linear]\nfactor = 4\n",
    ))
    .expect("plans");
    assert_eq!(factor_of(&plan, "lora_unet_time_embed_0"), (2, 2));
    assert_eq!(factor_of(&plan, "lora_unet_time_embed_2"), (4, 4), "named, without a table by name: by class");
    assert_eq!(factor_of(&plan, PROJ_IN), (4, 4));
    assert_eq!(plan.unmatched, ["name_algo_map: .*proj_in"]);
}

#[test]
fn convolutions_need_conv_dim_or_a_table_with_a_dim() {
    let conv = |plan: &Plan| plan.modules.iter().filter(|m| m.name.ends_with("in_layers_2")).count();
    assert_eq!(conv(&sdxl(&config("full")).expect("plans")), 17);
    assert_eq!(conv(&sdxl(&NetworkConfig { conv_dim: Some(0), ..config("full") }).expect("plans")), 0);
    let plan = sdxl(&custom("enable_conv = false\n[module_algo_map.ResnetBlock2D]\ndim = 4\n")).expect("plans");
    assert_eq!(conv(&plan), 17);
    let one_by_one = plan.modules.iter().filter(|m| m.name.ends_with("skip_connection")).count();
    assert_eq!(one_by_one, 11);
}

#[test]
fn excluded_paths_are_left_alone_and_what_lies_below_is_tested_by_itself() {
    let base = sdxl(&config("full")).expect("plans").modules.len();
    let plan = sdxl(&custom("exclude_name = ['input_blocks\\.4\\.1$']")).expect("plans");
    assert_eq!(plan.modules.len(), base - 22, "the block itself is skipped, and nothing else leads to its leaves");
    let plan = sdxl(&custom("exclude_name = ['.*ff\\.net']")).expect("plans");
    assert!(!plan.modules.iter().any(|m| m.name.contains("ff_net")) && plan.modules.len() == base - 140);
    // An excluded class opens no table, but its leaves stay.
    let plan = sdxl(&custom("exclude_name = ['.*attn1$']\n[module_algo_map.CrossAttention]\nfactor = 2\n")).expect("plans");
    assert_eq!(factor_of(&plan, Q), (8, 8));
    assert_eq!(plan.modules.len(), base);
    assert_eq!(sdxl(&custom("exclude_name = ['nowhere']")).expect("plans").unmatched, ["exclude_name: nowhere"]);
}

#[test]
fn globs_match_whole_paths() {
    let plan = sdxl(&custom("use_fnmatch = true\nunet_target_module = []\nunet_target_name = ['*.to_q']\ntext_encoder_target_module = []"))
        .expect("plans");
    assert_eq!(plan.modules.len(), 140);
}

#[test]
fn targets_that_lead_to_nothing_are_listed() {
    let plan = sdxl(&custom(
        "unet_target_module = ['CrossAttention', 'SelfAttention']\nunet_target_name = ['conv_in', 'out\\.2']\n\
         text_encoder_target_module = ['CLIPMLP', 'CLIPSdpaAttention']\n[module_algo_map.GEGLU]\nfactor = 2\n",
    ))
    .expect("plans");
    assert_eq!(
        plan.unmatched,
        [
            "unet_target_module: SelfAttention",
            "unet_target_name: conv_in",
            "text_encoder_target_module: CLIPSdpaAttention",
            "module_algo_map: GEGLU"
        ]
    );
    let unet = unet();
    let only_unet = plan_unet(&custom("unet_target_module = ['CrossAttention']\ntext_encoder_target_module = ['Nothing']"), &unet);
    assert_eq!(only_unet.expect("plans").unmatched, Vec::<String>::new(), "a network that is not trained cannot be missed");
}

fn plan_unet(config: &NetworkConfig, tree: &Tree) -> Result<Plan, Error> {
    plan(config, &[(Unet, tree.nodes())])
}

#[test]
fn a_preset_that_adapts_nothing_is_an_error_that_names_its_targets() {
    let error = plan_unet(&custom("unet_target_module = ['Attention']"), &unet()).expect_err("nothing");
    assert_eq!(error.to_string(), "preset `test` adapts no layer of this model");
    assert_eq!(error.hint().as_deref(), Some("none of these led to a layer: unet_target_module: Attention"));
}

#[test]
fn what_is_not_written_is_refused_by_name() {
    let refused = |change: fn(&mut NetworkConfig)| {
        let mut config = config("full");
        change(&mut config);
        config.check().expect_err("refused").to_string()
    };
    assert!(refused(|c| c.dora_wd = true).starts_with("`dora_wd` is not supported yet"));
    assert!(refused(|c| c.rank_dropout = 0.1).starts_with("`rank_dropout` is not supported yet"));
    assert!(refused(|c| c.module_dropout = 0.1).starts_with("`module_dropout` is not supported yet"));
    assert!(refused(|c| c.dropout = 0.1).starts_with("`dropout` is not supported yet"));
    assert_eq!(refused(|c| c.alpha = f64::NAN), "`network_alpha` = NaN: must be a finite number");
}
