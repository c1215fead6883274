"""ID-Sim (XVerseBench; UMO, arXiv 2509.06818): does everybody appear? A metric; to train on it, see `identity`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from rewardgen.rewards.faces.explain import face_matches
from rewardgen.rewards.faces.metrics import id_sim
from rewardgen.rewards.faces.reward import FaceReward
from rewardgen.types import Example, FaceMatches, Score


class IdSimReward(FaceReward):
    """Mean over the references of the largest cosine with a face of the picture, x 100; 0 where it has no face.

    The published number is the mean over all references of a benchmark. Here each picture has its mean, and a table
    the mean over pictures: the same where all have as many references. (`faces.metrics.identity_report` pools.)
    Valid where there is an identity reference and each of them shows a face.

    Args:
        faces: detector and face network.
    """

    differentiable: ClassVar[bool] = False

    def explain(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> list[FaceMatches]:
        """Who was found in each picture, one face to a reference."""
        return face_matches(self.faces, pixels_B3HW, examples, one_each=True)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        seen = self.faces.compare(pixels_B3HW.detach(), examples, one_each=True)
        values = [id_sim(wanted_MD @ drawn_ND.T) for wanted_MD, drawn_ND in seen.pairs()]
        return Score(
            value_B=torch.stack([value_M.mean() for value_M in values]),
            valid_B=torch.tensor([len(value_M) > 0 for value_M in values]),
            counts=seen.counts(),
        )
