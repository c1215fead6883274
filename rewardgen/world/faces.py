"""The identity half of the generator: portraits and group pictures of drawn people, with every landmark known.

Faces are painted from signed distances, anti-aliased, each in a small window that is then laid on the picture.
Coordinates are pixels with centres at whole numbers, as for `rewards.faces`.

N pictures, K people of a picture at most, M faces, P pixels of a window's side, S of a picture's;
52 = left eye, right eye, nose, left and right corner of the mouth as the viewer sees them; 4 = (x1, y1, x2, y2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewardgen.world.people import BEARDS, HAIR, Looks, People, draw_looks, take
from rewardgen.world.scenes import hsv_to_rgb

VERSION = "1"
SIDE, PORTRAIT = 96, 40
"""Pixels of a side of group pictures and of portraits."""
PLACES = tuple(f"{row} {column}" for row in ("top", "bottom") for column in ("left", "centre", "right"))
MAX_PEOPLE = len(PLACES)
BACKGROUNDS = {
    "white": (0.9, 0.9, 0.88), "grey": (0.5, 0.5, 0.5), "yellow": (0.85, 0.78, 0.35), "green": (0.35, 0.6, 0.35),
    "teal": (0.2, 0.55, 0.55), "blue": (0.3, 0.4, 0.75), "purple": (0.5, 0.3, 0.6), "red": (0.7, 0.25, 0.25),
}  # fmt: skip
_REACH = 1.5
"""Half a window, in half heights of a face: hair, neck and shoulders."""


@dataclass(frozen=True)
class Faces:
    """What is known about drawn faces: whose (`who`, -1 = nobody), where (`place` in `PLACES`), landmarks, boxes."""

    who_NK: Tensor
    place_NK: Tensor
    landmarks_NK52: Tensor
    boxes_NK4: Tensor


def portraits(people: People, seed: int, side: int = PORTRAIT) -> tuple[Tensor, Tensor, Tensor]:
    """A picture [M, 3, side, side] in [0, 1] of each person alone, its box [M, 4] and landmarks [M, 5, 2]."""
    n, rng = len(people), torch.Generator().manual_seed(seed)
    picture, _ = backgrounds(n, seed + 1, side)
    jitter = (torch.rand(n, 2, generator=rng) - 0.5) * 0.06 * side
    centre_M2 = jitter + torch.tensor([0.5, 0.48]) * (side - 1)
    scale_M = side * (0.32 + 0.03 * torch.rand(n, generator=rng))
    landmarks_M52, boxes_M4 = lay(picture, torch.arange(n), people, draw_looks(n, seed + 2), centre_M2, scale_M)
    return picture, boxes_M4, landmarks_M52


def draw_groups(people: People, who_NK: Tensor, seed: int) -> tuple[Tensor, Faces, list[str]]:
    """Group pictures [N, 3, 96, 96] in [0, 1]: the people of each row, each at a place of their own drawn by chance.

    Args:
        who_NK: rows of `people`, -1 for nobody; at most six in a picture.

    Returns:
        The pictures, what is known about their faces, and prompts that say which places are taken and the
        background's colour, but not who stands where.
    """
    n, most = who_NK.shape
    rng = torch.Generator().manual_seed(seed)
    picture, colours = backgrounds(n, seed + 1, SIDE)
    place_NK = torch.rand(n, MAX_PEOPLE, generator=rng).argsort(1)[:, :most]
    jitter_NK2 = (torch.rand(n, most, 2, generator=rng) - 0.5) * torch.tensor([3.0, 5.0])
    scale_NK = 12.6 + 1.6 * torch.rand(n, most, generator=rng)
    cell = torch.tensor([SIDE / 3, SIDE / 2])
    corner_NK2 = torch.stack([place_NK % 3, place_NK // 3], -1) * cell
    centre_NK2 = corner_NK2 + cell * torch.tensor([0.5, 0.46]) - 0.5 + jitter_NK2
    landmarks_NK52, boxes_NK4 = torch.zeros(n, most, 5, 2), torch.zeros(n, most, 4)
    looks = draw_looks(n * most, seed + 2)
    # The upper row first: shoulders end where the heads below begin.
    for place in range(MAX_PEOPLE):
        rows, k = ((place_NK == place) & (who_NK >= 0)).nonzero(as_tuple=True)
        if len(rows):
            faces = take(people, who_NK[rows, k]), take(looks, rows * most + k)
            found = lay(picture, rows, *faces, centre_NK2[rows, k], scale_NK[rows, k])
            landmarks_NK52[rows, k], boxes_NK4[rows, k] = found
    known = Faces(who_NK, place_NK.masked_fill(who_NK < 0, -1), landmarks_NK52, boxes_NK4)
    return picture, known, describe(known.place_NK, colours)


def describe(place_NK: Tensor, colours: list[str]) -> list[str]:
    """'top left and bottom centre on a blue background'"""
    taken = [sorted(place for place in row if place >= 0) for row in place_NK.tolist()]
    return [
        f"{' and '.join(PLACES[place] for place in row)} on a {colour} background"
        for row, colour in zip(taken, colours, strict=True)
    ]


def backgrounds(n: int, seed: int, side: int) -> tuple[Tensor, list[str]]:
    """Pictures [n, 3, side, side] without people, and the names of their colours: a gradient and a few faint discs."""
    rng = torch.Generator().manual_seed(seed)
    which = torch.randint(len(BACKGROUNDS), (n,), generator=rng)
    base_N3 = torch.tensor(list(BACKGROUNDS.values()))[which] + 0.05 * (torch.rand(n, 3, generator=rng) - 0.5)
    y, x = torch.meshgrid(*(2 * [torch.linspace(-1, 1, side)]), indexing="ij")
    slope = 0.12 * (torch.rand(n, 2, 1, 1, 1, generator=rng) - 0.5)
    picture = base_N3[:, :, None, None] * (1 + slope[:, 0] * x + slope[:, 1] * y)
    for _ in range(3):
        middle, radius = 2 * torch.rand(n, 2, 1, 1, generator=rng) - 1, 0.1 + 0.3 * torch.rand(n, 1, 1, generator=rng)
        disc = ((radius - ((x - middle[:, 0]) ** 2 + (y - middle[:, 1]) ** 2).sqrt()) * side / 2 + 0.5).clamp(0, 1)
        hue = hsv_to_rgb(
            torch.rand(n, 3, generator=rng) * torch.tensor([1.0, 0.6, 0.6]) + torch.tensor([0.0, 0.0, 0.3])
        )
        picture = torch.lerp(picture, hue[:, :, None, None], 0.35 * disc[:, None])
    return picture.clamp(0, 1), [list(BACKGROUNDS)[i] for i in which.tolist()]


def lay(
    picture: Tensor, rows_M: Tensor, people: People, looks: Looks, centre_M2: Tensor, scale_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Lay faces on pictures, in place, at most one on each; returns landmarks [M, 5, 2] and boxes [M, 4].

    Args:
        picture: [N, 3, S, S].
        rows_M: the picture of each face, none twice.
        centre_M2: middle of the face in pixels.
        scale_M: half its height in pixels.
    """
    side, half = picture.shape[-1], int(torch.ceil(_REACH * scale_M.max())) + 1
    corner_M2 = centre_M2.round().long() - half
    steps_P = torch.arange(2 * half + 1)
    x_MP, y_MP = corner_M2[:, :1] + steps_P, corner_M2[:, 1:] + steps_P
    paint, landmarks_M52, boxes_M4 = _Painter(people, looks, centre_M2, scale_M, x_MP, y_MP).paint()
    inside_MPP = ((y_MP >= 0) & (y_MP < side))[:, :, None] & ((x_MP >= 0) & (x_MP < side))[:, None]
    m, i, j = inside_MPP.nonzero(as_tuple=True)
    at = rows_M[m], slice(None), y_MP[m, i], x_MP[m, j]
    colour_M4PP = paint[m, :, i, j]
    picture[at] = (picture[at] * (1 - colour_M4PP[:, 3:]) + colour_M4PP[:, :3]).clamp(0, 1)
    return landmarks_M52, boxes_M4


