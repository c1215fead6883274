"""From pictures and latents to tokens: 2x2 packing, position ids, and the preprocessing of references.

Shape suffixes: B batch, C latent channels, H and W latent rows and columns, L tokens, P packed channels (4C).
A grid is (rows, columns) counted in tokens, an image size (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewardgen.errors import ConfigError

Grid = tuple[int, int]
PositionEncoding = Literal["d", "h", "w", "o"]
"""How references are set apart from the target: along both axes ("d"), rows only, columns only, or not at all."""

PATCH = 2


def pack(latents_BCHW: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4C]: 2x2 patches row by row, features ordered channel, row, column."""
    batch, channels, height, width = latents_BCHW.shape
    patches = latents_BCHW.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens_BLP: Tensor, grid: Grid) -> Tensor:
    """The inverse of `pack` for a token grid of (rows, columns)."""
    batch, _, packed = tokens_BLP.shape
    rows, columns = grid
    patches = tokens_BLP.reshape(batch, rows, columns, packed // (PATCH * PATCH), PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * PATCH, columns * PATCH)


def grid_ids(grid: Grid, offset: Grid = (0, 0)) -> Tensor:
    """Position ids [rows * columns, 3], float32: (0, row + offset, column + offset), row by row."""
    rows, columns = grid
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = (torch.arange(rows) + offset[0])[:, None]
    ids[..., 2] = (torch.arange(columns) + offset[1])[None, :]
    return ids.reshape(-1, 3)


def image_ids(target: Grid, references: Sequence[Grid], pe: PositionEncoding = "d") -> list[Tensor]:
    """Position ids of the target, then of each reference (UNO, section 3.3).

    The references go down a staircase: the first starts where the target ends, each one after it where its
    predecessor ends, along the axes that `pe` names.
    """
    ids = [grid_ids(target)]
    row, column = target
    for reference in references:
        ids.append(grid_ids(reference, (row if pe in "dh" else 0, column if pe in "dw" else 0)))
        row, column = row + reference[0], column + reference[1]
    return ids


def preprocess_reference(image: Image.Image, long_side: int, multiple: int) -> Image.Image:
    """Resize a content reference to a long side (LANCZOS), then crop its centre to multiples of `multiple`.

    A picture of exactly `multiple` x `multiple` is returned as it is (USO release, which uses it as "nothing here").

    Raises:
        ConfigError: the picture is so thin that nothing is left after the crop.
    """
    width, height = image.size
    if width == height == multiple:
        return image
    # The order of the operations matters: it decides which way the short side is truncated.
    if width >= height:
        new_width, new_height = long_side, int((long_side / width) * height)
    else:
        new_width, new_height = int((long_side / height) * width), long_side
    crop_width, crop_height = new_width // multiple * multiple, new_height // multiple * multiple
    if min(crop_width, crop_height) == 0:
        raise ConfigError(
            f"a content reference of {width}x{height} pixels is too thin: at a long side of {long_side} "
            f"its short side falls below {multiple}"
        )
    resized = image.resize((new_width, new_height), resample=Image.Resampling.LANCZOS)
    left, top = (new_width - crop_width) // 2, (new_height - crop_height) // 2
    return resized.crop((left, top, left + crop_width, top + crop_height)).convert("RGB")


def to_pil(image_3HW: Tensor) -> Image.Image:
    """A picture [3, H, W] in [0, 1] as 8-bit RGB."""
    array = (image_3HW.detach().clamp(0, 1) * 255).round().to(device="cpu", dtype=torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def to_signed(image: Image.Image) -> Tensor:
    """8-bit RGB as float32 [1, 3, H, W] in [-1, 1], the range of the autoencoder and of SigLIP."""
    array = torch.from_numpy(np.array(image.convert("RGB")))
    return array.permute(2, 0, 1)[None].float() / 127.5 - 1
