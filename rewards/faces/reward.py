"""What rewards that look at faces and have no settings of their own share: how they are made."""

from __future__ import annotations

from typing import Any, Self

from rewardgen.reward import Reward
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.faces.onnx_detectors import check_confidence


class FaceReward(Reward):
    """A reward that needs a detector and a face network, and nothing else.

    Args:
        faces: both of them.
    """

    def __init__(self, faces: FaceEncoder) -> None:
        super().__init__()
        self.faces = faces

    @classmethod
    def from_pretrained(cls, checkpoint: str, *, detector: str = "given", confidence: float | None = None) -> Self:
        """Read an IResNet (`load_iresnet`) and open a detector (`open_detector`)."""
        return cls(FaceEncoder.from_pretrained(checkpoint, detector, confidence))

    @classmethod
    def check_arguments(cls, *, detector: str, confidence: float | None, **_: Any) -> None:
        """Refuse values of `from_pretrained`, with nothing read. Raises ConfigError as it does."""
        check_confidence(detector, confidence)
