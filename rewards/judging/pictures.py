"""Pictures as a service takes them."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor


def to_pil(pixels_3HW: Tensor, max_side: int | None = None) -> Image.Image:
    """An 8-bit picture of pixels in [0, 1] (clamped), made smaller until no side is longer than `max_side` pixels."""
    levels = (pixels_3HW.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
    if max_side is not None and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return picture


def data_url(pixels_3HW: Tensor, max_side: int | None = None) -> str:
    """A picture as the PNG in a `data:` URL. Equal pixels give equal text."""
    buffer = io.BytesIO()
    to_pil(pixels_3HW, max_side).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
