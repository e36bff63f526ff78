"""Times PyTorch's DataLoader over a folder of pictures, as sd-scripts' users have it, each picture by Pillow.

A picture is opened, made RGB, resized to 1024x1024 by Lanczos, cropped, and turned into a tensor from -1 to 1, channels first; a batch
has four. Workers are processes that stay (`persistent_workers`), one per core. Nothing is done with the batches.

The program answers requests as `benches/src/request.rs` describes; `compare.py` sends them."""

import argparse
import glob
import json
import os
import sys
import time

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

SIDE = 1024
BATCH = 4


class Pictures(Dataset):
    def __init__(self, folder):
        self.paths = sorted(p for p in glob.glob(os.path.join(folder, "*")) if not p.endswith(".txt"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        image = Image.open(self.paths[number]).convert("RGB")
        scale = max(SIDE / image.width, SIDE / image.height)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.LANCZOS)
        left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
        image = image.crop((left, top, left + SIDE, top + SIDE))
        # What torchvision's ToTensor and Normalize([0.5], [0.5]) do.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(0.5).div_(0.5)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--on-request", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(1)
    loaders = {}
    for name in ("webp", "jpeg"):
        pictures = Pictures(os.path.join(a.pictures, name))
        loaders[f"{name}, lanczos"] = DataLoader(
            pictures, batch_size=BATCH, shuffle=True, num_workers=a.threads, persistent_workers=True, prefetch_factor=2
        )

    def epoch(loader):
        start = time.monotonic()
        count = sum(len(batch) for batch in loader)
        seconds = time.monotonic() - start
        return {"seconds": seconds, "pictures_per_s": count / seconds}

    for loader in loaders.values():
        epoch(loader)  # starts the workers
    if not a.on_request:
        for name, loader in loaders.items():
            print(f"{name:14} {epoch(loader)['pictures_per_s']:7.1f} pictures/s")
        return
    print(json.dumps({"ready": list(loaders)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(epoch(loaders[line.strip()])), flush=True)


if __name__ == "__main__":
    main()
