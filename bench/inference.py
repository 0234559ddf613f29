#!/usr/bin/env python3
"""Times inference at published sizes, in PyTorch (transformers) and in this project, and prints JSON.

    cargo build --release -p blip2-cli
    python bench/inference.py                                    # everything; an hour, 9 GB of memory
    python bench/inference.py --works vision,decode --no-compile # a part, a quick look
    python bench/inference.py --works pictures --pictures DIR    # files to pixel values, against Pillow

needs torch, transformers, Pillow and numpy. Weights are random in both engines (the time does not depend on them) and
no model is downloaded. PyTorch computes in bf16, the fastest it has here; each work is timed eagerly and with
torch.compile, and the faster counts. Works:
- vision: EVA-CLIP ViT-g, pixel values to image tokens, one picture and four
- prefill: OPT-2.7B reads a prompt of 40 rows (32 queries and 8 words) and gives the scores of the next token
- decode: OPT-2.7B, one more token, the mean of 20 after a prompt of 40 rows
- caption: BLIP-2 OPT-2.7B, a picture in memory to 20 tokens, greedily and with 5 beams; and the peak memory of that
- caption-t5: the same with Flan-T5-XL
- pictures: files to pixel values, 12-megapixel JPEGs: one, and a folder of eight; against Pillow and numpy on one thread

`speedup` is PyTorch's median over this project's. Engines take turns, each in processes of its own, never two at once.
Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from random_checkpoint import MEAN, STD, SHAPES  # noqa: E402

OPT, T5 = "blip2-opt-2.7b", "blip2-flan-t5-xl"
WORKS = ("vision", "prefill", "decode", "caption", "caption-t5", "pictures")
N_QUERIES, N_WORDS, N_TOKENS, N_BEAMS = 32, 8, 20, 5
PHOTO, SIDE, N_PHOTOS = (4032, 3024), 224, 8
TARGETS = {
    ("vision, 1 picture", "bf16"): 1.0,
    ("vision, 1 picture", "int8"): 1.7,
    ("vision, 4 pictures", "bf16"): 1.0,
    ("vision, 4 pictures", "int8"): 1.7,
    ("prefill", "int8"): 1.4,
    ("decode", "int8"): 1.9,
    ("decode", "int4"): 3.3,
    ("caption, greedy", "int8"): 1.8,
    ("caption, greedy", "int4"): 2.4,
    ("caption, 5 beams", "int8"): 3.0,
    ("caption, 5 beams", "int4"): 3.5,
    ("Flan-T5-XL caption, greedy", "int8"): 2.0,
    ("Flan-T5-XL caption, greedy", "int4"): 2.5,
    ("1 photo", ""): 1.0,
    ("8 photos", ""): 1.8,
}
"""The least ratio that is wanted."""


@contextlib.contextmanager
def without_initialisation():
    """Modules are made without drawing their weights, in bf16, so that none is ever in memory twice."""
    names = ["uniform_", "normal_", "trunc_normal_", "constant_", "zeros_", "ones_", "xavier_uniform_", "kaiming_uniform_"]
    originals = {name: getattr(nn.init, name) for name in names}
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for name in names:
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        torch.set_default_dtype(dtype)
        for name, original in originals.items():
            setattr(nn.init, name, original)


def build(shape: str) -> nn.Module:
    text, image_token = SHAPES[shape]
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(hidden_act="gelu", layer_norm_eps=1e-6).to_dict(),
        qformer_config=transformers.Blip2QFormerConfig(vocab_size=30522).to_dict(),
        text_config=text.to_dict(),
        image_token_index=image_token,
    )
    with without_initialisation():
        model = transformers.Blip2ForConditionalGeneration(config).eval()
    draw(model)
    return model


def draw(model: nn.Module) -> None:
    """A stretch of noise, again and again: drawing billions of numbers takes longer than what is measured. It begins elsewhere
    in every tensor, since some engines keep equal ones once."""
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = noise.roll(97)
            flat, is_norm = p.view(-1), p.dim() == 1 and name.endswith("weight")
            scale = 0.1 if p.dim() < 2 else p.shape[-1] ** -0.5
            for part in flat.split(len(noise)):
                part.copy_(noise[: len(part)]).mul_(scale)
                if is_norm:
                    part.add_(1)


def timed(run: Callable[[], object], n_warmup: int, n_runs: int, n_things: int = 1) -> list[float]:
    seconds = []
    for _ in range(n_warmup + n_runs):
        start = time.perf_counter()
        run()
        seconds.append((time.perf_counter() - start) / n_things)
    return seconds[n_warmup:]


class Torch:
    """A model and its works, each as a function that runs it once and how many things that is for."""

    def __init__(self, shape: str):
        self.model, self.shape = build(shape), shape
        self.is_compiled = False

    def compile(self) -> None:
        """What a user would compile: the encoder, and the language model whose texts grow."""
        self.is_compiled = True
        self.model.vision_model.forward = torch.compile(self.model.vision_model.forward)
        self.model.language_model.forward = torch.compile(self.model.language_model.forward, dynamic=True)

    def pixels(self, n: int = 1) -> Tensor:
        return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)

    def prompt(self) -> Tensor:
        width = self.model.config.text_config.hidden_size
        return torch.randn(1, N_QUERIES + N_WORDS, width, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)

    def prefill(self) -> object:
        return self.model.language_model(inputs_embeds=self.prompt(), use_cache=True, logits_to_keep=1)

    def decode(self) -> None:
        # The first token follows from the prompt; each of the next is fed back.
        state = self.prefill()
        self.started = time.perf_counter()
        for _ in range(N_TOKENS):
            token = state.logits[:, -1:].argmax(-1)
            state = self.model.language_model(
                input_ids=token, past_key_values=state.past_key_values, use_cache=True, logits_to_keep=1
            )
        state.logits.argmax(-1)
        self.seconds = (time.perf_counter() - self.started) / N_TOKENS

    def decode_times(self, n_warmup: int, n_runs: int) -> list[float]:
        seconds = []
        for _ in range(n_warmup + n_runs):
            self.decode()
            seconds.append(self.seconds)
        return seconds[n_warmup:]

    def caption(self, beams: int) -> None:
        picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (480, 640, 3), dtype=np.uint8))
        pixels = torch.from_numpy(pillow_pixels(picture)).permute(2, 0, 1)[None].to(torch.bfloat16)
        image_token = self.model.config.image_token_index
        ids = torch.tensor([[image_token] * N_QUERIES + list(range(10, 10 + N_WORDS))])
        self.model.generate(
            pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams,
            do_sample=False, min_new_tokens=N_TOKENS, max_new_tokens=N_TOKENS,
        )

    def times(self, work: str, n_warmup: int, n_runs: int) -> dict[str, list[float]]:
        def vision(n: int) -> list[float]:
            pixels = self.pixels(n)
            return timed(lambda: self.model.vision_model(pixel_values=pixels), n_warmup, n_runs)

        def caption(beams: int) -> list[float]:
            return timed(lambda: self.caption(beams), n_warmup, n_runs)

        match work:
            case "vision":
                return {"vision, 1 picture": vision(1), "vision, 4 pictures": vision(4)}
            case "prefill":
                return {"prefill": timed(self.prefill, n_warmup, n_runs)}
            case "decode":
                return {"decode": self.decode_times(n_warmup, n_runs)}
            case "caption":
                return {"caption, greedy": caption(1), f"caption, {N_BEAMS} beams": caption(N_BEAMS)}
            case "caption-t5":
                return {"Flan-T5-XL caption, greedy": caption(1)}
        raise ValueError(work)


def measure_torch(shape: str, works: list[str], is_compiled: bool, n_threads: int, n_runs: int) -> dict:
    torch.set_num_threads(n_threads)
    torch._dynamo.config.recompile_limit = 64
    engine = Torch(shape)
    if is_compiled:
        engine.compile()
    with torch.inference_mode():
        seconds = {}
        for work in works:
            # What is compiled for one length is compiled again for any at the second.
            seconds |= engine.times(work, 3 if is_compiled else 1, n_runs)
    return {"seconds": seconds, "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def in_a_process(function: Callable, *arguments):
    """Its memory is its own, and free again afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def blip2(arguments: argparse.Namespace, *options: str) -> dict:
    command = [str(arguments.binary), "bench", "--json", "--threads", str(arguments.threads)]
    command += ["--repeat", str(arguments.repeat), "--tokens", str(N_TOKENS), "--prompt-tokens", str(N_WORDS), *options]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def stage(report: dict, name: str, beams: int | None = None) -> float:
    (found,) = [s for s in report["stages"] if s["stage"] == name and s.get("beams") == beams]
    return found["median_s"]


