"""Pictures to face embeddings: find, align, embed, with gradient in the pixels; references once each.

Suffixes: B pictures, N faces of one picture, F faces of all pictures, D length of an embedding, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewardgen.errors import ScoringError
from rewardgen.rewards.cache import TensorCache, digest
from rewardgen.rewards.faces.align import is_usable, similarity_transform, template, warp
from rewardgen.rewards.faces.detector import FaceDetector, Faces, known_in_picture, known_in_references
from rewardgen.rewards.faces.iresnet import load_iresnet
from rewardgen.rewards.faces.onnx_detectors import open_detector
from rewardgen.rewards.preprocess import clamp_straight_through
from rewardgen.types import Example

CACHED_REFERENCES = 4096
"""Reference pictures whose faces are kept by one encoder; an embedding has 512 floats."""

LEAST_LENGTH = 1e-4
"""Embeddings below it have no direction worth a gradient and stay shorter than 1; those of faces have 10 or more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Who should appear and who does, picture by picture.

    Args:
        found: the faces of each picture.
        drawn: their embeddings [N, D], of unit length, with gradient in the pixels.
        wanted: embeddings [M, D] of the people who should appear, without gradient. M is 0 where the example has no
            identity reference, or where one of them shows no face: then nobody can tell who is missing.
        readable: for each example, whether every identity reference shows a face.
    """

    found: list[Faces]
    drawn: list[Tensor]
    wanted: list[Tensor]
    readable: list[bool]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(wanted, drawn) of each picture; `wanted @ drawn.T` are the cosines."""
        return list(zip(self.wanted, self.drawn, strict=True))

    def counts(self) -> dict[str, float]:
        """Over the batch: `faces` found, pictures with `no_face`, examples with an `unreadable_reference`."""
        return {
            "faces": float(sum(map(len, self.found))),
            "no_face": float(sum(not len(faces) for faces in self.found)),
            "unreadable_reference": float(self.readable.count(False)),
        }


class FaceEncoder(nn.Module):
    """A detector and a face network, both frozen.

    Args:
        detector: says where the faces are.
        network: aligned RGB crops [F, 3, S, S] in [-1, 1] to embeddings [F, D]; it stays in evaluation mode.
        crop_size: side S in pixels.
    """

    def __init__(self, detector: FaceDetector, network: nn.Module, *, crop_size: int = 112) -> None:
        super().__init__()
        self.detector = detector
        self.network = network
        self.crop_size = crop_size
        self._cache = TensorCache()
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, checkpoint: str, detector: str, confidence: float | None) -> FaceEncoder:
        """Read an IResNet with `load_iresnet` and open a detector with `open_detector`."""
        finder = open_detector(detector, confidence=confidence)
        network = load_iresnet(checkpoint)
        return cls(finder, network, crop_size=network.config.image_size)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: batch norm over the faces of a batch would make scores depend on each other."""
        return super().train(False)

    def compare(self, pixels_B3HW: Tensor, examples: Sequence[Example], *, one_each: bool) -> Comparison:
        """Embed the faces of the pictures drawn for these examples, and of their identity references.

        Args:
            pixels_B3HW: RGB in [0, 1].
            examples: one for each picture.
            one_each: take the largest face of each reference picture instead of all its faces.
        """
        found = self.find(pixels_B3HW, [known_in_picture(example) for example in examples])
        drawn = self.embed(pixels_B3HW, [self.align(faces) for faces in found])
        references = [self.references(example) for example in examples]
        readable = [all(map(len, faces)) for faces in references]
        wanted = [
            torch.cat([face_ND[:1] if one_each else face_ND for face_ND in faces]) if faces and reads else nobody_0D
            for faces, reads, nobody_0D in zip(references, readable, (d.detach()[:0] for d in drawn), strict=True)
        ]
        return Comparison(found=found, drawn=drawn, wanted=wanted, readable=readable)

    def find(self, pixels_B3HW: Tensor, known: Sequence[Tensor | None]) -> list[Faces]:
        """The faces of each picture, without gradient; landmarks that allow no alignment are no face.

        Raises:
            ScoringError: the detector answered for another number of pictures.
        """
        with torch.no_grad():
            found = self.detector.detect(_at_least_float32(pixels_B3HW.detach()).clamp(0, 1), known)
        if len(found) != len(pixels_B3HW):
            raise ScoringError(
                f"{type(self.detector).__name__} answered for {len(found)} pictures instead of {len(pixels_B3HW)}"
            )
        return [faces[is_usable(self.align(faces))] for faces in found]

    def align(self, faces: Faces) -> Tensor:
        """The matrices [N, 2, 3] from the picture to the crop."""
        return similarity_transform(faces.landmarks_N52, template(self.crop_size))

    def embed(self, pixels_B3HW: Tensor, transforms: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings [N, D] of unit length, in float32 or better, for each picture; all crops in one pass.

        Pixels are clamped to [0, 1], the range of a saved picture, straight-through.

        Args:
            pixels_B3HW: RGB in [0, 1].
            transforms: for each picture its matrices [N, 2, 3], from pixels of the picture to pixels of the crop.
        """
        like = next(chain(self.network.parameters(), self.network.buffers()), pixels_B3HW)
        # A reward differs between pictures in its third digit; autocast's bfloat16 would drown that.
        with torch.autocast(like.device.type, enabled=False):
            images = 2 * clamp_straight_through(_at_least_float32(pixels_B3HW.to(like.device))) - 1
            crops_F3SS = warp(images, transforms, self.crop_size)
            embedding_FD = _at_least_float32(self.network(crops_F3SS.to(like.dtype)))
            unit_FD = F.normalize(embedding_FD, dim=-1, eps=LEAST_LENGTH)
        return list(unit_FD.split([len(transform_N23) for transform_N23 in transforms]))

    def references(self, example: Example) -> list[Tensor]:
        """For each identity reference the embeddings [N, D] of its faces, largest face first, without gradient.

        Each picture is looked at once: what was found is kept by the hash of its content (and of its known landmarks).
        """
        known = known_in_references(example)
        return [
            self._reference(picture, landmarks) for picture, landmarks in zip(example.identity_refs, known, strict=True)
        ]

    def _reference(self, pixels_3HW: Tensor, known_N52: Tensor | None) -> Tensor:
        like = next(chain(self.network.parameters(), self.network.buffers()), pixels_3HW)

        def look() -> Tensor:
            # One at a time: an embedding must not depend, in its last bits, on what else was new in this batch.
            pixels_13HW = pixels_3HW.detach().clone()[None].to(like.device)
            faces = self.find(pixels_13HW, [known_N52])[0].by_size()
            return self.embed(pixels_13HW, [self.align(faces)])[0]

        key = (digest(pixels_3HW, known_N52), like.dtype, like.device)
        return self._cache.get(key, look, CACHED_REFERENCES)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
