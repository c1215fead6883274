"""Aspect-ratio buckets: pictures of several sizes in one run, each micro-batch of one size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch

from rewardgen.data.images import fit
from rewardgen.seeds import derive_seed
from rewardgen.types import Example

Size = tuple[int, int]
"""(height, width) in pixels."""


class Examples(Protocol):
    """Examples by position. With `target_size(index)` as well, targets need not be decoded to know their size."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int, /) -> Example:
        """The example at an index in [0, len)."""


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """The bucket whose proportions are nearest to a picture's: least |log| of the two ratios' quotient, then area.

    Of equals the first.
    """

    def distance(bucket: Size) -> tuple[float, float]:
        ratio = math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1])
        area = math.log(bucket[0] * bucket[1]) - math.log(size[0] * size[1])
        return round(abs(ratio), 9), abs(area)

    return min(range(len(buckets)), key=lambda index: distance(buckets[index]))


class BucketedDataset:
    """A dataset whose targets are brought to the bucket that is nearest to their proportions.

    Examples without a target go to the first bucket. Targets are resized to cover the bucket and cut at the centre.

    Args:
        data: the examples as they are.
        buckets: sizes of pictures, at least one.
    """

    def __init__(self, data: Examples, buckets: Sequence[Size]) -> None:
        self.data, self.buckets = data, [(int(height), int(width)) for height, width in buckets]
        size_of = getattr(data, "target_size", self._decoded_size)
        self._bucket_of = [self._choose(size_of(index)) for index in range(len(data))]
        numbers = range(len(self.buckets))
        self._groups = tuple(tuple(i for i, of in enumerate(self._bucket_of) if of == number) for number in numbers)

    def _decoded_size(self, index: int) -> Size | None:
        target = self.data[index].target
        return None if target is None else (target.shape[1], target.shape[2])

    def _choose(self, size: Size | None) -> int:
        return 0 if size is None else nearest_bucket(size, self.buckets)

    @property
    def read_ahead(self) -> bool:
        """Whether the examples may be read by another thread, see `read_ahead.py`."""
        return bool(getattr(self.data, "read_ahead", False))

    def __len__(self) -> int:
        return len(self._bucket_of)

    def __getitem__(self, index: int) -> Example:
        """The example at `index`, its target of its bucket's size."""
        example = self.data[index]
        if example.target is None:
            return example
        return dataclasses.replace(example, target=fit(example.target, self.image_size(index)))

    def image_size(self, index: int) -> Size:
        """(height, width) of the bucket of the example at `index`."""
        return self.buckets[self._bucket_of[index]]

    def counts(self) -> dict[Size, int]:
        """How many examples each bucket has."""
        return {size: self._bucket_of.count(number) for number, size in enumerate(self.buckets)}

    def micro_batch(self, number: int, size: int, seed: int) -> list[int]:
        """Indices of the examples of a micro-batch, all of one bucket: a function of its number in the run.

        In an epoch each bucket's examples are shuffled and cut into micro-batches; the last one of a bucket is filled
        up from the beginning of that bucket. The micro-batches of all buckets are then shuffled.

        Args:
            number: counted from 0 over the whole run and all processes.
            size: examples in it.
            seed: of the run.
        """
        epoch, place = divmod(number, sum(-(-len(group) // size) for group in self._groups))
        return _epoch(self._groups, size, derive_seed(seed, "order", epoch))[place]


@lru_cache(maxsize=2)
def _epoch(groups: tuple[tuple[int, ...], ...], size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    for group in groups:
        order = [group[place] for place in torch.randperm(len(group), generator=generator).tolist()]
        for begin in range(0, len(order), size):
            batches.append([order[(begin + offset) % len(order)] for offset in range(size)])
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
