"""Stage 1 of BLIP-2: contrastive (ITC), matching (ITM) and generation (ITG) losses on one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .qformer import LanguageModelHead, Output, QFormer, QFormerConfig

LABEL_SMOOTHING = 0.1
IGNORED = -100


@dataclass
class Stage1Batch:
    """One batch. Texts are `[CLS] words [SEP]`, padded at the end."""

    image_embeds: Tensor
    """[B, P, encoder width], before the vision layer norm."""
    ids: Tensor
    """[B, T]"""
    mask: Tensor
    """[B, T], True on tokens."""
    image_ids: Tensor
    """[B]; pairs with the same id are positives of each other and never each other's negatives."""
    negative_images: Tensor
    """[B]: the row of the image that serves as the negative of text b."""
    negative_texts: Tensor
    """[B]: the row of the text that serves as the negative of image b."""


@dataclass
class Stage1Output:
    itc: Tensor
    itm: Tensor
    itg: Tensor
    sim_i2t: Tensor
    """[B images, B texts], divided by the temperature."""
    sim_t2i: Tensor
    """[B texts, B images], divided by the temperature."""
    image_features: Tensor
    """[B, Q, ITC width], unit rows."""
    text_features: Tensor
    """[B, ITC width], unit rows."""
    itm_logits: Tensor
    """[3B, 2]: matching pairs, then texts with their negative images, then images with their negative texts."""
    itg_logits: Tensor
    """[B, T, V]"""
    query_pass: Output
    text_pass: Output
    itm_pass: Output
    itg_pass: Output

    @property
    def total(self) -> Tensor:
        return self.itc + self.itm + self.itg


class Stage1(nn.Module):
    def __init__(self, config: QFormerConfig, dec_token_id: int):
        super().__init__()
        self.config, self.dec_token_id = config, dec_token_id
        width, itc_width = config.hidden_size, config.image_text_hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.vision_layernorm = nn.LayerNorm(config.encoder_hidden_size, eps=config.vision_layer_norm_eps)
        self.qformer = QFormer(config)
        self.vision_projection = nn.Linear(width, itc_width)
        self.text_projection = nn.Linear(width, itc_width)
        self.itm_head = nn.Linear(width, 2)
        self.cls = LanguageModelHead(config)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def forward(self, batch: Stage1Batch) -> Stage1Output:
        n_batch = batch.ids.shape[0]
        image = self.vision_layernorm(batch.image_embeds)
        queries = self.query_tokens.expand(n_batch, -1, -1)

        query_pass = self.qformer.queries(queries, image)
        text_pass = self.qformer.text(batch.ids, batch.mask)
        image_features = F.normalize(self.vision_projection(query_pass.last), dim=-1)
        text_features = F.normalize(self.text_projection(text_pass.last[:, 0]), dim=-1)
        sim_i2t, sim_t2i = self.similarities(image_features, text_features)
        itc = contrastive_loss(sim_i2t, sim_t2i, batch.image_ids)

        # Three groups of pairs: (b, b); the negative image with text b; image b with the negative text.
        itm_image = torch.cat([image, image[batch.negative_images], image])
        itm_ids = torch.cat([batch.ids, batch.ids, batch.ids[batch.negative_texts]])
        itm_mask = torch.cat([batch.mask, batch.mask, batch.mask[batch.negative_texts]])
        itm_pass = self.qformer.bidirectional(
            self.query_tokens.expand(3 * n_batch, -1, -1), itm_ids, itm_mask, itm_image
        )
        itm_logits = self.itm_head(itm_pass.last[:, : self.config.num_query_tokens]).mean(dim=1)
        matches = torch.arange(3 * n_batch, device=batch.ids.device) < n_batch
        itm = F.cross_entropy(itm_logits, matches.long())

        itg_ids = batch.ids.clone()
        itg_ids[:, 0] = self.dec_token_id
        itg_pass = self.qformer.causal(itg_ids, batch.mask, query_pass)
        itg_logits = self.cls(itg_pass.last, self.qformer.embeddings.word_embeddings.weight)
        itg = generation_loss(itg_logits, itg_ids, batch.mask)

        return Stage1Output(
            itc, itm, itg, sim_i2t, sim_t2i, image_features, text_features, itm_logits, itg_logits,
            query_pass, text_pass, itm_pass, itg_pass,
        )  # fmt: skip

    def similarities(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """An image is as similar to a text as the closest of its queries is."""
        sims = torch.einsum("iqc,tc->itq", image_features, text_features).amax(dim=-1) / self.temp
        return sims, sims.T


def contrastive_loss(sim_i2t: Tensor, sim_t2i: Tensor, image_ids: Tensor) -> Tensor:
    """Cross entropy in both directions; pairs that share an image share the target, then smoothing."""
    positives = (image_ids[:, None] == image_ids[None, :]).to(sim_i2t.dtype)
    targets = positives / positives.sum(dim=1, keepdim=True)
    targets = (1 - LABEL_SMOOTHING) * targets + LABEL_SMOOTHING / targets.shape[1]
    losses = [-(targets * sims.log_softmax(dim=1)).sum(dim=1).mean() for sims in (sim_i2t, sim_t2i)]
    return (losses[0] + losses[1]) / 2


def generation_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Each token predicts the next; the mean over all predicted tokens of the batch."""
    targets = ids.masked_fill(~mask, IGNORED)[:, 1:]
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING
    )


def sample_negatives(sims: Tensor, image_ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One hard negative a row, drawn from softmax(sims) without the row's own image. [B]"""
    own = image_ids[:, None] == image_ids[None, :]
    weights = sims.detach().float().masked_fill(own, float("-inf")).softmax(dim=1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]
