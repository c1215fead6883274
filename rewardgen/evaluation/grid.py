"""The picture grid: for each example its references, the picture before and after training, and the true one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rewardgen.errors import UserError
from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.types import Example

LEAST_SIDE, MOST_SIDE = 128, 512
"""Pixels: smaller pictures are enlarged by a whole number (each pixel a square), larger ones reduced."""
GAP, HEADER = 4, 24
"""Pixels between cells and around them, and height of the line with the columns' names."""
BACKGROUND, INK = (40, 40, 40), (235, 235, 235)


def save_grid(path: Path, examples: Sequence[Example], base: Evaluation, trained: Evaluation) -> Path:
    """Write the grid as a PNG file: a row for each example, and columns for what any of them has.

    Args:
        path: of the file to write; its folder exists.
        examples: to show; both evaluations kept their pictures.
        base: evaluation before training.
        trained: evaluation after it, with the same seed.

    Raises:
        UserError: an evaluation has no picture of an example.
    """
    columns: dict[str, list[tuple[Tensor, ...]]] = {
        "content": [example.content_refs for example in examples],
        "style": [example.style_refs for example in examples],
        "identity": [example.identity_refs for example in examples],
        "base": [(picture_of(base, example.id),) for example in examples],
        "trained": [(picture_of(trained, example.id),) for example in examples],
        "target": [() if example.target is None else (example.target,) for example in examples],
    }
    # References that no example has get no column; what was drawn always has one.
    shown = {name: cells for name, cells in columns.items() if any(cells) or name in ("base", "trained")}
    draw_grid(shown, cell_size(columns["base"])).save(path, format="PNG")
    return path


def draw_grid(columns: dict[str, list[tuple[Tensor, ...]]], cell: tuple[int, int]) -> Image.Image:
    """Lay pictures out in named columns.

    The cell of (row r, column c) has its upper left corner at x = GAP + c (width + GAP), y = HEADER + r (height + GAP).

    Args:
        columns: for each row the pictures [3, H, W] in [0, 1] of the cell; several share it, none leave it empty.
        cell: (height, width) of a cell in pixels.
    """
    height, width = cell
    num_rows = max((len(cells) for cells in columns.values()), default=0)
    size = (GAP + len(columns) * (width + GAP), HEADER + num_rows * (height + GAP))
    canvas = Image.new("RGB", size, BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for number, (name, cells) in enumerate(columns.items()):
        x = GAP + number * (width + GAP)
        draw.text((x + 2, HEADER // 2), name, fill=INK, font=font, anchor="lm")
        for row, pictures in enumerate(cells):
            _paste(canvas, pictures, (x, HEADER + row * (height + GAP)), cell)
    return canvas


def cell_size(drawn: Sequence[Sequence[Tensor]]) -> tuple[int, int]:
    """(height, width) of a cell for the first of the drawn pictures."""
    first = next((picture for pictures in drawn for picture in pictures), None)
    if first is None:
        raise UserError("a picture grid needs at least one example")
    height, width = first.shape[1:]
    factor: float = math.ceil(LEAST_SIDE / min(height, width))
    if factor == 1:
        factor = min(1.0, MOST_SIDE / max(height, width))
    return round(height * factor), round(width * factor)


def _paste(canvas: Image.Image, pictures: Sequence[Tensor], corner: tuple[int, int], cell: tuple[int, int]) -> None:
    """Put pictures into a cell, several in a square arrangement, each whole and centred in its share."""
    side = math.ceil(math.sqrt(len(pictures)))
    for place, picture in enumerate(pictures):
        row, column = divmod(place, side)
        height, width = cell[0] // side, cell[1] // side
        fitted = _fit(to_image(picture), (height, width))
        x = corner[0] + column * width + (width - fitted.width) // 2
        y = corner[1] + row * height + (height - fitted.height) // 2
        canvas.paste(fitted, (x, y))


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    factor = min(size[0] / picture.height, size[1] / picture.width)
    filtering = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    return picture.resize((max(round(picture.width * factor), 1), max(round(picture.height * factor), 1)), filtering)


def to_image(picture_3HW: Tensor) -> Image.Image:
    """A picture [3, H, W] in [0, 1] as 8-bit RGB; what is no number is black."""
    values = picture_3HW.detach().float().cpu().nan_to_num().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def picture_of(evaluation: Evaluation, name: str) -> Tensor:
    """The picture that an evaluation kept of an example. Raises UserError where it kept none."""
    kept = evaluation.pixels_K3HW
    known = evaluation.example_ids[: 0 if kept is None else len(kept)]
    if kept is None or name not in known:
        raise UserError(f"the evaluation kept no picture of example '{name}'; evaluate with a larger keep_pixels")
    return kept[known.index(name)]
