#!/usr/bin/env python3
"""What transformers' `generate` writes after a picture and a text, for many settings.

    python tools/golden_blip2.py && python tools/golden_generate.py      # needs what golden_blip2.py needs

writes crates/blip2/tests/golden/generate_{opt,t5}.json: what each stage makes of the picture and the second prompt (of the logits the
last rows); and for each setting, under transformers' names, the tokens that follow each prompt, from the tiny models of golden_blip2.py. Each prompt is read alone, with the picture's tokens before it; where lengths do not
count them, all prompts are read once more as one left-padded batch, which must write the same. `sees_prompt` false is how LAVIS
generates: embeddings only, so that no rule sees the prompt.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter

import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration
from transformers.utils import logging

from golden_blip2 import FOLDER, PROMPTS, pixels, prompt_ids, tokenizer

logging.set_verbosity_error()
warnings.filterwarnings("ignore")


def settings(end: int, other_end: int, frequent: list[int]) -> list[dict]:
    """`end` and `other_end` are tokens that the model likes to write, `frequent` some more of them."""
    ends, both = {"eos_token_id": [end]}, {"eos_token_id": [end, other_end]}
    first, second, third = frequent[:3]
    beams = lambda n, **more: {"num_beams": n, "max_new_tokens": 12, **more}  # noqa: E731
    return [
        {"max_new_tokens": 20},
        {"max_new_tokens": 12, **ends},
        {"max_new_tokens": 12, **both},
        {"max_new_tokens": 12, "min_new_tokens": 8, **ends},
        {"max_new_tokens": 1},
        {"max_length": 48},
        {"max_length": 48, "min_length": 46, **ends},
        {"max_new_tokens": 14, "min_length": 20, **both},
        {"max_new_tokens": 14, "repetition_penalty": 1.5},
        {"max_new_tokens": 14, "repetition_penalty": 0.7, **ends},
        {"max_new_tokens": 14, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 14, "no_repeat_ngram_size": 1},
        {"max_new_tokens": 14, "no_repeat_ngram_size": 3, **ends},
        {"max_new_tokens": 14, "bad_words_ids": [[first], [second, third], [third, first]]},
        {"max_new_tokens": 14, "bad_words_ids": [[end], [first]], **ends},
        {"max_new_tokens": 14, "suppress_tokens": [first, second]},
        {"max_new_tokens": 14, "begin_suppress_tokens": frequent},
        {"max_new_tokens": 8, "forced_bos_token_id": third},
        {"max_new_tokens": 8, "forced_bos_token_id": third, "begin_suppress_tokens": frequent},
        {"max_new_tokens": 8, "forced_eos_token_id": [end], **ends},
        beams(2),
        beams(3, **ends),
        beams(5, **ends),
        beams(4, **both),
        beams(4, num_return_sequences=4, **ends),
        beams(3, num_return_sequences=2, **both),
        beams(5, length_penalty=0.0, **ends),
        beams(5, length_penalty=-1.0, **both),
        beams(5, length_penalty=2.0, num_return_sequences=3, **ends),
        beams(3, early_stopping=True, **ends),
        beams(4, early_stopping=True, length_penalty=-1.0, num_return_sequences=4, **both),
        beams(3, early_stopping="never", **ends),
        beams(4, early_stopping="never", length_penalty=0.0, **both),
        beams(4, early_stopping="never", length_penalty=-0.5, num_return_sequences=2, **ends),
        beams(4, early_stopping="never", length_penalty=1.5, num_return_sequences=3, **both),
        beams(3, min_new_tokens=6, **both),
        beams(5, min_new_tokens=3, repetition_penalty=1.15, length_penalty=0.0, **ends),
        beams(5, repetition_penalty=1.5, num_return_sequences=2, **ends),
        beams(4, no_repeat_ngram_size=2, **ends),
        beams(3, no_repeat_ngram_size=1, repetition_penalty=1.1),
        beams(4, bad_words_ids=[[first, first], [second], [end]], num_return_sequences=2, **both),
        beams(4, suppress_tokens=[first], begin_suppress_tokens=[second, third], **ends),
        beams(3, forced_bos_token_id=second, num_return_sequences=3, **ends),
        beams(4, forced_eos_token_id=[end], num_return_sequences=3, **ends),
        beams(4, forced_eos_token_id=[other_end], early_stopping="never", **both),
        {"num_beams": 3, "max_length": 47, **ends},
        {"num_beams": 3, "max_length": 50, "min_length": 45, "length_penalty": -1.0, **both},
        {"num_beams": 8, "max_new_tokens": 20, "num_return_sequences": 8, **ends},
        {"max_new_tokens": 14, "repetition_penalty": 1.5, "sees_prompt": False},
        {"max_new_tokens": 14, "no_repeat_ngram_size": 2, "sees_prompt": False, **ends},
        {"max_new_tokens": 8, "forced_bos_token_id": third, "sees_prompt": False},
        {"num_beams": 5, "max_new_tokens": 30, "repetition_penalty": 1.5, "sees_prompt": False, **ends},
        {"num_beams": 5, "max_new_tokens": 10, "length_penalty": -1.0, "sees_prompt": False, **both},
    ]


class Writer:
    def __init__(self, family: str) -> None:
        self.family = family
        self.model = Blip2ForConditionalGeneration.from_pretrained(FOLDER / f"blip2_{family}").eval()
        made = tokenizer(family)
        self.end = self.model.config.text_config.eos_token_id
        image_token = self.model.config.image_token_id
        self.prompts = [prompt_ids(family, made, text, image_token) for text in PROMPTS[family]]
        self.pixels = pixels(Image.open(FOLDER / "blip2.png").convert("RGB"))

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, mask: torch.Tensor, setting: dict) -> list[list[int]]:
        """The new tokens of every returned text, the end token included."""
        setting = dict(setting)
        values = self.pixels.expand(len(ids), -1, -1, -1)
        if setting.pop("sees_prompt", True):
            out = self.model.generate(pixel_values=values, input_ids=ids, attention_mask=mask, **setting)
            out = out[:, 1 if self.family == "t5" else ids.shape[1] :]
        else:
            embeds = self.model.get_input_embeddings()(ids)
            vision = self.model.vision_model(values).last_hidden_state
            queries = self.model.query_tokens.expand(len(ids), -1, -1)
            queries = self.model.qformer(query_embeds=queries, encoder_hidden_states=vision).last_hidden_state
            embeds[ids == self.model.config.image_token_id] = self.model.language_projection(queries).flatten(0, 1)
            out = self.model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **setting)
            out = out[:, 1:] if self.family == "t5" else out
        ends = setting.get("eos_token_id", [self.end])
        texts = []
        for row in out.tolist():
            at = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
            texts.append(row[: at + 1])
        return texts

    @torch.no_grad()
    def stages(self, ids: list[int]) -> dict[str, list]:
        ids = torch.tensor([ids])
        more = {"decoder_input_ids": torch.tensor([[0]])} if self.family == "t5" else {}
        out = self.model(pixel_values=self.pixels, input_ids=ids, attention_mask=torch.ones_like(ids), **more)
        queries = out.qformer_outputs.last_hidden_state
        stages = {
            "vision.out": out.vision_outputs.last_hidden_state[0],
            "qformer.out": queries[0],
            "language_projection.out": self.model.language_projection(queries)[0],
            "logits": out.logits[0, -2:],
        }
        return {name: [[round(x, 6) for x in row] for row in rows.tolist()] for name, rows in stages.items()}

    def alone(self, setting: dict) -> list[list[list[int]]]:
        rows = [torch.tensor([ids]) for ids in self.prompts]
        return [self.generate(ids, torch.ones_like(ids), setting) for ids in rows]

    def together(self, setting: dict) -> list[list[list[int]]]:
        width = max(map(len, self.prompts))
        pad = self.model.config.text_config.pad_token_id
        ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in self.prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in self.prompts])
        texts = self.generate(ids, mask, setting)
        n = setting.get("num_return_sequences", 1)
        return [texts[i : i + n] for i in range(0, len(texts), n)]


def write(family: str) -> None:
    writer = Writer(family)
    liked = Counter()
    for texts in writer.alone({"max_new_tokens": 20, "num_beams": 3, "num_return_sequences": 3}):
        for text in texts:
            liked.update(set(text[2:]))
    ranked = [token for token, _ in liked.most_common() if token != writer.end]
    cases, n_batched, n_ended = [], 0, 0
    for setting in settings(ranked[2], ranked[5], [ranked[0], ranked[1], ranked[3], ranked[4]]):
        results = writer.alone(setting)
        counts_padding = "max_length" in setting or "min_length" in setting or setting.get("no_repeat_ngram_size") == 1
        # Without ids, transformers takes the padding before the prompt for generated tokens that the penalty must not see.
        mistaken = not setting.get("sees_prompt", True) and "repetition_penalty" in setting
        if not counts_padding and not mistaken:
            assert writer.together(setting) == results, setting
            n_batched += 1
        ends = setting.get("eos_token_id", [writer.end])
        n_ended += sum(text[-1] in ends for texts in results for text in texts)
        cases.append({"config": setting, "results": results})
    path = FOLDER / f"generate_{family}.json"
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    stages = json.dumps(writer.stages(writer.prompts[1]), separators=(",", ":"))
    path.write_text(f'{{"prompts": {json.dumps(PROMPTS[family])},\n"stages": {stages},\n"cases": [\n{lines}\n]}}\n')
    different = len({json.dumps(case["results"]) for case in cases})
    print(f"{family}: {len(cases)} settings, {different} different results, {n_batched} also as a batch, {n_ended} texts ended")


def main() -> None:
    for family in PROMPTS:
        write(family)


if __name__ == "__main__":
    main()
