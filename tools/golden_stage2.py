#!/usr/bin/env python3
"""Golden files of stage 2, from `tools/reference` in front of a tiny random `LlamaForCausalLM` of transformers.

    python tools/golden_stage2.py           # needs torch, transformers, safetensors, numpy

writes
  crates/blip2-train/tests/golden/stage2.safetensors          weights, inputs, outputs, loss, every trainable gradient
  crates/blip2-train/tests/golden/stage2_steps.safetensors    ten AdamW steps: losses, gradient norms, last weights

Rows are packed (no padding): sample after sample in `in.ids`, whose -1 stand for a projected query each and
whose targets are marked in `in.is_target`. The language model's tensors are named
`language_model.<Hugging Face name>`, its configuration is the metadata entry `language_config`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from golden_qformer import N_STEPS, layers, weights
from reference import golden, optimizer
from reference.golden import TINY, packed
from reference.stage2 import IMAGE_ROW, Stage2, Stage2Batch, Stage2Output

START, END, NEWLINE = 1, 2, 3
"""Stand-ins for `<|im_start|>`, `<|im_end|>` and the line break of the chat format."""

LANGUAGE = {
    "model_type": "llama",
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": START,
    "eos_token_id": END,
}
TURNS = (((5, 4),), ((3, 1),), ((7, 6),), ((4, 2), (3, 5)), ((2, 3),))
"""Per sample: turns of (instruction tokens, answer tokens); the fourth is a dialogue of two turns."""


def sample(turns, generator: torch.Generator) -> tuple[list[int], list[bool]]:
    """One conversation in the shape of the default model's prompt: ids, and which of them are targets."""
    words = lambda n: torch.randint(NEWLINE + 1, LANGUAGE["vocab_size"], (n,), generator=generator).tolist()  # noqa: E731
    ids: list[int] = []
    is_target: list[bool] = []

    def add(tokens: list[int], target: bool) -> None:
        ids.extend(tokens)
        is_target.extend([target] * len(tokens))

    user, assistant = [START, 10, NEWLINE], [START, 11, NEWLINE]
    for i, (n_instruction, n_answer) in enumerate(turns):
        add(user, False)
        if i == 0:
            add([IMAGE_ROW] * TINY.num_query_tokens + [NEWLINE], False)
        add(words(n_instruction) + [END, NEWLINE] + assistant, False)
        add(words(n_answer) + [END], True)
        if i + 1 < len(turns):
            add([NEWLINE], False)
    return ids, is_target


def pad(rows: list[list], value) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


class Rotary(torch.nn.Module):
    """The rotary table in the precision of its input; transformers computes it in float32 always."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, LANGUAGE["head_dim"], 2, dtype=x.dtype) / LANGUAGE["head_dim"]
        angles = position_ids[..., None].to(x.dtype) * LANGUAGE["rope_theta"] ** -half
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


class RmsNorm(torch.nn.Module):
    """The same for its norm, which takes the mean of the squares in float32."""

    def __init__(self, weight: torch.nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()


def compute_all_in_float64(language_model: LlamaForCausalLM) -> None:
    inner = language_model.model
    inner.rotary_emb = Rotary()
    inner.norm = RmsNorm(inner.norm.weight, LANGUAGE["rms_norm_eps"])
    for layer in inner.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, RmsNorm(getattr(layer, name).weight, LANGUAGE["rms_norm_eps"]))


def model_and_batch(dtype: torch.dtype) -> tuple[Stage2, Stage2Batch]:
    generator = torch.Generator().manual_seed(golden.SEED + 2)
    language_model = LlamaForCausalLM(LlamaConfig(**LANGUAGE, attn_implementation="eager"))
    model = Stage2(TINY, language_model.eval()).to(dtype)
    golden.randomise(model, generator)
    if dtype == torch.float64:
        compute_all_in_float64(language_model)
    samples = [sample(turns, generator) for turns in TURNS]
    image_embeds = golden.random_images(len(TURNS), generator).to(dtype)
    batch = Stage2Batch(
        image_embeds,
        ids=pad([ids for ids, _ in samples], 0),
        mask=pad([[True] * len(ids) for ids, _ in samples], False),
        is_target=pad([targets for _, targets in samples], False),
    )
    return model, batch


def inputs(batch: Stage2Batch) -> dict[str, Tensor]:
    return {
        "in.image_embeds": batch.image_embeds,  # [B, P, encoder width]
        "in.ids": packed(batch.ids, batch.mask),  # [sum of lengths], -1 at the rows of the image
        "in.lengths": batch.mask.sum(dim=1),  # [B]
        "in.is_target": packed(batch.is_target, batch.mask),  # [sum of lengths], 0 or 1
    }


def outputs(batch: Stage2Batch, out: Stage2Output) -> dict[str, Tensor]:
    return {
        **layers("queries", out.query_pass, TINY.num_query_tokens, None),
        "out.soft_tokens": out.soft_tokens.flatten(0, 1),  # [B * Q, language width]
        "out.logits": packed(out.logits, batch.mask),
        "loss": out.loss,
    }


def language_weights(model: Stage2) -> dict[str, Tensor]:
    # named_parameters lists a tied matrix once, under the name of the embedding.
    return {f"language_model.{n}": p.detach() for n, p in model.language_model.named_parameters()}


def run(dtype: torch.dtype):
    model, batch = model_and_batch(dtype)
    frozen = {k: v.clone() for k, v in language_weights(model).items()}
    start = {**{k: v.clone() for k, v in weights(model).items()}, **frozen, **inputs(batch)}
    out = model(batch)
    names, trainable = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    gradients = {f"grad.{n}": g for n, g in zip(names, torch.autograd.grad(out.loss, trainable))}
    forward = outputs(batch, out)
    step_losses, norms = optimizer.train(model, lambda: model(batch).loss, N_STEPS)
    assert all(torch.equal(p, frozen[n]) for n, p in language_weights(model).items()), "the language model moved"
    steps = {"steps.loss": step_losses, "steps.gradient_norm": norms}
    steps |= {f"final.{name}": p for name, p in weights(model).items()}
    detach = lambda tensors: {k: v.detach() for k, v in tensors.items()}  # noqa: E731
    return detach(start), detach(forward), detach(gradients), detach(steps)


def main() -> None:
    start, forward, gradients, steps = run(torch.float64)
    rough = run(torch.float32)
    common = {"config": TINY.to_dict(), "language_config": LANGUAGE}
    folder = golden.ROOT / "crates/blip2-train/tests/golden"
    golden.write(
        folder / "stage2.safetensors",
        {**start, **forward, **gradients},
        {**common, "tolerance": golden.tolerances({**forward, **gradients}, {**rough[1], **rough[2]})},
    )
    golden.write(
        folder / "stage2_steps.safetensors",
        steps,
        {**common, "optimizer": optimizer.description(), "tolerance": golden.tolerances(steps, rough[3], golden.STEPS_FACTOR)},
    )


if __name__ == "__main__":
    main()
