"""Places to look for a face that no detector found: square windows of a picture. Suffixes: W windows, N faces."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCALES = (1.0, 0.5, 0.25)
"""Sides of the windows, as shares of the picture's short side."""


def windows(height: int, width: int) -> Tensor:
    """Corners (x1, y1, x2, y2) of square windows, float64 [W, 4]: each of `SCALES`, half overlapping, edge to edge.

    A square picture has 1 + 9 + 49 of them. Windows under two pixels are left out.
    """
    boxes = []
    for scale in SCALES:
        side = scale * min(height, width)
        if side < 2:
            continue
        x, y = _starts(width, side), _starts(height, side)
        y_W, x_W = (axis.flatten() for axis in torch.meshgrid(y, x, indexing="ij"))
        boxes.append(torch.stack([x_W, y_W, x_W + side - 1, y_W + side - 1], dim=1))
    return torch.cat(boxes) if boxes else torch.zeros(0, 4, dtype=torch.float64)


def untouched(windows_W4: Tensor, boxes_N4: Tensor) -> Tensor:
    """Bool [W]: the windows that share no pixel with any of these boxes, nor one that bilinear sampling would read."""
    windows_W4, boxes_N4 = _whole_pixels(windows_W4), _whole_pixels(boxes_N4.to(windows_W4))
    low_WN2 = torch.maximum(windows_W4[:, None, :2], boxes_N4[None, :, :2])
    high_WN2 = torch.minimum(windows_W4[:, None, 2:], boxes_N4[None, :, 2:])
    return ~(low_WN2 <= high_WN2).all(2).any(1)


def window_transforms(windows_W4: Tensor, size: int) -> Tensor:
    """The matrices [W, 2, 3] that bring each window to a crop of `size` pixels, corner to corner."""
    scale_W2 = (size - 1) / (windows_W4[:, 2:] - windows_W4[:, :2])
    return torch.cat([torch.diag_embed(scale_W2), (-scale_W2 * windows_W4[:, :2])[:, :, None]], dim=2)


def _whole_pixels(boxes_N4: Tensor) -> Tensor:
    return torch.cat([(boxes_N4[:, :2] + 1e-6).floor(), (boxes_N4[:, 2:] - 1e-6).ceil()], dim=1)


def _starts(length: int, side: float) -> Tensor:
    count = math.ceil((length - side) / (side / 2) - 1e-9) + 1
    return torch.linspace(0, length - side, count, dtype=torch.float64)
