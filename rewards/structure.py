"""Layout kept: how much of the content reference can be read off the picture, whatever colours it was given.

No weights. In a window the best affine map from the picture's colours to the reference's is found in closed form (the
local linear model of the guided filter, He et al., ECCV 2010), and the reward is the share of the
reference's variance that it explains. A new palette is an affine map and costs nothing; a shape that is gone, moved or
another one cannot be explained.

Shape suffixes: B batch, S side, W windows, P pixels of a window, C = 3 colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardgen.errors import ConfigError
from rewardgen.reward import Reward
from rewardgen.rewards.cache import TensorCache, digest
from rewardgen.rewards.preprocess import clamp_straight_through
from rewardgen.transfer import to_device
from rewardgen.types import Example, Score

FLAT = 1e-5
"""Mean variance of a reference's colours below which there is no layout to compare with."""
CACHED_REFERENCES = 1024
"""References kept as they are compared; 50 kB each at the usual size."""


class StructureReward(Reward):
    """Share of the content reference's variance that the picture's colours explain, in [0, 1]; 1 keeps everything.

    Per window, with the covariances Sxx of the picture's colours, Syy of the reference's and Syx between them,

        explained = tr(Syx (Sxx + noise^2 I)^-1 Sxy),    R^2 = sum_windows explained / sum_windows tr(Syy)

    and the value is the mean of R^2 over grids of 1, 2 and 4 windows a side, half overlapping: the large ones ask
    where the shapes are, the small ones which shapes they are. `noise` keeps a layout that nobody can see from
    counting. Both pictures are first brought to `size` x `size` pixels (the reference is stretched to the picture's
    form) and smoothed by a pixel, which takes away most of the texture.

    With several content references it is their mean; an example without one, or whose reference is of one colour, is
    not valid. Pixels are clamped to [0, 1], straight-through.

    It does not see what an affine map of colours cannot show: a subject's own colours are not asked for, and texture
    that hides an edge costs.

    Args:
        size: side in pixels at which pictures are compared, a multiple of 8; larger sees finer detail and less layout.
        noise: standard deviation of colour (of 1) below which contrast hardly counts.

    Raises:
        ConfigError: an argument is out of its range.
    """

    differentiable: ClassVar[bool] = True

    def __init__(self, size: int = 64, noise: float = 0.03) -> None:
        super().__init__()
        self.check_arguments(size=size, noise=noise)
        self.size, self.noise = size, noise
        self._cache = TensorCache()

    @classmethod
    def check_arguments(cls, *, size: int, noise: float, **_: Any) -> None:
        """Refuse values out of their range. Raises ConfigError."""
        if size < 16 or size % 8:
            raise ConfigError(f"size: {size} is not a multiple of 8 of at least 16")
        if not noise > 0:
            raise ConfigError(f"noise: {noise:g} must be above 0")

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        seen_B3SS = self._at_size(clamp_straight_through(_full_precision(pixels_B3HW)))
        values, valid = [], []
        for index, example in enumerate(examples):
            seen_13SS = seen_B3SS[index : index + 1]
            refs = [self._reference(ref, seen_13SS) for ref in example.content_refs]
            shares = [explained_share(seen_13SS, ref, self.noise) for ref in refs if len(ref)]
            values.append(torch.cat(shares).mean() if shares else 0 * seen_13SS.sum())
            valid.append(bool(shares))
        return Score(value_B=torch.stack(values), valid_B=to_device(torch.tensor(valid), pixels_B3HW.device))

    def _reference(self, ref_3HW: Tensor, like: Tensor) -> Tensor:
        """A reference as it is compared, [1, 3, S, S], or [0, 3, S, S] where it is of one colour; made once."""

        def make() -> Tensor:
            sized = self._at_size(_full_precision(ref_3HW).to(like)[None].detach())
            return sized if float(sized.var((2, 3)).mean()) > FLAT else sized[:0]

        return self._cache.get((digest(ref_3HW), like.dtype, like.device), make, CACHED_REFERENCES)

    def _at_size(self, pixels_B3HW: Tensor) -> Tensor:
        sized = F.interpolate(pixels_B3HW, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        return _smooth(sized)


def explained_share(picture_B3SS: Tensor, reference_B3SS: Tensor, noise: float) -> Tensor:
    """Mean over the three grids of the share of the reference's variance that the picture explains, [B] in [0, 1]."""
    shares = []
    for windows in (1, 2, 4):
        picture_BWCP, reference_BWCP = _windows(picture_B3SS, windows), _windows(reference_B3SS, windows)
        number = picture_BWCP.shape[-1]
        s_xx = picture_BWCP @ picture_BWCP.mT / number
        s_yx = reference_BWCP @ picture_BWCP.mT / number
        noisy = s_xx + noise**2 * torch.eye(s_xx.shape[-1], dtype=s_xx.dtype, device=s_xx.device)
        explained_B = (s_yx * torch.linalg.solve(noisy, s_yx.mT).mT).sum((1, 2, 3))
        shares.append(explained_B / (reference_BWCP.square().sum((1, 2, 3)) / number))
    return torch.stack(shares).mean(0)


def _windows(pixels_B3SS: Tensor, across: int) -> Tensor:
    """Windows [B, W, C, P] of a grid of `across` a side, half overlapping, each less its mean."""
    side = pixels_B3SS.shape[-1] // across
    step = max(side // 2, 1) if across > 1 else side
    windows = pixels_B3SS.unfold(2, side, step).unfold(3, side, step)
    windows_BWCP = windows.permute(0, 2, 3, 1, 4, 5).flatten(4).flatten(1, 2)
    return windows_BWCP - windows_BWCP.mean(-1, keepdim=True)


def _smooth(pixels_B3SS: Tensor) -> Tensor:
    """Blur with a Gaussian of one pixel; borders are repeated."""
    offsets = torch.arange(-3, 4, dtype=pixels_B3SS.dtype, device=pixels_B3SS.device)
    kernel = torch.exp(-offsets.square() / 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7)
    padded = F.pad(pixels_B3SS, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.mT, groups=3)


def _full_precision(pixels: Tensor) -> Tensor:
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32))