class _Painter:
    """Paints M faces, each in its window [P, P]. (u, v) are face coordinates: x right, y down, chin at v = 1."""

    def __init__(
        self, people: People, looks: Looks, centre_M2: Tensor, scale_M: Tensor, x_MP: Tensor, y_MP: Tensor
    ) -> None:
        self.people, self.looks = people, looks
        self.centre_M2, self.scale = centre_M2, scale_M[:, None, None]
        self.cos, self.sin = looks("roll").cos(), looks("roll").sin()
        x = (x_MP[:, None, :] - centre_M2[:, :1, None]) / self.scale
        y = (y_MP[:, :, None] - centre_M2[:, 1:, None]) / self.scale
        self.u, self.v = self.cos * x + self.sin * y, self.cos * y - self.sin * x
        light = 1 + looks("light") * (self.u * looks("light_angle").cos() + self.v * looks("light_angle").sin())
        tint = torch.cat([1 + looks("warmth"), torch.ones_like(looks("warmth")), 1 - looks("warmth")], 1)
        self.light_M3PP = (looks("gain") * light)[:, None] * tint[..., None].reshape(-1, 3, 1, 1)
        self.paint_M4PP = torch.zeros(len(people), 4, *self.u.shape[1:])

    def paint(self) -> tuple[Tensor, Tensor, Tensor]:
        """Premultiplied colours and coverage [M, 4, P, P], landmarks [M, 5, 2], boxes [M, 4]."""
        people, width = self.people, self.people.shape("width")
        head = self._head(width, 1.0)
        self._hair_behind(width)
        self._cover(people.skin_M3 * 0.85, self._box(0, 1.0, 0.33 * width / 0.77, 0.45))
        self._cover(self.looks.clothes_M3, self._ellipse(0, 1.85, 1.15, 0.75))
        for side in (-1, 1):
            self._cover(people.skin_M3 * 0.9, self._ellipse(side * width, 0.02, 0.12, 0.2))
        self._cover(people.skin_M3, head)
        mouth = self._place(0, people.shape("mouth_y"), 0.75)
        self._beard(head, mouth)
        eyes = [self._eye(side) for side in (-1, 1)]
        nose = self._nose()
        corners = self._mouth(mouth)
        self._hair_in_front(width)
        self._glasses(eyes)
        landmarks_M52 = torch.stack([self._pixel(*point) for point in (*eyes, nose, *corners)], 1)
        half_x = ((width * self.cos) ** 2 + self.sin**2).sqrt()
        half_y = ((width * self.sin) ** 2 + self.cos**2).sqrt()
        half_M2 = (torch.cat([half_x, half_y], 1) * self.scale)[:, :, 0]
        return self.paint_M4PP, landmarks_M52, torch.cat([self.centre_M2 - half_M2, self.centre_M2 + half_M2], 1)

    # -- parts --

    def _hair_behind(self, width: Tensor) -> None:
        volume, style = self.people.shape("volume"), self.people.style_M
        curtain = torch.minimum(self._box(0, 0.45, width * volume + 0.06, 0.75), self._head(width, volume))
        afro = self._ellipse(0, -0.32, width * volume + 0.22, 0.98)
        for name, distance in (("long", curtain), ("curly", afro)):
            self._cover(self.people.hair_M3 * 0.8, distance, only=style == HAIR.index(name))

    def _hair_in_front(self, width: Tensor) -> None:
        """The cap of hair above a line that depends on the style."""
        style, line = self.people.style_M[:, None, None], self.people.shape("hairline")
        u = self.u / width
        slope = 0.35 * ((style == HAIR.index("parted left")).float() - (style == HAIR.index("parted right")).float())
        fringe = (style == HAIR.index("fringe")).float()
        edge = line + 0.22 * fringe + slope * u + (1 - fringe) * 0.35 * u**2
        cap = torch.maximum(self._head(width, self.people.shape("volume")), self.v - edge)
        self._cover(self.people.hair_M3, cap, only=self.people.style_M != HAIR.index("bald"))

    def _beard(self, head: Tensor, mouth: tuple[Tensor, Tensor]) -> None:
        beard = self.people.beard_M
        below = torch.maximum(head, mouth[1] - 0.2 - self.v - 0.48 * self.u**2)
        for name, strength in (("stubble", 0.35), ("full", 0.9)):
            self._cover(self.people.hair_M3 * 0.9, below, only=beard == BEARDS.index(name), strength=strength)
        moustache = self._ellipse(mouth[0], mouth[1] - 0.13, 0.27, 0.075)
        self._cover(self.people.hair_M3 * 0.9, moustache, only=beard == BEARDS.index("moustache"))

    def _eye(self, side: int) -> tuple[Tensor, Tensor]:
        shape, size = self.people.shape, self.people.shape("eye_size")
        x, y = self._place(side * shape("eye_gap"), shape("eye_y"), 0.8)
        white = self._ellipse(x, y, size, size * 0.75 * self.looks("lids"))
        self._cover(torch.full_like(self.people.skin_M3, 0.95), white)
        gaze = x + 0.08 * self.looks("yaw")
        for colour, share in ((self.people.iris_M3, 0.62), (self.people.iris_M3 * 0.15, 0.3)):
            self._cover(colour, torch.maximum(white, self._ellipse(gaze, y, size * share, size * share)))
        tilt, brow_y = side * shape("brow_tilt"), y - shape("brow_gap") - self.looks("lift")
        middle = brow_y + tilt * (self.u - x) / 0.2
        brow = torch.maximum((self.v - middle).abs() - shape("brow_weight"), (self.u - x).abs() - 0.19)
        self._cover(self.people.hair_M3 * 0.7, brow)
        return x, y

    def _nose(self) -> tuple[Tensor, Tensor]:
        shape = self.people.shape
        x, y = self._place(0, shape("nose_y"), 1.15)
        root, _ = self._place(0, shape("eye_y"), 0.9)
        top = shape("eye_y")
        middle = root + (self.v - top) / (y - top) * (x - root)
        ridge = torch.maximum((self.u - middle).abs() - 0.035, (self.v - (top + y) / 2).abs() - (y - top) / 2)
        self._cover(self.people.skin_M3 * 0.86, ridge)
        self._cover(self.people.skin_M3 * 0.7, self._ellipse(x, y, shape("nose_width"), 0.065))
        return x, y

    def _mouth(self, mouth: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        shape, smile = self.people.shape, self.looks("smile")
        half = shape("mouth_width") * (1 + 0.12 * smile) * self.looks("yaw").cos()
        x, y = mouth
        across = ((self.u - x) / half).clamp(-1, 1)
        bow = (1 - across**2).clamp(min=0)
        offset, bound = (self.v - (y + 0.13 * smile * bow)).abs(), (self.u - x).abs() - half
        red = self.people.skin_M3 * torch.tensor([0.82, 0.5, 0.5]) + torch.tensor([0.1, 0.0, 0.02])
        gap = 0.1 * self.looks("open")
        self._cover(red, torch.maximum(offset - (shape("lips") + gap) * bow.sqrt(), bound))
        self._cover(red * 0.25, torch.maximum(offset - gap * bow.sqrt(), bound), strength=0.9)
        return (x - half, y), (x + half, y)

    def _glasses(self, eyes: list[tuple[Tensor, Tensor]]) -> None:
        dark = torch.full_like(self.people.skin_M3, 0.12)
        for x, y in eyes:
            ring = self._ellipse(x, y, 0.25, 0.23).abs() - 0.035
            self._cover(dark, ring, only=self.people.glasses_M)
        (left, y), (right, _) = eyes
        bridge = torch.maximum(
            (self.v - y).abs() - 0.035, (self.u - (left + right) / 2).abs() - (right - left) / 2 + 0.25
        )
        self._cover(dark, bridge, only=self.people.glasses_M)

    # -- geometry --

    def _place(self, x: Tensor | float, y: Tensor, depth: float) -> tuple[Tensor, Tensor]:
        """Where a point of the face, `depth` in front of its middle, is seen after yaw and pitch."""
        round_off = (1 - (x / self.people.shape("width")) ** 2 - y**2).clamp(min=0.05).sqrt()
        z, yaw, pitch = 0.75 * depth * round_off, self.looks("yaw"), self.looks("pitch")
        return x * yaw.cos() + z * yaw.sin(), y * pitch.cos() + z * pitch.sin()

    def _pixel(self, u: Tensor, v: Tensor) -> Tensor:
        """Face coordinates [M, 1, 1] to pixels [M, 2]."""
        turned = torch.cat([self.cos * u - self.sin * v, self.sin * u + self.cos * v], 1)[:, :, 0]
        return self.centre_M2 + self.scale[:, :, 0] * turned

    def _head(self, width: Tensor, volume: Tensor | float) -> Tensor:
        """Distance to the outline of the face, or of the hair around it."""
        narrow = 1 - self.people.shape("jaw") * self.v.clamp(0, 1) ** 2
        return ((self.u / (width * narrow)).square() + self.v.square()).sqrt().sub(volume) * width

    def _ellipse(self, x: Tensor | float, y: Tensor | float, rx: Tensor | float, ry: Tensor | float) -> Tensor:
        """About the distance to an ellipse: exact on it."""
        a, b = (self.u - x) / rx, (self.v - y) / ry
        length = (a**2 + b**2).sqrt()
        gradient = ((a / rx) ** 2 + (b / ry) ** 2).sqrt()
        return (length - 1) * length / gradient.clamp(min=1e-4)

    def _box(self, x: float, y: float, half_width: Tensor, half_height: float) -> Tensor:
        return torch.maximum((self.u - x).abs() - half_width, (self.v - y).abs() - half_height)

    def _cover(
        self, colour_M3: Tensor, distance_MPP: Tensor, *, only: Tensor | None = None, strength: float = 1.0
    ) -> None:
        """Paint where a distance is negative, its edge a pixel soft."""
        cover = strength * (0.5 - distance_MPP * self.scale).clamp(0, 1)
        if only is not None:
            cover = cover * only[:, None, None]
        lit = torch.cat([colour_M3[:, :, None, None] * self.light_M3PP, torch.ones_like(cover)[:, None]], 1)
        self.paint_M4PP.lerp_(lit.clamp(0, 1), cover[:, None])
