"""Writes the pictures of this folder, pictures.json (what PIL shows of each) and resize.json (PIL's and OpenCV's resizing).

Made with Python 3.11, Pillow 11.3.0 (13 resizes down first where that axis shrinks more), opencv-python-headless 5.0.0, numpy 2.4.6:  python make.py
Read by ../image.rs, which states the tolerances.
"""

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).parent


def drawn(width, height):
    """A smooth gradient with one hard edge: lossy formats keep it, and no symmetry hides a wrong turn."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([40 + x * 160 // width, 30 + y * 180 // height, 200 - (x + y) * 120 // (width + height)], -1)
    rgb[: height // 2, : width // 3] = (250, 200, 20)
    return rgb.astype(np.uint8)


def rough(width, height):
    """Any neighbours differ wildly: a wrong weight shows. The test computes the same formula."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return ((x * x * 7 + y * y * 13 + x * y * 5 + c * 101) % 256).astype(np.uint8)


def shown(path):
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode in ("P", "LA", "RGBA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


rgb = Image.fromarray(drawn(24, 16))
alpha = Image.fromarray(np.linspace(0, 255, 24 * 16).reshape(16, 24).astype(np.uint8))
rgba = rgb.copy()
rgba.putalpha(alpha)
turn = lambda n: (lambda e: (e.__setitem__(0x0112, n), e)[1])(Image.Exif())

rgb.save(HERE / "rgb.png")
rgba.save(HERE / "alpha.png")
rgb.convert("L").save(HERE / "grey.png")
rgba.convert("LA").save(HERE / "grey-alpha.png")
rgb.convert("1").save(HERE / "one-bit.png")
rgb.quantize(16).save(HERE / "palette.png", transparency=3)
rgb.save(HERE / "exif-6.png", exif=turn(6))
rgb.save(HERE / "rgb.bmp")
rgb.quantize(16).save(HERE / "palette.bmp")
rgb.save(HERE / "full.jpg", quality=95, subsampling=0)
rgb.save(HERE / "subsampled.jpg", quality=95, subsampling=2)
rgb.save(HERE / "progressive.jpg", quality=95, subsampling=0, progressive=True)
rgb.convert("L").save(HERE / "grey.jpg", quality=95)
rgb.convert("CMYK").save(HERE / "cmyk.jpg", quality=95, subsampling=0)
for n in range(2, 9):
    rgb.save(HERE / f"exif-{n}.jpg", quality=95, subsampling=0, exif=turn(n))
rgb.save(HERE / "lossless.webp", lossless=True)
rgba.save(HERE / "alpha.webp", lossless=True, exact=True)
rgb.save(HERE / "lossy.webp", quality=95)
rgb.save(HERE / "exif-8.webp", lossless=True, exif=turn(8))

pictures = {}
for path in sorted(HERE.glob("*.*")):
    if path.suffix in (".png", ".jpg", ".webp", ".bmp") and "16" not in path.name:
        image = shown(path)
        pictures[path.name] = {"size": image.size, "rgb": image.tobytes().hex()}
# PIL turns 16-bit grey into white, so what these show is stated here: the high byte of each value is what was drawn.
wide = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
cv2.imwrite(str(HERE / "grey16.png"), wide)
pictures["grey16.png"] = {"size": rgb.size, "rgb": rgb.convert("L").convert("RGB").tobytes().hex()}
cv2.imwrite(str(HERE / "rgb16.png"), np.asarray(rgb)[..., ::-1].astype(np.uint16) * 257)
pictures["rgb16.png"] = {"size": rgb.size, "rgb": rgb.tobytes().hex()}
(HERE / "pictures.json").write_text(json.dumps(pictures, indent=0))

source = rough(32, 24)
pil = lambda size, how: np.asarray(Image.fromarray(source).resize(size, how))
ocv = lambda size, how: cv2.resize(source, size, interpolation=how)
cases = [
    ("area", (16, 12), ocv((16, 12), cv2.INTER_AREA)),
    ("area", (8, 8), ocv((8, 8), cv2.INTER_AREA)),
    ("area", (21, 15), ocv((21, 15), cv2.INTER_AREA)),
    ("area", (32, 7), ocv((32, 7), cv2.INTER_AREA)),
    ("area", (31, 23), ocv((31, 23), cv2.INTER_AREA)),
    ("lanczos", (50, 37), pil((50, 37), Image.LANCZOS)),
    ("lanczos", (40, 15), pil((40, 15), Image.LANCZOS)),
    ("lanczos", (13, 10), pil((13, 10), Image.LANCZOS)),
    ("box", (21, 15), pil((21, 15), Image.BOX)),
    ("linear", (45, 30), ocv((45, 30), cv2.INTER_LINEAR)),
    ("linear", (21, 15), ocv((21, 15), cv2.INTER_LINEAR)),
    # A quarter of the contrast: fast_image_resize cuts overshoots to 0..255 between its passes, OpenCV after them.
    ("cubic", (45, 30), cv2.resize((source >> 2) + 96, (45, 30), interpolation=cv2.INTER_CUBIC)),
    # Ratios at which fixed point and float agree on target centres between two pixels.
    ("nearest", (16, 12), ocv((16, 12), cv2.INTER_NEAREST_EXACT)),
    ("nearest", (64, 48), ocv((64, 48), cv2.INTER_NEAREST_EXACT)),
]
(HERE / "resize.json").write_text(
    json.dumps([{"method": m, "size": s, "rgb": a.tobytes().hex()} for m, s, a in cases], indent=0)
)
