"""AdamW with the decay groups of this project, and a constant-rate training loop for the golden files."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.98)
EPS = 1e-8
WEIGHT_DECAY = 0.05
LEARNING_RATE = 1e-3
MAX_GRADIENT_NORM = 1.0


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Biases and norms (all one-dimensional), the temperature and the queries are not decayed.

    LAVIS decays the last two, by an accident of their number of dimensions.
    """
    return parameter.dim() > 1 and name != "query_tokens"


def adamw(model: nn.Module) -> torch.optim.AdamW:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if is_decayed(n, p)], "weight_decay": WEIGHT_DECAY},
        {"params": [p for n, p in named if not is_decayed(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS)


def train(model: nn.Module, loss_of: Callable[[], Tensor], n_steps: int) -> tuple[Tensor, Tensor]:
    """`n_steps` on the same batch. Returns the loss before each step and the gradient norm before clipping."""
    optimizer = adamw(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, norms = [], []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM))
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(norms)


def description() -> dict:
    """For the metadata of the golden files."""
    return {
        "lr": LEARNING_RATE,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "clip_norm": MAX_GRADIENT_NORM,
        "undecayed": "one-dimensional tensors, temp, query_tokens",
    }
