"""Replays the recorded ten steps of the tiny SDXL (tests/golden/README.md, train_step) in PyTorch, in f32 and under bf16 autocast, and
prints how far the losses are from the recorded ones. The second figure is what our own products of bf16 are measured by.

    python trajectory.py [--golden tests/golden]

Needs transformers beside what the other programs here need."""
import argparse
import contextlib
import json
import logging
import math
import pathlib

import torch
from safetensors.torch import load_file

from unet import Shape, Unet, sinusoids


def load(golden):
    """The networks with the recorded adapter, in f32."""
    from lycoris.kohya import create_network
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    c = json.loads((golden / "tiny-sdxl.json").read_text())
    unet = Unet(Shape(c["block_out_channels"], c["transformer_depth"], c["mid_depth"], c["head_dim"], c["norm_num_groups"],
                      c["context_dim"], c["adm_dim"]))
    prefix = "model.diffusion_model."
    weights = load_file(golden / "tiny-sdxl.safetensors")
    unet.load_state_dict({k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)})
    folder = golden / "tiny-sdxl-diffusers"
    text = [CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
            CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").float()]
    for model in [unet, *text]:
        model.requires_grad_(False).train()
    network = create_network(1.0, 4, 1, None, text, unet, algo="lokr", preset=str(golden / "lokr-preset.toml"), factor=8, full_matrix=True)
    network.apply_to(text, unet, True, True)
    return unet, text, network.train()


def replay(golden, recorded, tensors, autocast):
    import bitsandbytes

    unet, text, network = load(golden)
    # Newer transformers name the first encoder's modules without `text_model`.
    short = any(k.startswith("lora_te1_encoder") for k in network.state_dict())
    name = lambda k: k.removeprefix("init.").replace("lora_te1_text_model_", "lora_te1_" if short else "lora_te1_text_model_")
    network.load_state_dict({name(k): v.float() for k, v in tensors.items() if k.startswith("init.")})
    h = recorded["hyper"]
    parts = [("lora_unet", h["lr_unet"]), ("lora_te", h["lr_te"])]
    groups = [{"params": [p for n, p in network.named_parameters() if part in n], "lr": rate} for part, rate in parts]
    optimizer = bitsandbytes.optim.Lion32bit(groups, betas=tuple(h["betas"]), weight_decay=h["weight_decay"])
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    losses = []
    for step in range(recorded["steps"]):
        for micro in range(recorded["accumulation"]):
            get = lambda key: tensors[f"in.{recorded['accumulation'] * step + micro:02}.{key}"]
            noise = get("noise").float() + h["noise_offset"] * get("offset_noise").float()
            t = get("timesteps").long()
            a = alphas[t][:, None, None, None]
            noisy = a.sqrt() * get("latents").float() + (1 - a).sqrt() * noise
            with autocast():
                first, second = (m(get(f"ids{i + 1}").long(), output_hidden_states=True) for i, m in enumerate(text))
                context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
                sizes = get("time_ids")
                condition = torch.cat([second.text_embeds.float(), sinusoids(sizes.flatten(), 256).reshape(len(sizes), -1)], 1)
                prediction = unet(noisy, t, context, condition)
            snr = alphas[t] / (1 - alphas[t])
            loss = (((prediction.float() - noise) ** 2).mean((1, 2, 3)) * snr.clamp(max=h["gamma"]) / snr).mean()
            (loss / recorded["accumulation"]).backward()
            losses.append(loss.item())
        for group, (_, rate) in zip(optimizer.param_groups, parts):
            group["lr"] = rate * min(1, step / h["warmup"])
        torch.nn.utils.clip_grad_norm_(network.parameters(), recorded["max_grad_norm"]["lion"])
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    here = pathlib.Path(__file__).resolve().parents[2]
    parser.add_argument("--golden", type=pathlib.Path, default=here / "tests/golden")
    golden = parser.parse_args().golden
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    recorded = json.loads((golden / "train_step.json").read_text())
    tensors = load_file(golden / "train_step.safetensors")
    want = [loss for step in recorded["runs"]["lion"] for loss in step["losses"]]
    for name, autocast in [("f32", contextlib.nullcontext), ("bf16", lambda: torch.autocast("cpu", torch.bfloat16))]:
        off = [got / w - 1 for got, w in zip(replay(golden, recorded, tensors, autocast), want)]
        worst, mean = max(map(abs, off)), math.sqrt(sum(x * x for x in off) / len(off))
        print(f"{name}: losses off by up to {worst:.3e} of the recorded ones, {mean:.3e} in the root mean square")


if __name__ == "__main__":
    main()