def rust_times(shape: str, works: list[str], dtype: str, arguments: argparse.Namespace) -> tuple[dict, dict | None]:
    """Seconds of each work, and the report of the run that made captions, alone."""
    model = ["--shape", shape, "--dtype", dtype, "--ignore-memory"]
    seconds, captions = {}, None
    if "vision" in works:
        for n, name in ((1, "vision, 1 picture"), (4, "vision, 4 pictures")):
            report = blip2(arguments, *model, "--stages", "vision", "--batch", str(n))
            seconds[name] = stage(report, "vision")
    stages = [work for work in works if work in ("prefill", "decode")]
    if stages:
        report = blip2(arguments, *model, "--stages", ",".join(stages), "--beams", "1")
        seconds |= {name: stage(report, name, 1 if name == "decode" else None) for name in stages}
    if "caption" in works:
        captions = blip2(arguments, *model, "--stages", "caption", "--beams", str(N_BEAMS))
        for beams, name in ((1, "caption, greedy"), (N_BEAMS, f"caption, {N_BEAMS} beams")):
            seconds[name] = stage(captions, "caption", beams)
    if "caption-t5" in works:
        captions = blip2(arguments, *model, "--stages", "caption", "--beams", "1")
        seconds["Flan-T5-XL caption, greedy"] = stage(captions, "caption", 1)
    return seconds, captions


