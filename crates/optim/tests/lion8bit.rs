//! The code search is exact for every f32, the fast step equals its reference bit for bit, and the corners of the rule.

use optim::lion::{self, LionRule};
use optim::lion8bit::{self, BLOCK, Lion8bit};
use optim::map::{self, dynamic_map};
use proptest::prelude::*;

fn agrees(x: f32) {
    let map = dynamic_map();
    assert_eq!(map.code(x), map::reference(&map.values, x), "x = {x:e} ({:#x})", x.to_bits());
}

/// Both searches are steps that only rise with |x| within a bucket of the lookup (the fast one by its form: one
/// comparison), so agreement at both ends of each bucket and on both sides of each threshold is agreement everywhere.
#[test]
fn the_fast_search_is_exact_at_every_edge() {
    let values = &dynamic_map().values;
    let top = 1.0f32.to_bits();
    let mut edges: Vec<u32> = (0..=top >> 17).flat_map(|bucket| [bucket << 17, (bucket << 17) + 0x1_FFFF]).collect();
    edges.extend(values.windows(2).map(|pair| (((pair[0] + pair[1]) * 0.5).abs()).to_bits()));
    edges.extend(values.iter().map(|v| v.abs().to_bits()));
    for edge in edges {
        for bits in edge.saturating_sub(2)..=edge + 2 {
            if bits <= top {
                agrees(f32::from_bits(bits));
                agrees(-f32::from_bits(bits));
            }
        }
    }
}

#[test]
#[ignore = "two billion values; about a minute"]
fn the_fast_search_is_exact_everywhere() {
    (0..=1.0f32.to_bits()).for_each(|bits| {
        agrees(f32::from_bits(bits));
        agrees(-f32::from_bits(bits));
    });
}

/// The reference itself, by the definition: no value is nearer, apart from the sign rule.
#[test]
fn the_reference_search_is_the_nearest_value() {
    let values = &dynamic_map().values;
    for i in -200_000..=200_000 {
        let x = (i as f32 / 200_000.0).powi(3);
        let code = map::reference(values, x);
        let distance = |v: f32| (f64::from(v) - f64::from(x)).abs();
        let nearest = values.iter().map(|&v| distance(v)).fold(f64::INFINITY, f64::min);
        // A middle between two values is rounded to f32, at most 2^-25.
        let exact = distance(values[code as usize]) <= nearest + 6e-8;
        let sign_rule = x < 0.0 && code == 126 && x > values[126];
        assert!(exact || sign_rule, "x = {x:e} got {}", values[code as usize]);
    }
}

#[test]
fn the_named_codes_are_as_documented() {
    let map = dynamic_map();
    for (x, code) in [(1.0, 255), (-1.0, 0), (0.0, 127), (-0.0, 126), (1e-30, 127), (-1e-30, 126), (5.5e-7, 128), (0.99296874, 254)] {
        assert_eq!(map.code(x), code, "x = {x}");
    }
    assert_eq!((map.values[0], map.values[127], map.values[254], map.values[255]), (-0.99296874, 0.0, 0.99296874, 1.0));
    // One unit above 5.5e-7: the golden map's own rounding.
    assert_eq!((map.values[126], map.values[128]), (-5.5000004e-7, 5.5000004e-7));
    // In the very middle of two values the even code is taken; these middles are exact in f32.
    let mut seen = 0;
    for code in 128..254u8 {
        let (a, b) = (map.values[code as usize], map.values[code as usize + 1]);
        let middle = (a + b) * 0.5;
        assert_eq!(map.code(middle), code + code % 2, "between {a} and {b}");
        assert_eq!(map.code(-middle), 254 - (code + code % 2), "between -{a} and -{b}");
        seen += 1;
    }
    assert_eq!(seen, 126);
}

fn rule() -> LionRule {
    LionRule::new((0.9, 0.95), 0.1, 1e-3)
}

fn blockwise(state: &Lion8bit) -> (&[u8], &[f32]) {
    match state {
        Lion8bit::Blockwise { codes, absmax } => (codes, absmax),
        Lion8bit::F32(_) => panic!("expected a quantized state"),
    }
}

/// Values that reach every decade of the map, with zeros and negative zeros among them.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let mantissa = (x >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            match x & 31 {
                0 => 0.0,
                1 => -0.0,
                e => mantissa * 10f32.powi(-((e % 9) as i32)),
            }
        })
        .collect()
}

#[test]
fn the_fast_step_equals_the_reference_bit_for_bit() {
    for n in [4096, 4097, 16384, 16385, 70_001] {
        let mut state = Lion8bit::new(n);
        let (mut p, mut q) = (values(n, 1), values(n, 1));
        let (mut codes, mut absmax) = (vec![0; n], vec![0.0; n.div_ceil(BLOCK)]);
        for step in 0..8 {
            // The last steps have no gradient, so that momentum decays through the small codes.
            let g = if step < 5 { values(n, 100 + step) } else { vec![0.0; n] };
            state.step(&rule(), &mut p, &g);
            lion8bit::reference(&rule(), &mut q, &g, &mut codes, &mut absmax);
            assert!(p.iter().zip(&q).all(|(a, b)| a.to_bits() == b.to_bits()), "n = {n}, step {step}: parameters");
            assert_eq!(blockwise(&state), (codes.as_slice(), absmax.as_slice()), "n = {n}, step {step}");
        }
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let n = 300_007;
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut p, mut state) = (values(n, 1), Lion8bit::new(n));
            (0..3).for_each(|step| state.step(&rule(), &mut p, &values(n, 7 + step)));
            (p, state)
        })
    };
    let (p, state) = run(1);
    for threads in [2, 3, 7] {
        let (q, other) = run(threads);
        assert!(p.iter().zip(&q).all(|(a, b)| a.to_bits() == b.to_bits()) && state == other, "{threads} threads");
    }
}

