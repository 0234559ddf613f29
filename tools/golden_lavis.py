#!/usr/bin/env python3
"""Tiny BLIP-2 models as LAVIS saves them, and what transformers' modules make of a picture with the same weights.

    python tools/golden_lavis.py          # needs torch, transformers, safetensors, pillow, numpy, tokenizers

writes crates/blip2/tests/golden/lavis/: `eva_vit.pth`, an image encoder alone; `opt.pth`, a stage-2 checkpoint with what was
trained only; `t5.pth`, one whose encoder was fine-tuned; `stage1.pth`, one of stage 1; and `expected.json`. The models are
those of `golden_blip2.py` (their language models are in blip2_opt/ and blip2_t5/), so run that first. What LAVIS does
otherwise than transformers is done here too: keys have no bias, the norm after the encoder has the epsilon 1e-5, a frozen
encoder is stored in half precision.

    python tools/golden_lavis.py --read FILE      # prints what torch.load reads in a file, names and shapes
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict

import golden_blip2 as hf
import torch
from PIL import Image
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, GenerationConfig

from reference import golden

FOLDER = golden.ROOT / "crates/blip2/tests/golden"
LN_VISION_EPS = 1e-5
TEXT_IDS = [2, 5, 9, 14, 3]
"""[CLS] words [SEP] of a vocabulary of its own."""
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a dog cat on the beach picture of two in snow red house".split()]


def lavis_name(name: str) -> str:
    """The name that LAVIS has for a parameter of transformers' BLIP-2."""
    if name.startswith("vision_model.post_layernorm"):
        return name.replace("vision_model.post_layernorm", "ln_vision")
    if name.startswith("vision_model."):
        for ours, theirs in [
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"),
            ("layer_norm", "norm"),
            ("self_attn.projection", "attn.proj"),
            ("self_attn", "attn"),
        ]:
            name = name.replace(ours, theirs)
        return name
    if name.startswith("qformer.layernorm"):
        return name.replace("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm")
    if name.startswith("qformer."):
        return "Qformer.bert." + name.removeprefix("qformer.").replace("attention.attention.", "attention.self.")
    if name.startswith("embeddings."):
        return "Qformer.bert." + name
    return name.replace("vision_projection", "vision_proj").replace("text_projection", "text_proj")


def state_dict(model: torch.nn.Module) -> OrderedDict[str, Tensor]:
    """All but the language model and its projection, under LAVIS's names."""
    state = OrderedDict()
    for name, tensor in model.state_dict().items():
        if name.startswith(("language_model.", "language_projection.")):
            continue
        name, tensor = lavis_name(name), tensor.clone()
        if name.endswith("attn.qkv.bias"):
            query, key, value = tensor.chunk(3)
            assert not key.any()
            state[name.replace("qkv.bias", "q_bias")] = query.clone()
            state[name.replace("qkv.bias", "v_bias")] = value.clone()
        else:
            state[name] = tensor
    n_positions = model.config.qformer_config.max_position_embeddings
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(n_positions).expand(1, -1)
    return state


def as_lavis(model: torch.nn.Module, in_half: bool) -> None:
    model.vision_model.post_layernorm.eps = LN_VISION_EPS
    for layer in model.vision_model.encoder.layers:
        bias = layer.self_attn.qkv.bias.data
        bias[len(bias) // 3 : 2 * len(bias) // 3] = 0
        if in_half:
            # What `convert_weights_to_fp16` of LAVIS halves: convolutions and linear layers, their biases among them.
            for linear in (layer.self_attn.projection, layer.mlp.fc1, layer.mlp.fc2):
                linear.weight.data, linear.bias.data = linear.weight.data.half().float(), linear.bias.data.half().float()
            layer.self_attn.qkv.weight.data = layer.self_attn.qkv.weight.data.half().float()


def is_halved(name: str) -> bool:
    return ".attn.qkv.weight" in name or ".attn.proj." in name or ".mlp." in name


def save(name: str, state: OrderedDict[str, Tensor]) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.98)}]}
    config = {"model": {"arch": name, "image_size": hf.SIDE, "prompt": ""}}
    checkpoint = {"model": state, "optimizer": optimizer, "config": config, "scaler": None, "epoch": 1}
    path = FOLDER / "lavis" / f"{name}.pth"
    torch.save(checkpoint, path)
    print(path.relative_to(golden.ROOT), len(state), "tensors,", path.stat().st_size, "bytes")


