"""What an identity reward saw, in a form that can be drawn. Suffixes: M reference faces, N faces, D embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardgen.rewards.faces.assignment import assign
from rewardgen.rewards.faces.detector import Faces, known_in_picture, known_in_references
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.types import Example, FaceMatches


def face_matches(
    encoder: FaceEncoder, pixels_B3HW: Tensor, examples: Sequence[Example], *, one_each: bool
) -> list[FaceMatches]:
    """The faces of each picture, their cosines with the reference faces, and the assignment; without gradient.

    Args:
        pixels_B3HW: RGB in [0, 1].
        examples: one for each picture.
        one_each: take the largest face of each reference picture instead of all its faces.
    """
    with torch.no_grad():
        found = encoder.find(pixels_B3HW, [known_in_picture(example) for example in examples])
        drawn = encoder.embed(pixels_B3HW, [encoder.align(faces) for faces in found])
        return [
            _matches(encoder, example, faces, drawn_ND, one_each)
            for example, faces, drawn_ND in zip(examples, found, drawn, strict=True)
        ]


def _matches(encoder: FaceEncoder, example: Example, faces: Faces, drawn_ND: Tensor, one_each: bool) -> FaceMatches:
    most = 1 if one_each else None
    places = [
        encoder.find(picture[None].to(drawn_ND.device), [known])[0].by_size().boxes_N4[:most].cpu().float()
        for picture, known in zip(example.identity_refs, known_in_references(example), strict=True)
    ]
    wanted_MD = torch.cat([drawn_ND[:0], *(people_ND[:most] for people_ND in encoder.references(example))])
    cosine_MN = wanted_MD @ drawn_ND.T
    return FaceMatches(
        boxes_N4=faces.boxes_N4.cpu().float(),
        cosine_MN=cosine_MN.cpu().float(),
        matched_MN=assign(cosine_MN).cpu(),
        reference_M=tuple(index for index, boxes in enumerate(places) for _ in boxes),
        reference_boxes_M4=torch.cat([torch.zeros(0, 4), *places]),
        faceless=tuple(index for index, boxes in enumerate(places) if not len(boxes)),
    )
