"""Times forward and backward of SDXL's UNet under LyCORIS's LoKr (factor 8, full matrices) in PyTorch on a GPU, as sd-scripts runs it with
--mixed_precision fp16 and --gradient_checkpointing: frozen weights in f16, adapter in f32, autocast. Prints one JSON line.

    python gpu.py [--bypass] [--batch 4] [--latent 128] [--steps 5]"""
import argparse
import json
import statistics
import time

import torch

from step import adapt
from unet import SHAPES, Unet


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bypass", action="store_true", help="LyCORIS's bypass_mode: no weight is rebuilt")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--latent", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    a = parser.parse_args()

    torch.manual_seed(0)
    torch.set_default_device("cuda")
    shape = SHAPES["sdxl"]
    unet = Unet(shape, True).half().requires_grad_(False).train()
    network = adapt(unet, a.bypass)
    network.to("cuda", torch.float32)
    parameters = [p for p in network.parameters() if p.requires_grad]
    latents, noise = torch.randn(2, a.batch, 4, a.latent, a.latent)
    timesteps = torch.randint(1000, (a.batch,))
    context, condition = torch.randn(a.batch, 77, shape.context), torch.randn(a.batch, shape.condition)
    times = []
    for _ in range(a.steps + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.autocast("cuda", torch.float16):
            prediction = unet(latents.half(), timesteps, context.half(), condition.half())
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        (loss * 1024).backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        for p in parameters:
            p.grad = None
    print(json.dumps({
        "program": "torch " + torch.__version__, "device": torch.cuda.get_device_name(), "bypass": a.bypass, "batch": a.batch, "latent": a.latent,
        "trained": sum(p.numel() for p in parameters), "forward_backward_s": round(statistics.median(times[1:]), 4), "first_s": round(times[0], 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }))


if __name__ == "__main__":
    main()
