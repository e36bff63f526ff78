"""Times one training step (forward, backward, Lion) of a UNet under LyCORIS's LoKr in PyTorch on the CPU, and prints one JSON
line with the fields of our own program (`cargo run --release -p benches --bin step`).

    python step.py --config mid [--bypass] [--checkpointing] [--dtype bf16]

The optimizer is bitsandbytes' Lion with f32 state, which has a CPU kernel; its share of a step is under two per cent."""
import argparse
import json
import logging
import resource
import statistics
import sys
import tempfile
import time

import torch

from unet import SHAPES, Unet

TARGETS = '["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]'


def adapt(unet, bypass):
    from lycoris import create_lycoris

    logging.disable(logging.WARNING)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as preset:
        preset.write(f"enable_conv = true\ntarget_module = {TARGETS}\ntarget_name = []\n")
        preset.flush()
        network = create_lycoris(unet, 1.0, 4, 1, algo="lokr", factor=8, full_matrix=True, bypass_mode=bypass, preset=preset.name)
    network.apply_to()
    return network.train()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", choices=SHAPES, default="tiny")
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bypass", action="store_true", help="LyCORIS's bypass_mode: no weight is rebuilt")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="bf16: by autocast")
    parser.add_argument("--on-request", action="store_true", help="run two steps for each line of standard input, time the second")
    a = parser.parse_args()

    import bitsandbytes

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    shape = SHAPES[a.config]
    unet = Unet(shape, a.checkpointing).requires_grad_(False).train()
    base = sum(p.numel() for p in unet.parameters())
    network = adapt(unet, a.bypass)
    optimizer = bitsandbytes.optim.Lion32bit(network.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.1)
    latents, noise = torch.randn(2, a.batch, 4, a.latent, a.latent)
    timesteps = torch.randint(1000, (a.batch,))
    context, condition = torch.randn(a.batch, 77, shape.context), torch.randn(a.batch, shape.condition)
    times = []

    def step():
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, a.dtype == "bf16"):
            prediction = unet(latents, timesteps, context, condition)
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        return loss

    loss = step()
    if a.on_request:
        print(json.dumps({"ready": ["step"]}), flush=True)
        for _ in sys.stdin:
            step()
            loss = step()
            print(json.dumps({"seconds": times[-1]}), flush=True)
    else:
        for _ in range(a.steps):
            loss = step()
    print(json.dumps({
        "program": "torch",
        "config": a.config,
        "dtype": a.dtype,
        "latent": a.latent,
        "batch": a.batch,
        "threads": a.threads,
        "checkpointing": a.checkpointing,
        "path": "bypass" if a.bypass else "default",
        "base_parameters": base,
        "lokr_parameters": sum(p.numel() for p in network.parameters()),
        "steps": len(times) - 1,
        "median_s": round(statistics.median(times[1:]), 4),
        "min_s": round(min(times[1:]), 4),
        "first_s": round(times[0], 4),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "loss": loss.item(),
    }))


if __name__ == "__main__":
    main()
