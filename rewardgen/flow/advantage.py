"""Group-relative advantages: how much better a sample is than the others drawn for the same example.

Shape suffix: N samples. Everything is computed in float64 on the CPU: these are a few hundred numbers, and processes
that compute them alike must get the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from rewardgen.types import Score

Scale: TypeAlias = Literal["group", "batch", "none"]

EPS = 1e-4
"""Added to a standard deviation before it divides, as in TRL's GRPO."""
_ROUNDING = 1e-6
"""Scores of a group that differ by less, relative above 1, are equal: what separates them is rounding."""


class Advantages(NamedTuple):
    """`value_N` float64, 0 where `taking_part_N` (bool) is False: no valid score, or none to compare it with."""

    value_N: Tensor
    taking_part_N: Tensor


def group_advantages(
    score: Score, group_N: Sequence[int], *, scale: Scale, clip: float, population_V: Tensor | None = None
) -> Advantages:
    """`(r - mean of its group) / (std + 1e-4)`, cut to [-clip, clip]; TRL's formula, on valid scores alone.

    Samples of a group without two different valid scores take no part: there is nothing to learn from them.

    Args:
        score: of each sample.
        group_N: the group of each sample.
        scale: the standard deviation (with n - 1) is the group's, or that of all valid scores (`batch`), or 1 without
            the 1e-4 (`none`, as in Dr. GRPO).
        clip: largest absolute advantage.
        population_V: the valid scores that `batch` looks at where they are more than these, such as all processes'.
    """
    value_N, valid_N = score.value_B.detach().cpu().double(), score.valid_B.cpu()
    groups_N = torch.tensor(list(group_N))
    population_V = value_N[valid_N] if population_V is None else population_V.cpu().double()
    advantage_N, taking_part_N = torch.zeros_like(value_N), torch.zeros_like(valid_N)
    for group in dict.fromkeys(group_N):
        chosen_N = valid_N & (groups_N == group)
        values_M = value_N[chosen_N]
        if len(values_M) < 2 or _all_equal(values_M):
            continue
        divisor = 1.0
        if scale != "none":
            divisor = float((values_M if scale == "group" else population_V).std()) + EPS
        advantage_N[chosen_N] = ((values_M - values_M.mean()) / divisor).clamp(-clip, clip)
        taking_part_N |= chosen_N
    return Advantages(advantage_N, taking_part_N)


def _all_equal(values_M: Tensor) -> bool:
    spread = float(values_M.max() - values_M.min())
    return spread <= _ROUNDING * max(1.0, float(values_M.abs().max()))
