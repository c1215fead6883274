"""The one training loop of most recipes: seeded, warm-up then cosine; the long ones go on where they were cut off."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

KEEP_EVERY = 250


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


def fit(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    steps: int,
    keep: Path | None = None,
    *,
    muon: Sequence[nn.Parameter] = (),
) -> list[float]:
    """Minimise `loss(step)` over the module's parameters with AdamW; returns the losses.

    Args:
        loss: must depend on the step and the module alone; modules without dropout or batch statistics only.
        keep: a file that is written every `KEEP_EVERY` steps and at the end of a training of at least so many. Where it
            is there for this recipe, start and material, training goes on from it, to the same weights.
        muon: matrices among them that Muon moves instead, by steps of AdamW's size.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = {id(matrix) for matrix in muon}
    rest = [p for p in parameters if id(p) not in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=recipe.lr, weight_decay=0.01, betas=(0.9, 0.99))
    ]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=recipe.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    losses, began = list[float](), time.perf_counter()
    keep = keep if steps >= KEEP_EVERY else None
    belongs_to = {"recipe": asdict(recipe), "steps": steps}
    if keep is not None:
        with torch.no_grad():
            belongs_to["first_loss"] = round(float(loss(0)), 4)  # tells other weights and other material
    if keep is not None and keep.is_file():
        kept = torch.load(keep, weights_only=True)
        if kept["belongs_to"] == belongs_to:
            losses = kept["losses"]
            for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            with torch.no_grad():
                for parameter, value in zip(parameters, kept["parameters"], strict=True):
                    parameter.copy_(value)
    for step in range(len(losses), steps):
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = recipe.lr * cosine(step, steps, min(100, steps // 10 + 1))
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))
        if step % 100 == 99:
            recent = sum(losses[-100:]) / 100
            print(
                f"{recipe.name}: step {step + 1}/{steps} loss {recent:.4f} {time.perf_counter() - began:.0f}s",
                flush=True,
            )
        if keep is not None and (step % KEEP_EVERY == KEEP_EVERY - 1 or step == steps - 1):
            keep.parent.mkdir(parents=True, exist_ok=True)
            state = {
                "parameters": [p.detach() for p in parameters],
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            torch.save({"belongs_to": belongs_to, "losses": losses, **state}, keep.with_suffix(".part"))
            keep.with_suffix(".part").replace(keep)
    return losses
