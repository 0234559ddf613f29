#!/usr/bin/env python3
"""The tokens that transformers and this project write for one picture, with one checkpoint, both computing in f32.

    python tools/compare_tokens.py FOLDER PICTURE [--blip2 target/release/blip2] [--max-new-tokens 20] [--num-beams 1 5]

needs torch, transformers, pillow, and for transformers the whole model in f32 in memory (15 GB for blip2-opt-2.7b). Prints
both lists for each number of beams, and the time and peak memory of each program. No token may come twice
(`--no-repeat-ngram 1`): random weights, whose head is that of their embeddings, else write one token over and over, which
compares little. `tools/random_checkpoint.py` makes a checkpoint of a published size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def ours(args: argparse.Namespace) -> dict:
    runs = [caption(args, num_beams) for num_beams in args.num_beams]
    return {
        "token_ids": [run["token_ids"] for run in runs], "seconds": sum(run["seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }


def caption(args: argparse.Namespace, num_beams: int) -> dict:
    command = [
        args.blip2, "caption", str(args.picture), "--model", str(args.folder), "--json", "--dtype", "f32", "--preset", "hf",
        "--beams", str(num_beams), "--max-new-tokens", str(args.max_new_tokens), "--no-repeat-ngram",
        str(args.no_repeat_ngram),
    ]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed")
    return {
        "token_ids": json.loads(out)[0]["token_ids"], "seconds": time.monotonic() - start,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def reference(args: argparse.Namespace) -> dict:
    import resource

    import numpy as np
    import torch
    from PIL import Image
    from transformers import Blip2ForConditionalGeneration

    start = time.monotonic()
    model = Blip2ForConditionalGeneration.from_pretrained(args.folder, dtype=torch.float32).eval()
    processor = json.loads((args.folder / "preprocessor_config.json").read_text())
    side = processor["size"]["height"]
    square = Image.open(args.picture).convert("RGB").resize((side, side), Image.BICUBIC)
    values = np.asarray(square, dtype=np.float64) / 255
    values = (values - np.array(processor["image_mean"])) / np.array(processor["image_std"])
    pixels = torch.from_numpy(values).float().permute(2, 0, 1)[None]
    config, is_opt = model.config, model.config.text_config.model_type == "opt"
    ids = [config.image_token_index] * config.num_query_tokens + ([2] if is_opt else [1])
    ids = torch.tensor([ids])
    end = config.text_config.eos_token_id if is_opt else 1
    texts = []
    for num_beams in args.num_beams:
        with torch.inference_mode():
            out = model.generate(
                pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                num_beams=num_beams, max_new_tokens=args.max_new_tokens, eos_token_id=end,
                no_repeat_ngram_size=args.no_repeat_ngram,
            )[0].tolist()
        if is_opt and out[: ids.shape[1]] == ids[0].tolist():
            out = out[ids.shape[1] :]
        elif not is_opt:
            out = out[1:]
        texts.append(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"token_ids": texts, "seconds": time.monotonic() - start, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--blip2", default="target/release/blip2")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--num-beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--no-repeat-ngram", type=int, default=1)
    args = parser.parse_args()
    files = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    print(f"weight files: {files / 2**30:.2f} GiB")
    results = {}
    for name, run in [("blip2", ours), ("transformers", reference)]:
        results[name] = run(args)
        peak = results[name]["peak_bytes"] / 2**30
        print(f"{name}: {results[name]['seconds']:.1f} s, peak {peak:.2f} GiB, {results[name]['token_ids']}", flush=True)
    same = results["blip2"]["token_ids"] == results["transformers"]["token_ids"]
    print("the same tokens" if same else "DIFFERENT tokens")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
