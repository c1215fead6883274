"""The generator: flat pictures whose content, style and therefore truth are known.

*Content* is which shape stands where. *Style* is three colours (background, fill, ink), a texture, an outline and
grain. The two are drawn independently, so "this content in that style" has exactly one right picture.

N pictures, K shapes a picture at most, S pixels a side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
TEXTURES = ("plain", "stripes", "dots", "checks", "waves")
REGIONS = ("background", "shapes", "both")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
MAX_SHAPES = 3
SIDE = 64
VERSION = "1"

Split = Literal["train", "held_out"]
T = TypeVar("T", "Content", "Style")


@dataclass(frozen=True)
class Content:
    """Which shape stands where: `kind_NK` (-1 = none), cell 0..8 in reading order, centre and radius in pixels."""

    kind_NK: Tensor
    cell_NK: Tensor
    centre_NK2: Tensor
    radius_NK: Tensor


@dataclass(frozen=True)
class Style:
    """How a picture looks. Colours are RGB in [0, 1], lengths pixels, angles radians, amounts in [0, 1]."""

    background_N3: Tensor
    fill_NK3: Tensor
    ink_N3: Tensor
    texture_N: Tensor
    region_N: Tensor
    period_N: Tensor
    angle_N: Tensor
    amount_N: Tensor
    outline_N: Tensor
    grain_N: Tensor


def take(items: T, index: Tensor) -> T:
    """Select rows of a batch of contents or styles."""
    return replace(items, **{f.name: getattr(items, f.name)[index] for f in fields(items)})


def concat(parts: list[T]) -> T:
    """Join batches of contents or styles."""
    return replace(parts[0], **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])})


def oklab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1], colours in the last axis -> Oklab (Ottosson 2020): equal distances look equally different."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    to_lms = rgb.new_tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = rgb.new_tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    lms = (linear @ to_lms.T).clamp(min=1e-8) ** (1 / 3)
    return lms @ to_lab.T


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """Hue, saturation, value in [0, 1] in the last axis -> RGB."""
    h, s, v = hsv.unbind(-1)
    offsets = torch.tensor([5.0, 3.0, 1.0])
    k = (offsets + h.unsqueeze(-1) * 6) % 6
    return v.unsqueeze(-1) * (1 - s.unsqueeze(-1) * torch.minimum(k, 4 - k).clamp(0, 1))


def draw_contents(n: int, seed: int, split: Split | None = None) -> Content:
    """`n` contents; a tenth of all arrangements (by hash) belongs to `held_out` and never to `train`."""
    return _drawn(_any_contents, _content_keys, n, seed, split)


def draw_styles(n: int, seed: int, split: Split | None = None) -> Style:
    """`n` styles; a tenth of all (background hue, fill hue, texture) combinations is held out."""
    return _drawn(_any_styles, _style_keys, n, seed, split)


def draw_photo_styles(n: int, seed: int) -> Style:
    """How content references look: muted, untextured, every shape in a colour of its own."""
    rng = torch.Generator().manual_seed(seed)
    plain = _any_styles(n, rng)
    muted = torch.rand(n, 1 + MAX_SHAPES, 3, generator=rng) * torch.tensor([1.0, 0.3, 0.35])
    base = torch.tensor([0.0, 0.0, 0.55]), torch.tensor([0.0, 0.1, 0.15])
    zero = torch.zeros(n)
    return replace(
        plain,
        background_N3=hsv_to_rgb(muted[:, 0] + base[0]),
        fill_NK3=hsv_to_rgb(muted[:, 1:] + base[1]),
        texture_N=zero.long(),
        amount_N=zero,
        outline_N=zero,
        grain_N=zero,
    )


def render(content: Content, style: Style, seed: int = 0) -> Tensor:
    """Pictures [N, 3, 64, 64] in [0, 1], anti-aliased; `seed` draws the grain only."""
    n = content.kind_NK.shape[0]
    distance_NKHW = shape_distances(content)
    texture_N1HW = (ink_field(style) * style.amount_N.view(n, 1, 1)).unsqueeze(1)
    ink_N311 = style.ink_N3.view(n, 3, 1, 1)
    on_background = (style.region_N != 1).float().view(n, 1, 1, 1)
    on_shapes = (style.region_N != 0).float().view(n, 1, 1, 1)

    picture = torch.lerp(style.background_N3.view(n, 3, 1, 1), ink_N311, texture_N1HW * on_background)
    for k in range(MAX_SHAPES):
        inside = (0.5 - distance_NKHW[:, k : k + 1]).clamp(0, 1)
        surface = torch.lerp(style.fill_NK3[:, k].view(n, 3, 1, 1), ink_N311, texture_N1HW * on_shapes)
        width = style.outline_N.view(n, 1, 1, 1)
        edge = (width - distance_NKHW[:, k : k + 1].abs() + 0.5).clamp(0, 1) * (width > 0)
        picture = torch.lerp(picture, surface, inside)
        picture = torch.lerp(picture, ink_N311, edge)
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 1, SIDE // 2, SIDE // 2, generator=rng)
    grain = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return (picture + style.grain_N.view(n, 1, 1, 1) * grain).clamp(0, 1)


def spoil(style: Style, other: Style, seed: int) -> Style:
    """What an imperfect styliser makes of a style: a wrong palette, a smeared texture, a lost outline."""
    rng = torch.Generator().manual_seed(seed)
    n = style.texture_N.shape[0]
    wrong = (torch.rand(n, generator=rng) < 0.4).float() * (0.35 + 0.5 * torch.rand(n, generator=rng))
    smear = torch.where(torch.rand(n, generator=rng) < 0.35, 0.1 + 0.3 * torch.rand(n, generator=rng), torch.ones(n))
    keep_outline = (torch.rand(n, generator=rng) > 0.25).float()
    return replace(
        style,
        background_N3=torch.lerp(style.background_N3, other.background_N3, wrong.view(n, 1)),
        fill_NK3=torch.lerp(style.fill_NK3, other.fill_NK3, wrong.view(n, 1, 1)),
        ink_N3=torch.lerp(style.ink_N3, other.ink_N3, wrong.view(n, 1)),
        amount_N=style.amount_N * smear,
        outline_N=style.outline_N * keep_outline,
    )


def describe(content: Content) -> list[str]:
    """What stands where, in words: 'a circle top left and a ring middle right'."""
    prompts = []
    for kinds, cells in zip(content.kind_NK.tolist(), content.cell_NK.tolist(), strict=True):
        seen = sorted((cell, kind) for kind, cell in zip(kinds, cells, strict=True) if kind >= 0)
        prompts.append(" and ".join(f"a {SHAPES[kind]} {ROWS[cell // 3]} {COLUMNS[cell % 3]}" for cell, kind in seen))
    return prompts


def content_grid(content: Content) -> Tensor:
    """The truth about content: shape index per cell [N, 9], 0 = empty, 1 + kind otherwise."""
    grid = torch.zeros(content.kind_NK.shape[0], 9, dtype=torch.long)
    present = content.kind_NK >= 0
    rows = torch.arange(grid.shape[0]).unsqueeze(1).expand_as(present)
    grid[rows[present], content.cell_NK[present]] = content.kind_NK[present] + 1
    return grid


def _any_contents(n: int, rng: torch.Generator) -> Content:
    kind = torch.randint(len(SHAPES), (n, MAX_SHAPES), generator=rng)
    cell = torch.rand(n, 9, generator=rng).argsort(1)[:, :MAX_SHAPES].sort(1).values
    two = torch.rand(n, generator=rng) < 0.4
    kind[two, 2] = -1
    pitch = SIDE / 3
    jitter = (torch.rand(n, MAX_SHAPES, 2, generator=rng) - 0.5) * 3
    centre = torch.stack([cell % 3, cell // 3], -1) * pitch + pitch / 2 + jitter
    radius = 7.0 + 2.0 * torch.rand(n, MAX_SHAPES, generator=rng)
    return Content(kind, cell, centre, radius)


def _any_styles(n: int, rng: torch.Generator) -> Style:
    tries = 12
    hsv = torch.rand(n, tries, 3, 3, generator=rng)
    hsv = hsv * torch.tensor([1.0, 0.85, 0.75]) + torch.tensor([0.0, 0.15, 0.25])
    hsv[:, :, 2, 2] *= 0.6  # ink is darker than fill and background
    colours = hsv_to_rgb(hsv)
    lab = oklab(colours)
    apart = torch.stack([(lab[:, :, a] - lab[:, :, b]).norm(dim=-1) for a, b in ((0, 1), (0, 2), (1, 2))], -1).amin(-1)
    first_good = (apart > 0.22).float().argmax(1)  # the first palette whose three colours can be told apart
    palette = colours[torch.arange(n), first_good]
    texture = torch.randint(len(TEXTURES), (n,), generator=rng)
    amount = (0.4 + 0.6 * torch.rand(n, generator=rng)) * (texture > 0)
    outline = torch.tensor([0.0, 0.75, 1.5])[torch.randint(3, (n,), generator=rng)]
    grain = 0.05 * torch.rand(n, generator=rng) * (torch.rand(n, generator=rng) < 0.3)
    return Style(
        background_N3=palette[:, 0],
        fill_NK3=palette[:, 1:2].repeat(1, MAX_SHAPES, 1),
        ink_N3=palette[:, 2],
        texture_N=texture,
        region_N=torch.randint(len(REGIONS), (n,), generator=rng),
        period_N=7.0 + 7.0 * torch.rand(n, generator=rng),
        angle_N=torch.pi * torch.rand(n, generator=rng),
        amount_N=amount,
        outline_N=outline,
        grain_N=grain,
    )


def shape_distances(content: Content) -> Tensor:
    """Signed distance in pixels to each shape, [N, K, S, S]; positive outside, large where there is no shape."""
    n, k = content.kind_NK.shape
    x, y = _pixel_centres()
    radius = content.radius_NK.view(n, k, 1, 1)
    dx = x - content.centre_NK2[..., 0].view(n, k, 1, 1)
    dy = y - content.centre_NK2[..., 1].view(n, k, 1, 1)
    ax, ay = dx.abs(), dy.abs()
    length = (dx * dx + dy * dy).sqrt()
    square = torch.maximum(ax, ay) - 0.88 * radius
    arm = 0.36 * radius
    shapes = torch.stack(
        [
            length - radius,
            square,
            torch.maximum(0.894 * ax + 0.447 * dy, -dy) - 0.5 * radius,
            (ax + ay) * 0.7071 - 0.75 * radius,
            torch.minimum(torch.maximum(ax - arm, ay - radius), torch.maximum(ay - arm, ax - radius)),
            (length - 0.75 * radius).abs() - 0.25 * radius,
        ]
    )
    chosen = shapes.gather(0, content.kind_NK.clamp(min=0).view(1, n, k, 1, 1).expand(1, n, k, SIDE, SIDE))[0]
    return torch.where((content.kind_NK < 0).view(n, k, 1, 1), torch.full_like(chosen, 1e3), chosen)


def ink_field(style: Style) -> Tensor:
    """How much ink the texture puts on each pixel at full amount, [N, S, S] in [0, 1], edges about a pixel soft."""
    n = style.texture_N.shape[0]
    x, y = _pixel_centres()
    c, s = style.angle_N.cos().view(n, 1, 1), style.angle_N.sin().view(n, 1, 1)
    omega = (2 * torch.pi / style.period_N).view(n, 1, 1)
    u, v = (c * x + s * y) * omega, (-s * x + c * y) * omega
    waves = {
        "plain": torch.full_like(u, -1.0),
        "stripes": u.cos(),
        "dots": u.cos() + v.cos() - 0.6,
        "checks": u.cos() * v.cos(),
        "waves": (u + 1.2 * (v * 0.5).sin()).cos(),
    }
    field = torch.stack([waves[name] for name in TEXTURES]).gather(
        0, style.texture_N.view(1, n, 1, 1).expand(1, n, SIDE, SIDE)
    )[0]
    soft = torch.sigmoid(field * 2.0 / omega)
    return torch.where((style.texture_N == 0).view(n, 1, 1), torch.zeros_like(soft), soft)


def _pixel_centres() -> tuple[Tensor, Tensor]:
    axis = torch.arange(SIDE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _content_keys(content: Content) -> list[str]:
    return ["".join(map(str, row)) for row in content_grid(content).tolist()]


def _style_keys(style: Style) -> list[str]:
    def hue(rgb: Tensor) -> Tensor:
        lab = oklab(rgb)
        return ((torch.atan2(lab[:, 2], lab[:, 1]) / (2 * torch.pi) % 1) * 6).long()

    rows = torch.stack([hue(style.background_N3), hue(style.fill_NK3[:, 0]), style.texture_N], 1)
    return ["-".join(map(str, row)) for row in rows.tolist()]


def _drawn(
    draw: Callable[[int, torch.Generator], T], keys: Callable[[T], list[str]], n: int, seed: int, split: Split | None
) -> T:
    rng = torch.Generator().manual_seed(seed)
    if split is None:
        return draw(n, rng)
    kept: list[T] = []
    have = 0
    while have < n:
        batch = draw(2 * n if split == "train" else 16 * n, rng)
        held = torch.tensor([hashlib.blake2b(key.encode(), digest_size=1).digest()[0] < 26 for key in keys(batch)])
        index = (held if split == "held_out" else ~held).nonzero().squeeze(1)
        kept.append(take(batch, index))
        have += len(index)
    return take(concat(kept), torch.arange(n))
