"""Workers for tests of the fleet: small, importable in other processes, and hostile on request."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardgen.rollout import RolloutWorker, Weights
from rewardgen.types import Example, Rollout
from tests.toys import ToyPolicy


PATIENCE = 300.0
"""Seconds that a test waits for what should come at once: the machine may be busy."""


@contextmanager
def ray_session(num_cpus: int = 16) -> Iterator[None]:
    """One Ray for a module; pools join it and leave it running. Workers are not behind other processes in line."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class ToyFactory:
    """A rollout worker with a toy policy of other weights than the learner's: they must come with the request."""

    seed: int = 99

    def __call__(self) -> RolloutWorker:
        return RolloutWorker(ToyPolicy(seed=self.seed))


class NoRoomError(Exception):
    """A type of the user's own."""


class Hostile:
    """Does what it is told, and notes each call in a file, so that a test sees how often it really ran.

    Args:
        folder: one file per call is left there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def note(self, name: str) -> int:
        """How often something has been done, this time included."""
        count = len(list(self.folder.glob(f"{name}-*"))) + 1
        (self.folder / f"{name}-{count}-{os.getpid()}").touch()
        return count

    def double(self, value: Any) -> Any:
        self.note("double")
        return value * 2

    def pid(self) -> int:
        return os.getpid()

    def nap(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def die(self, times: int, value: int) -> int:
        """Kill the process the first `times` times."""
        if self.note("die") <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    def hang(self, times: int, value: int) -> int:
        """Stop the process the first `times` times: only SIGKILL ends it."""
        if self.note("hang") <= times:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)
        return value

    def fail(self, message: str) -> None:
        self.note("fail")
        raise NoRoomError(message)

    def large(self, size: int, seed: int) -> Tensor:
        """Too large to travel with the reply: it stays in the object store."""
        self.note("large")
        return torch.rand(size, generator=torch.Generator().manual_seed(seed))

    def spoil(self, weights: Weights) -> float:
        """The sum of the weights, having tried to write into what came of another call."""
        return float(sum(tensor.sum() for tensor in weights.tensors.values()))

    def score(self, rollout: Rollout) -> tuple[list[str], Tensor, Sequence[Example]]:
        """A judge: reads a rollout that another worker drew, and its examples."""
        entry_BLC = rollout.trajectory.entry_BLC
        total_B = entry_BLC.sum((1, 2))
        entry_BLC.zero_()  # its own copy: nobody else may notice
        refs_B = torch.stack([example.style_refs[0].sum() for example in rollout.examples])
        return [example.id for example in rollout.examples], total_B + refs_B, rollout.examples


@dataclass(frozen=True)
class HostileFactory:
    folder: Path

    def __call__(self) -> Hostile:
        return Hostile(self.folder)


@dataclass(frozen=True)
class Broken:
    """A constructor that raises."""

    folder: Path

    def __call__(self) -> Hostile:
        Hostile(self.folder).note("broken")
        raise NoRoomError("no weights here")


@dataclass(frozen=True)
class Deadly:
    """A constructor that kills its process."""

    folder: Path

    def __call__(self) -> Hostile:
        Hostile(self.folder).note("deadly")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")
