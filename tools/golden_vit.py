#!/usr/bin/env python3
"""Golden file of the vision transformers, from transformers' `Blip2VisionModel` and `CLIPVisionModel`.

    python tools/golden_vit.py          # needs torch, transformers, safetensors

writes crates/blip2/tests/golden/vit_tiny.safetensors: weights of a tiny EVA (`eva.`) and a tiny CLIP (`clip.`) under the names
that the crate reads, pixels, the tokens of every block, and position embeddings resized by both conventions.

BLIP-2 takes what the block before the last one gives. transformers has CLIP's query, key and value apart and a last
block more; here they are one matrix, and the last block is not run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2VisionConfig, CLIPVisionConfig, CLIPVisionModel
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel

from reference import golden

SIZES = dict(hidden_size=24, intermediate_size=40, num_attention_heads=3, image_size=13, patch_size=4)
N_PICTURES, N_LAYERS = 2, 3
GRIDS = ((3, 5), (3, 2), (4, 4))
"""Sides of the position grid, before and after."""


def eva(dtype: torch.dtype) -> nn.Module:
    config = Blip2VisionConfig(
        **SIZES, num_hidden_layers=N_LAYERS, layer_norm_eps=1e-6, hidden_act="gelu", attn_implementation="eager"
    )
    model = Blip2VisionModel(config).eval().to(dtype)
    golden.randomise(model, torch.Generator().manual_seed(golden.SEED))
    return model


def clip(dtype: torch.dtype) -> nn.Module:
    config = CLIPVisionConfig(
        **SIZES, num_hidden_layers=N_LAYERS + 1, layer_norm_eps=1e-5, hidden_act="quick_gelu", attn_implementation="eager"
    )
    model = CLIPVisionModel(config).eval().to(dtype)
    golden.randomise(model, torch.Generator().manual_seed(golden.SEED + 1))
    return model


def hidden_states(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """What each of the N_LAYERS blocks gives, before any norm after them."""
    states, hooks = [], []
    tower = getattr(model, "vision_model", model)
    for layer in tower.encoder.layers[:N_LAYERS]:
        take = lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        hooks.append(layer.register_forward_hook(take))
    model(pixels.permute(0, 3, 1, 2))
    for hook in hooks:
        hook.remove()
    return states


def eva_weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"eva.{name}": p for name, p in model.named_parameters() if not name.startswith("post_layernorm")}


def clip_weights(model: nn.Module) -> dict[str, Tensor]:
    weights = {}
    parameters = {name.removeprefix("vision_model."): p for name, p in model.named_parameters()}
    width = SIZES["hidden_size"]
    weights["clip.embeddings.class_embedding"] = parameters["embeddings.class_embedding"].reshape(1, 1, width)
    weights["clip.embeddings.position_embedding"] = parameters["embeddings.position_embedding.weight"][None]
    weights["clip.embeddings.patch_embedding.weight"] = parameters["embeddings.patch_embedding.weight"]
    for part in ("weight", "bias"):
        weights[f"clip.pre_layernorm.{part}"] = parameters[f"pre_layrnorm.{part}"]
        for i in range(N_LAYERS):
            at = f"encoder.layers.{i}"
            qkv = [parameters[f"{at}.self_attn.{x}_proj.{part}"] for x in "qkv"]
            weights[f"clip.{at}.self_attn.qkv.{part}"] = torch.cat(qkv)
            weights[f"clip.{at}.self_attn.projection.{part}"] = parameters[f"{at}.self_attn.out_proj.{part}"]
            for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                weights[f"clip.{at}.{name}.{part}"] = parameters[f"{at}.{name}.{part}"]
    return weights


def resized(positions: Tensor, to: int, align_corners: bool) -> Tensor:
    grid = positions.permute(2, 0, 1)[None]
    out = nn.functional.interpolate(grid, size=(to, to), mode="bicubic", align_corners=align_corners)
    return out[0].permute(1, 2, 0)


def results(dtype: torch.dtype, pixels: Tensor, grids: list[Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, model in (("eva", eva(dtype)), ("clip", clip(dtype))):
        out |= {f"{name}.out.{i}": state for i, state in enumerate(hidden_states(model, pixels.to(dtype)))}
    for (side, to), grid in zip(GRIDS, grids):
        for align in (False, True):
            # Its coefficients are computed in the tensor's type: float32 is what LAVIS and transformers do.
            out[f"resized.{side}.{to}.{'corners' if align else 'centres'}"] = resized(grid.float(), to, align).to(dtype)
    return out


def main() -> None:
    generator = torch.Generator().manual_seed(golden.SEED + 2)
    side = SIZES["image_size"]
    pixels = torch.randn(N_PICTURES, side, side, 3, generator=generator, dtype=torch.float64).float().double()
    grids = [torch.randn(n, n, 6, generator=generator).double() for n, _ in GRIDS]
    with torch.no_grad():
        exact = results(torch.float64, pixels, grids)
        rough = results(torch.float32, pixels, grids)
    tensors = eva_weights(eva(torch.float64)) | clip_weights(clip(torch.float64)) | exact
    tensors["in.pixels"] = pixels
    tensors |= {f"in.grid.{side}.{to}": grid for (side, to), grid in zip(GRIDS, grids)}
    golden.write(
        golden.ROOT / "crates/blip2/tests/golden/vit_tiny.safetensors",
        tensors,
        {"tolerance": golden.tolerances(exact, rough), "grids": GRIDS, "sizes": SIZES | {"num_hidden_layers": N_LAYERS}},
    )


if __name__ == "__main__":
    main()
