#!/usr/bin/env python3
"""Golden file of stage 2 through T5, from transformers' `Blip2ForConditionalGeneration`.

    python tools/golden_stage2_t5.py           # needs torch, transformers, safetensors, numpy

writes crates/blip2-train/tests/golden/stage2_t5.safetensors: the weights of a tiny random bridge, the outputs of its image encoder
before the last norm, texts, and, in front of two language models, `flan.` (gated, exact GELU, a head of its own, as BLIP-2 runs
Flan-T5) and `t5.` (gated, the approximate GELU, tied head, scaled output): what the queries become, the decoder's logits, the
loss, and the gradient of every trained parameter.

Texts are as in `golden_stage2.py`: sample after sample in `in.ids`, whose -1 stand for a projected query each; `in.is_target` marks
what the decoder writes, the rest is what the encoder reads. Trained parameters have this project's names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, T5Config
from transformers.models.t5.modeling_t5 import T5LayerNorm

from golden_stage2 import pad
from reference import golden
from reference.stage2 import IMAGE_ROW

END, IMAGE_TOKEN = 1, 52
LANGUAGE = dict(
    vocab_size=53, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, layer_norm_epsilon=1e-6, decoder_start_token_id=0,
)
LANGUAGES = {
    "flan": LANGUAGE | dict(feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False),
    "t5": LANGUAGE | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=True),
}
QFORMER = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16,
    layer_norm_eps=1e-12, cross_attention_frequency=2, encoder_hidden_size=24,
)
N_QUERIES, SIDE = 5, 28
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3, image_size=SIDE, patch_size=14,
    layer_norm_eps=1e-6, hidden_act="gelu",
)
LENGTHS = ((3, 5), (0, 9), (12, 1), (1, 2))
"""Per sample the words that encoder and decoder have, without their ends."""


class RmsNorm(nn.Module):
    """T5's norm in the precision of its input; transformers takes the mean of the squares in float32."""

    def __init__(self, norm: T5LayerNorm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()


def compute_all_in_float64(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, T5LayerNorm):
            setattr(module, name, RmsNorm(child))
        else:
            compute_all_in_float64(child)


def model_of(language: str, dtype: torch.dtype) -> Blip2ForConditionalGeneration:
    text = T5Config(**LANGUAGES[language], pad_token_id=0, eos_token_id=END, dropout_rate=0.0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION).to_dict(), qformer_config=Blip2QFormerConfig(**QFORMER).to_dict(),
        text_config=text.to_dict(), num_query_tokens=N_QUERIES, image_token_index=IMAGE_TOKEN,
    )
    config._attn_implementation = "eager"
    model = Blip2ForConditionalGeneration(config).eval().to(dtype)
    if not LANGUAGES[language]["tie_word_embeddings"]:
        # transformers 5 ties it whatever the configuration says.
        model.language_model.lm_head.weight = nn.Parameter(model.language_model.shared.weight.clone())
    assert model.language_model.config.scale_decoder_outputs == LANGUAGES[language]["tie_word_embeddings"]
    # Module by module, so that the bridge is the same before both language models.
    for i, module in enumerate([model.vision_model, model.qformer, model.language_projection, model.language_model]):
        golden.randomise(module, torch.Generator().manual_seed(golden.SEED + 3 + i))
    model.query_tokens.data = 0.5 * torch.randn(
        model.query_tokens.shape, generator=torch.Generator().manual_seed(golden.SEED), dtype=torch.float64
    ).float().to(dtype)
    for name, parameter in model.language_model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.data *= 3
    model.language_model.requires_grad_(False)
    is_tied = model.language_model.lm_head.weight is model.language_model.shared.weight
    assert is_tied == LANGUAGES[language]["tie_word_embeddings"]
    if dtype == torch.float64:
        compute_all_in_float64(model.language_model)
    return model


def samples() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(golden.SEED + 4)
    words = lambda n: torch.randint(END + 1, IMAGE_TOKEN, (n,), generator=generator).tolist() + [END]  # noqa: E731
    return [([IMAGE_TOKEN] * N_QUERIES + words(n_read), words(n_written)) for n_read, n_written in LENGTHS]


def trained(model: Blip2ForConditionalGeneration) -> dict[str, nn.Parameter]:
    """All that stage 2 trains, under this project's names."""
    ours = lambda name: name.replace("vision_model.post_layernorm.", "vision_layernorm.")  # noqa: E731
    frozen = ("vision_model.", "language_model.")
    named = {ours(name): parameter for name, parameter in model.named_parameters()}
    return {name: parameter for name, parameter in named.items() if not name.startswith(frozen)}


def run(language: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    model = model_of(language, dtype)
    generator = torch.Generator().manual_seed(golden.SEED + 5)
    pixels = torch.randn(len(LENGTHS), 3, SIDE, SIDE, generator=generator).to(dtype)
    kept = {}

    def keep_given(_module, given, _out) -> None:
        kept.setdefault("in.image_embeds", given[0].detach())  # the second call is for the pooled output

    def keep_made(_module, _given, out) -> None:
        kept["out.soft_tokens"] = out

    hooks = [
        model.vision_model.post_layernorm.register_forward_hook(keep_given),
        model.language_projection.register_forward_hook(keep_made),
    ]
    read, written = zip(*samples())
    ids = pad(list(read), 0)
    labels = pad(list(written), -100)
    out = model(pixel_values=pixels, input_ids=ids, attention_mask=pad([[1] * len(r) for r in read], 0), labels=labels)
    for hook in hooks:
        hook.remove()
    parameters = trained(model)
    gradients = torch.autograd.grad(out.loss, list(parameters.values()))
    outputs = {
        f"{language}.out.soft_tokens": kept["out.soft_tokens"].flatten(0, 1),
        f"{language}.out.logits": out.language_model_outputs.logits[labels != -100],
        f"{language}.loss": out.loss,
    }
    outputs |= {f"{language}.grad.{name}": g for name, g in zip(parameters, gradients)}
    inputs = {"in.image_embeds": kept["in.image_embeds"], **parameters}
    weights = {f"{language}.{name}": p for name, p in model.language_model.named_parameters()}
    return inputs, weights, outputs


def main() -> None:
    inputs, tensors, exact, rough = {}, {}, {}, {}
    for language in LANGUAGES:
        of_bridge, weights, outputs = run(language, torch.float64)
        assert all(torch.equal(tensor, inputs.get(name, tensor)) for name, tensor in of_bridge.items())
        inputs |= of_bridge
        tensors |= weights
        exact |= outputs
        rough |= run(language, torch.float32)[2]
    inputs |= {
        "in.ids": torch.tensor([IMAGE_ROW if i == IMAGE_TOKEN else i for r, w in samples() for i in r + w]),
        "in.lengths": torch.tensor([len(r + w) for r, w in samples()]),
        "in.is_target": torch.tensor([int(part == 1) for sample in samples() for part in (0, 1) for _ in sample[part]]),
    }
    config = QFORMER | dict(num_query_tokens=N_QUERIES, image_text_hidden_size=16, vision_layer_norm_eps=1e-6)
    golden.write(
        golden.ROOT / "crates/blip2-train/tests/golden/stage2_t5.safetensors",
        inputs | tensors | exact,
        {
            "config": config,
            "language_configs": {name: {"model_type": "t5"} | language for name, language in LANGUAGES.items()},
            "tolerance": golden.tolerances(exact, rough),
        },
    )


if __name__ == "__main__":
    main()
