#!/usr/bin/env python3
"""Times one training step of the two stages, in PyTorch and in this project, and prints JSON.

    python bench/train_step.py                                       # the default model's size, f32 and bf16, 2 threads
    python bench/train_step.py --size base                           # a published Q-Former's size
    python bench/train_step.py --stage 1 --precision f32 --steps 2   # a quick look
    python bench/train_step.py --engine torch                        # PyTorch alone

A step is: forward, backward, clipping by the global norm, AdamW. The picture encoder is not part of it (its
output is cached in training), the weights are random (the time does not depend on them), there is no dropout.
- stage 1: 32 queries, captions of 14 tokens on average and 24 at most; ITC + ITM + ITG.
- stage 2: soft tokens in a chat prompt of a frozen language model, loss on the answers; logits are computed for the rows that
  predict an answer token only.
Sizes:
- default: Q-Former of 6 layers x 384, cross-attention in layers 0, 2, 4 to 49 x 1280 image tokens, 64 pairs; stage 2 through a
  Llama of SmolLM2-135M's size, 32 pictures.
- base: Q-Former of 12 layers x 768 (BERT-base), cross-attention in every other layer to ViT-g's 257 x 1408 image tokens, 16
  pairs; stage 2 through four layers of OPT-2.7B with its vocabulary, 8 pictures.

PyTorch runs its usual way, on padded batches. bf16 is autocast; the frozen language model is then held in bf16.
Both engines start from the same weights and see the same batch: the first losses must agree, or the comparison
means nothing and the script says so. `speedup` is PyTorch's median over this project's. Every measurement has a
process of its own; nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from reference import optimizer  # noqa: E402
from reference.qformer import QFormerConfig  # noqa: E402
from reference.stage1 import Stage1, Stage1Batch, sample_negatives  # noqa: E402
from reference.stage2 import IMAGE_ROW, Stage2, Stage2Batch  # noqa: E402

@dataclass(frozen=True)
class Size:
    qformer: QFormerConfig
    n_image_tokens: int
    stage1_batch: int
    stage2_batch: int
    language: dict
    """The configuration of the language model, as its config.json has it."""


SIZES = {
    "default": Size(
        QFormerConfig(
            vocab_size=30523,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            max_position_embeddings=512,
            encoder_hidden_size=1280,
            num_query_tokens=32,
            image_text_hidden_size=256,
        ),
        n_image_tokens=49,
        stage1_batch=64,
        stage2_batch=32,
        language=dict(
            model_type="llama",
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
        ),
    ),
    "base": Size(
        QFormerConfig(
            vocab_size=30523,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            max_position_embeddings=512,
            encoder_hidden_size=1408,
            num_query_tokens=32,
            image_text_hidden_size=256,
        ),
        n_image_tokens=257,
        stage1_batch=16,
        stage2_batch=8,
        language=dict(
            model_type="opt",
            vocab_size=50272,
            hidden_size=2560,
            word_embed_proj_dim=2560,
            ffn_dim=10240,
            num_hidden_layers=4,
            num_attention_heads=32,
            max_position_embeddings=2048,
            do_layer_norm_before=True,
        ),
    ),
}
LOSS_AGREES = {"f32": 1e-4, "bf16": 1e-2}
"""How far the first losses of the two engines may differ, relatively."""
CLS, SEP, DEC = 101, 102, 30522
TEXT_TOKENS_MEAN, TEXT_TOKENS_MIN, TEXT_TOKENS_MAX = 14, 7, 24

# `<|im_start|>user\n` IMAGE `\n{instruction}<|im_end|>\n<|im_start|>assistant\n` {answer} `<|im_end|>`
TOKENS_BEFORE_IMAGE, TOKENS_OF_TURN, INSTRUCTION_TOKENS = 3, 6, (4, 8)


def text_lengths(n: int, generator: torch.Generator) -> list[int]:
    """Lengths as those of captions: a mean of 14, and at least one text of the greatest length."""
    noise = torch.randn(n, generator=generator) * 4
    lengths = (TEXT_TOKENS_MEAN + noise).round().clamp(TEXT_TOKENS_MIN, TEXT_TOKENS_MAX).int().tolist()
    lengths[0] = TEXT_TOKENS_MAX
    return lengths


def words(n: int, vocab_size: int, generator: torch.Generator) -> list[int]:
    return torch.randint(1000, vocab_size - 1, (n,), generator=generator).tolist()


def padded(rows: list[list]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    values = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return values, mask


def initialise(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)


class Workload:
    """A model, the loss of its batch, and both as tensors for the other engine."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], inputs: dict[str, Tensor], metadata: dict):
        self.model, self.loss, self.inputs, self.metadata = model, loss, inputs, metadata

    def write(self, path: Path) -> None:
        tensors = {name: p.detach().float() for name, p in self.model.named_parameters()}
        # The reader on the other side wants one element type; all integers here are exact in float32.
        tensors |= {name: x.float().contiguous() for name, x in self.inputs.items()}
        save_file(tensors, path, {k: json.dumps(v) for k, v in self.metadata.items()})