def texts(family: str, model: Blip2ForConditionalGeneration, values: Tensor) -> list[dict]:
    made = hf.tokenizer(family)
    end = made.encode("\n", add_special_tokens=False).ids[0] if family == "opt" else 1
    found = []
    for prompt in hf.PROMPTS[family]:
        if prompt == "a photo of":
            continue
        for num_beams in (1, 5):
            ids = torch.tensor([hf.prompt_ids(family, made, prompt, made.get_vocab_size())])
            config = GenerationConfig(
                num_beams=num_beams, max_new_tokens=hf.N_NEW, do_sample=False, eos_token_id=end, decoder_start_token_id=0,
                pad_token_id=1 if family == "opt" else 0, bos_token_id=2 if family == "opt" else 1,
            )
            out = model.generate(
                pixel_values=values, input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
            )[0].tolist()
            if family == "opt":
                out = out[ids.shape[1] :] if out[: ids.shape[1]] == ids[0].tolist() else out
            else:
                out = out[1:]
            found.append(
                {"prompt": prompt, "num_beams": num_beams, "token_ids": out[: out.index(end) + 1] if end in out else out}
            )
    return found


def stage2(family: str, values: Tensor) -> list[dict]:
    model = Blip2ForConditionalGeneration.from_pretrained(FOLDER / f"blip2_{family}", dtype=torch.float32).eval()
    is_frozen = family == "opt"
    as_lavis(model, in_half=is_frozen)
    state = state_dict(model)
    for part in ("weight", "bias"):
        state[f"{family}_proj.{part}"] = getattr(model.language_projection, part).detach().clone()
    if is_frozen:
        # LAVIS drops what `named_parameters` calls frozen, which names a tied tensor once: its copy stays.
        head = model.language_model.get_input_embeddings().weight.detach().clone()
        encoder = OrderedDict()
        for name in [name for name in state if name.startswith("visual_encoder.")]:
            tensor = state.pop(name)
            name = name.removeprefix("visual_encoder.")
            encoder[name] = tensor.half() if is_halved(f".{name}") else tensor
        # What stands behind the blocks of EVA's own checkpoint.
        encoder["norm.weight"], encoder["norm.bias"] = torch.ones(24), torch.zeros(24)
        encoder["head.weight"] = torch.zeros(3, 24)
        torch.save(encoder, FOLDER / "lavis/eva_vit.pth")
        state["opt_model.lm_head.weight"] = head
    save(family, state)
    with torch.no_grad():
        return texts(family, model, values)


def stage1(values: Tensor) -> dict:
    base = Blip2Config.from_pretrained(FOLDER / "blip2_opt")
    base.qformer_config.use_qformer_text_input = True
    base.qformer_config.vocab_size = len(VOCABULARY) + 1
    base.image_text_hidden_size = 12
    # As old revisions: the texts have no image tokens in front.
    base.image_token_index = None
    base._attn_implementation = "eager"
    model = Blip2ForImageTextRetrieval(base).eval()
    generator = torch.Generator().manual_seed(golden.SEED + 1)
    golden.randomise(model, generator)
    as_lavis(model, in_half=False)
    state = state_dict(model)
    width, vocabulary = base.qformer_config.hidden_size, base.qformer_config.vocab_size
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    predictions = "Qformer.cls.predictions"
    bias = random(vocabulary)
    state |= {
        "temp": torch.tensor(0.043),
        f"{predictions}.bias": bias,
        f"{predictions}.transform.dense.weight": random(width, width),
        f"{predictions}.transform.dense.bias": random(width),
        f"{predictions}.transform.LayerNorm.weight": random(width),
        f"{predictions}.transform.LayerNorm.bias": random(width),
        # Tied: the same tensors, in the same storage.
        f"{predictions}.decoder.weight": state["Qformer.bert.embeddings.word_embeddings.weight"],
        f"{predictions}.decoder.bias": bias,
    }
    save("stage1", state)
    (FOLDER / "lavis/vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    ids = torch.tensor([TEXT_IDS])
    with torch.no_grad():
        call = lambda head: model(  # noqa: E731
            pixel_values=values, input_ids=ids, attention_mask=torch.ones_like(ids), use_image_text_matching_head=head
        )
        itm = call(True).logits_per_image.softmax(-1)[0, 1].item()
        itc = call(False).logits_per_image.max().item()
    text = " ".join(VOCABULARY[i] for i in TEXT_IDS[1:-1])
    return {"text": text, "itm_probability": itm, "itc_similarity": itc, "names": sorted(model.state_dict())}


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        checkpoint = torch.load(sys.argv[2], weights_only=True, mmap=True)
        for name, tensor in checkpoint.get("model", checkpoint).items():
            print(name, tuple(tensor.shape), tensor.dtype, f"{tensor.double().sum().item():.6g}")
        return
    (FOLDER / "lavis").mkdir(exist_ok=True)
    values = hf.pixels(Image.open(FOLDER / "blip2.png").convert("RGB"))
    expected = {"max_new_tokens": hf.N_NEW, "opt": stage2("opt", values), "t5": stage2("t5", values), "stage1": stage1(values)}
    (FOLDER / "lavis/expected.json").write_text(json.dumps(expected) + "\n")
    print({family: [text["token_ids"] for text in expected[family]] for family in ("opt", "t5")})


if __name__ == "__main__":
    main()
