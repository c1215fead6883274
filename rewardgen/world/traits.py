"""Two witnesses of identity that no objective uses: is everybody there, and is anybody mixed up with another?

They share nothing with the rewards' detector and face network: the places are those of the prompt, the truth is what
people were drawn from (`people.People`) and not their portraits, and the reader was taught to read traits off a whole
place, not to tell faces apart. They say whether a rise of ID-Sim was honest.

M people of a picture, F places, N pictures, T traits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from rewardgen.errors import ConfigError
from rewardgen.reward import Reward
from rewardgen.types import Example, Score
from rewardgen.world.faces import MAX_PEOPLE, SIDE
from rewardgen.world.people import BEARDS, HAIR, SHAPE, People, draw_people

FILE = "people/traits.safetensors"
CELL = (SIDE // 2, SIDE // 3)
"""Height and width of a place in pixels."""
STRANGERS = 32
"""Groups of strangers that a picture is compared with, to see what it would agree with by chance."""


def traits(people: People) -> Tensor:
    """Who somebody is, as numbers [M, T]: zero is the average person, and two strangers are orthogonal on average.

    Six parts weigh the same: skin, colour of the hair, its style, beard, glasses, and the shape of the face. The mean
    squared length is 1.
    """
    parts_MP = _parts(people)
    everybody = _parts(draw_people(20_000, 0))
    weighed = []
    for part_MP, all_NP in zip(parts_MP, everybody, strict=True):
        spread = all_NP.var(0, correction=0).sum().sqrt()
        weighed.append((part_MP - all_NP.mean(0)) / (spread * len(parts_MP) ** 0.5))
    return torch.cat(weighed, 1)


def _parts(people: People) -> list[Tensor]:
    low, high = (torch.tensor(side) for side in zip(*SHAPE.values(), strict=True))
    return [
        people.skin_M3,
        people.hair_M3,
        F.one_hot(people.style_M, len(HAIR)).float(),
        F.one_hot(people.beard_M, len(BEARDS)).float(),
        people.glasses_M[:, None].float(),
        (people.shape_MS - low) / (high - low),
    ]


class TraitReader(nn.Module):
    """Places of pictures [F, 3, 48, 32] in [0, 1] -> the traits [F, T] to be expected of who stands there."""

    def __init__(self, num_traits: int = 33) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.SiLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.SiLU(), nn.Conv2d(48, 80, 3, 2, 1),
            nn.SiLU(), nn.Flatten(), nn.Linear(80 * 24, 96), nn.SiLU(), nn.Linear(96, num_traits),
        )  # fmt: skip

    def forward(self, cells_F3HW: Tensor) -> Tensor:
        read_FT: Tensor = self.layers(2 * cells_F3HW - 1)
        return read_FT


def cells(pixels_N3HW: Tensor) -> Tensor:
    """The places [N, 6, 3, 48, 32] of pictures [N, 3, 96, 96], in the order of `faces.PLACES`."""
    height, width = CELL
    return pixels_N3HW.unfold(2, height, height).unfold(3, width, width).flatten(2, 3).transpose(1, 2)


def load_trait_reader(path: Path) -> TraitReader:
    reader = TraitReader()
    reader.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return reader.eval()


class TraitWitness(Reward):
    """Traits read off the places that the prompt names, against those of the people who should stand there.

    A place's agreement with a person is the product of the traits read there with the person's own: 1 for the same
    person read without error, 0 on average for a stranger, and 0 for an average face, which says nothing. People are
    given places by the assignment with the most agreement, since the prompt does not say who stands where. The best of
    several assignments is better than 0 by chance, and the more so the sharper the faces are: so the mean agreement of
    groups of strangers with the same picture is taken off. 0 is a picture that says nothing of these people, however
    sharp it is; true pictures of held-out people have about 0.6, 0.5 and 0.4 for two, four and six.

    Applies to examples with `extras["traits"]` [M, T] and `extras["places"]`, and to pictures of 96 x 96 pixels;
    `apart` to those of two people or more.

    Args:
        read: `likeness` is the mean agreement of people with their own places. `apart` is what remains of it when the
            agreement of each place with the others of the picture (their mean) is taken off: 0 if everybody is drawn as
            a mixture of all.

    Raises:
        ConfigError: `read` is neither.
    """

    differentiable: ClassVar[bool] = False

    def __init__(self, read: Literal["likeness", "apart"] = "likeness", *, reader: TraitReader | None = None) -> None:
        super().__init__()
        self.check_arguments(read=read)
        self.read = read
        self.reader = reader or load_trait_reader(Path(__file__).parent / "assets" / FILE)

    @classmethod
    def check_arguments(cls, *, read: str, **_: Any) -> None:
        """Refuse values before anything is read. Raises ConfigError."""
        if read not in ("likeness", "apart"):
            raise ConfigError(f"read: '{read}' is neither 'likeness' nor 'apart'")

    @classmethod
    def blueprint(
        cls, read: Literal["likeness", "apart"] = "likeness", *, reader: TraitReader | None = None
    ) -> TraitWitness:
        """A witness of the right sizes whose weights mean nothing; no file is read."""
        return cls(read, reader=reader or TraitReader())

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        fits = tuple(pixels_B3HW.shape[2:]) == (SIDE, SIDE)
        least = 2 if self.read == "apart" else 1
        valid_B = torch.tensor(
            [fits and "places" in e.extras and len(e.extras.get("traits", ())) >= least for e in examples]
        )
        value_B = torch.zeros(len(examples))
        if bool(valid_B.any()):
            cells_B63HW = cells(pixels_B3HW.detach().float().cpu().clamp(0, 1))
            for index in valid_B.nonzero()[:, 0].tolist():
                extras = examples[index].extras
                with torch.no_grad():
                    read_FT = self.reader(cells_B63HW[index][extras["places"]])
                groups = [extras["traits"], *_strangers()[:, : len(extras["traits"])]]
                own, *by_chance = [agreement(people_MT @ read_FT.T, apart=self.read == "apart") for people_MT in groups]
                value_B[index] = own - sum(by_chance) / len(by_chance)
        return Score(value_B=value_B, valid_B=valid_B)


@functools.cache
def _strangers() -> Tensor:
    """Traits [STRANGERS, 6, T] of other held-out people, who are more like each other than all people are."""
    strangers_MT = traits(draw_people(STRANGERS * MAX_PEOPLE, 17, "held_out"))
    return strangers_MT.view(STRANGERS, MAX_PEOPLE, -1)


def agreement(agreement_MF: Tensor, *, apart: bool) -> float:
    """Mean over the pairs of the best assignment; with `apart` less the mean of each place's other people."""
    people, places = linear_sum_assignment(agreement_MF.numpy(), maximize=True)
    own_M = agreement_MF[people, places]
    if not apart:
        return float(own_M.mean())
    everybody_M = agreement_MF[:, places].sum(0)
    return float((own_M - (everybody_M - own_M) / (len(agreement_MF) - 1)).mean())
