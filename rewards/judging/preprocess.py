"""A processor's preprocessing of pictures, written out with a gradient.

Processors on PIL resize an 8-bit picture, cut its centre, and normalise; Qwen-VL's then cut it into patches, and
Idefics3's and SmolVLM's resize it twice. Those that make several tiles of a picture are told to make one (`one_tile`).
The same is done here in torch, rounding to 8 bits straight-through. Whatever a processor's settings say, it is the
result that counts: a new `Preprocess` is compared with the processor itself on random pictures, and refused if any
value differs by more than one 8-bit level.

Shape suffixes: H and W pixels of a side, S pixels of a side of the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewardgen.errors import ConfigError
from rewardgen.rewards.preprocess import Kernel, clamp_straight_through, normalise, resize

_CHECK_SIZES = ((48, 80), (90, 50), (31, 31))
_TILES = ("crop_to_patches", "do_image_splitting")
"""What the image processors of InternVL, and of Idefics3 and SmolVLM, call the cutting of pictures into tiles."""
_LARGEST = 4096
"""Longest side in pixels of which Idefics3's processor takes account."""
_FILTERS: dict[Image.Resampling, Kernel] = {
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
        long_side: the longer side is resized to it before all else, the other one in proportion; pixels. None where
            there is only one resize.
        nested: several pictures are given to the model as [1, number, 3, S, S].
    """

    size: tuple[int, ...]
    kernel: Kernel
    crop: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patches: tuple[int, int, int] | None = None
    long_side: int | None = None
    nested: bool = False

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
    def of_settings(cls, processor: Any, *, name: str) -> Self:
        """As `of`, but taking the processor's settings at their word: nothing is computed."""
        try:
            return cls._from_settings(processor)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(_unknown(name, processor, str(error))) from error

    @classmethod
    def _from_settings(cls, processor: Any) -> Self:
        if getattr(processor, "crop_to_patches", False) or getattr(processor, "do_image_splitting", False):
            raise ValueError("it cuts pictures into tiles")
        if hasattr(processor, "do_image_splitting"):
            return cls._of_idefics3(processor)
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

    @classmethod
    def _of_idefics3(cls, processor: Any) -> Self:
        """Of Idefics3 and SmolVLM without splitting: the longer side to `size`, then all to a square, which they pad by
        nothing."""
        if not (processor.do_rescale and processor.do_normalize):
            raise ValueError("it does not normalise")
        given = {name: value for name, value in dict(processor.size).items() if value}
        if processor.do_resize and (set(given) != {"longest_edge"} or given["longest_edge"] > _LARGEST):
            raise ValueError(f"it resizes to {given}")
        side = int(dict(processor.max_image_size)["longest_edge"])
        return cls(
            size=(side, side),
            kernel=_FILTERS[processor.resample],
            crop=(),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            long_side=int(given["longest_edge"]) if processor.do_resize else None,
            nested=True,
        )

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
            if self.long_side is not None:
                height, width = _by_long_side(pixels.shape[-2], pixels.shape[-1], self.long_side)
                pixels = self._resize(pixels, height, width, round_8bit)
            height, width = self.resized(*pixels.shape[-2:])
            pixels = self._resize(pixels, height, width, round_8bit)
            if self.crop:
                top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
                if top < 0 or left < 0:
                    raise ValueError(f"a picture of {height}x{width} is smaller than the crop {self.crop}")
                pixels = pixels[:, top : top + self.crop[0], left : left + self.crop[1]]
            normalised: Tensor = normalise(pixels, self.mean, self.std)
            return normalised if self.patches is None else _patches(normalised, *self.patches)

    def batch(self, pictures: Sequence[Tensor]) -> Tensor:
        """Several pictures' results as the model takes them together."""
        stacked = torch.stack(list(pictures)) if self.patches is None else torch.cat(list(pictures))
        return stacked[None] if self.nested else stacked

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

    def _resize(self, pixels_3HW: Tensor, height: int, width: int, round_8bit: bool) -> Tensor:
        first = round_8bit and _height_first(*pixels_3HW.shape[-2:], height, width, self.kernel)
        resized: Tensor = resize(
            pixels_3HW[None], height, width, kernel=self.kernel, round_8bit=round_8bit, height_first=first
        )[0]
        return resized

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that a picture is resized to."""
        if not self.size:
            return height, width
        if self.patches is not None:
            return _in_patches(height, width, self.patches[0] * self.patches[1], *self.size)
        if len(self.size) == 2:
            return self.size[0], self.size[1]
        (short,) = self.size
        long = int(short * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)


def one_tile(processor: Any, *, name: str) -> None:
    """Tell the processor of InternVL, Idefics3 or SmolVLM to take pictures whole instead of cutting them into tiles.

    How many tiles there are depends on a picture's shape, and each costs as much as a whole picture. InternVL sees
    single tiles of small square pictures and SmolVLM of video frames; for Idefics3 they are an option of its processor.
    Other processors are left as they are.

    Raises:
        ConfigError: it goes on cutting; names `name`.
    """
    images = processor.image_processor
    for switch in _TILES:
        if not isinstance(getattr(images, switch, None), bool):
            continue
        setattr(images, switch, False)
        # What a processor asks for in its calls comes before what the part that it asks is set to.
        processor.images_kwargs = {**getattr(processor, "images_kwargs", {}), switch: False}
        wide = Image.new("RGB", (320, 80))
        seen = processor(images=[wide], text=[processor.image_token], return_tensors="pt")["pixel_values"]
        if seen.flatten(0, -4).shape[0] != 1:
            raise ConfigError(_unknown(name, processor, f"it cuts pictures into tiles whatever {switch} says"))


def _unknown(name: str, processor: Any, why: str) -> str:
    return (
        f"{name}: what {type(processor).__name__} does to pictures has no gradient here ({why.strip()}); use a model"
        " whose processor resizes, crops and normalises, such as LLaVA, or serve this one and use vlm_judge"
    )


def _by_long_side(height: int, width: int, long: int) -> tuple[int, int]:
    """The size whose longer side is `long`; the other one is in proportion, and even."""
    ratio = width / height
    if width >= height:
        return max(1, (short := int(long / ratio)) + short % 2), long
    return long, max(1, (short := int(long * ratio)) + short % 2)


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


@lru_cache(maxsize=1024)
def _height_first(old_height: int, old_width: int, height: int, width: int, kernel: Kernel) -> bool:
    """Whether the installed Pillow resizes the height before the width. It depends on the version and on the sizes."""
    levels = np.random.default_rng(0).integers(0, 2, (old_height, old_width, 1), dtype=np.uint8).repeat(3, 2) * 255
    resample = next(resample for resample, name in _FILTERS.items() if name == kernel)
    resized = np.array(Image.fromarray(levels).resize((width, height), resample))
    expected, given = (torch.from_numpy(picture).permute(2, 0, 1).double() / 255 for picture in (resized, levels))

    def fault(height_first: bool) -> float:
        drawn = resize(given[None], height, width, kernel=kernel, round_8bit=True, height_first=height_first)
        return float((drawn[0] - expected).abs().sum())

    return fault(height_first=True) < fault(height_first=False)