def stage1(size: Size) -> Workload:
    generator = torch.Generator().manual_seed(1)
    n, config = size.stage1_batch, size.qformer
    model = Stage1(config, DEC)
    initialise(model)
    lengths = text_lengths(n, generator)
    ids, mask = padded([[CLS] + words(length - 2, DEC, generator) + [SEP] for length in lengths])
    image_embeds = torch.randn(n, size.n_image_tokens, config.encoder_hidden_size, generator=generator)
    image_ids = torch.arange(n)
    # Given, not drawn at each step: drawing them is a softmax of n x n numbers, and the engines must agree.
    negatives = sample_negatives(torch.zeros(n, n), image_ids, generator)
    batch = Stage1Batch(image_embeds, ids, mask, image_ids, negatives, negatives)
    inputs = {
        "in.image_embeds": image_embeds,
        "in.text_ids": ids[mask],
        "in.text_lengths": mask.sum(dim=1),
        "in.image_ids": image_ids,
        "in.negative_images": negatives,
        "in.negative_texts": negatives,
    }
    return Workload(model, lambda: model(batch).total, inputs, {"config": config.to_dict(), "dec_token_id": DEC})


def language_model(config: dict) -> nn.Module:
    settings = {name: value for name, value in config.items() if name != "model_type"}
    if config["model_type"] == "opt":
        return transformers.OPTForCausalLM(transformers.OPTConfig(**settings)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


def stage2(size: Size, precision: str) -> Workload:
    generator = torch.Generator().manual_seed(1)
    n, config, vocab_size = size.stage2_batch, size.qformer, size.language["vocab_size"]
    language = language_model(size.language)
    model = Stage2(config, language)
    initialise(model)
    if precision == "bf16":
        language.to(torch.bfloat16)
    rows, targets = [], []
    for length in text_lengths(n, generator):
        n_instruction = int(torch.randint(*INSTRUCTION_TOKENS, (1,), generator=generator))
        prompt = words(TOKENS_BEFORE_IMAGE, vocab_size, generator) + [IMAGE_ROW] * config.num_query_tokens
        prompt += words(n_instruction + TOKENS_OF_TURN, vocab_size, generator)
        # Captions are counted with [CLS] and [SEP]; an answer has its words and one end token.
        answer = words(length - 1, vocab_size, generator)
        rows.append(prompt + answer)
        targets.append([0] * len(prompt) + [1] * len(answer))
    ids, mask = padded(rows)
    image_embeds = torch.randn(n, size.n_image_tokens, config.encoder_hidden_size, generator=generator)
    batch = Stage2Batch(image_embeds, ids, mask, padded(targets)[0].bool())
    inputs = {
        "in.image_embeds": image_embeds,
        "in.ids": ids[mask],
        "in.lengths": mask.sum(dim=1),
        "in.is_target": batch.is_target[mask],
    }
    metadata = {"config": config.to_dict(), "language_config": size.language}
    return Workload(model, lambda: model(batch, all_logits=False).loss, inputs, metadata)


def measure_torch(
    size: str, stage: int, precision: str, n_threads: int, n_warmup: int, n_steps: int, export: Path | None
) -> dict:
    torch.set_num_threads(n_threads)
    torch.manual_seed(1)
    workload = stage1(SIZES[size]) if stage == 1 else stage2(SIZES[size], precision)
    if export is not None:
        workload.write(export)
    parameters = [p for p in workload.model.parameters() if p.requires_grad]
    adamw = optimizer.adamw(workload.model)
    seconds, losses = [], []
    for _ in range(n_warmup + n_steps):
        start = time.perf_counter()
        adamw.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = workload.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, optimizer.MAX_GRADIENT_NORM)
        adamw.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    timed = seconds[n_warmup:]
    return {
        "steps": n_steps,
        "median_s": statistics.median(timed),
        "min_s": min(timed),
        "max_s": max(timed),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def measure_rust(stage: int, precision: str, n_threads: int, n_warmup: int, n_steps: int, batch: Path) -> dict:
    command = ["cargo", "run", "--release", "--quiet", "-p", "blip2-train", "--example", "timed_batch", "--"]
    command += [str(stage), precision, str(batch), str(n_warmup), str(n_steps)]
    # What `blip2 train` starts itself with.
    environment = os.environ | {"RAYON_NUM_THREADS": str(n_threads)}
    environment |= {"MIMALLOC_PURGE_DELAY": "-1", "CANDLE_BARRIER_POOL_SPIN_LIMIT": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def compare(stage: int, precision: str, arguments: argparse.Namespace) -> dict:
    size = SIZES[arguments.size]
    batch = size.stage1_batch if stage == 1 else size.stage2_batch
    result = {"size": arguments.size, "stage": stage, "precision": precision, "batch": batch}
    settings = (stage, precision, arguments.threads, arguments.warmup, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        both = arguments.engine == "both"
        export = Path(folder, "batch.safetensors") if both else None
        # A fresh process, so that its peak memory is its own and its memory is free again afterwards.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result["torch"] = pool.apply(measure_torch, (arguments.size, *settings, export))
        if export is not None:
            result["rust"] = measure_rust(*settings, export)
            result["speedup"] = result["torch"]["median_s"] / result["rust"]["median_s"]
            difference = abs(result["rust"]["first_loss"] / result["torch"]["first_loss"] - 1)
            result["same_loss"] = difference < LOSS_AGREES[precision]
    return result


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description="Time training steps of both stages, in PyTorch and here.")
    parser.add_argument("--size", choices=tuple(SIZES), default="default")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="default: both")
    parser.add_argument("--precision", choices=("f32", "bf16"), help="default: both")
    parser.add_argument("--engine", choices=("both", "torch"), default="both")
    parser.add_argument("--steps", type=int, default=7, help="timed steps (default 7)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    arguments = parser.parse_args()
    if arguments.engine == "both":
        build = ["cargo", "build", "--release", "--quiet", "-p", "blip2-train", "--example", "timed_batch"]
        subprocess.run(build, cwd=ROOT, check=True)
    load = os.getloadavg()[0]
    results = []
    for stage in [arguments.stage] if arguments.stage else [1, 2]:
        for precision in [arguments.precision] if arguments.precision else ["f32", "bf16"]:
            result = compare(stage, precision, arguments)
            results.append(rounded(result))
            medians = ", ".join(f"{e} {result[e]['median_s']:.2f} s" for e in ("torch", "rust") if e in result)
            ratio = f", {result['speedup']:.2f} times PyTorch's speed" if "speedup" in result else ""
            print(f"stage {stage} {precision}: {medians}{ratio}", file=sys.stderr)
            if not result.get("same_loss", True):
                print("  but the two compute different losses", file=sys.stderr)
    report = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": arguments.threads,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "load_before": round(load, 2),
        "results": results,
    }
    json.dump(report, sys.stdout, indent=2)
    print()
    return 0 if all(result.get("same_loss", True) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
