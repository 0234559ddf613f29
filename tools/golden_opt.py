#!/usr/bin/env python3
"""Golden file of the OPT language model and of its generation, from transformers' `OPTForCausalLM`.

    python tools/golden_opt.py          # needs torch, transformers, safetensors

writes crates/blip2/tests/golden/opt_tiny.safetensors: two tiny random models under `pre.` (norm before the sublayers, as all
sizes but one) and `post.` (norm after, embeddings of another width: 350m), packed embeddings of texts of unequal length,
hidden states, logits, the gradient to the embeddings, and what `generate` writes after each text alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from reference import golden

SIZES = dict(vocab_size=53, hidden_size=24, ffn_dim=40, num_hidden_layers=3, num_attention_heads=3, max_position_embeddings=40)
CONFIGS = {
    "pre": SIZES | dict(do_layer_norm_before=True, word_embed_proj_dim=24),
    "post": SIZES | dict(do_layer_norm_before=False, word_embed_proj_dim=16),
}
LENGTHS = (5, 1, 9, 3)
END = (15, 30)
"""Two end tokens, which these models like: one in each of them."""
N_NEW = 10


def model_of(name: str, dtype: torch.dtype) -> OPTForCausalLM:
    config = OPTConfig(**CONFIGS[name], pad_token_id=1, bos_token_id=2, eos_token_id=END[0], attn_implementation="eager")
    model = OPTForCausalLM(config).eval().to(dtype)
    golden.randomise(model, torch.Generator().manual_seed(golden.SEED))
    # Norms keep the scale of what they are given: without this, all logits of a tiny model are alike.
    model.lm_head.weight.data *= 2
    return model


def inputs(name: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(golden.SEED + 1)
    embeds = torch.randn(sum(LENGTHS), CONFIGS[name]["word_embed_proj_dim"], generator=generator)
    return embeds.double(), torch.randn(sum(LENGTHS), SIZES["vocab_size"], generator=generator).double()


def outputs(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model = model_of(name, dtype)
    embeds, d_logits = (x.to(dtype) for x in inputs(name))
    embeds.requires_grad_()
    hidden = torch.cat([model.model(inputs_embeds=rows[None]).last_hidden_state[0] for rows in embeds.split(LENGTHS)])
    logits = model.lm_head(hidden)
    (gradient,) = torch.autograd.grad(logits, embeds, d_logits)
    return {f"{name}.out.hidden": hidden.detach(), f"{name}.out.logits": logits.detach(), f"{name}.grad.embeds": gradient}


def generated(name: str, num_beams: int) -> list[list[int]]:
    model = model_of(name, torch.float64)
    config = GenerationConfig(
        num_beams=num_beams, max_new_tokens=N_NEW, do_sample=False, eos_token_id=list(END), pad_token_id=1, bos_token_id=2
    )
    texts = []
    for rows in inputs(name)[0].split(LENGTHS):
        mask = torch.ones(1, len(rows), dtype=torch.long)
        ids = model.generate(inputs_embeds=rows[None], attention_mask=mask, generation_config=config)[0].tolist()
        ends = [i for i, token in enumerate(ids) if token in END]
        texts.append(ids[: ends[0] + 1] if ends else ids)
    return texts


def main() -> None:
    tensors, exact, rough, texts = {}, {}, {}, {}
    for name in CONFIGS:
        # The tied head is stored once, as the embeddings.
        parameters = model_of(name, torch.float64).named_parameters()
        tensors |= {f"{name}.{key}": p for key, p in parameters}
        embeds, d_logits = inputs(name)
        tensors |= {f"{name}.in.embeds": embeds, f"{name}.in.d_logits": d_logits}
        exact |= outputs(name, torch.float64)
        rough |= outputs(name, torch.float32)
        texts[name] = {str(n): generated(name, n) for n in (1, 3)}
    golden.write(
        golden.ROOT / "crates/blip2/tests/golden/opt_tiny.safetensors",
        tensors | exact,
        {
            "tolerance": golden.tolerances(exact, rough),
            "configs": {name: {"model_type": "opt"} | config for name, config in CONFIGS.items()},
            "lengths": LENGTHS,
            "end": END,
            "max_new_tokens": N_NEW,
            "texts": texts,
        },
    )
    print(texts)


if __name__ == "__main__":
    main()
