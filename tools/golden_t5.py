#!/usr/bin/env python3
"""Golden file of the T5 language model and of its generation, from transformers' `T5ForConditionalGeneration`.

    python tools/golden_t5.py          # needs torch, transformers, safetensors

writes crates/blip2/tests/golden/t5_tiny.safetensors: two tiny random models under `flan.` (gated, exact GELU, a head of its
own, as BLIP-2 runs Flan-T5) and `t5.` (ReLU, tied head, scaled output), packed embeddings of prompts of unequal length, the
encoder's output, the decoder's logits for given answers, what `generate` writes after each prompt alone, and the buckets of
distances.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from reference import golden

SIZES = dict(
    vocab_size=53,
    d_model=24,
    d_kv=10,
    d_ff=40,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    layer_norm_epsilon=1e-6,
    decoder_start_token_id=0,
)
CONFIGS = {
    "flan": SIZES | dict(feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False),
    "t5": SIZES | dict(feed_forward_proj="relu", tie_word_embeddings=True),
}
LENGTHS = (5, 1, 30, 3)
ANSWER_LENGTHS = (4, 26, 2, 7)
END = (15, 30)
N_NEW = 12


def model_of(name: str, dtype: torch.dtype) -> T5ForConditionalGeneration:
    config = T5Config(**CONFIGS[name], pad_token_id=0, eos_token_id=END[0], attn_implementation="eager", dropout_rate=0.0)
    model = T5ForConditionalGeneration(config).eval().to(dtype)
    golden.randomise(model, torch.Generator().manual_seed(golden.SEED))
    for parameter_name, parameter in model.named_parameters():
        if "relative_attention_bias" in parameter_name:
            parameter.data *= 3
    return model


def inputs(name: str) -> tuple[Tensor, list[list[int]]]:
    generator = torch.Generator().manual_seed(golden.SEED + 1)
    embeds = torch.randn(sum(LENGTHS), SIZES["d_model"], generator=generator).double()
    answers = [torch.randint(1, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in ANSWER_LENGTHS]
    return embeds, answers


def outputs(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model = model_of(name, dtype)
    embeds, answers = inputs(name)
    encoded, logits = [], []
    for rows, answer in zip(embeds.to(dtype).split(LENGTHS), answers):
        encoded.append(model.encoder(inputs_embeds=rows[None]).last_hidden_state[0])
        ids = torch.tensor([[SIZES["decoder_start_token_id"]] + answer])
        logits.append(model(inputs_embeds=rows[None], decoder_input_ids=ids, use_cache=False).logits[0])
    return {f"{name}.out.encoded": torch.cat(encoded), f"{name}.out.logits": torch.cat(logits)}


def generated(name: str, num_beams: int) -> list[list[int]]:
    model = model_of(name, torch.float64)
    config = GenerationConfig(
        num_beams=num_beams,
        max_new_tokens=N_NEW,
        do_sample=False,
        eos_token_id=list(END),
        pad_token_id=0,
        decoder_start_token_id=SIZES["decoder_start_token_id"],
        use_cache=False,  # its cache has the encoder's number of layers
    )
    texts = []
    for rows in inputs(name)[0].split(LENGTHS):
        mask = torch.ones(1, len(rows), dtype=torch.long)
        ids = model.generate(inputs_embeds=rows[None], attention_mask=mask, generation_config=config)[0].tolist()[1:]
        ends = [i for i, token in enumerate(ids) if token in END]
        texts.append(ids[: ends[0] + 1] if ends else ids)
    return texts


def buckets(is_decoder: bool) -> list[int]:
    """Of the official sizes, for keys 300 before to 300 after the query."""
    distances = torch.arange(-300, 301)
    return T5Attention._relative_position_bucket(distances, not is_decoder, num_buckets=32, max_distance=128).tolist()


def main() -> None:
    tensors, exact, rough, texts = {}, {}, {}, {}
    with torch.no_grad():
        for name in CONFIGS:
            tensors |= {f"{name}.{key}": p for key, p in model_of(name, torch.float64).named_parameters()}
            tensors[f"{name}.in.embeds"] = inputs(name)[0]
            exact |= outputs(name, torch.float64)
            rough |= outputs(name, torch.float32)
            texts[name] = {str(n): generated(name, n) for n in (1, 3)}
    golden.write(
        golden.ROOT / "crates/blip2/tests/golden/t5_tiny.safetensors",
        tensors | exact,
        {
            "tolerance": golden.tolerances(exact, rough),
            "configs": {name: {"model_type": "t5"} | config for name, config in CONFIGS.items()},
            "lengths": LENGTHS,
            "answers": {name: inputs(name)[1] for name in CONFIGS},
            "end": END,
            "max_new_tokens": N_NEW,
            "texts": texts,
            "buckets": {"encoder": buckets(False), "decoder": buckets(True)},
        },
    )
    print(texts)


if __name__ == "__main__":
    main()
