#!/usr/bin/env python3
"""Checkpoints as `torch.save` writes them, in both containers.

    python tools/golden_torch.py          # needs torch

writes crates/blip2/tests/golden/{torch_zip,torch_legacy}.pth: a training checkpoint in LAVIS's form (`model`, `optimizer`,
`config`, `scaler`, `epoch`), whose state dict has a tensor of every kind, one stored column by column, one that is a part of
another's storage, and two that are one tensor; and torch_payload.pth, which would run a command if it were unpickled.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from reference.golden import ROOT

FOLDER = ROOT / "crates/blip2/tests/golden"


class Payload:
    def __reduce__(self):
        return __import__("os").system, ("touch /tmp/blip2-was-here",)


def main() -> None:
    counted = torch.arange(6, dtype=torch.float32)
    tied = torch.nn.Parameter(torch.tensor([[1.5, -2.5]]))
    state = OrderedDict(
        by_column=counted.view(2, 3).t(),
        part=counted[2:5],
        tied=tied,
        also_tied=tied,
        half=torch.tensor([0.5, -1.25], dtype=torch.float16),
        brain=torch.tensor([0.5, -1.25], dtype=torch.bfloat16),
        double=torch.tensor([0.1], dtype=torch.float64),
        ids=torch.arange(4).expand(1, -1),
        bytes=torch.tensor([0, 255], dtype=torch.uint8),
        flags=torch.tensor([True, False]),
        temp=torch.tensor(0.07),
        nothing=torch.zeros(0, 3),
    )
    state._metadata = OrderedDict({"": {"version": 1}})
    optimizer = {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.98)}]}
    config = {"model": {"arch": "blip2", "image_size": 224, "prompt": "", "freeze_vit": True}, "run": {"init_lr": 1e-4}}
    checkpoint = {"model": state, "optimizer": optimizer, "config": config, "scaler": None, "epoch": 9}
    for name, is_zip in [("torch_zip", True), ("torch_legacy", False)]:
        torch.save(checkpoint, FOLDER / f"{name}.pth", _use_new_zipfile_serialization=is_zip)
    torch.save({"model": {"weight": counted, "payload": Payload()}}, FOLDER / "torch_payload.pth")
    for name in ("torch_zip", "torch_legacy", "torch_payload"):
        print(name, (FOLDER / f"{name}.pth").stat().st_size)


if __name__ == "__main__":
    main()
