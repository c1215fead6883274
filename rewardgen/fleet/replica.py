"""What runs inside a worker process: one worker, called by method name with packed arguments."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import rewardgen
from rewardgen.fleet.payload import Packed, examples_in, pack, unpack
from rewardgen.reward import RewardWarning
from rewardgen.types import Begun, Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a worker's results depend on besides its arguments, and where it finds files, as in the learner."""

    threads: int
    matmul_precision: str
    deterministic: bool
    folder: str

    @classmethod
    def here(cls, threads: int | None = None) -> Surroundings:
        """This process's, with another number of threads where one is given."""
        return cls(
            threads=threads or torch.get_num_threads(),
            matmul_precision=torch.get_float32_matmul_precision(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            folder=os.getcwd(),
        )

    def enter(self) -> None:
        """Make this process's the same."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.use_deterministic_algorithms(self.deterministic)
        # Experiments name files of the folder that they were started from. On another machine it may not be there, or
        # what was shipped with a job stands in its place.
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A process of a cluster, and what runs there."""

    host: str
    pid: int
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def versions() -> dict[str, str]:
    """What must be equal in the learner and in every worker."""
    return {"Python": platform.python_version(), "torch": torch.__version__, "rewardgen": rewardgen.__version__}


class Replica:
    """A Ray actor. Its constructor makes no worker, so that what a worker's constructor raises is an ordinary error."""

    def __init__(self, surroundings: Surroundings) -> None:
        surroundings.enter()  # before anything of the user's is imported
        self._worker: Any = None

    def start(self, factory: Callable[[], Any]) -> Place:
        """Make the worker; returns where it is."""
        self._worker = factory()
        return Place(host=platform.node(), pid=os.getpid(), versions=versions())

    def ping(self) -> None:
        """Answered by whoever is alive."""

    def call(self, method: str, attached: Sequence[Packed | None], *args: Packed) -> tuple[tuple[str, ...], Packed]:
        """Call a method of the worker.

        Args:
            method: its name.
            attached: for each argument that another worker made, the examples of that worker's own request, which it
                left out of its reply; None for those of the learner's.
            args: its arguments.

        Returns:
            Two objects of the store. The first says that the call is done, and what rewards warned of meanwhile; the
            second stays where it is until somebody reads it. Examples that came with the call are left out.
        """
        values: list[Any] = []
        examples: list[Example] = []
        for arg, companion in zip(args, attached, strict=True):
            own = None if companion is None else unpack(companion)
            values.append(unpack(arg, own or ()))
            examples += examples_in(values[-1]) if own is None else own
        with warnings.catch_warnings(record=True) as caught:
            made = getattr(self._worker, method)(*values)
            packed = pack(made.finish() if isinstance(made, Begun) else made, examples)
        for other in (warning for warning in caught if not issubclass(warning.category, RewardWarning)):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        return tuple(str(warning.message) for warning in caught if issubclass(warning.category, RewardWarning)), packed
