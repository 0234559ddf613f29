#!/usr/bin/env python3
"""Compares `tools/reference` with the two public implementations, on the model and batch of the golden files.

    python tools/check_reference.py transformers        # the Q-Former's modes against Blip2QFormerModel and
                                                         # Blip2ForImageTextRetrieval of the installed transformers
    python tools/check_reference.py lavis CLONE         # losses and every gradient of stage 1 against the public
                                                         # LAVIS code (a clone of salesforce/LAVIS; needs
                                                         # transformers 4.26 to 4.30), run in this process

Exits with 1 when anything disagrees. Outcome in float64 (2026-11-24, torch 2.15.0), largest difference:
- transformers 5.23.0: 4e-15 over every layer's rows in the three modes it has (queries, text, pairs), the
  matching logits and the projected features.
- LAVIS 506965b with transformers 4.30.2, the three losses and all 105 gradients: 9e-16 on a batch where every
  image stands once; 5e-8 where one stands twice, because LAVIS then builds its soft targets in float32.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from golden_qformer import activations, layers, model_and_batch
from reference import golden
from reference.golden import TINY, packed

LIMIT = 1e-12
LIMIT_SOFT_TARGETS = 1e-7
"""Where images repeat, LAVIS computes the contrastive targets in float32, whatever its weights are in."""


class Report:
    """Prints the largest difference of each comparison and remembers whether one was too large."""

    def __init__(self):
        self.failed = False
        self.limit = LIMIT

    def compare(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
        wrong = not difference < self.limit
        self.failed |= wrong
        print(f"{'DIFFERS' if wrong else 'agrees '} {difference:8.1e}  {name}")


def check_transformers(report: Report) -> None:
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

    ours, batch = model_and_batch(torch.float64)
    shared = {
        k: getattr(TINY, k)
        for k in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "encoder_hidden_size", "cross_attention_frequency", "layer_norm_eps",
        )
    }  # fmt: skip
    qformer = Blip2QFormerConfig(
        **shared, use_qformer_text_input=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    vision = Blip2VisionConfig(hidden_size=TINY.encoder_hidden_size, num_hidden_layers=1, num_attention_heads=4)
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        num_query_tokens=TINY.num_query_tokens,
        image_text_hidden_size=TINY.image_text_hidden_size,
    )
    theirs = Blip2ForImageTextRetrieval(config).double().eval()
    state = {}
    for name, p in ours.state_dict().items():
        if not name.startswith(("vision_layernorm", "temp", "cls")):
            state[name.removeprefix("qformer.") if "embeddings" in name else name] = p
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("vision_model") for name in missing), missing

    n_queries, mask = TINY.num_query_tokens, batch.mask
    image = ours.vision_layernorm(batch.image_embeds)
    expected = activations(ours, batch, ours(batch))
    queries = ours.query_tokens.expand(len(batch.ids), -1, -1)
    all_visible = torch.cat([mask.new_ones(len(mask), n_queries), mask], dim=1)
    passes = {
        "queries": dict(query_embeds=queries, encoder_hidden_states=image),
        "text": dict(query_embeds=theirs.embeddings(batch.ids), query_length=0, attention_mask=mask.long()),
        "pairs": dict(
            query_embeds=theirs.embeddings(batch.ids, query_embeds=queries),
            query_length=n_queries,
            attention_mask=all_visible.long(),
            encoder_hidden_states=image,
        ),
    }
    for mode, arguments in passes.items():
        output = theirs.qformer(**arguments, output_hidden_states=True)
        ours_alike = types.SimpleNamespace(layers=list(output.hidden_states))
        rows = layers(mode, ours_alike, 0 if mode == "text" else n_queries, None if mode == "queries" else mask)
        for name, x in rows.items():
            report.compare(name, expected[name], x)

    # The whole retrieval model, its image encoder replaced by our image tokens.
    theirs.vision_model.forward = lambda **_: (image,)
    theirs.config.image_token_index = None
    tokens = dict(pixel_values=None, input_ids=batch.ids, attention_mask=mask.long())
    itm = theirs(**tokens, use_image_text_matching_head=True).logits_per_image
    report.compare("out.match_logits", expected["out.match_logits"], itm)
    itc = theirs(**tokens, use_image_text_matching_head=False)
    report.compare("out.image_features", expected["out.image_features"], itc.image_embeds.flatten(0, 1))
    report.compare("out.text_features", expected["out.text_features"], itc.text_embeds)


def lavis_modules(clone: Path):
    """LAVIS's Qformer.py and blip2_qformer.py as they are; what they import from the rest of LAVIS, stubbed."""

    def stub(name: str, **contents) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        sys.modules[name] = module

    one_process = lambda x: x  # noqa: E731
    register = types.SimpleNamespace(register_model=lambda _name: lambda cls: cls)
    for package in ("lavis", "lavis.common", "lavis.models", "lavis.models.blip2_models", "lavis.models.blip_models"):
        stub(package)
    stub("lavis.common.registry", registry=register)
    stub("lavis.models.base_model", all_gather_with_grad=one_process, concat_all_gather=one_process)
    stub("lavis.models.blip2_models.blip2", Blip2Base=nn.Module, compute_sim_matrix=None, disabled_train=None)
    stub("lavis.models.blip_models.blip_outputs", BlipOutput=types.SimpleNamespace, BlipOutputFeatures=None)
    folder = clone / "lavis/models/blip2_models"
    loaded = []
    for name in ("Qformer", "blip2_qformer"):
        spec = importlib.util.spec_from_file_location(f"lavis.models.blip2_models.{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        loaded.append(module)
    return loaded


def lavis_name(name: str) -> str:
    """Our (Hugging Face's) name of a parameter, in LAVIS's terms."""
    if name.startswith("cls.predictions"):
        return f"Qformer.{name}"
    head, _, rest = name.partition(".")
    renamed = {"vision_layernorm": "ln_vision", "vision_projection": "vision_proj", "text_projection": "text_proj"}
    if head != "qformer":
        return ".".join(filter(None, [renamed.get(head, head), rest]))
    rest = rest.replace("attention.attention.", "attention.self.")
    rest = rest.replace("layernorm.", "embeddings.LayerNorm.") if rest.startswith("layernorm.") else rest
    return f"Qformer.bert.{rest}"


def check_lavis(report: Report, clone: Path) -> None:
    from transformers import BertConfig

    qformer_code, stage1_code = lavis_modules(clone)
    ours, batch = model_and_batch(torch.float64)
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    config = BertConfig(
        **{name: getattr(TINY, name) for name in [*names, "max_position_embeddings", "layer_norm_eps"]},
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=golden.PAD,
    )  # fmt: skip
    config.encoder_width, config.add_cross_attention = TINY.encoder_hidden_size, True
    config.cross_attention_freq, config.query_length = TINY.cross_attention_frequency, TINY.num_query_tokens

    theirs = stage1_code.Blip2Qformer.__new__(stage1_code.Blip2Qformer)
    nn.Module.__init__(theirs)
    width, itc_width = TINY.hidden_size, TINY.image_text_hidden_size
    theirs.Qformer = qformer_code.BertLMHeadModel(config)
    theirs.query_tokens = nn.Parameter(torch.zeros(1, TINY.num_query_tokens, width))
    theirs.ln_vision = nn.LayerNorm(TINY.encoder_hidden_size)
    theirs.vision_proj, theirs.text_proj = nn.Linear(width, itc_width), nn.Linear(width, itc_width)
    theirs.itm_head, theirs.temp = nn.Linear(width, 2), nn.Parameter(torch.zeros([]))
    theirs.visual_encoder = nn.Identity()
    theirs.max_txt_len = batch.ids.shape[1]
    tokens = types.SimpleNamespace(input_ids=batch.ids, attention_mask=batch.mask.long())
    tokens.to = lambda _device: tokens

    class Tokenizer:
        bos_token_id, pad_token_id = golden.DEC, golden.PAD

        def __call__(self, *_args, **_kwargs):
            return tokens

    theirs.tokenizer = Tokenizer()
    theirs.double().train()
    parameters = dict(theirs.named_parameters())
    assert {lavis_name(n) for n, _ in ours.named_parameters()} == set(parameters)
    for name, p in ours.named_parameters():
        parameters[lavis_name(name)].data.copy_(p.data)

    for distinct_images in (True, False):
        print("every image once:" if distinct_images else "an image twice, soft targets:")
        report.limit = LIMIT if distinct_images else LIMIT_SOFT_TARGETS
        if distinct_images:
            compared = dataclasses.replace(batch, image_ids=torch.arange(len(batch.ids)))
            samples = {"image": batch.image_embeds, "text_input": None}
        else:
            compared = batch
            samples = {"image": batch.image_embeds, "text_input": None, "image_id": batch.image_ids}
        # LAVIS draws the negative images first, then the negative texts, one multinomial call a row.
        drawn = collections.deque(batch.negative_images.tolist() + batch.negative_texts.tolist())
        multinomial = lambda _weights, _n: torch.tensor([drawn.popleft()])  # noqa: B023, E731
        theirs.zero_grad()
        with mock.patch.object(torch, "multinomial", multinomial), mock.patch("torch.distributed.get_rank", lambda: 0):
            output = theirs(samples)
        output.loss.backward()
        assert not drawn

        ours.zero_grad()
        mine = ours(compared)
        mine.total.backward()
        report.compare("loss.itc", mine.itc, output.loss_itc)
        report.compare("loss.itm", mine.itm, output.loss_itm)
        report.compare("loss.itg", mine.itg, output.loss_lm)
        for name, p in ours.named_parameters():
            report.compare(f"grad.{name}", p.grad, parameters[lavis_name(name)].grad)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare tools/reference with public implementations.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("transformers")
    commands.add_parser("lavis").add_argument("clone", type=Path)
    arguments = parser.parse_args()
    report = Report()
    if arguments.command == "transformers":
        check_transformers(report)
    else:
        check_lavis(report, arguments.clone)
    sys.exit(report.failed)


if __name__ == "__main__":
    main()
