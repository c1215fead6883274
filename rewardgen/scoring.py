"""A scoring worker: asks rewards about finished pictures, without gradient, in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rewardgen.errors import ScoringError
from rewardgen.reward import Reward, begin_score
from rewardgen.seeds import derive_seed, seed_globals
from rewardgen.types import Begun, Rollout, Score


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

    def score(self, rollout: Rollout, names: Sequence[str] | None = None) -> Rollout:
        """The rollout with a score from each reward; those that failed or do not apply are masked in it.

        Args:
            rollout: with pictures.
            names: of the rewards to ask; None asks all.

        Raises:
            ScoringError: the rollout has no pictures, or a reward broke its contract.
        """
        return self.begin(rollout, names).finish()

    def begin(self, rollout: Rollout, names: Sequence[str] | None = None) -> Begun[Rollout]:
        """As `score`, but rewards that mostly wait are not waited for (`Reward.begin`)."""
        drawn_B3HW = rollout.pixels_B3HW
        if drawn_B3HW is None:
            raise ScoringError("there is nothing to score: the rollout was asked for without pictures (decode)")
        # What a reward draws from the global generators belongs to its pictures, wherever they are scored.
        seed_globals(derive_seed("score", *rollout.trajectory.seed_B))
        pixels_B3HW = drawn_B3HW if self.device is None else drawn_B3HW.to(self.device)
        finite_B = pixels_B3HW.flatten(1).sum(1, dtype=torch.float32).isfinite()
        asked = [(name, self.rewards[name]) for name in (self.rewards if names is None else names)]
        begun = {name: begin_score(reward, pixels_B3HW, rollout.examples) for name, reward in asked}
        kept = dataclasses.replace(rollout, pixels_B3HW=drawn_B3HW if self.keep_pixels else None)

        def finish() -> Rollout:
            found = {name: reward.finish() for name, reward in begun.items()}
            scores = {name: _valid_where(finite_B, score) for name, score in found.items()}
            return dataclasses.replace(kept, scores={**kept.scores, **scores})

        return Begun(finish)

    def give_up(self) -> None:
        """Nobody waits any more for what was begun."""
        for reward in self.rewards.values():
            reward.give_up()


def _valid_where(finite_B: Tensor, score: Score) -> Score:
    """A reward could make a finite value of a broken picture; it is not valid.

    Waits for the pictures' device where the score lies on another: whoever brought it there has waited already.
    """
    return dataclasses.replace(score, valid_B=score.valid_B & finite_B.to(score.valid_B.device))
