"""The picture grid, read back from the file pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rewardgen.errors import UserError
from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.evaluation.grid import BACKGROUND, GAP, HEADER, LEAST_SIDE, MOST_SIDE, cell_size, save_grid
from rewardgen.types import Example

RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def plain(colour: tuple[float, float, float], height: int = 8, width: int = 8) -> Tensor:
    return torch.tensor(colour)[:, None, None].expand(3, height, width).clone()


def kept(examples: list[Example], pixels_K3HW: Tensor) -> Evaluation:
    return Evaluation(example_ids=tuple(example.id for example in examples), scores={}, pixels_K3HW=pixels_K3HW)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def cell_of(grid: np.ndarray, row: int, column: int, size: tuple[int, int]) -> np.ndarray:
    top, left = HEADER + row * (size[0] + GAP), GAP + column * (size[1] + GAP)
    return grid[top : top + size[0], left : left + size[1]]


def bytes_of(picture: Tensor) -> np.ndarray:
    return (picture * 255).round().permute(1, 2, 0).numpy().astype(int)


def test_every_picture_is_where_it_belongs_and_each_pixel_a_square(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(5, 3, 3, 8, 16, generator=generator)
    examples = [
        Example(id=f"e{n}", content_refs=(pictures[0, n],), style_refs=(pictures[1, n],), target=pictures[4, n])
        for n in range(3)
    ]
    path = save_grid(tmp_path / "grid.png", examples, kept(examples, pictures[2]), kept(examples, pictures[3]))
    assert path == tmp_path / "grid.png"
    grid, size = read(path), (128, 256)
    assert grid.shape == (HEADER + 3 * (128 + GAP), GAP + 5 * (256 + GAP), 3)
    for column in range(5):
        for row in range(3):
            expected = bytes_of(pictures[column, row]).repeat(16, axis=0).repeat(16, axis=1)
            assert (cell_of(grid, row, column, size) == expected).all()
        label = grid[:HEADER, GAP + column * (256 + GAP) :][:, :256]
        assert (label.max(axis=2) > 150).sum() > 20, "each column has a label"
    for row in range(3):
        gap = grid[HEADER + row * (128 + GAP) + 128 :][:GAP]
        assert (gap == BACKGROUND).all()


def test_rows_follow_the_examples_whatever_the_order_they_were_drawn_in(tmp_path: Path) -> None:
    examples = [Example(id="a"), Example(id="b")]
    drawn = torch.stack([plain(RED), plain(GREEN)])
    grid = read(save_grid(tmp_path / "grid.png", examples[::-1], kept(examples, drawn), kept(examples, drawn)))
    assert (cell_of(grid, 0, 0, (128, 128)) == (0, 255, 0)).all()
    assert (cell_of(grid, 1, 1, (128, 128)) == (255, 0, 0)).all()


def test_columns_that_no_example_has_are_left_out_and_missing_pictures_stay_empty(tmp_path: Path) -> None:
    examples = [Example(id="a", style_refs=(plain(RED),)), Example(id="b", identity_refs=(plain(BLUE),))]
    drawn = torch.stack([plain(GREEN), plain(GREEN)])
    grid = read(save_grid(tmp_path / "grid.png", examples, kept(examples, drawn), kept(examples, drawn)))
    assert grid.shape[1] == GAP + 4 * (128 + GAP), "style, identity, base, trained"
    corners = [[tuple(cell_of(grid, row, column, (128, 128))[0, 0]) for column in range(4)] for row in range(2)]
    empty, green = BACKGROUND, (0, 255, 0)
    assert corners == [[(255, 0, 0), empty, green, green], [empty, (0, 0, 255), green, green]]


@pytest.mark.parametrize(("height", "width"), [(40, 10), (10, 40), (300, 900), (129, 128), (1, 1)])
def test_references_of_other_sizes_are_whole_and_centred(tmp_path: Path, height: int, width: int) -> None:
    examples = [Example(id="a", content_refs=(plain(RED, height, width),))]
    drawn = plain(GREEN)[None]
    grid = read(save_grid(tmp_path / "grid.png", examples, kept(examples, drawn), kept(examples, drawn)))
    red = (cell_of(grid, 0, 0, (128, 128)) == (255, 0, 0)).all(axis=2)
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    assert red[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "one rectangle"
    assert max(len(rows), len(columns)) == 128, "as large as fits"
    assert len(rows) / len(columns) == pytest.approx(height / width, rel=0.02), "not distorted"
    assert abs(rows[0] - (127 - rows[-1])) <= 1
    assert abs(columns[0] - (127 - columns[-1])) <= 1


def test_several_references_share_a_cell(tmp_path: Path) -> None:
    colours = [RED, GREEN, BLUE]
    examples = [Example(id="a", content_refs=tuple(plain(colour) for colour in colours))]
    drawn = plain(GREEN)[None]
    grid = read(save_grid(tmp_path / "grid.png", examples, kept(examples, drawn), kept(examples, drawn)))
    cell = cell_of(grid, 0, 0, (128, 128))
    quarters = [cell[:64, :64], cell[:64, 64:], cell[64:, :64], cell[64:, 64:]]
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), BACKGROUND]
    assert all((quarter == colour).all() for quarter, colour in zip(quarters, expected, strict=True))


def test_values_outside_of_the_range_are_clamped(tmp_path: Path) -> None:
    drawn = torch.tensor([-1.0, 2.0, torch.nan])[None, :, None, None].expand(1, 3, 8, 8)
    examples = [Example(id="a")]
    grid = read(save_grid(tmp_path / "grid.png", examples, kept(examples, drawn), kept(examples, drawn)))
    assert (cell_of(grid, 0, 0, (128, 128)) == (0, 255, 0)).all()


@pytest.mark.parametrize(
    ("picture", "cell"),
    [
        ((8, 8), (128, 128)),
        ((100, 100), (200, 200)),
        ((60, 120), (180, 360)),
        ((128, 200), (128, 200)),
        ((500, 500), (500, 500)),
        ((1024, 1024), (512, 512)),
        ((1024, 512), (512, 256)),
    ],
)
def test_cells_are_neither_tiny_nor_huge(picture: tuple[int, int], cell: tuple[int, int]) -> None:
    assert cell_size([(torch.zeros(3, *picture),)]) == cell
    assert min(cell) >= LEAST_SIDE
    assert max(cell) <= MOST_SIDE


def test_pictures_that_were_not_kept_are_named(tmp_path: Path) -> None:
    examples = [Example(id="a"), Example(id="b")]
    one, none = kept(examples, plain(RED)[None]), Evaluation(example_ids=("a", "b"), scores={})
    for evaluation in (one, none):
        with pytest.raises(UserError, match=r"no picture of example 'b'"):
            save_grid(tmp_path / "grid.png", examples[1:], evaluation, one)
    with pytest.raises(UserError, match="at least one example"):
        save_grid(tmp_path / "grid.png", [], one, one)
