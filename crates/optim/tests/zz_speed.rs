use optim::*;
#[test]
fn speed() {
    for kind in OptimizerKind::ALL {
        for n in [1 << 14, 1 << 26] {
            let mut o = Optimizer::new(kind, Hyper { betas: (0.9, 0.95), weight_decay: 0.1, eps: 1e-8 }, &[n]);
            let mut p: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let g: Vec<f32> = (0..n).map(|i| (i as f32 * 0.31).cos() * 1e-3).collect();
            for _ in 0..2 {
                o.step(0, &mut p, &g, 1e-4);
            }
            let reps = (1usize << 28) / n;
            let t = std::time::Instant::now();
            for _ in 0..reps {
                o.step(0, &mut p, &g, 1e-4);
            }
            println!("{} n={n}: {:.3} ns/element", kind.name(), t.elapsed().as_secs_f64() * 1e9 / (reps * n) as f64);
        }
    }
    let g: Vec<f32> = (0..1 << 26).map(|i| (i as f32 * 0.31).cos() * 1e-3).collect();
    let t = std::time::Instant::now();
    for _ in 0..4 {
        std::hint::black_box(clip::global_norm(&[&g]));
    }
    println!("norm {:.3} ns/element", t.elapsed().as_secs_f64() * 1e9 / (4 << 26) as f64);
}
