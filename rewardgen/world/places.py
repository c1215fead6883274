"""A witness of layout that no objective uses: are the places that the prompt names taken, and no others?

It counts edges only and shares nothing with the detector and the face network that the identity rewards use.

N pictures, 6 places of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from rewardgen.reward import Reward
from rewardgen.types import Example, Score
from rewardgen.world.faces import SIDE

STEEP, MANY = 0.15, 0.1
"""Change from pixel to pixel that is an edge (summed over colours and both directions), and the share of edges in the
middle of a place from which somebody stands there: 99.8 % right on true pictures."""
_ROWS, _COLUMNS = 2, 3


class LayoutWitness(Reward):
    """Places on which picture and prompt agree, over all that are taken in either, in [0, 1].

    Backgrounds are smooth and faces are not: a place is taken where there are edges. Applies to examples with
    `extras["places"]` and to pictures of 96 x 96 pixels.
    """

    differentiable: ClassVar[bool] = False

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        fits = tuple(pixels_B3HW.shape[2:]) == (SIDE, SIDE)
        valid_B = torch.tensor([fits and "places" in example.extras for example in examples])
        value_B = torch.zeros(len(examples))
        if bool(valid_B.any()):
            wanted = torch.stack([example.extras["places"] for example in examples if "places" in example.extras])
            drawn = taken(pixels_B3HW.detach().float().cpu()[valid_B].clamp(0, 1))
            value_B[valid_B] = (drawn & wanted).sum(1) / (drawn | wanted).sum(1).clamp(min=1)
        return Score(value_B=value_B, valid_B=valid_B)


def taken(pixels_N3HW: Tensor) -> Tensor:
    """Which places somebody stands at, bool [N, 6]."""
    down = pixels_N3HW.diff(dim=2, append=pixels_N3HW[:, :, -1:]).abs().sum(1)
    across = pixels_N3HW.diff(dim=3, append=pixels_N3HW[..., -1:]).abs().sum(1)
    height, width = SIDE // _ROWS, SIDE // _COLUMNS
    cells_N6HW = (down + across).unfold(1, height, height).unfold(2, width, width).flatten(1, 2)
    return (cells_N6HW[:, :, 8:38, 5:27] > STEEP).float().mean((2, 3)) > MANY
