"""Where the faces of a picture are: the contract of a detector, and the detector that is told.

Suffixes: B pictures, N faces of one picture, 4 = (x1, y1, x2, y2), 52 = five landmarks (x, y). Coordinates are pixels
of the picture, with pixel centres at whole numbers; x runs right, y runs down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewardgen.errors import ScoringError
from rewardgen.types import Example

FACE_LANDMARKS = "face_landmarks"
"""Column of `Example.extras`: landmarks [N, 5, 2] of the people in the drawn picture, where the world knows them."""
IDENTITY_LANDMARKS = "identity_landmarks"
"""Column of `Example.extras`: for each identity reference its landmarks [N, 5, 2]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Faces:
    """The faces found in one picture, without gradient.

    Args:
        boxes_N4: corners in pixels.
        scores_N: the detector's confidence in [0, 1].
        landmarks_N52: left eye, right eye, nose, left and right corner of the mouth, as the viewer sees them.

    Raises:
        ScoringError: shapes that do not belong together.
    """

    boxes_N4: Tensor
    scores_N: Tensor
    landmarks_N52: Tensor

    def __post_init__(self) -> None:
        count = len(self.scores_N)
        shapes = tuple(tuple(t.shape) for t in (self.boxes_N4, self.scores_N, self.landmarks_N52))
        if shapes != ((count, 4), (count,), (count, 5, 2)):
            raise ScoringError(
                f"a face detector returned boxes, scores and landmarks of shapes {shapes};"
                f" expected ({count}, 4), ({count},) and ({count}, 5, 2)"
            )

    def __len__(self) -> int:
        return len(self.scores_N)

    def __getitem__(self, chosen: Tensor) -> Faces:
        """The faces chosen by a mask or by indices, in that order."""
        return Faces(
            boxes_N4=self.boxes_N4[chosen], scores_N=self.scores_N[chosen], landmarks_N52=self.landmarks_N52[chosen]
        )

    def by_size(self) -> Faces:
        """The same faces, largest box first."""
        sides_N2 = self.boxes_N4[:, 2:] - self.boxes_N4[:, :2]
        return self[torch.argsort(sides_N2.prod(1), descending=True, stable=True)]


class FaceDetector(ABC):
    """Finds faces. Nothing it returns carries a gradient: a reward moves what a face looks like, not where it is.

    A trained detector derives from `torch.nn.Module` as well, so that it moves to the device with its reward.
    """

    @abstractmethod
    def detect(self, pixels_B3HW: Tensor, known: Sequence[Tensor | None]) -> list[Faces]:
        """Find the faces of each picture.

        Args:
            pixels_B3HW: RGB in [0, 1].
            known: for each picture the landmarks [N, 5, 2] that its example states, or None. A detector that looks
                for itself ignores them.
        """


class GivenDetector(FaceDetector):
    """Returns the landmarks that the example states: for worlds with known truth, and for tests.

    Boxes are those of the landmarks, scores are 1.

    Raises:
        ScoringError: an example states none (an empty list says that there is no face).
    """

    def detect(self, pixels_B3HW: Tensor, known: Sequence[Tensor | None]) -> list[Faces]:
        return [self._faces(landmarks) for landmarks in known]

    @staticmethod
    def _faces(landmarks_N52: Tensor | None) -> Faces:
        if landmarks_N52 is None:
            raise ScoringError(
                f"the detector 'given' needs landmarks in the example's extras: '{FACE_LANDMARKS}' for the drawn"
                f" picture and '{IDENTITY_LANDMARKS}' for its identity references"
            )
        boxes_N4 = torch.cat([landmarks_N52.amin(1), landmarks_N52.amax(1)], dim=1)
        return Faces(boxes_N4=boxes_N4, scores_N=torch.ones(len(landmarks_N52)), landmarks_N52=landmarks_N52)


def known_in_picture(example: Example) -> Tensor | None:
    """Landmarks [N, 5, 2] that the example states for the drawn picture; None where it states none.

    Raises:
        ScoringError: they have another shape.
    """
    if FACE_LANDMARKS not in example.extras:
        return None
    return _landmarks(example.extras[FACE_LANDMARKS], f"example '{example.id}': extras['{FACE_LANDMARKS}']")


def known_in_references(example: Example) -> list[Tensor | None]:
    """The same for each identity reference.

    Raises:
        ScoringError: another shape, or not one entry for each reference.
    """
    if IDENTITY_LANDMARKS not in example.extras:
        return [None] * len(example.identity_refs)
    stated, where = example.extras[IDENTITY_LANDMARKS], f"example '{example.id}': extras['{IDENTITY_LANDMARKS}']"
    if len(stated) != len(example.identity_refs):
        raise ScoringError(f"{where} has {len(stated)} entries for {len(example.identity_refs)} identity references")
    return [_landmarks(value, f"{where}[{index}]") for index, value in enumerate(stated)]


def _landmarks(value: Any, where: str) -> Tensor:
    try:
        landmarks = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScoringError(f"{where} is no array of numbers: {error}") from error
    if landmarks.numel() == 0:
        return landmarks.reshape(0, 5, 2)
    if landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2):
        raise ScoringError(f"{where} has shape {tuple(landmarks.shape)}; expected (faces, 5, 2)")
    return landmarks.detach()
