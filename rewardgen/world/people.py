"""Who is in a picture and how they look in it: identities of drawn faces, and what changes from picture to picture.

An identity is skin, hair, beard, glasses, eye colour and the shape of everything in the face. A look is pose,
expression, light and clothes. The two are drawn independently, so nothing but the identity tells who somebody is.

M faces. Lengths are in half heights of a face (chin to middle), angles in radians.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from rewardgen.world.scenes import Split

VERSION = "1"
HAIR = ("bald", "short", "fringe", "long", "curly", "parted left", "parted right")
BEARDS = ("none", "stubble", "moustache", "full")
SKINS = ((0.96, 0.82, 0.72), (0.88, 0.69, 0.53), (0.74, 0.52, 0.36), (0.55, 0.36, 0.25), (0.37, 0.24, 0.17))
HAIR_COLOURS = (
    (0.09, 0.07, 0.06), (0.32, 0.19, 0.09), (0.58, 0.37, 0.18), (0.90, 0.77, 0.42), (0.70, 0.27, 0.09),
    (0.72, 0.72, 0.74), (0.20, 0.33, 0.70), (0.24, 0.56, 0.30), (0.80, 0.36, 0.60), (0.44, 0.22, 0.58),
)  # fmt: skip
IRISES = ((0.28, 0.17, 0.09), (0.20, 0.42, 0.72), (0.25, 0.52, 0.28), (0.45, 0.47, 0.50))
SHAPE = {
    "width": (0.66, 0.88),
    "jaw": (0.0, 0.4),
    "volume": (1.06, 1.2),
    "hairline": (-0.68, -0.5),
    "eye_gap": (0.27, 0.42),
    "eye_y": (-0.2, -0.02),
    "eye_size": (0.13, 0.2),
    "brow_gap": (0.2, 0.3),
    "brow_weight": (0.03, 0.085),
    "brow_tilt": (-0.1, 0.1),
    "nose_y": (0.2, 0.34),
    "nose_width": (0.08, 0.18),
    "mouth_y": (0.52, 0.64),
    "mouth_width": (0.22, 0.38),
    "lips": (0.04, 0.1),
}
"""Ranges of the continuous traits of a face; down is positive."""
LOOK = {
    "yaw": (-0.4, 0.4),
    "pitch": (-0.15, 0.15),
    "roll": (-0.2, 0.2),
    "smile": (-0.7, 1.0),
    "open": (0.0, 1.0),
    "lids": (0.55, 1.0),
    "lift": (-0.04, 0.06),
    "light_angle": (-3.1416, 3.1416),
    "light": (0.0, 0.22),
    "gain": (0.85, 1.1),
    "warmth": (-0.05, 0.05),
}
"""Ranges of what changes from picture to picture."""


@dataclass(frozen=True)
class People:
    """Identities. Colours are RGB in [0, 1]; `tone_M2` says which of `SKINS` and of `HAIR_COLOURS` they are near;
    `shape_MS` holds the traits of `SHAPE` in its order."""

    skin_M3: Tensor
    hair_M3: Tensor
    iris_M3: Tensor
    style_M: Tensor
    beard_M: Tensor
    glasses_M: Tensor
    tone_M2: Tensor
    shape_MS: Tensor

    def __len__(self) -> int:
        return len(self.style_M)

    def shape(self, name: str) -> Tensor:
        """One trait, [M, 1, 1]."""
        return self.shape_MS[:, list(SHAPE).index(name), None, None]


@dataclass(frozen=True)
class Looks:
    """How people look in one picture: `pose_ML` holds the values of `LOOK` in its order."""

    pose_ML: Tensor
    clothes_M3: Tensor

    def __call__(self, name: str) -> Tensor:
        """One value, [M, 1, 1]."""
        return self.pose_ML[:, list(LOOK).index(name), None, None]


T = TypeVar("T", People, Looks)


def take(items: T, index: Tensor) -> T:
    """Select faces of a batch."""
    return type(items)(**{f.name: getattr(items, f.name)[index] for f in fields(items)})


def draw_people(n: int, seed: int, split: Split | None = None) -> People:
    """`n` identities. A tenth of all combinations of hair, its colour, beard, glasses and skin tone (by hash) belongs
    to `held_out` and never to `train`: nobody who is held out has a double in training."""
    rng = torch.Generator().manual_seed(seed)
    kept: list[People] = []
    have = 0
    while have < n:
        batch = _any_people(n if split is None else 2 * n if split == "train" else 16 * n, rng)
        held = torch.tensor([hashlib.blake2b(key.encode(), digest_size=1).digest()[0] < 26 for key in kinds(batch)])
        chosen = torch.ones_like(held) if split is None else held if split == "held_out" else ~held
        kept.append(take(batch, chosen))
        have += len(kept[-1])
    joined = People(**{f.name: torch.cat([getattr(part, f.name) for part in kept]) for f in fields(People)})
    return take(joined, torch.arange(n))


def kinds(people: People) -> list[str]:
    """The combination of hair, beard, glasses and the two tones of each, by which the splits are told apart."""
    columns = (people.style_M, people.beard_M, people.glasses_M.long(), *people.tone_M2.unbind(1))
    return ["-".join(map(str, row)) for row in torch.stack(columns, 1).tolist()]


def draw_looks(n: int, seed: int) -> Looks:
    """`n` looks, each value uniform in its range."""
    rng = torch.Generator().manual_seed(seed)
    return Looks(pose_ML=_uniform(LOOK, n, rng), clothes_M3=0.1 + 0.8 * torch.rand(n, 3, generator=rng))


def _any_people(n: int, rng: torch.Generator) -> People:
    def pick(choices: int) -> Tensor:
        return torch.randint(choices, (n,), generator=rng)

    def near(colours: tuple[tuple[float, float, float], ...], index: Tensor, spread: float) -> Tensor:
        shade = 1 + spread * (2 * torch.rand(n, 1, generator=rng) - 1)
        tint = 0.04 * (2 * torch.rand(n, 3, generator=rng) - 1)
        return (torch.tensor(colours)[index] * shade + tint).clamp(0.02, 0.98)

    style, beard, glasses = pick(len(HAIR)), pick(len(BEARDS)), torch.rand(n, generator=rng) < 0.25
    beard[torch.rand(n, generator=rng) < 0.4] = 0
    skin, hair, iris = pick(len(SKINS)), pick(len(HAIR_COLOURS)), pick(len(IRISES))
    return People(
        skin_M3=near(SKINS, skin, 0.06),
        hair_M3=near(HAIR_COLOURS, hair, 0.15),
        iris_M3=near(IRISES, iris, 0.15),
        style_M=style,
        beard_M=beard,
        glasses_M=glasses,
        tone_M2=torch.stack([skin, hair], 1),
        shape_MS=_uniform(SHAPE, n, rng),
    )


def _uniform(ranges: dict[str, tuple[float, float]], n: int, rng: torch.Generator) -> Tensor:
    low, high = (torch.tensor(side) for side in zip(*ranges.values(), strict=True))
    return torch.lerp(low, high, torch.rand(n, len(ranges), generator=rng))
