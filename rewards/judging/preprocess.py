"""A processor's preprocessing of pictures, written out with a gradient.

Processors on PIL resize an 8-bit picture, cut its centre, and normalise; Qwen-VL's then cut it into patches. The same
is done here in torch: the resize as two products with small matrices, rounding to 8 bits straight-through. Whatever a
processor's settings say, it is the result that counts: a new `Preprocess` is compared with the processor itself on
random pictures, and refused if any value differs by more than one 8-bit level.

Shape suffixes: H and W pixels of a side, S pixels of a side of the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewardgen.errors import ConfigError
from rewardgen.rewards.preprocess import clamp_straight_through, normalise, straight_through

_FRACTION_BITS = 22
"""PIL's 8-bit resize keeps its weights as integers with this many bits after the point."""
_CHECK_SIZES = ((48, 80), (90, 50), (31, 31))
_FILTERS = {
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
    Image.Resampling.LANCZOS: "lanczos",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """What a processor does to a picture.

    Args:
        size: (height, width) of the resized picture, or (short side,), or () for no resize; pixels. With `patches`:
            (fewest, most) pixels of a picture as a whole.
        kernel: `bilinear`, `bicubic` or `lanczos`.
        crop: (height, width) of the part cut from the centre, () for all.
        mean: taken from each channel of pixels in [0, 1];
        std: each channel is divided by it.
        patches: (side of a patch in pixels, patches a side that are merged, repeats in time) of Qwen-VL, or None.
    """

    size: tuple[int, ...]
    kernel: str
    crop: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patches: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, processor: Any, *, name: str) -> Self:
        """Of a transformers image processor on PIL.

        Raises:
            ConfigError: the processor does something else than resize, crop and normalise; names `name`.
        """
        try:
            made = cls._from_settings(processor)
            fault = made.difference(processor)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(_unknown(name, processor, str(error))) from error
        if not fault <= 1.01:
            raise ConfigError(_unknown(name, processor, f"pixel values differ by {fault:.3g} of 255 levels"))
        return made

    @classmethod
    def _from_settings(cls, processor: Any) -> Self:
        if processor.do_pad or not (processor.do_rescale and processor.do_normalize):
            raise ValueError("it pads, or does not normalise")
        patches = None
        if hasattr(processor, "merge_size") and hasattr(processor, "temporal_patch_size"):
            patches = (int(processor.patch_size), int(processor.merge_size), int(processor.temporal_patch_size))
        size: tuple[int, ...] = ()
        if processor.do_resize:
            given = {name: value for name, value in dict(processor.size).items() if value}
            if patches is not None:
                size = (int(given.pop("shortest_edge")), int(given.pop("longest_edge")))
            elif set(given) not in ({"shortest_edge"}, {"height", "width"}):
                raise ValueError(f"it resizes to {given}")
            size = size or tuple(int(given[name]) for name in ("shortest_edge", "height", "width") if name in given)
        crop: tuple[int, ...] = ()
        if processor.do_center_crop:
            crop = (int(processor.crop_size["height"]), int(processor.crop_size["width"]))
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        kernel = _FILTERS[processor.resample]
        return cls(size=size, kernel=kernel, crop=crop, mean=mean, std=std, patches=patches)

    def __call__(self, pixels_3HW: Tensor, *, round_8bit: bool = True) -> Tensor:
        """Pixels in [0, 1] to what the model takes: [3, S, S], or the processor's own height and width, or patches
        [number, values of a patch].

        Args:
            pixels_3HW: floating-point; values outside [0, 1] are clamped straight-through.
            round_8bit: round as the processor does, where the gradient is that of the unrounded picture. Without it
                the function is smooth.
        """
        pixels = pixels_3HW if pixels_3HW.dtype == torch.float64 else pixels_3HW.float()
        # Autocast's bfloat16 is coarser than the 8 bits of a picture.
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = clamp_straight_through(pixels)
            height, width = self._resized(*pixels.shape[-2:])
            rounded = _resize_8bit(pixels.detach(), height, width, self.kernel) if round_8bit else None
            if (height, width) != tuple(pixels.shape[-2:]):
                across = _weights(pixels.shape[-1], width, self.kernel, pixels.dtype, pixels.device)
                down = _weights(pixels.shape[-2], height, self.kernel, pixels.dtype, pixels.device)
                pixels = down @ (pixels @ across.T)
            if rounded is not None:
                pixels = straight_through(rounded.to(pixels.dtype), pixels)
            if self.crop:
                top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
                if top < 0 or left < 0:
                    raise ValueError(f"a picture of {height}x{width} is smaller than the crop {self.crop}")
                pixels = pixels[:, top : top + self.crop[0], left : left + self.crop[1]]
            normalised: Tensor = normalise(pixels, self.mean, self.std)
            return normalised if self.patches is None else _patches(normalised, *self.patches)

    def batch(self, pictures: Sequence[Tensor]) -> Tensor:
        """Several pictures' results as the model takes them together."""
        return torch.stack(list(pictures)) if self.patches is None else torch.cat(list(pictures))

    def difference(self, processor: Any) -> float:
        """Largest difference from the processor on random pictures, in 8-bit levels over std."""
        rng = np.random.default_rng(0)
        worst = 0.0
        for height, width in _CHECK_SIZES:
            levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            # Without structure every resize is grey: a gradient from black to white beside the noise.
            levels[:, : width // 2] = np.linspace(0, 255, height, dtype=np.uint8)[:, None, None]
            given = processor(images=[Image.fromarray(levels)], return_tensors="pt")["pixel_values"]
            ours = self.batch([self(torch.from_numpy(levels).permute(2, 0, 1) / 255)])
            if given.shape != ours.shape:
                return math.inf
            worst = max(worst, float((given - ours).abs().max()) * min(self.std) * 255)
        return worst

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not self.size:
            return height, width
        if self.patches is not None:
            return _in_patches(height, width, self.patches[0] * self.patches[1], *self.size)
        if len(self.size) == 2:
            return self.size[0], self.size[1]
        (short,) = self.size
        long = int(short * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)


def _unknown(name: str, processor: Any, why: str) -> str:
    return (
        f"{name}: what {type(processor).__name__} does to pictures has no gradient here ({why.strip()}); use a model"
        " whose processor resizes, crops and normalises, such as LLaVA, or serve this one and use vlm_judge"
    )


def _in_patches(height: int, width: int, unit: int, fewest: int, most: int) -> tuple[int, int]:
    """The size nearest to a picture's whose sides are multiples of `unit` and whose area is within the bounds."""
    rows, columns = round(height / unit) * unit, round(width / unit) * unit
    if rows * columns > most:
        scale = math.sqrt(height * width / most)
        rows, columns = (max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
    elif rows * columns < fewest:
        scale = math.sqrt(fewest / (height * width))
        rows, columns = (math.ceil(side * scale / unit) * unit for side in (height, width))
    return rows, columns


def _patches(pixels_3HW: Tensor, side: int, merged: int, repeats: int) -> Tensor:
    """A picture as rows of patches; those that the model merges lie next to each other, each repeated in time."""
    channels, height, width = pixels_3HW.shape
    rows, columns = height // side // merged, width // side // merged
    blocks = pixels_3HW.reshape(channels, rows, merged, side, columns, merged, side).permute(1, 4, 2, 5, 0, 3, 6)
    return blocks.unsqueeze(5).expand(-1, -1, -1, -1, -1, repeats, -1, -1).reshape(rows * columns * merged**2, -1)


def _resize_8bit(pixels: Tensor, height: int, width: int, kernel: str) -> Tensor:
    """PIL's resize of the 8-bit picture, exactly: its integer arithmetic in float64, whose 53 bits hold the sums."""
    levels = (pixels.double().clamp(0, 1) * 255).round()
    old_height, old_width = levels.shape[-2:]
    if (height, width) == (old_height, old_width):
        return levels / 255
    across = _weights(old_width, width, kernel, torch.float64, levels.device, whole=True)
    down = _weights(old_height, height, kernel, torch.float64, levels.device, whole=True)
    # Each pass is clamped and rounded, so their order shows.
    if _down_first(old_height, old_width, height, width, kernel):
        return _to_level(_to_level(down @ levels) @ across.T) / 255
    return _to_level(down @ _to_level(levels @ across.T)) / 255


def _to_level(sums: Tensor) -> Tensor:
    return torch.floor(sums / 2.0**_FRACTION_BITS + 0.5).clamp(0, 255)


@lru_cache(maxsize=128)
def _weights(
    length: int, resized: int, kernel: str, dtype: torch.dtype, device: torch.device, *, whole: bool = False
) -> Tensor:
    """PIL's resize of one axis as a matrix [resized, length]; `whole`: as PIL's integers.

    The kernel is stretched if shrinking, and cut at the border. As `rewardgen.rewards.preprocess` does for bicubic.
    """
    function, support = _KERNELS[kernel]
    # A matrix made in inference mode would be useless for gradients later.
    with torch.inference_mode(False), torch.no_grad():
        scale = length / resized
        stretch = max(scale, 1.0)
        centre = (torch.arange(resized, dtype=torch.float64) + 0.5) * scale
        start = (centre - support * stretch + 0.5).long().clamp(min=0)
        stop = (centre + support * stretch + 0.5).long().clamp(max=length)
        index = torch.arange(length)
        # The order of operations is PIL's too: a last bit can turn a tie between two of the 256 levels.
        matrix = function((index - centre[:, None] + 0.5) * (1 / stretch))
        matrix *= (index >= start[:, None]) & (index < stop[:, None])
        matrix *= 1 / matrix.cumsum(1)[:, -1:]
        if whole:
            scaled = matrix * 2.0**_FRACTION_BITS
            matrix = torch.trunc(scaled + torch.copysign(torch.tensor(0.5, dtype=torch.float64), scaled))
        return matrix.to(dtype=dtype, device=device)


@lru_cache(maxsize=1024)
def _down_first(old_height: int, old_width: int, height: int, width: int, kernel: str) -> bool:
    """Whether the installed Pillow resizes the height before the width. It depends on the version and on the sizes."""
    levels = np.random.default_rng(0).integers(0, 2, (old_height, old_width, 1), dtype=np.uint8).repeat(3, 2) * 255
    resample = next(resample for resample, name in _FILTERS.items() if name == kernel)
    resized = np.array(Image.fromarray(levels).resize((width, height), resample))
    expected, pixels = (torch.from_numpy(picture).permute(2, 0, 1).double() for picture in (resized, levels))
    cpu = torch.device("cpu")
    across = _weights(old_width, width, kernel, torch.float64, cpu, whole=True)
    down = _weights(old_height, height, kernel, torch.float64, cpu, whole=True)
    down_last = (_to_level(down @ _to_level(pixels @ across.T)) - expected).abs().sum()
    return bool((_to_level(_to_level(down @ pixels) @ across.T) - expected).abs().sum() < down_last)


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5."""
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


_KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "bilinear": (_bilinear, 1),
    "bicubic": (_bicubic, 2),
    "lanczos": (_lanczos, 3),
}
