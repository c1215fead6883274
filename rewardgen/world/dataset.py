"""The tiny world as a dataset: triplets (content reference, style reference, target) with known truth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardgen.errors import ConfigError, nearest
from rewardgen.types import Example
from rewardgen.world.scenes import (
    Split,
    content_grid,
    describe,
    draw_contents,
    draw_photo_styles,
    draw_styles,
    render,
    spoil,
    take,
)

_SEEDS = {"train": 1_000_000, "held_out": 2_000_000}


class TinyWorld:
    """`size` triplets. Contents and styles of `held_out` never occur in `train` (see `scenes.draw_*`).

    Training targets come from imperfect stylisers, as they do in reality: some keep a wrong palette, some smear the
    texture, some lose the outline. Held-out targets are the truth. `extras` hold the true picture (`truth`
    [3, 64, 64]) and the true arrangement (`grid` [9]) for the witnesses, and the content in the style of the next
    triplet (`another_style`), to read tables by.
    """

    def __init__(
        self, split: str = "train", size: int = 1024, seed: int = 0, clean_targets: bool | None = None
    ) -> None:
        self.check_arguments(split=split, size=size)
        which: Split = "train" if split == "train" else "held_out"
        base = _SEEDS[split] + 10_000 * seed
        self.split = split
        content, style = draw_contents(size, base, which), draw_styles(size, base + 1, which)
        other, photo = draw_styles(size, base + 2, which), draw_photo_styles(size, base + 3)
        clean = split == "held_out" if clean_targets is None else clean_targets
        self._prompts, self._grids = describe(content), content_grid(content)
        self._truth = _bytes(render(content, style, base + 4))
        self._target = self._truth if clean else _bytes(render(content, spoil(style, other, base + 5), base + 4))
        neighbour = take(style, torch.arange(size).roll(-1))
        self._another = _bytes(render(content, neighbour, base + 4))
        self._content = _bytes(render(content, photo))
        self._style = _bytes(render(draw_contents(size, base + 6, which), style, base + 7))

    @classmethod
    def check_arguments(cls, *, split: str, size: int, **_: Any) -> None:
        """Refuse values before anything is drawn. Raises ConfigError."""
        if split not in _SEEDS:
            raise ConfigError(f"split: '{split}' is neither 'train' nor 'held_out'.{nearest(split, _SEEDS)}")
        if size < 1:
            raise ConfigError(f"size: {size} triplets; at least 1 is needed")

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Example:
        return Example(
            id=f"{self.split}-{index:06d}",
            prompt=self._prompts[index],
            content_refs=(self._content[index] / 255,),
            style_refs=(self._style[index] / 255,),
            target=self._target[index] / 255,
            extras={
                "truth": self._truth[index] / 255,
                "grid": self._grids[index],
                "another_style": self._another[index] / 255,
            },
        )


def _bytes(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().to(torch.uint8)
