#!/usr/bin/env python3
"""Checksums of pictures that Pillow resized with its antialiased bicubic filter.

    pip install pillow==13.0.0 numpy
    python tools/golden_resize.py

writes crates/blip2/tests/golden/pillow_resize.json: one row `[channels, width, height, new width, new height, checksum]` a
case. The pictures are drawn by a generator that both sides have, seeded with the row's index; the checksum is the first
12 hexadecimal digits of the SHA-256 of the resized bytes. Modes are L, RGB and CMYK (four channels that Pillow treats
alike; it would premultiply RGBA, which is made opaque before it is resized here).
"""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

GOLDEN = Path(__file__).parent.parent / "crates/blip2/tests/golden/pillow_resize.json"
N_RANDOM = 2500
MODES = {1: "L", 3: "RGB", 4: "CMYK"}
SPECIAL = [
    (3, 1, 1, 224, 224),
    (3, 65535, 1, 224, 224),
    (3, 1, 65535, 224, 224),
    (3, 4000, 3000, 224, 224),
    (3, 1600, 1200, 1, 1),
    (1, 3, 2, 1000, 1),
    (3, 224, 224, 224, 224),
    (3, 500, 375, 500, 224),
    (3, 500, 375, 224, 375),
    (3, 225, 223, 224, 224),
    (3, 100, 100, 90, 80),  # the height shrinks by exactly twice as much as the width
    (3, 100, 101, 90, 80),
    (3, 100, 100, 101, 99),
    (3, 375, 500, 224, 224),
    (3, 333, 500, 224, 224),
]


def picture(seed: int, width: int, height: int, channels: int) -> Image.Image:
    """Bytes of splitmix64; every third picture black and white only, where sums leave 0 to 255 most."""
    n = width * height * channels
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    values = (z >> np.uint64(56)).astype(np.uint8)
    if seed % 3 == 0:
        values = np.where(values < 128, 0, 255).astype(np.uint8)
    return Image.frombytes(MODES[channels], (width, height), values.tobytes())


def cases():
    yield from SPECIAL
    draw = random.Random(7)
    side = lambda: round(400 ** draw.random()) if draw.random() < 0.5 else draw.randint(1, 300)
    for _ in range(N_RANDOM):
        width, height, new_width, new_height = side(), side(), side(), side()
        if draw.random() < 0.1:
            new_width = width
        if draw.random() < 0.1:
            new_height = height
        yield draw.choice([1, 3, 3, 4]), width, height, new_width, new_height


rows = []
for seed, case in enumerate(cases()):
    channels, width, height, new_width, new_height = case
    resized = picture(seed, width, height, channels).resize((new_width, new_height), Image.Resampling.BICUBIC)
    rows.append([*case, hashlib.sha256(resized.tobytes()).hexdigest()[:12]])
assert len({row[-1] for row in rows}) > 0.9 * len(rows)
GOLDEN.write_text("[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n")
print(f"Pillow {PIL.__version__}: {len(rows)} cases, {GOLDEN.stat().st_size} bytes")
