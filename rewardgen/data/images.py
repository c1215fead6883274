"""Pictures from files: whatever the camera or the editor made of them, one kind of tensor comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rewardgen.errors import UserError

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: a small file can claim a size that fills the memory."""

_SIXTEEN_BIT = {"I", "I;16", "I;16L", "I;16B", "I;16N"}


class ImageError(UserError):
    """A picture that cannot be read."""


def load_image(path: Path) -> Tensor:
    """Read a picture as float32 [3, H, W] in RGB and [0, 1].

    The camera's rotation is applied, transparency is put on white, 16 bits keep their precision, of an animation the
    first frame is taken; greyscale, palette and CMYK pictures become RGB.

    Raises:
        ImageError: the file is missing, truncated, no picture, or larger than `MAX_PIXELS`; names the path.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"{path}: {width} x {height} pixels is more than the limit of {MAX_PIXELS:,}")
            picture.seek(0)
            return _to_tensor(ImageOps.exif_transpose(picture))
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such picture") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not a picture, or of a kind that cannot be read") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: more pixels than the limit of {MAX_PIXELS:,}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow raises SyntaxError and ValueError for damaged files too.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"{path}: the picture cannot be read: {reason[:1].lower() + reason[1:]}") from None


def _to_tensor(picture: Image.Image) -> Tensor:
    if picture.mode in _SIXTEEN_BIT:
        values = np.asarray(picture).astype(np.float32) / 65535
        return torch.from_numpy(values.clip(0, 1)).expand(3, -1, -1).contiguous()
    if picture.mode == "F":
        # Floating-point greyscale carries no range of its own; [0, 1] is the convention.
        return torch.from_numpy(np.array(picture, dtype=np.float32).clip(0, 1)).expand(3, -1, -1).contiguous()
    if picture.has_transparency_data:
        values = np.asarray(picture.convert("RGBA")).astype(np.float32) / 255
        alpha = values[..., 3:]
        flat = values[..., :3] * alpha + (1 - alpha)
    else:
        flat = np.asarray(picture.convert("RGB")).astype(np.float32) / 255
    return torch.from_numpy(flat).permute(2, 0, 1).contiguous()
