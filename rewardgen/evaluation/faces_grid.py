"""The matched faces of a picture, drawn: each face to the reference it was matched to, with its cosine.

Green is a match. Red is a confusion (a face more like another reference than like its own; a thin line goes there), and
the frame of a reference whose face is missing. Yellow is a face that belongs to nobody. Blue is a reference in which no
face was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.evaluation.grid import BACKGROUND, GAP, HEADER, INK, picture_of, to_image
from rewardgen.reward import Reward
from rewardgen.types import Example, FaceMatches

MATCH, FAULT, NOBODY, BLIND = (90, 220, 120), (240, 80, 70), (250, 200, 60), (110, 130, 170)
COLUMN = 96
"""Pixels of a side of a reference; they stand in a column left of the picture."""
LEAST, MOST = 448, 896
"""Pixels of a picture's sides: smaller ones are enlarged by a whole number, so that labels fit, larger ones reduced."""
_SPACE = 64
"""Pixels between references and picture, for the lines."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is to be said about a picture; indices of reference faces and of faces.

    Args:
        matches: (reference face, face, cosine, the reference face it is more like or None).
        missing: reference faces without a face.
        extra: faces without a reference.
    """

    matches: tuple[tuple[int, int, float, int | None], ...]
    missing: tuple[int, ...]
    extra: tuple[int, ...]

    def describe(self) -> str:
        """'3 matched (1 confused), 1 missing, 0 extra'"""
        confused = sum(other is not None for *_, other in self.matches)
        return (
            f"{len(self.matches)} matched ({confused} confused), {len(self.missing)} missing, {len(self.extra)} extra"
        )


def judge(found: FaceMatches) -> Verdict:
    """Sort the faces of a picture; a match is a confusion where another reference face is more like the face."""
    matches = []
    for m, n in found.matched_MN.nonzero().tolist():
        likeness_M = found.cosine_MN[:, n]
        best = int(likeness_M.argmax())
        other = best if float(likeness_M[best]) > float(likeness_M[m]) else None
        matches.append((m, n, float(likeness_M[m]), other))
    missing = (~found.matched_MN.any(1)).nonzero()[:, 0].tolist()
    extra = (~found.matched_MN.any(0)).nonzero()[:, 0].tolist()
    return Verdict(matches=tuple(matches), missing=tuple(missing), extra=tuple(extra))


