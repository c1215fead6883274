"""The one training loop of all recipes: seeded, warm-up then cosine, resumable by nothing - each takes minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """What remakes a part. `version` rises whenever the result would differ."""

    name: str
    version: str
    steps: int
    batch: int
    lr: float
    seed: int

    def scaled(self, factor: float) -> int:
        """The number of steps times `factor`, at least one."""
        return max(1, round(self.steps * factor))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(module: nn.Module, loss: Callable[[int], Tensor], recipe: Recipe, steps: int) -> list[float]:
    """Minimise `loss(step)` over the module's parameters with AdamW; returns the losses."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.01, betas=(0.9, 0.99))
    losses, began = [], time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * cosine(step, steps, min(100, steps // 10 + 1))
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))
        if step % 100 == 99:
            recent = sum(losses[-100:]) / 100
            print(
                f"{recipe.name}: step {step + 1}/{steps} loss {recent:.4f} {time.perf_counter() - began:.0f}s",
                flush=True,
            )
    return losses
