"""Stage 2 of BLIP-2: the queries, projected, stand as soft tokens in the prompt of a frozen language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .qformer import Output, QFormer, QFormerConfig

IMAGE_ROW = -1
"""In `Stage2Batch.ids`: the places of the projected queries, Q in a row for each sample."""


@dataclass
class Stage2Batch:
    image_embeds: Tensor
    """[B, P, encoder width], before the vision layer norm."""
    ids: Tensor
    """[B, S]: prompt, `IMAGE_ROW` times Q, instruction, answer, end token; padded at the end."""
    mask: Tensor
    """[B, S], True on rows that exist."""
    is_target: Tensor
    """[B, S], True on the tokens that the loss counts: answers and the end tokens after them."""


@dataclass
class Stage2Output:
    loss: Tensor
    query_pass: Output
    soft_tokens: Tensor
    """[B, Q, width of the language model]"""
    logits: Tensor | None
    """[B, S, V], or None when only the loss was asked for."""


class Stage2(nn.Module):
    """`language_model` is a decoder-only model of transformers (`LlamaForCausalLM`, `OPTForCausalLM`); it is frozen here."""

    def __init__(self, config: QFormerConfig, language_model: nn.Module):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.vision_layernorm = nn.LayerNorm(config.encoder_hidden_size, eps=config.vision_layer_norm_eps)
        self.qformer = QFormer(config, with_text=False)
        self.language_projection = nn.Linear(config.hidden_size, language_model.config.hidden_size)
        self.language_model = language_model.requires_grad_(False)

    def forward(self, batch: Stage2Batch, all_logits: bool = True) -> Stage2Output:
        """`all_logits=False` spends the vocabulary projection on the rows that predict a target only."""
        image = self.vision_layernorm(batch.image_embeds)
        query_pass = self.qformer.queries(self.query_tokens.expand(image.shape[0], -1, -1), image)
        soft_tokens = self.language_projection(query_pass.last)

        is_image = batch.ids == IMAGE_ROW
        rows = self.language_model.get_input_embeddings()(batch.ids.masked_fill(is_image, 0))
        # Row-major order of the mask is the order of the soft tokens: sample by sample, query by query.
        rows = rows.masked_scatter(is_image[..., None], soft_tokens.to(rows.dtype))
        hidden = self.language_model.model(inputs_embeds=rows, attention_mask=batch.mask.long(), use_cache=False)[0]

        # A target is predicted by the row before it.
        predicts = batch.is_target.roll(-1, dims=1)
        predicts[:, -1] = False
        targets = batch.ids[:, 1:][predicts[:, :-1]]
        logits = None
        if all_logits:
            logits = self.language_model.lm_head(hidden)
            loss = F.cross_entropy(logits[predicts], targets)
        else:
            loss = F.cross_entropy(self.language_model.lm_head(hidden[predicts]).float(), targets)
        return Stage2Output(loss, query_pass, soft_tokens, logits)
