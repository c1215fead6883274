"""What a step is made of: which examples, under which seeds, and what is asked of the fleet for them.

All of it is a function of the run's seed and the step, and of nothing that happened before: a batch may be drawn
ahead, drawn again after a crash, or drawn by a resumed run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from rewardgen.distributed import Processes
from rewardgen.errors import ConfigError
from rewardgen.flow.window import draw_entry
from rewardgen.learner import MicroBatch
from rewardgen.rollout import RolloutConfig
from rewardgen.seeds import derive_seed, seed_globals
from rewardgen.types import Example, Rollout, RolloutRequest


class Dataset(Protocol):
    """Examples by position."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int, /) -> Example:
        """The example at an index in [0, len)."""


class BatchShape(Protocol):
    """How a step's examples are cut into micro-batches, and with which probability their conditions are dropped."""

    @property
    def batch_size(self) -> int:
        """Examples in one micro-batch of each process."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of each process in one step."""

    @property
    def prompt_dropout(self) -> float:
        """Probability of losing the prompt."""

    @property
    def content_dropout(self) -> float:
        """Probability of losing the content references."""

    @property
    def style_dropout(self) -> float:
        """Probability of losing the style references."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """This process's share of a step: per micro-batch, pairs of (place in the batch of all processes, example)."""

    step: int
    micro_batches: Sequence[Sequence[tuple[int, Example]]]


class Batches:
    """Makes the batches of a run.

    Args:
        dataset: training examples; at least one.
        rollout: how pictures are drawn.
        config: sizes and dropout.
        seed: the run's seed.
        processes: those that share a step's examples.
    """

    def __init__(
        self, dataset: Dataset, *, rollout: RolloutConfig, config: BatchShape, seed: int, processes: Processes
    ) -> None:
        if len(dataset) == 0:
            raise ConfigError("data.train has no examples")
        self.dataset = dataset
        self.rollout = rollout
        self.config = config
        self.seed = seed
        self.processes = processes

    def plan(self, step: int) -> Batch:
        """The examples of a step.

        Each epoch is a permutation of the data, and each process has the places after those of the one before it.
        """
        seed_globals(derive_seed(self.seed, "globals", step))  # for datasets that draw from them
        size, share = len(self.dataset), self.config.batch_size * self.config.accumulation
        chosen = []
        for place in range(self.processes.rank * share, (self.processes.rank + 1) * share):
            epoch, position = divmod(step * share * self.processes.size + place, size)
            chosen.append((place, self.dataset[_permutation(derive_seed(self.seed, "order", epoch), size)[position]]))
        cuts = range(0, share, self.config.batch_size)
        return Batch(step=step, micro_batches=[chosen[i : i + self.config.batch_size] for i in cuts])

    def requests(self, batch: Batch) -> list[RolloutRequest]:
        """The prefixes for the reward terms, one request per micro-batch.

        Fresh noise, full conditions, one entry step for the whole batch.
        """
        num_steps, step = self.rollout.num_steps, batch.step
        entry_step = draw_entry(self.rollout.window, num_steps, derive_seed(self.seed, "entry_step", step))
        return [
            RolloutRequest(
                step=step,
                examples=[example for _, example in micro_batch],
                seed_B=tuple(
                    derive_seed(self.seed, "rollout", step, example.id, place) for place, example in micro_batch
                ),
                image_size=self.rollout.image_size,
                num_steps=num_steps,
                stop_step=entry_step,
            )
            for micro_batch in batch.micro_batches
        ]

    def micro_batches(self, batch: Batch, drawn: Sequence[Rollout]) -> list[MicroBatch]:
        """What the learner gets: examples after dropout, and a rollout for each micro-batch, or none for any."""
        rollouts: Sequence[Rollout | None] = drawn or [None] * len(batch.micro_batches)
        return [
            MicroBatch(
                examples=[self._drop(example, batch.step, place) for place, example in micro_batch],
                seed_B=[
                    derive_seed(self.seed, "flow_matching", batch.step, example.id, place)
                    for place, example in micro_batch
                ],
                image_size=self.rollout.image_size,
                rollout=rollout,
            )
            for micro_batch, rollout in zip(batch.micro_batches, rollouts, strict=True)
        ]

    def identity(self) -> dict[str, int]:
        """What the order of the data depends on: with another one the run would not be the same run."""
        whole = self.config.batch_size * self.config.accumulation * self.processes.size
        return {"seed": self.seed, "number of examples": len(self.dataset), "examples in a step": whole}

    def _drop(self, example: Example, step: int, place: int) -> Example:
        """Dropout of conditions for the flow-matching term."""
        seed = derive_seed(self.seed, "dropout", step, example.id, place)
        prompt, content, style = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
        changes: dict[str, Any] = {}
        if prompt < self.config.prompt_dropout:
            changes |= {"prompt": ""}
        if content < self.config.content_dropout:
            changes |= {"content_refs": (), "correspondences": ()}
        if style < self.config.style_dropout:
            changes |= {"style_refs": ()}
        return dataclasses.replace(example, **changes)


@lru_cache(maxsize=4)
def _permutation(seed: int, size: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
