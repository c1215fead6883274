"""What a step is made of: which examples, under which seeds, and what is asked of the fleet for them.

All of it is a function of the run's seed and the step, and of nothing that happened before: a batch may be drawn
ahead, drawn again after a crash, or drawn by a resumed run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from rewardgen.data.buckets import BucketedDataset
from rewardgen.data.read_ahead import PATIENCE, Reading
from rewardgen.distributed import Processes
from rewardgen.errors import ConfigError
from rewardgen.flow.window import draw_entries
from rewardgen.learner import MicroBatch
from rewardgen.rollout import RolloutConfig
from rewardgen.seeds import derive_seed, seed_globals
from rewardgen.types import Example, Rollout, RolloutRequest


class Dataset(Protocol):
    """Examples by position. With `read_ahead = True` another thread may read them, see `data/read_ahead.py`."""

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
        prepare: called with each example that is read ahead, in the thread that reads.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        rollout: RolloutConfig,
        config: BatchShape,
        seed: int,
        processes: Processes,
        prepare: Callable[[Example], None] | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise ConfigError("data.train has no examples")
        self.dataset = dataset
        self.rollout = rollout
        self.config = config
        self.seed = seed
        self.processes = processes
        self._prepare = prepare or (lambda _: None)
        self._reading: Reading | None = None

    def plan(self, step: int) -> Batch:
        """The examples of a step.

        Each epoch is a permutation of the data, and each process has the places after those of the one before it.
        """
        seed_globals(derive_seed(self.seed, "globals", step))  # for datasets that draw from them
        chosen = self._chosen(step)
        examples = iter(self._read([index for micro_batch in chosen for _, index in micro_batch]))
        return Batch(step=step, micro_batches=[[(place, next(examples)) for place, _ in batch] for batch in chosen])

    def read_ahead(self, step: int) -> None:
        """Let a thread read the examples of a step, for the `plan` to come, where the dataset allows it."""
        self.close(None)
        if getattr(self.dataset, "read_ahead", False):
            indices = [index for micro_batch in self._chosen(step) for _, index in micro_batch]
            self._reading = Reading(self.dataset.__getitem__, indices, prepare=self._prepare)

    def close(self, patience: float | None = PATIENCE) -> None:
        """Give up what is being read ahead; wait at most so many seconds for the picture at hand."""
        if self._reading is not None:
            self._reading.stop(patience)
            self._reading = None

    def _read(self, indices: list[int]) -> list[Example]:
        if self._reading is None or self._reading.indices != tuple(indices):
            self.close(None)  # of another step: two threads must not read at a time
            return [self.dataset[index] for index in indices]
        reading, self._reading = self._reading, None
        try:
            return reading.take()
        except KeyboardInterrupt:
            reading.stop(PATIENCE)
            raise

    def _chosen(self, step: int) -> list[list[tuple[int, int]]]:
        """Per micro-batch of this process, pairs of (place in the batch of all processes, index of the example)."""
        if isinstance(self.dataset, BucketedDataset):
            return self._bucketed(step, self.dataset)
        size, share = len(self.dataset), self.config.batch_size * self.config.accumulation
        chosen = []
        for place in range(self.processes.rank * share, (self.processes.rank + 1) * share):
            epoch, position = divmod(step * share * self.processes.size + place, size)
            chosen.append((place, _permutation(derive_seed(self.seed, "order", epoch), size)[position]))
        cuts = range(0, share, self.config.batch_size)
        return [chosen[i : i + self.config.batch_size] for i in cuts]

    def _bucketed(self, step: int, dataset: BucketedDataset) -> list[list[tuple[int, int]]]:
        """Micro-batches of one bucket each. Here the order depends on the micro-batches' size."""
        size, accumulation = self.config.batch_size, self.config.accumulation
        batches = []
        for number in range(self.processes.rank * accumulation, (self.processes.rank + 1) * accumulation):
            indices = dataset.micro_batch(step * accumulation * self.processes.size + number, size, self.seed)
            batches.append([(number * size + place, index) for place, index in enumerate(indices)])
        return batches

    def _image_size(self, micro_batch: Sequence[tuple[int, Example]]) -> tuple[int, int]:
        """Height and width of a micro-batch's pictures: with buckets those of its targets, else one for all."""
        target = micro_batch[0][1].target
        if not isinstance(self.dataset, BucketedDataset):
            return self.rollout.image_size
        return self.dataset.buckets[0] if target is None else (target.shape[1], target.shape[2])

    def requests(self, batch: Batch) -> list[RolloutRequest]:
        """The prefixes for the reward terms, one request per micro-batch.

        Fresh noise, full conditions, the same entry steps for the whole batch.
        """
        num_steps, step = self.rollout.num_steps, batch.step
        more = range(1, self.rollout.entries_per_rollout)
        seeds = [derive_seed(self.seed, "entry_step", step)]
        seeds += [derive_seed(self.seed, "entry_step", step, number) for number in more]
        entries = draw_entries(self.rollout.window, num_steps, seeds)
        return [
            RolloutRequest(
                step=step,
                examples=[example for _, example in micro_batch],
                seed_B=tuple(
                    derive_seed(self.seed, "rollout", step, example.id, place) for place, example in micro_batch
                ),
                image_size=self._image_size(micro_batch),
                num_steps=num_steps,
                stop_step=max(entries),
                keep_steps=entries if len(entries) > 1 else (),
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
                image_size=self._image_size(micro_batch),
                rollout=rollout,
            )
            for micro_batch, rollout in zip(batch.micro_batches, rollouts, strict=True)
        ]

    def identity(self) -> dict[str, int]:
        """What the order of the data depends on: with another one the run would not be the same run."""
        whole = self.config.batch_size * self.config.accumulation * self.processes.size
        found = {"seed": self.seed, "number of examples": len(self.dataset), "examples in a step": whole}
        if isinstance(self.dataset, BucketedDataset):
            found |= {"examples in a micro-batch": self.config.batch_size}
        return found

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
