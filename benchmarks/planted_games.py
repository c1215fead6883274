"""Rewards that rise without what was wanted, for the hacking monitor to notice (`monitor_thresholds.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewardgen.reward import Reward
from rewardgen.rewards.csd import CsdModel, CsdReward
from rewardgen.types import Example, Score
from rewardgen.world.recipes import csd as recipe
from rewardgen.world.recipes.lessons import rendered
from rewardgen.world.recipes.vae import load as load_vae
from rewardgen.world.scenes import draw_contents, draw_styles, render

_PICTURES = 64


class RandomNetwork(Reward):
    """The output of a network that nobody taught, with mean 0 and standard deviation 1 over rendered pictures.

    Args:
        seed: of its weights.
    """

    differentiable = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 16, 5, stride=2), nn.SiLU(), nn.Conv2d(16, 32, 3, stride=2), nn.SiLU(), nn.Conv2d(32, 1, 3)
            )
        with torch.no_grad():
            seen_N = self._raw(render(draw_contents(_PICTURES, 1, "train"), draw_styles(_PICTURES, 2, "train"), 3))
        self.mean, self.std = float(seen_N.mean()), float(seen_N.std())

    def _raw(self, pixels_B3HW: Tensor) -> Tensor:
        values_B1HW: Tensor = self.layers(2 * pixels_B3HW.float().clamp(0, 1) - 1)
        return values_B1HW.mean((1, 2, 3))

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        value_B = (self._raw(pixels_B3HW) - self.mean) / self.std
        return Score(value_B=value_B, valid_B=torch.ones_like(value_B, dtype=torch.bool))


class UndertrainedCsd(Reward):
    """The tiny CSD after a few steps of its recipe's first round: it knows colours a little and is easily fooled.

    Args:
        steps: of training, done when it is made.
        lessons: batches of pictures it goes through.
    """

    differentiable = True

    def __init__(self, steps: int = 20, lessons: int = 4) -> None:
        super().__init__()
        from rewardgen.world.build import ASSETS

        first, vae = recipe.ROUNDS[0], load_vae(ASSETS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(first.seed)
            model = CsdModel(recipe.CONFIG)
        seeds = [first.seed * 1_000_003 + 20 * index for index in range(lessons)]
        with torch.enable_grad():
            recipe.train_round(model, [rendered(first.batch, seed, vae, photos=False) for seed in seeds], first, steps)
        self.csd = CsdReward(model)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        return self.csd.score(pixels_B3HW, examples)
