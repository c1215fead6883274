"""Faces for tests: a person is a random patch of pixels, a face is that patch pasted into a picture.

Landmarks are the template's, moved by whole pixels, so that the aligned crop is exactly the patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewardgen.rewards.faces.align import template
from rewardgen.rewards.faces.detector import FACE_LANDMARKS, IDENTITY_LANDMARKS, FaceDetector, Faces, GivenDetector
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.faces.iresnet import IResNet, IResNetConfig
from rewardgen.types import Example

CROP = 16
TINY = IResNetConfig(layers=(1, 2, 1, 1), widths=(4, 8, 8, 8), embedding_dim=6, image_size=CROP)

Place = tuple[int, int]
"""(x, y) of a face's upper left pixel."""


def tiny_iresnet(seed: int = 0, config: IResNetConfig = TINY) -> IResNet:
    """With running statistics that differ from a fresh network's, so that the mode matters."""
    torch.manual_seed(seed)
    model = IResNet(config)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


class LinearNetwork(nn.Module):
    """A smooth face network: a random linear map of the crop, in float64."""

    def __init__(self, dim: int = 128, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(dim, 3 * CROP * CROP, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight / weight.shape[1] ** 0.5)

    def forward(self, crops_F3SS: Tensor) -> Tensor:
        return crops_F3SS.flatten(1) @ self.weight.T


class TwoPlaces(FaceDetector):
    """Finds a face in each half of any picture, whatever is in it."""

    def detect(self, pixels_B3HW: Tensor, known: Sequence[Tensor | None]) -> list[Faces]:
        height, width = pixels_B3HW.shape[2:]
        landmarks = torch.stack(
            [template(CROP) * 1.3 + torch.tensor([0.1 * width, 0.2 * height]), template(CROP) + width / 2]
        )
        return GivenDetector().detect(pixels_B3HW, [landmarks] * len(pixels_B3HW))


def linear_encoder(detector: FaceDetector | None = None) -> FaceEncoder:
    return FaceEncoder(detector or GivenDetector(), LinearNetwork(), crop_size=CROP)


def person(seed: int) -> Tensor:
    """A patch [3, CROP, CROP] in [0, 1]. Two people's cosine in `LinearNetwork` is 0 plus or minus 0.1."""
    return torch.rand(3, CROP, CROP, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def landmarks_at(*places: Place) -> Tensor:
    """[N, 5, 2]"""
    return torch.stack([template(CROP) + torch.tensor(place) for place in places]) if places else torch.zeros(0, 5, 2)


def scene(people: Sequence[Tensor], places: Sequence[Place], size: tuple[int, int] = (64, 64)) -> Tensor:
    """A grey picture [3, H, W] with the patches at their places."""
    picture = torch.full((3, *size), 0.5, dtype=torch.float64)
    for patch, (x, y) in zip(people, places, strict=True):
        picture[:, y : y + CROP, x : x + CROP] = patch
    return picture


GRID: tuple[Place, ...] = tuple((x, y) for y in (2, 24, 46) for x in (2, 24, 46))


def example_of(
    references: Sequence[Tensor], places: Sequence[Place], id: str = "a", reference_places: Sequence[Place] = ((0, 0),)
) -> Example:
    """Portraits as references, and the places of the faces in the drawn picture."""
    return Example(
        id=id,
        identity_refs=tuple(references),
        extras={
            FACE_LANDMARKS: landmarks_at(*places),
            IDENTITY_LANDMARKS: [landmarks_at(*reference_places) for _ in references],
        },
    )
