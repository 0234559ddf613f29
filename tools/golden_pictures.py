#!/usr/bin/env python3
"""Tiny pictures of every kind that is decoded, with the pixels that Pillow finds in them.

    pip install pillow==13.0.0 numpy
    python tools/golden_pictures.py

writes crates/blip2/tests/golden/pictures.json: for each picture its file, its size as it should be shown, the RGB bytes and
by how much decoders may differ (0 but for lossy WebP). Transparency is laid over white and 16 bits are rounded to 8 here,
in numpy, because Pillow's own conversions drop one and clip the other; where these give something else it stands beside,
as `pillow`: width, height, RGB bytes.
"""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

GOLDEN = Path(__file__).parent.parent / "crates/blip2/tests/golden/pictures.json"
WIDTH, HEIGHT = 24, 16
LOSSY = 6  # of WebP: colours are brought to size in more than one way
ORIENTATION = 0x0112

random = np.random.default_rng(7)
noise = random.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
smooth = np.stack([columns * 10, rows * 15, 255 - columns * 5 - rows * 5], -1).astype(np.uint8)
pictures = {}


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, format, **options)  # saving leaves settings behind in the picture
    return file.getvalue()


def add(name: str, file: bytes, rgb: np.ndarray, tolerance: int = 0) -> None:
    height, width, _ = rgb.shape
    own = pillow(file)
    differs = own.shape != rgb.shape or not np.array_equal(own, rgb)
    other = {"pillow": [own.shape[1], own.shape[0], own.tobytes().hex()]} if differs else {}
    pictures[name] = {"file": file.hex(), "width": width, "height": height, "rgb": rgb.astype(np.uint8).tobytes().hex(), "tolerance": tolerance, **other}


def over_white(rgba: np.ndarray) -> np.ndarray:
    rgba = rgba.astype(np.int64)
    alpha = rgba[..., 3:]
    return (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255


def pillow(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def png(values: np.ndarray, depth: int, color_type: int) -> bytes:
    """A PNG written by hand: Pillow cannot write 16-bit colour."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    lines = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
photo = Image.fromarray(smooth)
gray = noise[..., 0]

for name, options in {"jpeg": {}, "jpeg_progressive": {"progressive": True}, "jpeg_444": {"subsampling": 0}}.items():
    file = encode(photo, "JPEG", quality=95, **options)
    add(name, file, pillow(file))
file = encode(photo.convert("L"), "JPEG", quality=95)
add("jpeg_gray", file, pillow(file))
file = encode(photo.convert("CMYK"), "JPEG", quality=98)
add("jpeg_cmyk", file, pillow(file))

add("png", encode(rgb, "PNG"), noise[..., :3])
add("png_alpha", encode(rgba, "PNG"), over_white(noise))
palette = rgb.quantize(16)
transparent = np.asarray(palette.convert("RGBA")).copy()
transparent[np.asarray(palette) == 3, 3] = 0
transparent[np.asarray(palette) == 5, 3] = 100
alphas = bytes(0 if i == 3 else 100 if i == 5 else 255 for i in range(16))
add("png_palette_transparent", encode(palette, "PNG", transparency=alphas), over_white(transparent))
black_and_white = Image.fromarray(gray > 127)
add("png_1_bit", encode(black_and_white, "PNG"), np.asarray(black_and_white.convert("RGB")))
wide = random.integers(0, 65536, (HEIGHT, WIDTH, 4))
eight = (wide + 128) // 257
add("png_16_bit_gray", png(wide[..., :1], 16, 0), np.repeat(eight[..., :1], 3, -1))
add("png_16_bit", png(wide[..., :3], 16, 2), eight[..., :3])
add("png_16_bit_alpha", png(wide, 16, 6), over_white(eight))
gray_alpha = noise[..., [0, 0, 0, 3]]
add("png_gray_alpha", png(noise[..., [0, 3]], 8, 4), over_white(gray_alpha))

add("bmp", encode(rgb, "BMP"), noise[..., :3])
add("tiff", encode(rgb, "TIFF", compression="tiff_lzw"), noise[..., :3])
add("tiff_pages", encode(rgb, "TIFF", save_all=True, append_images=[photo]), noise[..., :3])
add("webp_lossless", encode(rgb, "WEBP", lossless=True, exact=True), noise[..., :3])
add("webp_alpha", encode(rgba, "WEBP", lossless=True, exact=True), over_white(noise))
file = encode(photo, "WEBP", quality=95)
add("webp", file, pillow(file), LOSSY)
add("webp_animated", encode(rgb, "WEBP", save_all=True, append_images=[photo], lossless=True, exact=True), noise[..., :3])
add("gif", encode(palette, "GIF"), np.asarray(palette.convert("RGB")))
add("gif_animated", encode(palette, "GIF", save_all=True, append_images=[photo.quantize(16)], duration=100), np.asarray(palette.convert("RGB")))
see_through = np.asarray(palette.convert("RGBA")).copy()
see_through[np.asarray(palette) == 3, 3] = 0
add("gif_transparent", encode(palette, "GIF", transparency=3), over_white(see_through))

for orientation in range(1, 9):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = encode(photo, "JPEG", quality=95, subsampling=0, exif=exif)
    add(f"jpeg_orientation_{orientation}", file, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file)))))
exif = Image.Exif()
exif[ORIENTATION] = 6
turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encode(rgb, "PNG", exif=exif)))))
assert turned.shape == (WIDTH, HEIGHT, 3)
add("png_orientation_6", encode(rgb, "PNG", exif=exif), turned)
add("webp_orientation_6", encode(rgb, "WEBP", lossless=True, exact=True, exif=exif), turned)

GOLDEN.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(p, separators=(',', ':'))}" for name, p in pictures.items()) + "\n}\n")
print(len(pictures), "pictures,", GOLDEN.stat().st_size, "bytes")
