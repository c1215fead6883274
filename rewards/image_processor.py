"""A released image processor (`preprocessor_config.json`) as a differentiable function.

B batch, H and W sides of a picture, h and w those that the encoder reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rewardgen.errors import CheckpointError
from rewardgen.rewards.loading import load_pretrained
from rewardgen.rewards.preprocess import CLIP_MEAN, CLIP_STD, Kernel, clamp_straight_through, normalise, resize

_KERNELS: dict[int, Kernel] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of its filters, as the files have them."""
_KNOWN = ("CLIPImageProcessor", "ViTImageProcessor", "BitImageProcessor", "SiglipImageProcessor", "BlipImageProcessor")
"""Processors that resize, cut, rescale and normalise, in this order and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessor:
    """Resize, cut the centre, normalise: the pixel values of the PIL image processors of transformers.

    The value equals theirs for 8-bit pictures (rounding as PIL does; the gradient is that of the unrounded resize).
    Where transformers itself resizes with torchvision it may differ from both by a level, and in tall pictures, some
    of which Pillow 13 resizes in another order than before, by two.

    Args:
        short_side: the short side is resized to so many pixels, the other in proportion; or else
        long_side: so is the long side, and the rest of the square becomes black (HPSv2, not transformers); or else
        size: (height, width) in pixels, whatever the proportions were.
        crop: (height, width) in pixels of the centre that is kept; None keeps all. Not larger than what was resized.
        kernel: filter of the resize.
        mean: subtracted per channel, of values in [0, 1].
        std: divided by per channel.
        round_8bit: round as PIL does to 8-bit pictures.
    """

    short_side: int | None = None
    long_side: int | None = None
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    kernel: Kernel = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    round_8bit: bool = True

    def __call__(self, pixels_B3HW: Tensor) -> Tensor:
        """Pictures in [0, 1] to encoder input [B, 3, h, w] in float32 (float64 stays); clamped straight-through."""
        height, width = self._resized(*pixels_B3HW.shape[-2:])
        pixels = clamp_straight_through(pixels_B3HW)
        pixels = resize(pixels, height, width, kernel=self.kernel, round_8bit=self.round_8bit)
        if self.long_side is not None:
            rest_y, rest_x = self.long_side - height, self.long_side - width
            pixels = F.pad(pixels, (rest_x // 2, rest_x - rest_x // 2, rest_y // 2, rest_y - rest_y // 2))
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        return normalise(pixels, self.mean, self.std)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        if self.long_side is not None:
            scale = self.long_side / max(height, width)
            return round(height * scale), round(width * scale)
        if self.short_side is None:
            return height, width
        short = self.short_side
        return (short, int(short * width / height)) if height < width else (int(short * height / width), short)


def load_image_processor(source: str) -> ImageProcessor:
    """Read `preprocessor_config.json` of a folder or hub repository.

    Raises:
        CheckpointError: there is none, or it says something that is not done here.
    """
    from transformers import AutoImageProcessor

    found = load_pretrained(AutoImageProcessor, source, backend="pil")
    name = type(found).__name__.removesuffix("Pil").removesuffix("Fast")
    if name not in _KNOWN:
        raise CheckpointError(f"{source}: images are prepared by a {name}; known are {', '.join(_KNOWN)}")
    size = _sides(found.size) if found.do_resize else {}
    crop = _sides(found.crop_size) if found.do_center_crop else None
    fixed = ("height" in size and "width" in size) or not size
    if (size and not fixed and set(size) != {"shortest_edge"}) or (crop and not {"height", "width"} <= set(crop)):
        raise CheckpointError(f"{source}: preprocessor_config.json asks for size {size} and crop_size {crop}")
    if not found.do_rescale or abs(found.rescale_factor * 255 - 1) > 1e-6:
        raise CheckpointError(f"{source}: preprocessor_config.json does not scale 8-bit pictures to [0, 1]")
    if size and found.resample not in _KERNELS:
        raise CheckpointError(f"{source}: preprocessor_config.json asks for PIL's filter {found.resample}")
    if crop and not fixed and size["shortest_edge"] < max(crop["height"], crop["width"]):
        raise CheckpointError(f"{source}: preprocessor_config.json cuts {crop} out of {size}")
    return ImageProcessor(
        short_side=None if fixed else size["shortest_edge"],
        size=(size["height"], size["width"]) if size and fixed else None,
        crop=None if crop is None else (crop["height"], crop["width"]),
        kernel=_KERNELS[int(found.resample)] if size else "bicubic",
        mean=tuple(found.image_mean) if found.do_normalize else (0.0, 0.0, 0.0),
        std=tuple(found.image_std) if found.do_normalize else (1.0, 1.0, 1.0),
    )


def _sides(stated: Any) -> dict[str, int]:
    return {key: int(value) for key, value in dict(stated).items() if value is not None}
