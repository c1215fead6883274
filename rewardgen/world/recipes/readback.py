"""Reading a style back from a picture whose content is known: how pictures drawn by a policy get a true label.

The generator knows where background, shapes, outlines and texture must be, so colours and amounts are least-squares
fits over those places. (The style witness does none of this: it compares pixel distributions and spectra.)

N pictures, K shapes, H and W pixels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rewardgen.world.scenes import Content, Style, ink_field, shape_distances


def read_back(pixels_N3HW: Tensor, content: Content, style: Style) -> Style:
    """The style that pictures meant to show `content` in `style` really show.

    Colours, texture amount, outline and grain are measured; kind, period, angle and region of the texture stay as
    asked for (where they are not drawn the measured amount is 0).
    """
    n = pixels_N3HW.shape[0]
    distance_NKHW = shape_distances(content)
    width = style.outline_N.view(n, 1, 1, 1)
    nearest_NHW = distance_NKHW.amin(1)
    ground_NHW = (nearest_NHW > style.outline_N.view(n, 1, 1) + 1.0).float()
    inside_NKHW = (distance_NKHW < -(width + 0.5)).float()
    field_NHW = ink_field(style)
    none_NHW = torch.zeros_like(field_NHW)
    over_ground = torch.where((style.region_N != 1).view(n, 1, 1), field_NHW, none_NHW)
    over_shapes = torch.where((style.region_N != 0).view(n, 1, 1), field_NHW, none_NHW)

    background_N3, slope_N3, rest_N = _fit(pixels_N3HW, over_ground, ground_NHW, style.background_N3)
    amount_N = _share(slope_N3, style.ink_N3 - background_N3)
    fills, shape_amounts = [], []
    for k in range(inside_NKHW.shape[1]):
        fill_N3, slope_N3, _ = _fit(pixels_N3HW, over_shapes, inside_NKHW[:, k], style.fill_NK3[:, k])
        fills.append(fill_N3)
        shape_amounts.append(_share(slope_N3, style.ink_N3 - fill_N3))
    fill_NK3 = torch.stack(fills, 1)
    on_shapes_N = torch.stack(shape_amounts, 1).mean(1)
    amount_N = torch.where(style.region_N == 1, on_shapes_N, amount_N) * (style.amount_N > 0)

    edge_NHW = (distance_NKHW.abs().amin(1) < style.outline_N.view(n, 1, 1)).float()
    edge_N3 = _mean(pixels_N3HW, edge_NHW, style.ink_N3)
    drawn_N = _share(edge_N3 - fill_NK3.mean(1), style.ink_N3 - fill_NK3.mean(1))
    return replace(
        style,
        background_N3=background_N3.clamp(0, 1),
        fill_NK3=_without_absent(fill_NK3.clamp(0, 1), content),
        amount_N=torch.minimum(amount_N, style.amount_N * 1.2),
        outline_N=style.outline_N * drawn_N,
        grain_N=torch.maximum(style.grain_N * 0, rest_N - 0.02),
    )


def _fit(
    pixels_N3HW: Tensor, field_NHW: Tensor, where_NHW: Tensor, otherwise_N3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted least squares pixels = level + slope * field; (level [N, 3], slope [N, 3], residual deviation [N])."""
    weight = where_NHW / where_NHW.sum((1, 2), keepdim=True).clamp(min=1)
    field_mean = (weight * field_NHW).sum((1, 2))
    pixel_mean = (weight[:, None] * pixels_N3HW).sum((2, 3))
    centred = field_NHW - field_mean[:, None, None]
    spread = (weight * centred.square()).sum((1, 2))
    together = (weight[:, None] * centred[:, None] * (pixels_N3HW - pixel_mean[:, :, None, None])).sum((2, 3))
    slope = together / spread.clamp(min=1e-4)[:, None] * (spread > 1e-4)[:, None]
    level = pixel_mean - slope * field_mean[:, None]
    rest = pixels_N3HW - level[:, :, None, None] - slope[:, :, None, None] * field_NHW[:, None]
    deviation = (weight[:, None] * rest.square()).sum((2, 3)).mean(1).sqrt()
    seen = (where_NHW.sum((1, 2)) >= 4)[:, None]
    return torch.where(seen, level, otherwise_N3), torch.where(seen, slope, torch.zeros_like(slope)), deviation


def _share(found_N3: Tensor, full_N3: Tensor) -> Tensor:
    """How much of `full` was found along it, [N] in [0, 1]."""
    return ((found_N3 * full_N3).sum(1) / full_N3.square().sum(1).clamp(min=1e-3)).clamp(0, 1)


def _mean(pixels_N3HW: Tensor, where_NHW: Tensor, otherwise_N3: Tensor) -> Tensor:
    count = where_NHW.sum((1, 2))[:, None]
    mean = (pixels_N3HW * where_NHW[:, None]).sum((2, 3)) / count.clamp(min=1)
    return torch.where(count > 0, mean, otherwise_N3)


def _without_absent(fill_NK3: Tensor, content: Content) -> Tensor:
    """Shapes that are not there take the mean colour of those that are."""
    there = (content.kind_NK >= 0).float().unsqueeze(-1)
    mean = (fill_NK3 * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    return torch.where(there > 0, fill_NK3, mean)
