#!/usr/bin/env python3
"""JPEG files of every kind that is decoded, with checksums of the pixels that Pillow finds in them.

    pip install pillow==13.0.0 numpy
    python tools/golden_jpeg.py [PHOTOS]

writes crates/blip2/tests/golden/jpeg.json: for each file its bytes in base64, its size, and the CRC-32 of Pillow's
`convert("RGB")`. Kinds that Pillow does not write (other sampling factors, one scan a component, scans that are missing) are
written here from random coefficients, and some files are damaged in the middle, which Pillow passes over. With a folder of photos also jpeg_photos.json: path below the folder and checksum of
every n-th, 200 in all.
"""

import base64
import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parent.parent / "crates/blip2/tests/golden"

# For the writer: a Huffman code as symbol -> (code, length), and its segment.


def huffman(is_dc: bool, is_steep: bool) -> tuple[dict, bytes]:
    """All symbols with codes of nearly one length, or a steep code, some of whose symbols have 16 bits."""
    symbols = list(range(16 if is_dc else 256))
    if is_steep:
        short = 4 if is_dc else 8
        lengths = [2 + at for at in range(short)] + [16] * (len(symbols) - short)
    else:
        lengths = [5] * 16 if is_dc else [8] * 254 + [9] * 2
    counts = [lengths.count(length) for length in range(1, 17)]
    codes, code, at = {}, 0, 0
    for length in range(1, 17):
        for _ in range(counts[length - 1]):
            codes[symbols[at]] = (code, length)
            code, at = code + 1, at + 1
        code <<= 1
    return codes, bytes([0 if is_dc else 0x10]) + bytes(counts) + bytes(symbols)


