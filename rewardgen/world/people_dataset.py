"""The identity world as a dataset: portraits of one to six people, and a picture in which all of them appear."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rewardgen.errors import ConfigError, nearest
from rewardgen.types import Example
from rewardgen.world.faces import MAX_PEOPLE, draw_groups, portraits
from rewardgen.world.people import People, draw_people
from rewardgen.world.scenes import Split
from rewardgen.world.traits import traits

_SEEDS = {"train": 3_000_000, "held_out": 4_000_000}
Targets = Literal["true", "lookalikes", "doubles"]
LOOKALIKES, DOUBLES = 0.4, 0.3
"""Shares of the people in training targets whose identity was not kept, as happens in the synthetic data of
multi-reference models: a stranger like them stands in their place, or another person of the picture once more."""


class TinyPeople:
    """`size` examples: portraits (`identity_refs`), a prompt that says which places are taken but not who takes them,
    and a target with everybody in other poses, lights and clothes.

    Identities of `held_out` never occur in `train` (see `people.draw_people`); within a split each occurs once.
    Training targets are imperfect: in the place of some people stands somebody else of the same picture, who is then in
    it twice (`doubles`). Held-out targets are true.
    `extras` hold the true picture (`truth` [3, 96, 96]), the places taken (`places` [6], bool), each person's place
    (`place_of`) and who they are (`traits`), both in the order of the references.

    Args:
        split: "train" or "held_out".
        size: number of examples.
        seed: of the identities and pictures.
        people: how many in each picture; None draws one to six.
        targets: "true"; "lookalikes", where strangers like them take the place of some people (`lookalikes`); or
            "doubles". By default those of `held_out` are true, and those of `train` have doubles.

    Raises:
        ConfigError: no such split, no examples, or more than six people.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 1024,
        seed: int = 0,
        people: int | None = None,
        targets: Targets | None = None,
    ) -> None:
        self.check_arguments(split=split, size=size, people=people)
        which: Split = "train" if split == "train" else "held_out"
        base = _SEEDS[split] + 10_000 * seed
        self.split = split
        rng = torch.Generator().manual_seed(base + 3)
        count_N = torch.randint(people or 1, (people or MAX_PEOPLE) + 1, (size,), generator=rng)
        present_NK = torch.arange(MAX_PEOPLE) < count_N[:, None]
        self._who_NK = torch.full((size, MAX_PEOPLE), -1)
        self._who_NK[present_NK] = torch.arange(int(count_N.sum()))
        wanted = draw_people(int(count_N.sum()), base, which)
        self._portraits = _bytes(portraits(wanted, base + 10)[0])
        self._traits = traits(wanted)
        truth, known, self._prompts = draw_groups(wanted, self._who_NK, base + 20)
        self._truth = _bytes(truth)
        self._place_NK = known.place_NK
        self._places = (known.place_NK[:, :, None] == torch.arange(MAX_PEOPLE)).any(1)
        shown, shown_NK = wanted, self._who_NK
        targets = targets or ("true" if split == "held_out" else "doubles")
        if targets == "lookalikes":
            shown = lookalikes(wanted, draw_people(len(wanted), base + 4, which), LOOKALIKES, base + 5)
        elif targets == "doubles":
            shown_NK = doubles(self._who_NK, DOUBLES, base + 5)
        true = targets == "true"
        self._target = self._truth if true else _bytes(draw_groups(shown, shown_NK, base + 20)[0])

    @classmethod
    def check_arguments(cls, *, split: str, size: int, people: int | None, **_: Any) -> None:
        """Refuse values before anything is drawn. Raises ConfigError."""
        if split not in _SEEDS:
            raise ConfigError(f"split: '{split}' is neither 'train' nor 'held_out'.{nearest(split, _SEEDS)}")
        if size < 1:
            raise ConfigError(f"size: {size} examples; at least 1 is needed")
        if people is not None and not 1 <= people <= MAX_PEOPLE:
            raise ConfigError(f"people: {people}; a picture has 1 to {MAX_PEOPLE}")

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Example:
        who_K = self._who_NK[index]
        return Example(
            id=f"people-{self.split}-{index:06d}",
            prompt=self._prompts[index],
            identity_refs=tuple(self._portraits[row] / 255 for row in who_K[who_K >= 0].tolist()),
            target=self._target[index] / 255,
            extras={
                "truth": self._truth[index] / 255,
                "places": self._places[index],
                "place_of": self._place_NK[index][who_K >= 0],
                "traits": self._traits[who_K[who_K >= 0]],
            },
        )


def lookalikes(people: People, others: People, share: float, seed: int) -> People:
    """Replace a `share` of the people by somebody like them: skin and hair halfway to another's, half of the other
    traits the other's own."""
    rng = torch.Generator().manual_seed(seed)
    n = len(people)
    chosen = torch.rand(n, generator=rng) < share
    half = 0.5 * chosen[:, None].float()
    trait = chosen[:, None] & (torch.rand(n, people.shape_MS.shape[1], generator=rng) < 0.5)
    style, beard, glasses = (chosen & (torch.rand(n, generator=rng) < 0.3) for _ in range(3))
    return replace(
        people,
        skin_M3=torch.lerp(people.skin_M3, others.skin_M3, half),
        hair_M3=torch.lerp(people.hair_M3, others.hair_M3, half),
        style_M=torch.where(style, others.style_M, people.style_M),
        beard_M=torch.where(beard, others.beard_M, people.beard_M),
        glasses_M=torch.where(glasses, others.glasses_M, people.glasses_M),
        shape_MS=torch.where(trait, others.shape_MS, people.shape_MS),
    )


def doubles(who_NK: Tensor, share: float, seed: int) -> Tensor:
    """Put another person of the same picture in the place of a `share` of the people; who is alone stays.

    Args:
        who_NK: people of each picture, -1 (nobody) behind them.
    """
    rng = torch.Generator().manual_seed(seed)
    count_N1 = (who_NK >= 0).sum(1, keepdim=True)
    place_K = torch.arange(who_NK.shape[1])
    # One to n - 1 places further on in the round of n.
    further_NK = 1 + (torch.rand(who_NK.shape, generator=rng) * (count_N1 - 1)).long().clamp(min=0)
    other_NK = who_NK.gather(1, (place_K + further_NK) % count_N1.clamp(min=1))
    chosen_NK = (torch.rand(who_NK.shape, generator=rng) < share) & (who_NK >= 0)
    return torch.where(chosen_NK, other_NK, who_NK)


def _bytes(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().to(torch.uint8)
