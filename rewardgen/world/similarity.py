"""How alike two styles are, from the generator's own parameters: the truth the tiny CSD is taught.

It uses parameters only, never pixels, so that the style witness (pixels only) stays independent of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewardgen.world.scenes import Style, oklab

PALETTE_SCALE = 0.12
"""Oklab distance at which palettes count as alike by 1/e."""


def style_similarity(a: Style, b: Style) -> Tensor:
    """Similarity in [0, 1] of every style of `a` with every one of `b`, [M, N]; 1 for equal styles.

    0.55 palette + 0.30 texture + 0.10 outline + 0.05 grain. Two unrelated styles come to about 0.2.
    """
    outline = 1 - _gap(a.outline_N, b.outline_N) / 1.5
    grain = (1 - _gap(a.grain_N, b.grain_N) / 0.05).clamp(min=0)
    return 0.55 * _palette(a, b) + 0.30 * _texture(a, b) + 0.10 * outline + 0.05 * grain


def _palette(a: Style, b: Style) -> Tensor:
    """exp(-mean colour distance / scale); ink counts only where both pictures show it."""
    ground = torch.cdist(oklab(a.background_N3), oklab(b.background_N3))
    fill = torch.cdist(oklab(a.fill_NK3).flatten(1), oklab(b.fill_NK3).flatten(1)) / a.fill_NK3.shape[1] ** 0.5
    ink = torch.cdist(oklab(a.ink_N3), oklab(b.ink_N3))
    shown = 0.2 * torch.outer(_shows_ink(a), _shows_ink(b))
    return torch.exp(-(0.45 * ground + 0.35 * fill + shown * ink) / (0.8 + shown) / PALETTE_SCALE)


def _texture(a: Style, b: Style) -> Tensor:
    """1 where both are plain or the same; falls with amount, period, direction, region and kind."""
    same_kind = (a.texture_N[:, None] == b.texture_N[None]) & (a.texture_N[:, None] > 0)
    turn = torch.where((a.texture_N == 2) | (a.texture_N == 3), torch.pi / 2, torch.pi)[:, None]
    angle = _gap(a.angle_N, b.angle_N) % turn
    angle = torch.minimum(angle, turn - angle) / (turn / 2)
    period = _gap(a.period_N.log(), b.period_N.log()) / 0.69
    region = (a.region_N[:, None] != b.region_N[None]).float()
    alike = (1 - _gap(a.amount_N, b.amount_N) - 0.3 * period - 0.3 * angle - 0.3 * region).clamp(min=0)
    unlike = (1 - a.amount_N[:, None] - b.amount_N[None]).clamp(min=0)
    return torch.where(same_kind, torch.maximum(alike, unlike), unlike)


def _shows_ink(style: Style) -> Tensor:
    return ((style.amount_N > 0) | (style.outline_N > 0)).float()


def _gap(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b[None]).abs()
