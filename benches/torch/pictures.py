"""Draws pictures of 2000x2000, as illustrations are (shapes with gradients, lines, some texture), and writes them as lossy WebP and as JPEG.

    python pictures.py FOLDER [COUNT]

Made of a fixed seed; those that are there are kept."""

import os
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 2000


def drawn(number):
    rng = np.random.default_rng(number)
    low = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    image = Image.fromarray(low).resize((SIDE, SIDE), Image.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(120):
        x, y, w, h = rng.integers(0, SIDE, 2).tolist() + rng.integers(20, 500, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        shape = draw.ellipse if rng.random() < 0.7 else draw.rectangle
        shape([x - w // 2, y - h // 2, x + w // 2, y + h // 2], fill=colour, outline=(20, 20, 30), width=int(rng.integers(1, 6)))
    for _ in range(600):
        points = np.cumsum(rng.normal(0, 40, (4, 2)), 0) + rng.integers(0, SIDE, 2)
        draw.line([tuple(p) for p in points.tolist()], fill=tuple(rng.integers(0, 120, 3).tolist()), width=int(rng.integers(1, 5)))
    image = image.filter(ImageFilter.GaussianBlur(0.7))
    grain = rng.normal(0, 3, (SIDE, SIDE, 1)) + rng.normal(0, 1, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def main():
    folder, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 32
    ways = [("webp", "webp", {"quality": 90}), ("jpeg", "jpg", {"quality": 90})]
    for number in range(count):
        paths = [(os.path.join(folder, way, f"{number:03}.{ending}"), options) for way, ending, options in ways]
        if all(os.path.exists(path) for path, _ in paths):
            continue
        image = drawn(number)
        for path, options in paths:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            image.save(path, **options)


if __name__ == "__main__":
    main()
