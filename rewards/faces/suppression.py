"""From many guesses to faces: the confident ones, each once. Suffixes: P guesses, N faces, 4 = (x1, y1, x2, y2)."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardgen.rewards.faces.detector import Faces


def suppress(boxes_N4: Tensor, scores_N: Tensor, overlap: float) -> Tensor:
    """Non-maximum suppression: indices of the boxes that stay, most confident first.

    A box goes if its intersection over union with a more confident one that stays is larger than `overlap`. Sides
    count both end pixels, as both releases do.
    """
    order = torch.argsort(scores_N, descending=True, stable=True)
    kept: list[int] = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        low_N2 = torch.maximum(boxes_N4[rest, :2], boxes_N4[best, :2])
        high_N2 = torch.minimum(boxes_N4[rest, 2:], boxes_N4[best, 2:])
        common_N = (high_N2 - low_N2 + 1).clamp(min=0).prod(1)
        union_N = _area(boxes_N4[rest]) + _area(boxes_N4[best][None]) - common_N
        order = rest[common_N <= overlap * union_N]
    return torch.tensor(kept, dtype=torch.long)


def _area(boxes_N4: Tensor) -> Tensor:
    return (boxes_N4[:, 2:] - boxes_N4[:, :2] + 1).prod(1)


def confident(scores_P: Tensor, boxes_P4: Tensor, landmarks_P52: Tensor, confidence: float, overlap: float) -> Faces:
    """The faces whose score is at least `confidence`, without those that a more confident one covers (`suppress`)."""
    sure = scores_P >= confidence
    faces = Faces(boxes_N4=boxes_P4[sure], scores_N=scores_P[sure], landmarks_N52=landmarks_P52[sure])
    return faces[suppress(faces.boxes_N4, faces.scores_N, overlap)]
