#!/usr/bin/env python3
"""A BLIP-2 of a published size with random weights, as a Hugging Face folder.

    python tools/random_checkpoint.py blip2-opt-2.7b OUT [--dtype float16] [--seed 1] [--tokenizer FOLDER]

needs torch, transformers, safetensors, numpy. Nothing is downloaded and the model is never whole in memory: its tensors are
named by an empty model of transformers and drawn shard by shard. Every bias and every query is random too. A tokenizer is
copied from a folder that has `tokenizer.json`, where one is given; the sizes are those of the published configurations.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    T5Config,
)

SHARD_BYTES = 2_000_000_000
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def opt(width: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=50304, hidden_size=width, ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        word_embed_proj_dim=width, eos_token_id=50118,
    )


def flan_t5(width: int, inner: int, layers: int, heads: int) -> T5Config:
    return T5Config(
        vocab_size=32128, d_model=width, d_kv=64, d_ff=inner, num_layers=layers, num_decoder_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )


SHAPES = {
    "blip2-opt-2.7b": (opt(2560, 32, 32), 50265),
    "blip2-opt-6.7b": (opt(4096, 32, 32), 50265),
    "blip2-flan-t5-xl": (flan_t5(2048, 5120, 24, 32), 32100),
    "blip2-flan-t5-xxl": (flan_t5(4096, 10240, 24, 64), 32100),
    "blip2-itm-vit-g": (None, None),
}


def empty_model(shape: str):
    text, image_token = SHAPES[shape]
    matching = text is None
    qformer = Blip2QFormerConfig(vocab_size=30523 if matching else 30522, use_qformer_text_input=matching)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(hidden_act="gelu", layer_norm_eps=1e-6).to_dict(), qformer_config=qformer.to_dict(),
        text_config={"model_type": "opt"} if matching else text.to_dict(), image_token_index=image_token,
    )
    with torch.device("meta"):
        return (Blip2ForImageTextRetrieval if matching else Blip2ForConditionalGeneration)(config)


def draw(name: str, shape: torch.Size, random: np.random.Generator, dtype: torch.dtype) -> torch.Tensor:
    numbers = random.standard_normal(size=tuple(shape), dtype=np.float32)
    is_norm = name.endswith("weight") and len(shape) == 1
    scale = 0.1 if is_norm or len(shape) < 2 else min(1.0, 1.0 / np.sqrt(shape[-1]))
    numbers *= scale
    if is_norm:
        numbers += 1
    return torch.from_numpy(numbers).to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = empty_model(args.shape)
    args.out.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(args.out)
    processor = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
        "image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255, "size": {"height": 224, "width": 224},
    }
    (args.out / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    for path in args.tokenizer.iterdir() if args.tokenizer else []:
        if path.name != "config.json":  # that of the language model alone
            shutil.copy(path, args.out / path.name)

    # Tied tensors are one parameter, which the files hold once.
    parameters = [(name, tensor.shape) for name, tensor in model.named_parameters()]
    shards, size = [[]], 0
    for name, shape in parameters:
        n_bytes = shape.numel() * dtype.itemsize
        if size and size + n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += n_bytes
    random, index = np.random.default_rng(args.seed), {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({name: draw(name, shape, random, dtype) for name, shape in shard}, args.out / file, {"format": "pt"})
        index |= {name: file for name, _ in shard}
        print(file, flush=True)
    total = sum(shape.numel() for _, shape in parameters) * dtype.itemsize
    (args.out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