/// The first step by hand: momentum 0, so the update is the gradient's sign and the momentum (1 - beta2) g.
#[test]
fn the_first_step_is_what_one_computes_by_hand() {
    let n = 4096;
    let mut p = vec![2.0f32; n];
    let mut g = vec![0.0f32; n];
    (g[0], g[1], g[2]) = (4.0, -1.0, 1e-12);
    let mut state = Lion8bit::new(n);
    state.step(&LionRule::new((0.5, 0.75), 0.5, 0.25), &mut p, &g);
    // Decay 1 - 0.25 * 0.5 = 0.875, then -+ 0.25.
    assert_eq!(p[..4], [1.5, 2.0, 1.5, 1.75]);
    let (codes, absmax) = blockwise(&state);
    assert_eq!(absmax[..2], [1.0, 0.0]);
    // m / absmax = 1.0, -0.25, tiny, 0: the nearest of -0.25 is -(0.1 + 0.9 * 10.5 / 64) = -0.24765625.
    assert_eq!(codes[0], 255);
    assert!((dynamic_map().values[codes[1] as usize] + 0.24765625).abs() < 1e-7);
    assert_eq!(codes[2..4], [127, 127]);
}

#[test]
fn zero_gradients_decay_and_follow_the_momentum() {
    let n = 4096;
    let (mut p, mut state) = (vec![1.0f32; n], Lion8bit::new(n));
    state.step(&rule(), &mut p, &vec![1.0; n]);
    let before = p[0];
    state.step(&rule(), &mut p, &vec![0.0; n]);
    assert_eq!(p[0], before * (1.0 - 1e-3 * 0.1) - 1e-3);
}

#[test]
fn a_zero_block_has_absmax_zero_and_only_decays() {
    let n = 4096;
    let (mut p, mut state) = (vec![1.0f32; n], Lion8bit::new(n));
    let mut g = vec![0.0; n];
    g[300] = 1.0;
    for _ in 0..2 {
        state.step(&rule(), &mut p, &g);
    }
    let (_, absmax) = blockwise(&state);
    assert_eq!(absmax[0], 0.0);
    assert!(absmax[1] > 0.0);
    let decay = 1.0f32 - 1e-3 * 0.1;
    assert_eq!(p[0], decay * decay);
}

/// Facts of the kernel: the padding of a short last block counts as momentum of the smallest code.
#[test]
fn padding_keeps_a_vanished_short_block_alive() {
    let n = 4097;
    let (mut p, mut state) = (vec![1.0f32; n], Lion8bit::new(n));
    let rule = LionRule::new((0.9, 0.5), 0.0, 1e-3);
    let mut g = vec![0.0; n];
    g[n - 1] = 1.0;
    state.step(&rule, &mut p, &g);
    assert_eq!(blockwise(&state).1[16], 0.5);
    g[n - 1] = -0.5; // 0.5 * 0.5 + 0.5 * -0.5 = 0: the one real momentum vanishes
    state.step(&rule, &mut p, &g);
    assert_eq!(blockwise(&state).1[16], 0.5 * (dynamic_map().values[128] * 0.5));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_fast_search_is_exact(x in -1.0f32..=1.0, exponent in 0i32..12) {
        agrees(x * 10f32.powi(-exponent));
    }

    /// A momentum never changes its sign by being quantized, and |m| moves by no more than half a gap of the map.
    #[test]
    fn quantization_keeps_sign_and_size(x in -1.0f32..=1.0, exponent in 0i32..8) {
        let x = x * 10f32.powi(-exponent);
        let value = dynamic_map().values[dynamic_map().code(x) as usize];
        prop_assert!(value == 0.0 || (value > 0.0) == (x > 0.0));
        // Widest gap: 0.9 / 64 in the top decade; relative 0.45 in decade 0 and between decades.
        prop_assert!((value - x).abs() <= (0.9f32 / 128.0 + 1e-6).min(0.5 * x.abs() + 5.5e-7));
    }

    #[test]
    fn lion_equals_its_reference(seed in any::<u64>(), n in 1usize..600, wd in 0.0f64..0.5) {
        let rule = LionRule::new((0.9, 0.99), wd, 3e-4);
        let (mut p, mut m) = (values(n, seed), values(n, seed ^ 1));
        let (mut q, mut k) = (p.clone(), m.clone());
        let g = values(n, seed ^ 2);
        lion::step(&rule, &mut p, &g, &mut m);
        lion::reference(&rule, &mut q, &g, &mut k);
        prop_assert!(p.iter().zip(&q).chain(m.iter().zip(&k)).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}
