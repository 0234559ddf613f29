#!/usr/bin/env python3
"""Tiny BLIP-2 models as Hugging Face folders, and what transformers makes of a picture with them.

    python tools/golden_blip2.py          # needs torch, transformers, tokenizers, safetensors, pillow, numpy

writes crates/blip2/tests/golden/{blip2_opt,blip2_t5}/: `config.json`, `model.safetensors`, `tokenizer.json`,
`tokenizer_config.json`, `preprocessor_config.json` as the hub has them, and `expected.json`: the first tokens of the picture,
the queries as the language model reads them, and the tokens that follow prompts, greedily and with beams; blip2_opt_narrow/, an OPT
whose embeddings are narrower than its layers (as those of OPT-350m); and blip2_itm/, a
`Blip2ForImageTextRetrieval` with `vocab.txt`: the matching head's logits, the similarities, both features, and the picture's tokens
at twice the size. The picture is
crates/blip2/tests/golden/blip2.png. Random weights, every bias and every query among them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BertTokenizer,
    GenerationConfig,
    OPTConfig,
    T5Config,
)

from reference import golden

FOLDER = golden.ROOT / "crates/blip2/tests/golden"
SIDE, N_QUERIES, N_NEW = 28, 5, 10
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = {
    "opt": ("", "a photo of", "Question: which city is this? Answer:"),
    "t5": ("", "a photo of", "Question: which city is this? Short answer:"),
}
SPECIAL = {"opt": ["<s>", "<pad>", "</s>", "<unk>"], "t5": ["<pad>", "</s>", "<unk>"]}


def tokenizer(family: str) -> Tokenizer:
    """Byte-level, without merges: every byte is a token."""
    vocabulary = SPECIAL[family] + sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL[family])
    return made


def vision_config() -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=SIDE, patch_size=14,
        layer_norm_eps=1e-6, hidden_act="gelu",
    )


def model_of(family: str, n_tokens: int, line_break: int, width: int = 32) -> Blip2ForConditionalGeneration:
    vision = vision_config()
    qformer = Blip2QFormerConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, encoder_hidden_size=24,
        cross_attention_frequency=2, vocab_size=40, max_position_embeddings=16, layer_norm_eps=1e-12,
    )
    if family == "opt":
        text = OPTConfig(
            vocab_size=n_tokens + 4, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=width, max_position_embeddings=120, bos_token_id=2, pad_token_id=1, eos_token_id=line_break,
        )
    else:
        text = T5Config(
            vocab_size=n_tokens + 4, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )
    config = Blip2Config(
        vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), text_config=text.to_dict(),
        num_query_tokens=N_QUERIES, image_token_index=n_tokens,
    )
    config._attn_implementation = "eager"
    model = Blip2ForConditionalGeneration(config).eval()
    golden.randomise(model, torch.Generator().manual_seed(golden.SEED))
    # Positions matter, so that a tiny model does not say one thing again and again.
    for name, parameter in model.language_model.named_parameters():
        if "embed_positions" in name or "relative_attention_bias" in name:
            parameter.data *= 4
    return model


def picture() -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 6, 44), np.linspace(0, 5, 31))
    channels = [np.sin(x + y), np.cos(2 * x - y), np.sin(x * y / 3)]
    return Image.fromarray(np.uint8(np.stack(channels, -1) * 110 + 128))


def pixels(image: Image.Image, side: int = SIDE) -> torch.Tensor:
    square = np.asarray(image.resize((side, side), Image.BICUBIC), dtype=np.float64) / 255
    values = (square - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(values).float().permute(2, 0, 1)[None]


def prompt_ids(family: str, made: Tokenizer, text: str, image_token: int) -> list[int]:
    ids = made.encode(text, add_special_tokens=False).ids
    return [image_token] * N_QUERIES + ([2] + ids if family == "opt" else ids + [1])


def write_processor(folder: Path) -> None:
    processor = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
        "image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255, "size": {"height": SIDE, "width": SIDE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")


def write(family: str, image: Image.Image, name: str = "", width: int = 32) -> None:
    made = tokenizer(family)
    n_tokens = made.get_vocab_size()
    line_break = made.encode("\n", add_special_tokens=False).ids[0]
    model = model_of(family, n_tokens, line_break, width)
    folder = FOLDER / f"blip2_{name or family}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    made.save(str(folder / "tokenizer.json"))
    marks = {"bos_token": "</s>" if family == "opt" else None, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks, indent=1) + "\n")
    write_processor(folder)

    values = pixels(image)
    with torch.no_grad():
        hidden = []
        hook = model.vision_model.encoder.layers[-1].register_forward_hook(
            lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out)
        )
        embeds = model.vision_model(values).last_hidden_state
        hook.remove()
        queries = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=embeds).last_hidden_state
        # Where the embeddings are narrower than the layers, `masked_scatter` takes the first numbers of all.
        soft_tokens = model.language_projection(queries)[0].flatten()[: N_QUERIES * width].reshape(N_QUERIES, width)
        texts = []
        end = line_break if family == "opt" else 1
        for prompt in PROMPTS[family]:
            for num_beams in (1, 5):
                ids = torch.tensor([prompt_ids(family, made, prompt, n_tokens)])
                config = GenerationConfig(
                    num_beams=num_beams, max_new_tokens=N_NEW, do_sample=False, eos_token_id=end,
                    pad_token_id=1 if family == "opt" else 0, bos_token_id=2 if family == "opt" else 1,
                    decoder_start_token_id=0,
                )
                out = model.generate(
                    pixel_values=values, input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
                )[0].tolist()
                if family == "opt":
                    out = out[ids.shape[1]:] if out[: ids.shape[1]] == ids[0].tolist() else out
                else:
                    out = out[1:]
                out = out[: out.index(end) + 1] if end in out else out[:N_NEW]
                texts.append({"prompt": prompt, "num_beams": num_beams, "token_ids": out})
    rounded = lambda rows: [[round(x, 6) for x in row] for row in rows.tolist()]  # noqa: E731
    expected = {
        "image_tokens": rounded(hidden[0][0]),
        "soft_tokens": rounded(soft_tokens),
        "max_new_tokens": N_NEW,
        "texts": texts,
    }
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    for path in sorted(folder.iterdir()):
        assert path.stat().st_size < 1_000_000, path
    print(family, [text["token_ids"] for text in texts])


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "dog", "on", "the", "sofa", "red", "two", "##s", "run", "##ning", "."]
TEXTS = ["a cat", "two dogs running on the red sofa.", "A Zebra", "the the the cat"]


def relevance(model: Blip2ForImageTextRetrieval, given: dict) -> list[float]:
    """Grad-CAM of the cross-attention for the logarithm of the odds of a match: the mean over layers, heads and queries."""
    probabilities, hooks = [], []
    for layer in model.qformer.encoder.layer:
        if hasattr(layer, "crossattention"):
            hooks.append(layer.crossattention.attention.register_forward_hook(lambda _, __, out: probabilities.append(out[1])))
    with torch.enable_grad():
        logits = model(**given, use_image_text_matching_head=True).logits_per_image[0]
        gradients = torch.autograd.grad(logits[1] - logits[0], probabilities)
    for hook in hooks:
        hook.remove()
    parts = [(p * g.clamp(min=0))[0].mean((0, 1)) for p, g in zip(probabilities, gradients, strict=True)]
    return torch.stack(parts).mean(0).tolist()


def write_itm(image: Image.Image) -> None:
    qformer = Blip2QFormerConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, encoder_hidden_size=24,
        cross_attention_frequency=2, vocab_size=len(WORDS) + 1, max_position_embeddings=16, layer_norm_eps=1e-12,
        use_qformer_text_input=True,
    )
    config = Blip2Config(
        vision_config=vision_config().to_dict(), qformer_config=qformer.to_dict(), text_config={"model_type": "opt"},
        num_query_tokens=N_QUERIES, image_text_hidden_size=12, image_token_index=None,
    )
    config._attn_implementation = "eager"
    model = Blip2ForImageTextRetrieval(config).eval()
    golden.randomise(model, torch.Generator().manual_seed(golden.SEED))
    folder = FOLDER / "blip2_itm"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    write_processor(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    made = BertTokenizer(str(folder / "vocab.txt"))
    values, texts = pixels(image), []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([made(text)["input_ids"]])
            given = {"pixel_values": values, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            itm = model(**given, use_image_text_matching_head=True)
            itc = model(**given, use_image_text_matching_head=False)
            texts.append({
                "relevance": relevance(model, given),
                "text": text, "itm_logits": itm.logits_per_image[0].tolist(), "itc": itc.logits_per_image.item(),
                "text_embeds": itc.text_embeds[0].tolist(),
            })
        hidden = []
        hook = model.vision_model.encoder.layers[-1].register_forward_hook(
            lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out)
        )
        model.vision_model(pixels(image, 2 * SIDE), interpolate_pos_encoding=True)
        hook.remove()
    expected = {
        "image_embeds": itc.image_embeds[0].tolist(), "texts": texts, "twice_the_size": hidden[0].flatten(0, -2).tolist(),
    }
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    print("itm", [text["itm_logits"] for text in texts])


def main() -> None:
    image = picture()
    path = FOLDER / "blip2.png"
    image.save(path)
    for family in SPECIAL:
        write(family, Image.open(path).convert("RGB"))
    write("opt", Image.open(path).convert("RGB"), "opt_narrow", width=20)
    write_itm(Image.open(path).convert("RGB"))


if __name__ == "__main__":
    main()
