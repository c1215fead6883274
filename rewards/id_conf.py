"""ID-Conf (UMO, arXiv 2509.06818): is nobody confused with another? A metric; to train on it, see `matching`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from rewardgen.rewards.faces.metrics import id_conf
from rewardgen.rewards.faces.reward import FaceReward
from rewardgen.types import Example, Score


class IdConfReward(FaceReward):
    """Mean confidence of the references, x 100: how much less than its best face its second best is like each.

    Officially a reference in a picture with fewer than two faces is left out. All references of a picture share its
    faces, so such a picture is not valid here, and the count of valid pictures is the metric's coverage: read the two
    together, or the metric can be bought by drawing one face. The mean over pictures is the published mean over
    references where all have as many. Not valid either without identity references that all show a face.

    Args:
        faces: detector and face network.
    """

    differentiable: ClassVar[bool] = False

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        seen = self.faces.compare(pixels_B3HW.detach(), examples, one_each=True)
        values = [
            [value for value in id_conf(wanted_MD @ drawn_ND.T) if value is not None]
            for wanted_MD, drawn_ND in seen.pairs()
        ]
        value_B = torch.tensor([100 * sum(some) / max(len(some), 1) for some in values])
        valid_B = torch.tensor([len(some) > 0 for some in values])
        return Score(value_B=value_B, valid_B=valid_B, counts=seen.counts())