class Bits:
    def __init__(self):
        self.text = []

    def put(self, value: int, length: int) -> None:
        if length:
            self.text.append(format(value, f"0{length}b"))

    def value(self, value: int) -> None:
        size = abs(value).bit_length()
        self.put(value if value >= 0 else value + (1 << size) - 1, size)

    def bytes(self) -> bytes:
        text = "".join(self.text)
        text += "1" * (-len(text) % 8)
        return int("1" + text, 2).to_bytes(len(text) // 8 + 1, "big")[1:].replace(b"\xff", b"\xff\0") if text else b""


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def write(random, width, height, parts, scans=None, progressive=False, steep=False, interval=0, adobe=None, jfif=False, strong=False) -> bytes:
    """`parts`: (id, across, down) of each component; `scans`: (components, from, to, bit), all in one by default."""
    most_across, most_down = max(part[1] for part in parts), max(part[2] for part in parts)
    mcus = -(-width // (8 * most_across)), -(-height // (8 * most_down))
    blocks = []
    for _, across, down in parts:
        shape = (mcus[1] * down, mcus[0] * across)
        decay = (1 + np.arange(64)) ** (0.3 if strong else 1.3)
        values = np.round(random.normal(0, (60 if strong else 12), (*shape, 64)) / decay)
        values[..., 1:] *= random.random((*shape, 63)) < (0.9 if strong else 0.3)
        values[..., 0] = np.round(random.normal(0, 25, shape))
        blocks.append(values.astype(int))
    dc, dc_table = huffman(True, steep)
    ac, ac_table = huffman(False, steep)
    quantizer = bytes([0]) + bytes(int(value) for value in 3 + np.arange(64) // 4)
    out = b"\xff\xd8"
    if jfif:
        out += segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
    if adobe is not None:
        out += segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([adobe]))
    out += b"\xff" + segment(0xDB, quantizer)  # a fill byte before the marker
    frame = struct.pack(">BHHB", 8, height, width, len(parts)) + b"".join(bytes([id, across << 4 | down, 0]) for id, across, down in parts)
    out += segment(0xC2 if progressive else 0xC0, frame) + segment(0xC4, dc_table + ac_table)
    if interval:
        out += segment(0xDD, struct.pack(">H", interval))
    for components, start, end, bit in scans or [(list(range(len(parts))), 0, 63, 0)]:
        out += segment(0xDA, bytes([len(components)]) + b"".join(bytes([parts[index][0], 0]) for index in components) + bytes([start, end, bit]))
        units = []
        if len(components) == 1:
            _, across, down = parts[components[0]]
            n_rows = -(-(-(-height * down // most_down)) // 8)
            n_columns = -(-(-(-width * across // most_across)) // 8)
            units = [[(components[0], row, column)] for row in range(n_rows) for column in range(n_columns)]
        else:
            for row in range(mcus[1]):
                for column in range(mcus[0]):
                    units.append([(index, row * parts[index][2] + y, column * parts[index][1] + x) for index in components for y in range(parts[index][2]) for x in range(parts[index][1])])
        bits, last = Bits(), [0] * len(parts)
        for at, unit in enumerate(units):
            if interval and at and at % interval == 0:
                out += bits.bytes() + bytes([0xFF, 0xD0 + (at // interval - 1) % 8])
                bits, last = Bits(), [0] * len(parts)
            for index, row, column in unit:
                block = blocks[index][row, column]
                if start == 0:
                    value = int(block[0]) >> bit
                    size = abs(value - last[index]).bit_length()
                    bits.put(*dc[size])
                    bits.value(value - last[index])
                    last[index] = value
                run = 0
                for k in range(max(start, 1), end + 1):
                    value = int(block[k])
                    value = (abs(value) >> bit) * (1 if value >= 0 else -1)
                    if value == 0:
                        run += 1
                        continue
                    while run > 15:
                        bits.put(*ac[0xF0])
                        run -= 16
                    bits.put(*ac[run << 4 | abs(value).bit_length()])
                    bits.value(value)
                    run = 0
                if run and end > 0:
                    bits.put(*ac[0])
        out += bits.bytes()
    return out + b"\xff\xd9"


def without(marker: int, file: bytes) -> bytes:
    """The file with no such segments."""
    while (at := file.find(bytes([0xFF, marker]))) >= 0:
        file = file[:at] + file[at + 2 + int.from_bytes(file[at + 2 : at + 4], "big") :]
    return file


def files(random):
    """Name and bytes."""
    ycc = lambda y, cb=(1, 1), cr=(1, 1): [(1, *y), (2, *cb), (3, *cr)]
    rows, columns = np.mgrid[0:61, 0:83]
    smooth = np.stack([columns * 3, rows * 4, 255 - columns - 2 * rows], -1).clip(0, 255)
    noisy = Image.fromarray((smooth + random.normal(0, 12, (61, 83, 3))).clip(0, 255).astype(np.uint8))
    hard = Image.fromarray((random.integers(0, 2, (61, 83, 3)) * 255).astype(np.uint8))

    def save(image, size, mode="RGB", **options):
        file = io.BytesIO()
        image.crop((0, 0, *size)).convert(mode).save(file, "JPEG", **options)
        return file.getvalue()

    sizes = [(83, 61), (1, 1), (2, 2), (3, 5), (5, 3), (8, 8), (16, 16), (17, 15), (33, 1), (1, 33), (40, 18)]
    for subsampling in (0, 1, 2):
        for progressive in (False, True):
            for size in sizes:
                kind = f"pillow_{subsampling}_{'progressive' if progressive else 'baseline'}_{size[0]}x{size[1]}"
                yield kind, save(noisy, size, quality=80, subsampling=subsampling, progressive=progressive)
    for quality in (1, 30, 100):
        for name, image in {"noisy": noisy, "hard": hard}.items():
            size = (40, 30)
            yield f"{name}_{quality}", save(image, size, quality=quality)
            yield f"{name}_{quality}_progressive", save(image, size, quality=quality, progressive=True)
            yield f"{name}_{quality}_optimised", save(image, size, quality=quality, optimize=True, subsampling=1)
    for mode in ("L", "CMYK"):
        for progressive in (False, True):
            for size in ((30, 21), (1, 1)):
                kind = f"{mode}_{'progressive' if progressive else 'baseline'}_{size[0]}x{size[1]}"
                yield kind, save(noisy, size, mode, quality=90, progressive=progressive)
    yield "rgb", save(noisy, (30, 21), quality=90, keep_rgb=True)
    for progressive in (False, True):
        yield f"restarts_{progressive}", save(noisy, (83, 40), quality=85, restart_marker_blocks=3, progressive=progressive)
    for progressive in (False, True):
        # Large enough to be spread over threads.
        yield f"large_{progressive}", save(noisy.resize((690, 450)), (690, 450), quality=10, progressive=progressive)
    yield "without_codes", without(0xC4, save(noisy, (40, 30), quality=60))  # as in Motion JPEG
    for kind in ("baseline", "progressive"):
        file = save(noisy, (83, 61), quality=70, progressive=kind == "progressive", restart_marker_blocks=7)
        start, found = file.index(b"\xff\xda") + 14, 0
        while found < 8:
            at = int(random.integers(start, len(file) - 2))
            damaged = file[:at] + bytes(random.integers(0, 256, 2).tolist()) + file[at + 2 :]
            try:
                checksum(io.BytesIO(damaged))
            except OSError:
                continue
            yield f"damaged_{kind}_{found}", damaged
            found += 1
    yield "trailing", save(noisy, (20, 20)) + b"\xff\xd8 and more \xff\xd9"

    factors = {
        "411": ycc((4, 1)), "440": ycc((1, 2)), "441": ycc((1, 4)), "410": ycc((4, 2)), "420_of_4": ycc((2, 4)),
        "mixed": ycc((2, 2), (2, 1), (1, 2)), "mixed_back": ycc((1, 1), (2, 2), (1, 1)), "chroma_larger": ycc((1, 1), (2, 1), (1, 2)),
        "halves_of_4": ycc((4, 1), (2, 1), (2, 1)), "quarter_rows": ycc((2, 2), (1, 1), (2, 1)), "all_2": ycc((2, 2), (1, 1), (2, 2)),
        "third": ycc((3, 1)), "third_rows": ycc((1, 3)),
    }
    for name, parts in factors.items():
        for size in ((43, 29), (7, 9), (65, 2)):
            yield f"factors_{name}_{size[0]}x{size[1]}", write(random, *size, parts)
    yield "grey_2x2", write(random, 37, 29, [(1, 2, 2)])
    yield "grey_restarts", write(random, 37, 29, [(1, 1, 1)], interval=3)
    yield "rgb_ids", write(random, 21, 13, [(82, 1, 1), (71, 1, 1), (66, 1, 1)])
    yield "rgb_ids_jfif", write(random, 21, 13, [(82, 1, 1), (71, 1, 1), (66, 1, 1)], jfif=True)
    yield "odd_ids", write(random, 21, 13, [(7, 1, 1), (0, 1, 1), (9, 1, 1)])
    for adobe in (0, 1, 2, 3):
        yield f"adobe_{adobe}", write(random, 21, 13, ycc((1, 1)), adobe=adobe)
        yield f"adobe_{adobe}_jfif", write(random, 21, 13, ycc((1, 1)), adobe=adobe, jfif=True)
    four = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1)]
    for adobe in (None, 0, 1, 2):
        yield f"four_{adobe}", write(random, 21, 13, four, adobe=adobe)
    yield "ycck_420", write(random, 37, 29, [(1, 2, 2), (2, 1, 1), (3, 1, 1), (4, 2, 2)], adobe=2)
    yield "steep", write(random, 37, 29, ycc((2, 2)), steep=True, strong=True)
    yield "strong", write(random, 37, 29, ycc((1, 1)), strong=True)
    yield "strong_restarts", write(random, 67, 29, ycc((2, 1)), strong=True, interval=2)
    alone = [([0], 0, 63, 0), ([1], 0, 63, 0), ([2], 0, 63, 0)]
    yield "a_scan_each", write(random, 43, 37, ycc((2, 2)), alone)
    yield "a_scan_each_restarts", write(random, 43, 37, ycc((2, 1)), alone, interval=5)
    yield "chroma_together", write(random, 43, 37, ycc((2, 2)), [([1, 2], 0, 63, 0), ([0], 0, 63, 0)])
    yield "no_chroma", write(random, 43, 37, ycc((2, 2)), alone[:1])
    everything = [([0, 1, 2], 0, 0, 0)]
    missing = {
        "dc": everything, "dc_coarse": [([0, 1, 2], 0, 0, 2)],
        "few": everything + [([0], 1, 5, 0)], "few_coarse": everything + [([0], 1, 5, 2), ([1], 1, 63, 1), ([2], 1, 2, 0)],
        "most": everything + [([0], 1, 63, 1), ([1], 1, 63, 0), ([2], 6, 63, 0)], "no_chroma": [([0], 0, 0, 0)],
    }
    for name, scans in missing.items():
        for down in (1, 2):
            for size in ((60, 43), (43, 9), (5, 21)):
                yield f"missing_{name}_{down}_{size[0]}x{size[1]}", write(random, *size, ycc((2, down)), scans, progressive=True)


def checksum(file) -> tuple[int, int, int]:
    image = Image.open(file).convert("RGB")
    return image.width, image.height, zlib.crc32(image.tobytes())


def main() -> None:
    golden = {}
    for name, file in files(np.random.default_rng(3)):
        width, height, crc = checksum(io.BytesIO(file))
        golden[name] = {"file": base64.b64encode(file).decode(), "width": width, "height": height, "crc": crc}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in golden.items())
    (GOLDEN / "jpeg.json").write_text("{\n" + lines + "\n}\n")
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        photos = sorted(path for path in folder.rglob("*.jpg"))
        photos = photos[:: max(1, len(photos) // 200)][:200]
        lines = ",\n".join(f"{json.dumps(str(path.relative_to(folder)))}: {json.dumps(checksum(path))}" for path in photos)
        (GOLDEN / "jpeg_photos.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
