"""The worked example of a reward of one's own: bright pictures score high. See docs/custom_rewards.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardgen.reward import Reward
from rewardgen.types import Example, Score


class Brightness(Reward):
    """Mean luminance (ITU-R BT.601 weights, as PIL's mode "L") of the picture in [0, 1]; applies to every example."""

    differentiable = True

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        # A plain clamp on purpose: once a pixel is white there is nothing left to gain, so no gradient either.
        red, green, blue = pixels_B3HW.float().clamp(0, 1).unbind(1)
        value_B = (0.299 * red + 0.587 * green + 0.114 * blue).mean((1, 2))
        return Score(value_B=value_B, valid_B=torch.ones_like(value_B, dtype=torch.bool))
