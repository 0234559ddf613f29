"""The Q-Former (BLIP-2, arXiv 2301.12597, section 3.1) with parameters named as in Hugging Face checkpoints.

A BERT whose self-attention layers are shared by learned queries and text, with separate feed-forward
layers for the two and cross-attention from the queries to the image in every n-th layer.

Shapes: B batch, P image tokens, Q queries, T text tokens (padded), D width, H heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class QFormerConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    encoder_hidden_size: int
    num_query_tokens: int
    image_text_hidden_size: int
    cross_attention_frequency: int = 2
    layer_norm_eps: float = 1e-12
    vision_layer_norm_eps: float = 1e-5

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


KeysValues = tuple[Tensor, Tensor]
"""The keys and values of one layer, each [B, H, K, D/H]."""


class Projections(nn.Module):
    """Query, key and value projections with scaled dot-product attention between them."""

    def __init__(self, config: QFormerConfig, key_width: int):
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_width, config.hidden_size)
        self.value = nn.Linear(key_width, config.hidden_size)

    def _heads(self, x: Tensor) -> Tensor:
        # [B, N, D] -> [B, H, N, D/H]
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None, past: KeysValues | None = None):
        """`mask` is True where a row of `x` may look at a key: broadcastable to [B, 1, N, K]."""
        keys, values = self._heads(self.key(source)), self._heads(self.value(source))
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        # A row of padding may see nothing at all on its own; every mask here leaves it at least one key.
        out = F.scaled_dot_product_attention(self._heads(self.query(x)), keys, values, attn_mask=mask)
        return out.transpose(1, 2).flatten(2), (keys, values)


class AddNorm(nn.Module):
    """LN(dense(x) + residual): how every sublayer of a post-norm BERT ends."""

    def __init__(self, in_features: int, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Module):
    def __init__(self, config: QFormerConfig, key_width: int):
        super().__init__()
        self.attention = Projections(config, key_width)
        self.output = AddNorm(config.hidden_size, config)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None, past: KeysValues | None = None):
        context, keys_values = self.attention(x, source, mask, past)
        return self.output(context, x), keys_values


class Expand(nn.Module):
    """The first half of a feed-forward layer: exact GELU of a dense layer."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    def __init__(self, config: QFormerConfig, layer_idx: int, with_text: bool):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        if layer_idx % config.cross_attention_frequency == 0:
            self.crossattention = Attention(config, config.encoder_hidden_size)
        else:
            self.crossattention = None
        self.intermediate_query = Expand(config)
        self.output_query = AddNorm(config.intermediate_size, config)
        if with_text:
            self.intermediate = Expand(config)
            self.output = AddNorm(config.intermediate_size, config)

    def forward(self, x: Tensor, n_queries: int, image: Tensor | None, mask: Tensor | None, past: KeysValues | None):
        x, keys_values = self.attention(x, x, mask, past)
        parts = []
        if n_queries > 0:
            queries = x[:, :n_queries]
            if self.crossattention is not None:
                queries, _ = self.crossattention(queries, image, None)
            parts.append(self.output_query(self.intermediate_query(queries), queries))
        if x.shape[1] > n_queries:
            text = x[:, n_queries:]
            parts.append(self.output(self.intermediate(text), text))
        return torch.cat(parts, dim=1), keys_values


@dataclass
class Output:
    """What one pass computed; `layers[0]` is the normalised embedding, `layers[i + 1]` the output of layer i."""

    layers: list[Tensor]
    keys_values: list[KeysValues]

    @property
    def last(self) -> Tensor:
        return self.layers[-1]


class Embeddings(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        # Positions count from the first text token, with or without queries before it.
        return self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]


class Encoder(nn.Module):
    def __init__(self, config: QFormerConfig, with_text: bool):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, i, with_text) for i in range(config.num_hidden_layers))


class QFormer(nn.Module):
    """The transformer alone. `with_text=False` is the query path that stage 2 keeps.

    Every method takes embeddings of images *after* the vision layer norm; `attention_mask` [B, T] is
    True on tokens and False on padding (which stands at the end).
    """

    def __init__(self, config: QFormerConfig, with_text: bool = True):
        super().__init__()
        if with_text:
            self.embeddings = Embeddings(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config, with_text)

    def _run(self, x: Tensor, n_queries: int, image: Tensor | None, mask: Tensor | None, past=None) -> Output:
        x = self.layernorm(x)
        layers, keys_values = [x], []
        for i, layer in enumerate(self.encoder.layer):
            x, kv = layer(x, n_queries, image, mask, None if past is None else past[i])
            layers.append(x)
            keys_values.append(kv)
        return Output(layers, keys_values)

    def queries(self, queries: Tensor, image: Tensor) -> Output:
        """Queries see each other and the image."""
        return self._run(queries, queries.shape[1], image, None)

    def text(self, ids: Tensor, attention_mask: Tensor) -> Output:
        """Text alone, bidirectional: the text side of the contrastive loss."""
        return self._run(self.embeddings(ids), 0, None, attention_mask[:, None, None, :])

    def bidirectional(self, queries: Tensor, ids: Tensor, attention_mask: Tensor, image: Tensor) -> Output:
        """Queries and text see all of each other: the matching mode. Rows: queries, then text."""
        n_queries = queries.shape[1]
        visible = torch.cat([attention_mask.new_ones(ids.shape[0], n_queries), attention_mask], dim=1)
        x = torch.cat([queries, self.embeddings(ids)], dim=1)
        return self._run(x, n_queries, image, visible[:, None, None, :])

    def causal(self, ids: Tensor, attention_mask: Tensor, queries: Output) -> Output:
        """Text sees the queries of an earlier `queries` pass (their keys and values, gradients flow) and earlier text.

        The queries do not see the text, so their pass need not be repeated. A padded row sees the queries,
        which keeps its softmax finite; no real row sees padding, since padding comes last.
        """
        n_queries, n_text = queries.keys_values[0][0].shape[2], ids.shape[1]
        causal = torch.ones(n_text, n_text, dtype=torch.bool, device=ids.device).tril()
        causal = causal & attention_mask[:, None, None, :]
        mask = torch.cat([causal.new_ones(*causal.shape[:3], n_queries), causal], dim=-1)
        return self._run(self.embeddings(ids), 0, None, mask, past=queries.keys_values)


class PredictionTransform(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.transform = PredictionTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        return F.linear(self.transform(x), word_embeddings, self.bias)


class LanguageModelHead(nn.Module):
    """BERT's masked-language-model head; the decoder matrix is the word embedding table."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.predictions = Predictions(config)

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        return self.predictions(x, word_embeddings)
