"""SDXL's UNet in PyTorch for timing: the topology and the class names by which LyCORIS picks layers, random weights.

One class for each of the four that LyCORIS knows; the walk through levels is a list of steps that `Unet.forward` runs."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Shape:
    channels: tuple
    depths: tuple
    middle: int
    head: int
    groups: int
    context: int
    condition: int


SHAPES = {
    "tiny": Shape((16, 32, 64), (0, 1, 2), 2, 8, 8, 48, 1568),
    "sdxl": Shape((320, 640, 1280), (0, 2, 10), 10, 64, 32, 2048, 2816),
    "mid": Shape((160, 320, 640), (0, 1, 2), 2, 64, 32, 768, 2048),
}


class ResnetBlock2D(nn.Module):
    def __init__(self, shape, inner, outer):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(shape.groups, inner), nn.GroupNorm(shape.groups, outer)
        self.conv1, self.conv2 = nn.Conv2d(inner, outer, 3, 1, 1), nn.Conv2d(outer, outer, 3, 1, 1)
        self.time = nn.Linear(4 * shape.channels[0], outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x, emb):
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(emb)).unsqueeze(-1).unsqueeze(-1)
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.skip is None else self.skip(x))


class Attention(nn.Module):
    def __init__(self, shape, width, source):
        super().__init__()
        self.head = shape.head
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(source, width, bias=False), nn.Linear(source, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x, source):
        def heads(t):
            return t.view(*t.shape[:2], -1, self.head).transpose(1, 2)

        y = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(source)), heads(self.v(source)))
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, shape, width):
        super().__init__()
        self.own, self.cross = Attention(shape, width, width), Attention(shape, width, shape.context)
        self.wide, self.narrow = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, context):
        y = self.norms[0](x)
        x = x + self.own(y, y)
        x = x + self.cross(self.norms[1](x), context)
        value, gate = self.wide(self.norms[2](x)).chunk(2, -1)
        return x + self.narrow(value * F.gelu(gate))


class Transformer2DModel(nn.Module):
    def __init__(self, shape, width, depth):
        super().__init__()
        self.norm = nn.GroupNorm(shape.groups, width, 1e-6)
        self.inward, self.outward = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(shape, width) for _ in range(depth))

    def forward(self, x, context, run):
        y = self.inward(self.norm(x).flatten(2).mT)
        for block in self.blocks:
            y = run(block, y, context)
        return x + self.outward(y).mT.reshape(x.shape)


class Downsample2D(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x):
        return self.conv(x)


class Upsample2D(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Unet(nn.Module):
    """`recompute`: each ResNet and each transformer block keeps its inputs only."""

    def __init__(self, shape, recompute=False):
        super().__init__()
        self.shape, self.recompute = shape, recompute
        base = shape.channels[0]

        def embedding(inner):
            return nn.Sequential(nn.Linear(inner, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))

        self.time, self.condition = embedding(base), embedding(shape.condition)
        self.first = nn.Conv2d(4, base, 3, 1, 1)
        down, up, kept, width = [], [], [base], base

        def pair(steps, inner, level):
            steps.append(ResnetBlock2D(shape, inner, shape.channels[level]))
            if shape.depths[level]:
                steps.append(Transformer2DModel(shape, shape.channels[level], shape.depths[level]))

        for level in range(3):
            for _ in range(2):
                pair(down, width, level)
                width = shape.channels[level]
                kept.append(width)
                down.append(None)
            if level < 2:
                down.append(Downsample2D(width))
                kept.append(width)
                down.append(None)
        self.down = nn.ModuleList(m or nn.Identity() for m in down)
        self.middle = nn.ModuleList(
            [ResnetBlock2D(shape, width, width), Transformer2DModel(shape, width, shape.middle), ResnetBlock2D(shape, width, width)])
        for level in (2, 1, 0):
            for i in range(3):
                up.append(None)
                pair(up, width + kept.pop(), level)
                width = shape.channels[level]
            if level:
                up.append(Upsample2D(width))
        self.up = nn.ModuleList(m or nn.Identity() for m in up)
        self.norm, self.last = nn.GroupNorm(shape.groups, width), nn.Conv2d(width, 4, 3, 1, 1)

    def forward(self, x, t, context, condition):
        half = self.shape.channels[0] // 2
        angle = t.float()[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / half))
        emb = self.time(torch.cat([angle.cos(), angle.sin()], 1)) + self.condition(condition)

        def run(module, *inputs):
            return checkpoint(module, *inputs, use_reentrant=False) if self.recompute else module(*inputs)

        def step(module, h):
            if isinstance(module, ResnetBlock2D):
                return run(module, h, emb)
            return module(h, context, run) if isinstance(module, Transformer2DModel) else module(h)

        h = self.first(x)
        kept = [h]
        # An Identity marks where a skip is kept on the way down, and taken on the way up.
        for module in self.down:
            if isinstance(module, nn.Identity):
                kept.append(h)
            else:
                h = step(module, h)
        for module in self.middle:
            h = step(module, h)
        for module in self.up:
            h = torch.cat([h, kept.pop()], 1) if isinstance(module, nn.Identity) else step(module, h)
        return self.last(F.silu(self.norm(h)))
