"""SDXL's UNet in PyTorch for timing: the topology and the class names by which LyCORIS picks layers, random weights.

Classes and attributes have the names by which kohya's trainer and LyCORIS know them, so that single-file checkpoints fit."""
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


def sinusoids(t, width):
    angle = t.float()[:, None] * torch.exp(torch.arange(width // 2) * (-math.log(10000) / (width // 2)))
    return torch.cat([angle.cos(), angle.sin()], 1)


class ResnetBlock2D(nn.Module):
    def __init__(self, shape, inner, outer):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(shape.groups, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, 1, 1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * shape.channels[0], outer))
        self.out_layers = nn.Sequential(nn.GroupNorm(shape.groups, outer), nn.SiLU(), nn.Identity(), nn.Conv2d(outer, outer, 3, 1, 1))
        self.skip_connection = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x, emb):
        y = self.in_layers(x) + self.emb_layers(emb).unsqueeze(-1).unsqueeze(-1)
        return self.out_layers(y) + self.skip_connection(x)


class CrossAttention(nn.Module):
    def __init__(self, shape, width, source):
        super().__init__()
        self.head = shape.head
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(source, width, bias=False), nn.Linear(source, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, source):
        def heads(t):
            return t.view(*t.shape[:2], -1, self.head).transpose(1, 2)

        y = F.scaled_dot_product_attention(heads(self.to_q(x)), heads(self.to_k(source)), heads(self.to_v(source)))
        return self.to_out[0](y.transpose(1, 2).reshape(x.shape))


class GEGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, shape, width):
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(shape, width, width), CrossAttention(shape, width, shape.context)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    def __init__(self, shape, width, depth):
        super().__init__()
        self.norm = nn.GroupNorm(shape.groups, width, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(shape, width) for _ in range(depth))

    def forward(self, x, context, run):
        y = self.proj_in(self.norm(x).flatten(2).mT)
        for block in self.transformer_blocks:
            y = run(block, y, context)
        return x + self.proj_out(y).mT.reshape(x.shape)


class Downsample2D(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x):
        return self.op(x)


class Upsample2D(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Unet(nn.Module):
    """Attributes have the names of SDXL's single-file layout. `recompute`: each ResNet and each transformer block keeps its inputs only."""

    def __init__(self, shape, recompute=False):
        super().__init__()
        self.shape, self.recompute = shape, recompute
        base = shape.channels[0]

        def embedding(inner):
            return nn.Sequential(nn.Linear(inner, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))

        def block(inner, level):
            width, depth = shape.channels[level], shape.depths[level]
            return [ResnetBlock2D(shape, inner, width)] + ([Transformer2DModel(shape, width, depth)] if depth else [])

        self.time_embed, self.label_emb = embedding(base), nn.Sequential(embedding(shape.condition))
        down, up, kept, width = [[nn.Conv2d(4, base, 3, 1, 1)]], [], [base], base
        for level in range(3):
            for _ in range(2):
                down.append(block(width, level))
                width = shape.channels[level]
                kept.append(width)
            if level < 2:
                down.append([Downsample2D(width)])
                kept.append(width)
        for level in (2, 1, 0):
            for i in range(3):
                up.append(block(width + kept.pop(), level))
                width = shape.channels[level]
            if level:
                up[-1].append(Upsample2D(width))
        middle = shape.channels[2]
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, down))
        self.middle_block = nn.ModuleList([
            ResnetBlock2D(shape, middle, middle), Transformer2DModel(shape, middle, shape.middle), ResnetBlock2D(shape, middle, middle)])
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, up))
        self.out = nn.Sequential(nn.GroupNorm(shape.groups, width), nn.SiLU(), nn.Conv2d(width, 4, 3, 1, 1))

    def forward(self, x, t, context, condition):
        emb = self.time_embed(sinusoids(t, self.shape.channels[0])) + self.label_emb(condition)

        def run(module, *inputs):
            return checkpoint(module, *inputs, use_reentrant=False) if self.recompute else module(*inputs)

        def through(block, h):
            for module in block:
                if isinstance(module, ResnetBlock2D):
                    h = run(module, h, emb)
                else:
                    h = module(h, context, run) if isinstance(module, Transformer2DModel) else module(h)
            return h

        h, kept = x, []
        for block in self.input_blocks:
            h = through(block, h)
            kept.append(h)
        h = through(self.middle_block, h)
        for block in self.output_blocks:
            h = through(block, torch.cat([h, kept.pop()], 1))
        return self.out(h)
