"""Cheap statistics of pictures that no reward should move far: the first signs that a reward is being gamed.

Each is one number for a picture, from pixels alone and of a known closed form on simple pictures.

Shape suffixes: N pictures, S seeds, P pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from rewardgen.errors import ConfigError, nearest
from rewardgen.reward import Reward
from rewardgen.types import Example, Score

EDGE = 0.05
"""Change of luminance per pixel from which on a pixel belongs to an edge."""
COLOUR_LEVELS = 8
"""Cells a channel in the histogram of colours."""
GRID_PERIOD = 16
"""Pixels after which the marks of an 8-fold autoencoder with 2x2 patches (and of those with less) repeat."""


def luminance(pixels_N3HW: Tensor) -> Tensor:
    """ITU-R BT.601 luminance [N, H, W] of pixels clamped to [0, 1]."""
    red, green, blue = pixels_N3HW.float().clamp(0, 1).unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def brightness(pixels_N3HW: Tensor) -> Tensor:
    """Mean luminance, in [0, 1]."""
    return luminance(pixels_N3HW).mean((1, 2))


def sharpness(pixels_N3HW: Tensor) -> Tensor:
    """log10 of the mean squared Laplacian (four neighbours) of luminance, with 1e-8 for a flat picture.

    A wave of amplitude a and w radians a pixel along one axis has log10(a^2 / 2 (2 - 2 cos w)^2).
    """
    light = luminance(pixels_N3HW)
    inner = light[:, 1:-1, 1:-1]
    around = light[:, :-2, 1:-1] + light[:, 2:, 1:-1] + light[:, 1:-1, :-2] + light[:, 1:-1, 2:]
    return torch.log10((around - 4 * inner).square().mean((1, 2)) + 1e-8)


def saturation(pixels_N3HW: Tensor) -> Tensor:
    """Mean difference of the largest and the smallest channel (chroma), in [0, 1]; 0 for grey."""
    pixels = pixels_N3HW.float().clamp(0, 1)
    return (pixels.amax(1) - pixels.amin(1)).mean((1, 2))


def colour_entropy(pixels_N3HW: Tensor) -> Tensor:
    """Entropy in bits of the colours, counted in 8 x 8 x 8 cells, in [0, 9]; log2(k) for k equally frequent colours."""
    levels = (pixels_N3HW.float().clamp(0, 1) * COLOUR_LEVELS).long().clamp(max=COLOUR_LEVELS - 1)
    cell_NP = ((levels[:, 0] * COLOUR_LEVELS + levels[:, 1]) * COLOUR_LEVELS + levels[:, 2]).flatten(1)
    counts = torch.zeros(len(cell_NP), COLOUR_LEVELS**3, device=cell_NP.device)
    counts.scatter_add_(1, cell_NP, torch.ones_like(cell_NP, dtype=counts.dtype))
    entropy: Tensor = torch.special.entr(counts / cell_NP.shape[1]).sum(1) / math.log(2)
    return entropy


def edge_density(pixels_N3HW: Tensor) -> Tensor:
    """Share of the inner pixels whose luminance changes by more than 0.05 a pixel (central differences), in [0, 1]."""
    light = luminance(pixels_N3HW)
    across = (light[:, 1:-1, 2:] - light[:, 1:-1, :-2]) / 2
    down = (light[:, 2:, 1:-1] - light[:, :-2, 1:-1]) / 2
    return (torch.hypot(across, down) > EDGE).float().mean((1, 2))


def grid_peaks(pixels_N3HW: Tensor) -> Tensor:
    """Share of luminance's variance that repeats every 16 pixels in both directions, in [0, 1].

    By Parseval that is the spectral energy at the harmonics of the 16-pixel grid, without the mean: 1 for a picture
    made of one tile, the inverse number of tiles for white noise. A remainder of less than a tile is left out; a
    picture smaller than two tiles gives 0, and so does a flat one.
    """
    light = luminance(pixels_N3HW)
    rows, columns = light.shape[1] // GRID_PERIOD, light.shape[2] // GRID_PERIOD
    if rows * columns < 2:
        return light.new_zeros(len(light))
    whole = light[:, : rows * GRID_PERIOD, : columns * GRID_PERIOD]
    tile = whole.unflatten(1, (rows, GRID_PERIOD)).unflatten(3, (columns, GRID_PERIOD)).mean((1, 3))
    variance = whole.flatten(1).var(1, correction=0)
    repeated: Tensor = tile.flatten(1).var(1, correction=0) / variance.clamp(min=1e-8)
    return repeated


def diversity(pixels_SN3HW: Tensor) -> Tensor:
    """How different pictures of one example are that only the seed tells apart: root mean square over pairs, [N].

    Needs at least two seeds. 0 where all are the same picture.
    """
    if len(pixels_SN3HW) < 2:
        raise ValueError("diversity needs pictures of at least two seeds")
    pixels = pixels_SN3HW.float().clamp(0, 1)
    pairs = [(a - b).square().mean((1, 2, 3)) for a, b in combinations(pixels, 2)]
    return torch.stack(pairs).mean(0).sqrt()


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "brightness": brightness,
    "sharpness": sharpness,
    "saturation": saturation,
    "colour_entropy": colour_entropy,
    "edge_density": edge_density,
    "grid_peaks": grid_peaks,
}
"""Those of single pictures, by name."""


class Statistic(Reward):
    """A statistic as a metric of the evaluation (`use: rewardgen.evaluation.statistics:Statistic`); not differentiable.

    Args:
        of: its name in `STATISTICS`.

    Raises:
        ConfigError: there is no such statistic.
    """

    differentiable: ClassVar[bool] = False

    def __init__(self, of: str) -> None:
        super().__init__()
        if of not in STATISTICS:
            guess = nearest(of, STATISTICS) or f" There are: {', '.join(STATISTICS)}."
            raise ConfigError(f"there is no statistic '{of}'.{guess}")
        self.of = of

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        value_B = STATISTICS[self.of](pixels_B3HW.detach())
        return Score(value_B=value_B, valid_B=torch.ones_like(value_B, dtype=torch.bool))