def draw_matches(picture_3HW: Tensor, references: Sequence[Tensor], found: FaceMatches, title: str = "") -> Image.Image:
    """One picture with its references in a column at its left.

    Args:
        picture_3HW: in [0, 1].
        references: pictures [3, H, W] in [0, 1] that `found` speaks of.
        found: what the reward saw.
        title: stands above the picture, before what was counted.
    """
    height, width = _size(picture_3HW)
    left = GAP + COLUMN + _SPACE
    rows = max(height, len(references) * (COLUMN + GAP) - GAP)
    canvas = Image.new("RGB", (left + width + GAP, HEADER + rows + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    canvas.paste(to_image(picture_3HW).resize((width, height), _filter(picture_3HW, height)), (left, HEADER))
    scale = height / picture_3HW.shape[1]
    faces = [_scaled(box, scale, (left, HEADER)) for box in found.boxes_N4.tolist()]
    people = _draw_references(canvas, references, found)
    verdict = judge(found)
    draw.text((GAP, HEADER // 2), f"{title}  {verdict.describe()}".strip(), fill=INK, font=font, anchor="lm")

    for index in found.faceless:
        y = HEADER + index * (COLUMN + GAP)
        draw.rectangle((GAP, y, GAP + COLUMN - 1, y + COLUMN - 1), outline=BLIND, width=2)
        _label(draw, (GAP + 2, y + 2), "no face", BLIND)
    for m in verdict.missing:
        draw.rectangle(people[m], outline=FAULT, width=2)
        _label(draw, people[m][:2], "missing", FAULT)
    for n in verdict.extra:
        draw.rectangle(faces[n], outline=NOBODY, width=2)
        _label(draw, faces[n][:2], "extra", NOBODY)
    for m, n, cosine, other in verdict.matches:
        colour = MATCH if other is None else FAULT
        draw.rectangle(people[m], outline=colour, width=2)
        draw.rectangle(faces[n], outline=colour, width=2)
        draw.line((_right(people[m]), _left(faces[n])), fill=colour, width=2)
        if other is not None:
            draw.line((_right(people[other]), _left(faces[n])), fill=colour, width=1)
        _label(draw, faces[n][:2], f"{m + 1}: {cosine:.2f}", colour)
    for m, box in enumerate(people):
        _label(draw, (box[0], box[3] - 12), str(m + 1), INK)
    return canvas


def save_faces_grid(
    path: Path, examples: Sequence[Example], base: Evaluation, trained: Evaluation, metrics: Mapping[str, Reward]
) -> Path | None:
    """Write the matched faces of each example before and after training, side by side, as a PNG file.

    Args:
        path: of the file to write; its folder exists.
        examples: to show; both evaluations kept their pictures. Those without identity references are left out.
        base: evaluation before training.
        trained: evaluation after it, with the same seed.
        metrics: the first that can `explain` itself says who was matched to whom.

    Returns:
        The path, or None where no metric can explain itself or no example has identity references.
    """
    able = next((metric for metric in metrics.values() if hasattr(metric, "explain")), None)
    people = [example for example in examples if example.identity_refs]
    if able is None or not people:
        return None
    columns = {"base": base, "trained": trained}
    pages = [
        [explained(able, picture_of(columns[title], example.id), example, title) for title in columns]
        for example in people
    ]
    stack(pages).save(path, format="PNG")
    return path


def explained(reward: Any, picture_3HW: Tensor, example: Example, title: str) -> Image.Image:
    """One picture drawn with what a reward that can `explain` itself saw in it."""
    own = next((tensor.device for tensor in chain(reward.parameters(), reward.buffers())), torch.device("cpu"))
    found = reward.explain(picture_3HW[None].to(own), [example])[0]
    return draw_matches(picture_3HW, example.identity_refs, found, title)


def stack(pages: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Drawings side by side in rows: before and after training, say."""
    widths = [max(row[i].width for row in pages) for i in range(len(pages[0]))]
    heights = [max(page.height for page in row) for row in pages]
    canvas = Image.new("RGB", (sum(widths), sum(heights)), BACKGROUND)
    for r, row in enumerate(pages):
        for c, page in enumerate(row):
            canvas.paste(page, (sum(widths[:c]), sum(heights[:r])))
    return canvas


def _size(picture_3HW: Tensor) -> tuple[int, int]:
    height, width = picture_3HW.shape[1:]
    factor: float = math.ceil(LEAST / max(height, width))
    if factor == 1:
        factor = min(1.0, MOST / max(height, width))
    return max(round(height * factor), 1), max(round(width * factor), 1)


def _draw_references(canvas: Image.Image, references: Sequence[Tensor], found: FaceMatches) -> list[Box]:
    """Paste the references and return the boxes of their faces on the canvas."""
    scales = []
    for index, reference in enumerate(references):
        factor = COLUMN / max(reference.shape[1:])
        size = (max(round(reference.shape[2] * factor), 1), max(round(reference.shape[1] * factor), 1))
        fitted = to_image(reference).resize(size, _filter(reference, size[1]))
        canvas.paste(fitted, (GAP, HEADER + index * (COLUMN + GAP)))
        scales.append(factor)
    return [
        _scaled(box, scales[index], (GAP, HEADER + index * (COLUMN + GAP)))
        for index, box in zip(found.reference_M, found.reference_boxes_M4.tolist(), strict=True)
    ]


def _filter(picture_3HW: Tensor, height: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if height >= picture_3HW.shape[1] else Image.Resampling.LANCZOS


def _scaled(box: Sequence[float], scale: float, corner: tuple[int, int]) -> Box:
    """Pixels of a picture, with centres at whole numbers, to the canvas."""
    x, y = corner
    x1, y1, x2, y2 = ((value + 0.5) * scale for value in box)
    return x + x1, y + y1, x + x2, y + y2


def _left(box: Box) -> tuple[float, float]:
    return box[0], (box[1] + box[3]) / 2


def _right(box: Box) -> tuple[float, float]:
    return box[2], (box[1] + box[3]) / 2


def _label(draw: ImageDraw.ImageDraw, corner: Sequence[float], text: str, colour: tuple[int, int, int]) -> None:
    """Small text on a dark ground, so that it can be read on any picture."""
    font = ImageFont.load_default(11)
    x, y = float(corner[0]) + 1, max(float(corner[1]), 0.0)
    draw.rectangle(draw.textbbox((x, y), text, font=font), fill=BACKGROUND)
    draw.text((x, y), text, fill=colour, font=font)
