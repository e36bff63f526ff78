//! The arithmetic of the GPU's kernels (kernels/lion8bit.h), built by the host's C++ compiler, against the Rust code: bit for bit.
//! Without a compiler named `CXX` or `g++` there is nothing to compare, and the tests say so.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use optim::lion::LionRule;
use optim::lion8bit::{BLOCK, Lion8bit};
use optim::map::dynamic_map;
use proptest::prelude::*;

/// The program of kernels/host.cpp; `None` where it cannot be built for lack of a compiler.
static PROGRAM: LazyLock<Option<String>> = LazyLock::new(|| {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let out = format!("{}/optim-kernels-{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/host.cpp");
    match Command::new(&compiler).args(["-std=c++17", "-O2", "-ffp-contract=off", "-o", &out, source]).output() {
        Ok(done) => {
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            Some(out)
        }
        Err(_) => {
            eprintln!("skipped: there is no C++ compiler `{compiler}`, so the kernels were not compared");
            None
        }
    }
});

/// Runs the program on a case; `None` where it is not there.
fn host(what: u32, rule: &LionRule, factor: f32, p: &[f32], g: &[f32], momentum: &[u8]) -> Option<Vec<u8>> {
    let program = PROGRAM.as_ref()?;
    let mut input = Vec::new();
    input.extend([what, p.len() as u32].into_iter().flat_map(u32::to_le_bytes));
    let numbers = [rule.beta1, rule.beta2, rule.gradient1, rule.gradient2, rule.lr, rule.decay, factor];
    input.extend(numbers.iter().chain(&dynamic_map().values).chain(p).chain(g).flat_map(|v| v.to_le_bytes()));
    input.extend(momentum);
    let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it was just built");
    let mut stdin = child.stdin.take().expect("piped");
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().expect("it ends");
    writer.join().expect("no panic").expect("it reads its input");
    assert!(output.status.success(), "{output:?}");
    Some(output.stdout)
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Zeros of both signs, denormals, the largest values, and all between.
fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -2.0f32..2.0,
        2 => (-38i32..10).prop_flat_map(|e| (-1.0f32..1.0).prop_map(move |m| m * 10f32.powi(e))),
        1 => prop::sample::select(vec![0.0, -0.0, 1e-45, -1e-45, f32::MIN_POSITIVE, 1.0, -1.0]),
    ]
}

fn rule() -> impl Strategy<Value = LionRule> {
    let betas = prop::sample::select(vec![(0.9, 0.99), (0.9, 0.95), (0.0, 0.0), (0.95, 0.98)]);
    (betas, prop::sample::select(vec![0.0, 0.1]), 0.0f32..1e-2).prop_map(|(betas, decay, lr)| LionRule::new(betas, decay, lr))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn lion8bit_equals_the_rust_code(
        rule in rule(), factor in prop::sample::select(vec![1.0f32, 0.25, 1.0 / 65536.0, 0.3]),
        // Whole blocks, and short last ones.
        n in prop::sample::select(vec![4096usize, 4097, 4351, 5000]), seeds in prop::collection::vec((number(), number(), any::<u8>()), 64),
        blocks in prop::collection::vec(number(), 20), quiet in any::<bool>(),
    ) {
        let at = |i: usize| &seeds[(i * 7 + i / 64) % 64];
        let p: Vec<f32> = (0..n).map(|i| at(i).0).collect();
        let g: Vec<f32> = (0..n).map(|i| if quiet && i > 300 { 0.0 } else { at(i).1 }).collect();
        let codes: Vec<u8> = (0..n).map(|i| at(i).2.wrapping_add(i as u8)).collect();
        let absmax: Vec<f32> = (0..n.div_ceil(BLOCK)).map(|b| if quiet { 0.0 } else { blocks[b].abs() }).collect();
        let mut momentum = codes.clone();
        momentum.extend(bytes(&absmax));
        if let Some(got) = host(0, &rule, factor, &p, &g, &momentum) {
            let scaled: Vec<f32> = g.iter().map(|g| if factor == 1.0 { *g } else { g * factor + 0.0 }).collect();
            let (mut p, mut state) = (p, Lion8bit::Blockwise { codes, absmax });
            state.step(&rule, &mut p, &scaled);
            let Lion8bit::Blockwise { codes, absmax } = state else { unreachable!() };
            let mut want = bytes(&p);
            want.extend(codes);
            want.extend(bytes(&absmax));
            let differs = got.iter().zip(&want).position(|(a, b)| a != b);
            prop_assert_eq!(differs, None, "byte of {} of p, then codes, then absmax", 4 * n);
            prop_assert_eq!(got.len(), want.len());
        }
    }

    #[test]
    fn lion_equals_the_rust_code(rule in rule(), elements in prop::collection::vec((number(), number(), number()), 1..600)) {
        let [p, g, m] = [0, 1, 2].map(|k| elements.iter().map(|e| [e.0, e.1, e.2][k]).collect::<Vec<f32>>());
        if let Some(got) = host(1, &rule, 1.0, &p, &g, &bytes(&m)) {
            let (mut p, mut m) = (p, m);
            optim::lion::step(&rule, &mut p, &g, &mut m);
            prop_assert_eq!(got, [bytes(&p), bytes(&m)].concat());
        }
    }
}

#[test]
fn the_search_finds_the_same_codes_on_and_beside_every_threshold() {
    let map = dynamic_map();
    let mut xs = vec![0.0f32, -0.0, 1.0, -1.0, 1e-45, -1e-45];
    for pair in map.values.windows(2) {
        let middle = (pair[0] + pair[1]) * 0.5;
        for x in [pair[0], middle, pair[1]] {
            xs.extend([x, x.next_up(), x.next_down()].into_iter().filter(|x| x.abs() <= 1.0));
        }
    }
    let rule = LionRule::new((0.9, 0.99), 0.0, 1e-4);
    if let Some(got) = host(2, &rule, 1.0, &xs, &vec![0.0; xs.len()], &[]) {
        let want: Vec<u8> = xs.iter().map(|x| map.code(*x)).collect();
        assert_eq!(got, want);
    }
}
