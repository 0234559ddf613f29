#!/usr/bin/env python3
"""Golden files of the Q-Former and of stage 1, from the PyTorch implementation in `tools/reference`.

    python tools/golden_qformer.py          # needs torch, transformers, safetensors, numpy

writes
  crates/blip2/tests/golden/qformer_tiny.safetensors          weights, inputs, the rows of every layer in every mode
  crates/blip2-train/tests/golden/stage1.safetensors          weights, inputs, losses, the gradient of every parameter
  crates/blip2-train/tests/golden/stage1_steps.safetensors    ten AdamW steps: losses, gradient norms, last weights

Rows are packed as in the crates: no padding; query rows of the whole batch first, then the text rows.
The metadata entry `tolerance` gives the absolute tolerance of each tensor (see `reference/golden.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference import golden, optimizer
from reference.golden import TINY, packed
from reference.qformer import Output
from reference.stage1 import Stage1, Stage1Batch, Stage1Output

N_STEPS = 10


def model_and_batch(dtype: torch.dtype) -> tuple[Stage1, Stage1Batch]:
    generator = torch.Generator().manual_seed(golden.SEED)
    model = Stage1(TINY, golden.DEC).to(dtype)
    golden.randomise(model, generator)
    ids, mask = golden.random_texts(generator)
    image_embeds = golden.random_images(len(golden.IMAGE_IDS), generator).to(dtype)
    as_rows = lambda values: torch.tensor(values)  # noqa: E731
    batch = Stage1Batch(
        image_embeds, ids, mask, as_rows(golden.IMAGE_IDS), as_rows(golden.NEGATIVE_IMAGES), as_rows(golden.NEGATIVE_TEXTS)
    )
    for own, negative in zip(range(len(ids)), batch.negative_images.tolist()):
        assert batch.image_ids[own] != batch.image_ids[negative]
    for own, negative in zip(range(len(ids)), batch.negative_texts.tolist()):
        assert batch.image_ids[own] != batch.image_ids[negative]
    return model, batch


def inputs(batch: Stage1Batch) -> dict[str, Tensor]:
    return {
        "in.image_embeds": batch.image_embeds,  # [B, P, encoder width], before the vision layer norm
        "in.text_ids": packed(batch.ids, batch.mask),  # [sum of lengths]
        "in.text_lengths": batch.mask.sum(dim=1),  # [B]
        "in.image_ids": batch.image_ids,
        "in.negative_images": batch.negative_images,
        "in.negative_texts": batch.negative_texts,
    }


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def layers(mode: str, output: Output, n_queries: int, mask: Tensor | None) -> dict[str, Tensor]:
    """The embedding rows and every layer's rows, packed: all query rows, then all text rows."""
    tensors = {}
    for i, x in enumerate(output.layers):
        rows = [x[:, :n_queries].flatten(0, 1)] if n_queries else []
        rows += [packed(x[:, n_queries:], mask)] if mask is not None else []
        tensors[f"{mode}.{'embeddings' if i == 0 else f'layer_{i - 1:02}'}"] = torch.cat(rows)
    return tensors


def activations(model: Stage1, batch: Stage1Batch, out: Stage1Output) -> dict[str, Tensor]:
    n_batch, n_queries = len(batch.ids), TINY.num_query_tokens
    pairs = model.qformer.bidirectional(
        model.query_tokens.expand(n_batch, -1, -1), batch.ids, batch.mask, model.vision_layernorm(batch.image_embeds)
    )
    return {
        **layers("queries", out.query_pass, n_queries, None),
        **layers("text", out.text_pass, 0, batch.mask),
        **layers("pairs", pairs, n_queries, batch.mask),
        **layers("causal", out.itg_pass, 0, batch.mask),
        "out.image_features": out.image_features.flatten(0, 1),
        "out.text_features": out.text_features,
        "out.match_logits": model.itm_head(pairs.last[:, :n_queries]).mean(dim=1),
        "out.language_logits": packed(out.itg_logits, batch.mask),
    }


def losses(batch: Stage1Batch, out: Stage1Output) -> dict[str, Tensor]:
    return {
        "out.sim_i2t": out.sim_i2t,
        "out.itm_logits": out.itm_logits,
        "out.itg_logits": packed(out.itg_logits, batch.mask),
        "loss.itc": out.itc,
        "loss.itm": out.itm,
        "loss.itg": out.itg,
        "loss.total": out.total,
    }


def run(dtype: torch.dtype):
    model, batch = model_and_batch(dtype)
    start = {**{k: v.clone() for k, v in weights(model).items()}, **inputs(batch)}
    out = model(batch)
    gradients = dict(zip(weights(model), torch.autograd.grad(out.total, list(model.parameters()))))
    gradients = {f"grad.{name}": g for name, g in gradients.items()}
    forward, values = activations(model, batch, out), losses(batch, out)
    step_losses, norms = optimizer.train(model, lambda: model(batch).total, N_STEPS)
    steps = {"steps.loss": step_losses, "steps.gradient_norm": norms}
    steps |= {f"final.{name}": p for name, p in weights(model).items()}
    detach = lambda tensors: {k: v.detach() for k, v in tensors.items()}  # noqa: E731
    return detach(start), detach(forward), detach(values), detach(gradients), detach(steps)


def main() -> None:
    torch.manual_seed(golden.SEED)
    start, forward, values, gradients, steps = run(torch.float64)
    rough = run(torch.float32)
    common = {"config": TINY.to_dict(), "dec_token_id": golden.DEC}

    golden.write(
        golden.ROOT / "crates/blip2/tests/golden/qformer_tiny.safetensors",
        {**start, **forward},
        {**common, "tolerance": golden.tolerances(forward, rough[1])},
    )
    golden.write(
        golden.ROOT / "crates/blip2-train/tests/golden/stage1.safetensors",
        {**start, **values, **gradients},
        {**common, "tolerance": golden.tolerances({**values, **gradients}, {**rough[2], **rough[3]})},
    )
    golden.write(
        golden.ROOT / "crates/blip2-train/tests/golden/stage1_steps.safetensors",
        steps,
        {**common, "optimizer": optimizer.description(), "tolerance": golden.tolerances(steps, rough[4], golden.STEPS_FACTOR)},
    )


if __name__ == "__main__":
    main()
