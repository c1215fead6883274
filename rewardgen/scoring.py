"""A scoring worker: asks rewards about finished pictures, without gradient, in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from rewardgen.errors import ScoringError
from rewardgen.reward import Reward, score
from rewardgen.seeds import derive_seed, seed_globals
from rewardgen.types import Rollout, Score


class ScoringWorker:
    """Scores rollouts with rewards that need no gradient: judges, and whatever is learned from samples.

    A pool of its own runs it, fed with the handles that rollout workers leave behind, so that pictures go from worker
    to judge without passing through anybody else. Scoring is pure: it may be done again after a crash.

    Args:
        rewards: by term name, frozen and in evaluation mode.
        device: where the pictures go, which is where the rewards are; None leaves them where they were drawn.
        keep_pixels: leave the pictures in what is returned; whoever learns from the samples does not need them.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], *, device: torch.device | None = None, keep_pixels: bool = False
    ) -> None:
        self.rewards = dict(rewards)
        self.device = device
        self.keep_pixels = keep_pixels

    def score(self, rollout: Rollout) -> Rollout:
        """The rollout with a score from each reward; those that failed or do not apply are masked in it.

        Raises:
            ScoringError: the rollout has no pictures, or a reward broke its contract.
        """
        drawn_B3HW = rollout.pixels_B3HW
        if drawn_B3HW is None:
            raise ScoringError("there is nothing to score: the rollout was asked for without pictures (decode)")
        # What a reward draws from the global generators belongs to its pictures, wherever they are scored.
        seed_globals(derive_seed("score", *rollout.trajectory.seed_B))
        scores: dict[str, Score] = {}
        pixels_B3HW = drawn_B3HW if self.device is None else drawn_B3HW.to(self.device)
        for name, reward in self.rewards.items():
            scores[name] = score(reward, pixels_B3HW, rollout.examples, enable_grad=False)
        kept_B3HW = drawn_B3HW if self.keep_pixels else None
        return dataclasses.replace(rollout, scores={**rollout.scores, **scores}, pixels_B3HW=kept_B3HW)
