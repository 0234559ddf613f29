#!/usr/bin/env python3
"""Times one training step of the default model's two stages in PyTorch, and prints JSON.

    python bench/train_step.py                                       # both stages, f32 and bf16, 2 threads
    python bench/train_step.py --stage 1 --precision f32 --steps 2   # a quick look

A step is: forward, backward, clipping by the global norm, AdamW. The picture encoder is not part of it (its
output is cached in training), the weights are random (the time does not depend on them), there is no dropout.
- stage 1: batch 64, Q-Former of 6 layers x 384, cross-attention in layers 0, 2, 4 to 49 x 1280 image tokens,
  32 queries, captions of 14 tokens on average and 24 at most; ITC + ITM + ITG.
- stage 2: batch 32 through a frozen Llama of SmolLM2-135M's size, soft tokens in a chat prompt, loss on the
  answers; logits are computed for the rows that predict an answer token only.

PyTorch runs its usual way, on padded batches. bf16 is autocast; the frozen language model is then held in bf16.
Reported per configuration: median, fastest and slowest of N steps after a warm-up, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Callable

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from reference import optimizer  # noqa: E402
from reference.qformer import QFormerConfig  # noqa: E402
from reference.stage1 import Stage1, Stage1Batch, sample_negatives  # noqa: E402
from reference.stage2 import IMAGE_ROW, Stage2, Stage2Batch  # noqa: E402

CONFIG = QFormerConfig(
    vocab_size=30523,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512,
    encoder_hidden_size=1280,
    num_query_tokens=32,
    image_text_hidden_size=256,
)
N_IMAGE_TOKENS = 49
CLS, SEP, DEC = 101, 102, 30522
STAGE1_BATCH, STAGE2_BATCH = 64, 32
TEXT_TOKENS_MEAN, TEXT_TOKENS_MIN, TEXT_TOKENS_MAX = 14, 7, 24

LANGUAGE = dict(
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
)
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
        if name != "temp" and (p.dim() > 1):
            nn.init.normal_(p, std=0.02)


def stage1(generator: torch.Generator) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = Stage1(CONFIG, DEC)
    initialise(model)
    lengths = text_lengths(STAGE1_BATCH, generator)
    ids, mask = padded([[CLS] + words(n - 2, DEC, generator) + [SEP] for n in lengths])
    image_embeds = torch.randn(STAGE1_BATCH, N_IMAGE_TOKENS, CONFIG.encoder_hidden_size, generator=generator)
    image_ids = torch.arange(STAGE1_BATCH)
    # Which negatives are drawn does not change the time; drawing them is a B x B softmax.
    negatives = sample_negatives(torch.zeros(STAGE1_BATCH, STAGE1_BATCH), image_ids, generator)
    batch = Stage1Batch(image_embeds, ids, mask, image_ids, negatives, negatives)
    return model, lambda: model(batch).total


def stage2(generator: torch.Generator, precision: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LANGUAGE)).eval()
    model = Stage2(CONFIG, language)
    initialise(model)
    if precision == "bf16":
        language.to(torch.bfloat16)
    rows, targets = [], []
    for n in text_lengths(STAGE2_BATCH, generator):
        n_instruction = int(torch.randint(*INSTRUCTION_TOKENS, (1,), generator=generator))
        prompt = words(TOKENS_BEFORE_IMAGE, LANGUAGE["vocab_size"], generator) + [IMAGE_ROW] * CONFIG.num_query_tokens
        prompt += words(n_instruction + TOKENS_OF_TURN, LANGUAGE["vocab_size"], generator)
        # Captions are counted with [CLS] and [SEP]; an answer has its words and one end token.
        answer = words(n - 1, LANGUAGE["vocab_size"], generator)
        rows.append(prompt + answer)
        targets.append([0] * len(prompt) + [1] * len(answer))
    ids, mask = padded(rows)
    image_embeds = torch.randn(STAGE2_BATCH, N_IMAGE_TOKENS, CONFIG.encoder_hidden_size, generator=generator)
    batch = Stage2Batch(image_embeds, ids, mask, padded(targets)[0].bool())
    return model, lambda: model(batch, all_logits=False).loss


def measure(stage: int, precision: str, n_steps: int, n_warmup: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    model, loss_of = stage1(generator) if stage == 1 else stage2(generator, precision)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = optimizer.adamw(model)
    seconds, losses = [], []
    for _ in range(n_warmup + n_steps):
        start = time.perf_counter()
        adamw.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, optimizer.MAX_GRADIENT_NORM)
        adamw.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    timed = seconds[n_warmup:]
    return {
        "stage": stage,
        "precision": precision,
        "batch": STAGE1_BATCH if stage == 1 else STAGE2_BATCH,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "steps": n_steps,
        "median_s": round(statistics.median(timed), 4),
        "min_s": round(min(timed), 4),
        "max_s": round(max(timed), 4),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time PyTorch training steps of both stages.")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="default: both")
    parser.add_argument("--precision", choices=("f32", "bf16"), help="default: both")
    parser.add_argument("--steps", type=int, default=7, help="timed steps (default 7)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for stage in [arguments.stage] if arguments.stage else [1, 2]:
        for precision in [arguments.precision] if arguments.precision else ["f32", "bf16"]:
            result = measure(stage, precision, arguments.steps, arguments.warmup)
            print(f"stage {stage} {precision}: {result['median_s']} s a step", file=sys.stderr)
            results.append(result)
    report = {
        "engine": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "threads": arguments.threads,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load_after": round(os.getloadavg()[0], 2),
        "results": results,
    }
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
