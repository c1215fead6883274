"""How many faces are missing from a picture, or are there too many: counts beside the identity metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rewardgen.reward import Reward
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.faces.onnx_detectors import check_confidence
from rewardgen.types import Example, Score


class FaceCountReward(Reward):
    """Minus the number of faces that are missing, or that are too many, against the number of references.

    Who they are plays no part. Valid where there is an identity reference and each of them shows a face.

    Args:
        faces: detector and face network.
        count: `missing` (references more than faces), `extra` (faces more than references) or `both`.
    """

    differentiable: ClassVar[bool] = False

    def __init__(self, faces: FaceEncoder, *, count: Literal["missing", "extra", "both"] = "both") -> None:
        super().__init__()
        self.faces, self.count = faces, count

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str,
        *,
        detector: str = "given",
        confidence: float | None = None,
        count: Literal["missing", "extra", "both"] = "both",
    ) -> FaceCountReward:
        """Read an IResNet (`load_iresnet`) and open a detector (`open_detector`)."""
        return cls(FaceEncoder.from_pretrained(checkpoint, detector, confidence), count=count)

    @classmethod
    def check_arguments(cls, *, detector: str, confidence: float | None, **_: Any) -> None:
        """Refuse values of `from_pretrained`, with nothing read. Raises ConfigError as it does."""
        check_confidence(detector, confidence)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        seen = self.faces.compare(pixels_B3HW.detach(), examples, one_each=True)
        surplus_B = torch.tensor([len(drawn) - len(wanted) for wanted, drawn in seen.pairs()])
        missing_B, extra_B = (-surplus_B).clamp(min=0), surplus_B.clamp(min=0)
        chosen_B = {"missing": missing_B, "extra": extra_B, "both": missing_B + extra_B}[self.count]
        return Score(
            value_B=-chosen_B.float(),
            valid_B=torch.tensor([len(wanted) > 0 for wanted in seen.wanted]),
            counts=seen.counts(),
        )