def compare(shape: str, works: list[str], arguments: argparse.Namespace) -> list[dict]:
    best, by_setting, memory = {}, {}, None
    for is_compiled in [False] if arguments.no_compile else [False, True]:
        try:
            result = in_a_process(measure_torch, shape, works, is_compiled, arguments.threads, arguments.repeat)
        except Exception as error:  # eager still counts
            print(f"torch.compile failed: {error}", file=sys.stderr)
            continue
        memory = memory or result["peak_memory"]
        for work, seconds in result["seconds"].items():
            median = statistics.median(seconds)
            by_setting.setdefault(work, {})["compile" if is_compiled else "eager"] = median
            best[work] = min(best.get(work, median), median)
    rows = []
    for dtype in arguments.dtypes:
        some = works if dtype != "bf16" else [work for work in works if work == "vision"]
        if not some:
            continue
        seconds, captions = rust_times(shape, some, dtype, arguments)
        for work, ours in seconds.items():
            if best.get(work):
                rows.append(row(work, dtype, best[work], ours, peer_settings_s=by_setting[work]))
        if captions is not None:
            rows.append({
                "work": f"peak memory, {shape}", "dtype": dtype, "torch_bytes": memory,
                "blip2_bytes": captions["peak_memory"], "ratio": captions["peak_memory"] / memory,
            })
            print(f"peak memory {dtype}: torch {memory / 1e9:.2f} GB, blip2 {captions['peak_memory'] / 1e9:.2f} GB", file=sys.stderr)
    return rows


def row(work: str, dtype: str, torch_s: float, ours_s: float, **more) -> dict:
    found, wanted = torch_s / ours_s, TARGETS.get((work, dtype))
    said = f", wanted {wanted}" if wanted else ""
    print(f"{work} {dtype}: torch {torch_s:.4f} s, blip2 {ours_s:.4f} s, {found:.2f} times{said}", file=sys.stderr)
    return {"work": work, "dtype": dtype, "peer_median_s": torch_s, "blip2_median_s": ours_s, "speedup": found, "wanted": wanted, **more}


def pillow_pixels(picture: Image.Image) -> np.ndarray:
    """Pixel values as LAVIS and transformers' Pillow processor make them, [S, S, 3]."""
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return (np.asarray(small, dtype=np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


def photos(folder: Path) -> list[Path]:
    """Photos of 12 megapixels: noise on smooth colours, about as large a file as a camera's."""
    random = np.random.default_rng(1)
    paths = []
    for i in range(N_PHOTOS):
        small = Image.fromarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize(PHOTO, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + random.integers(-12, 12, smooth.shape, dtype=np.int16), 0, 255).astype(np.uint8)
        paths.append(folder / f"{i}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=85)
    return paths


def compare_pictures(arguments: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(arguments.pictures.iterdir()) if arguments.pictures else photos(Path(folder))
        rows = []
        for some, name in ((paths[:1], "1 photo"), (paths, f"{len(paths)} photos")):
            peer = timed(lambda: [pillow_pixels(Image.open(path)) for path in some], 1, arguments.repeat)
            files = [option for path in some for option in ("--picture", str(path))]
            report = blip2(arguments, "--shape", "tiny", "--image-size", "224", "--stages", "preprocess", *files)
            rows.append(row(name, "", statistics.median(peer), stage(report, "preprocess")))
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Time inference at published sizes, in PyTorch and here.")
    parser.add_argument("--works", default=",".join(WORKS), help=f"some of {', '.join(WORKS)}")
    parser.add_argument("--dtypes", default="bf16,int8,int4", help="of this project (default bf16,int8,int4; bf16 for vision only)")
    parser.add_argument("--no-compile", action="store_true", help="PyTorch eagerly only")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--pictures", type=Path, help="a folder of photos, instead of drawn ones")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/blip2")
    arguments = parser.parse_args()
    works = arguments.works.split(",")
    if unknown := set(works) - set(WORKS):
        parser.error(f"no such work: {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    arguments.dtypes = arguments.dtypes.split(",")
    load = os.getloadavg()[0]
    results = []
    if "pictures" in works:
        results += compare_pictures(arguments)
    if with_opt := [work for work in works if work not in ("caption-t5", "pictures")]:
        results += compare(OPT, with_opt, arguments)
    if "caption-t5" in works:
        results += compare(T5, ["caption-t5"], arguments)
    report = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": arguments.threads,
        "machine": platform.machine(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "load_before": round(load, 2),
        "results": results,
    }
    json.dump(report, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
