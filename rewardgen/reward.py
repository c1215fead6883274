"""The reward contract, the one way the engine calls a reward, and `check_reward` for authors of new ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rewardgen.errors import ScoringError
from rewardgen.types import Example, Score


class Reward(nn.Module, ABC):
    """Scores pictures; higher is better.

    A subclass sets `differentiable` and implements `score`. Weights it holds are frozen by the engine.
    """

    differentiable: ClassVar[bool]
    """Whether `score` carries gradient from the value back to the pixels."""

    @abstractmethod
    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        """Score pictures in [0, 1] (values may stray slightly outside: clamp where it matters).

        Returns a `Score` whose `valid_B` is False for examples the reward does not apply to.
        """


def score(reward: Reward, pixels_B3HW: Tensor, examples: Sequence[Example], *, enable_grad: bool) -> Score:
    """Call a reward: the gradient mode is an argument, shapes are checked, non-finite values are masked.

    Raises:
        ScoringError: the reward broke its contract (wrong shape, or a gradient that was promised is missing).
    """
    with torch.set_grad_enabled(enable_grad):
        result = reward.score(pixels_B3HW, examples)
    name, batch = type(reward).__name__, len(examples)
    for label, tensor in (("value_B", result.value_B), ("valid_B", result.valid_B)):
        if tuple(tensor.shape) != (batch,):
            raise ScoringError(f"{name}.score returned {label} of shape {tuple(tensor.shape)}; expected ({batch},)")
    if enable_grad and pixels_B3HW.requires_grad and not result.value_B.requires_grad and bool(result.valid_B.any()):
        raise ScoringError(f"{name} is used with a gradient but its value does not depend on the pixels")
    finite_B = torch.isfinite(result.value_B.detach())
    valid_B = result.valid_B.to(device=finite_B.device, dtype=torch.bool) & finite_B
    return Score(value_B=result.value_B, valid_B=valid_B, metrics=result.metrics)
