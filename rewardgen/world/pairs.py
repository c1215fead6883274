"""Labelled pairs of the tiny world: do two pictures have the same style? The truth is the generator's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewardgen.errors import ConfigError, nearest
from rewardgen.types import Example
from rewardgen.world.scenes import Split, concat, draw_contents, draw_styles, render, spoil, take
from rewardgen.world.similarity import style_similarity

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_CHUNK = 256
_SEEDS = {"train": 5_000_000, "held_out": 6_000_000}
UNLIKE = 0.6
"""Spoiled styles count as another style where the true similarity is below this."""


class StylePairs:
    """`size` pairs, half of them of one style: a style reference, the picture to be judged, and the answer.

    The two pictures of a pair have contents and grain of their own. Of the pairs of two styles a third is a near miss:
    the reference's style with a wrong palette, a smeared texture or a lost outline. Styles of `held_out` never occur
    in `train`.

    `extras` hold `label` ("yes" or "no") and `similarity` in [0, 1], the true one.
    """

    def __init__(self, split: str = "train", size: int = 1000, seed: int = 0) -> None:
        self.check_arguments(split=split, size=size)
        which: Split = "train" if split == "train" else "held_out"
        base = _SEEDS[split] + 10_000 * seed
        self.split = split
        style, other = draw_styles(size, base, which), draw_styles(size, base + 1, which)
        worse = spoil(style, other, base + 2)
        near = style_similarity(style, worse).diag() < UNLIKE
        index = torch.arange(size)
        kind = torch.where(index % 2 == 0, 0, torch.where((index % 6 == 1) & near, 1, 2))
        shown = take(concat([style, worse, other]), index + size * kind)
        self._similarity = style_similarity(style, shown).diag()
        self._reference = _bytes(render(draw_contents(size, base + 3, which), style, base + 4))
        self._picture = _bytes(render(draw_contents(size, base + 5, which), shown, base + 6))

    def disturb(self, vae: AutoencoderKL, seed: int) -> None:
        """Give three quarters of the pictures an autoencoder's artefacts, noise or blur, which are no style."""
        from rewardgen.world.recipes.nuisance import disturb

        for offset, pictures in enumerate((self._reference, self._picture)):
            for first in range(0, len(pictures), _CHUNK):
                chunk = pictures[first : first + _CHUNK]
                chunk.copy_(_bytes(disturb(chunk / 255, vae, seed + 2 * first + offset)))

    @classmethod
    def check_arguments(cls, *, split: str, size: int, **_: Any) -> None:
        """Refuse values before anything is drawn. Raises ConfigError."""
        if split not in _SEEDS:
            raise ConfigError(f"split: '{split}' is neither 'train' nor 'held_out'.{nearest(split, _SEEDS)}")
        if size < 2:
            raise ConfigError(f"size: {size} pairs; at least 2 are needed")

    def __len__(self) -> int:
        return len(self._similarity)

    def __getitem__(self, index: int) -> Example:
        return Example(
            id=f"{self.split}-pair-{index:06d}",
            style_refs=(self._reference[index] / 255,),
            target=self._picture[index] / 255,
            extras={"label": "no" if index % 2 else "yes", "similarity": float(self._similarity[index])},
        )


def _bytes(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().to(torch.uint8)
