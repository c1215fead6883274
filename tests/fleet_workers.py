"""Workers for tests of the fleet: small, importable in other processes, and hostile on request."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewardgen import interrupt
from rewardgen.distributed import ProcessError
from rewardgen.fleet.replica import Surroundings
from rewardgen.reward import RewardWarning
from rewardgen.rollout import RolloutWorker, Weights
from rewardgen.scoring import ScoringWorker
from rewardgen.types import Example, Rollout, RolloutRequest, Score
from tests.toys import ToyJudge, ToyPolicy, ToyReward

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds that a test waits for what should come at once: the machine may be busy."""


def patiently(start: Callable[[], T], undo: Callable[[], None], times: int = 4) -> T:
    """Ray gives its own processes 30 s to come up, which a busy machine may not have: try again."""
    for left in reversed(range(times)):
        try:
            return start()
        except Exception:
            undo()
            if not left:
                raise
    raise AssertionError("unreachable")


@contextmanager
def ray_session(num_cpus: int = 16) -> Iterator[None]:
    """One Ray for a module; pools join it and leave it running. Workers are not behind other processes in line."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    patiently(
        lambda: ray.init(
            "local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        ),
        ray.shutdown,
    )
    try:
        yield
    finally:
        ray.shutdown()


def toy_policy(seed: int = 0) -> ToyPolicy:
    """A toy policy whose trained parameters have a seed of their own; what is frozen is the same in all."""
    policy = ToyPolicy()
    with torch.no_grad():
        for name, parameter in ToyPolicy(seed=seed).trainable().items():
            policy.trainable()[name].copy_(parameter)
    return policy


class Slow:
    """A rollout worker with other weights than the learner's: the right ones must come with the request.

    Args:
        seconds: each rollout takes longer by so much, so that a signal may fall into it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.inner = RolloutWorker(toy_policy(99))

    def rollout(self, request: RolloutRequest, weights: Weights) -> Rollout:
        time.sleep(self.seconds)
        return self.inner.rollout(request, weights)

    def pid(self) -> int:
        return os.getpid()

    def surroundings(self) -> Surroundings:
        return Surroundings.here()


@dataclass(frozen=True)
class ToyFactory:
    seconds: float = 0.0

    def __call__(self) -> Slow:
        return Slow(self.seconds)


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
        return value * 2

    def pid(self) -> int:
        return os.getpid()

    def nap(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    def die(self, tag: str, times: int, value: int) -> int:
        """Kill the process the first `times` times."""
        if self.note(tag) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    def hang(self, tag: str, times: int, value: int) -> int:
        """Stop the process the first `times` times: only SIGKILL ends it."""
        if self.note(tag) <= times:
            os.kill(os.getpid(), signal.SIGSTOP)
        return value

    def spoil(self, shared: Tensor) -> Tensor:
        """The sum of what came plus one, written in place."""
        shared += 1
        return shared.sum()

    def fail(self, tag: str) -> None:
        self.note(tag)
        raise NoRoomError(tag)

    def large(self, tag: str, size: int) -> Tensor:
        """Too large to travel with the reply: it stays in the object store."""
        self.note(tag)
        return torch.arange(size, dtype=torch.float32)

    def score(self, rollout: Rollout) -> tuple[list[str], Tensor, Sequence[Example]]:
        """A judge: reads a rollout that another worker drew, and its examples."""
        entry_BLC = rollout.trajectory.entry_BLC
        total_B = entry_BLC.sum((1, 2))
        entry_BLC.zero_()  # its own copy: nobody else may notice
        refs_B = torch.stack([example.style_refs[0].sum() for example in rollout.examples])
        return [example.id for example in rollout.examples], total_B + refs_B, rollout.examples


class Touchy(ToyJudge):
    """A judge that warns of what it fails at, and does what files in a folder say, in whatever process it is.

    `die` kills the process that finds it, once; `raise` makes every score an error.
    """

    def __init__(self, folder: Path, fail_ids: Sequence[str] = ()) -> None:
        super().__init__(fail_ids)
        self.folder = folder

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        with suppress(FileNotFoundError):
            (self.folder / "die").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.folder / "raise").exists():
            raise NoRoomError("for doubts")
        for example in examples:
            if example.id in self.fail_ids:
                warnings.warn(f"no opinion of {example.id}", RewardWarning, stacklevel=2)
        return super().score(pixels_B3HW, examples)


@dataclass(frozen=True)
class JudgeFactory:
    folder: Path
    fail_ids: tuple[str, ...] = ()

    def __call__(self) -> ScoringWorker:
        return ScoringWorker({"judge": Touchy(self.folder, self.fail_ids)})


def processes_below(pid: int, name: str = "") -> set[int]:
    """Descendants of a process, of those whose command begins with a name; `ray::Replica` are workers."""
    parents, commands = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has just ended
            continue
    found, border = set(), {pid}
    while border:
        border = {child for child, parent in parents.items() if parent in border} - found
        found |= border
    return {child for child in found if commands.get(child, "").startswith(name)}


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


class FatalReward(ToyReward):
    """Kills the second learner's process at its n-th score, once.

    Args:
        marker: a file that is made then; an empty name kills nobody.
        at: n, from 1.
    """

    def __init__(self, marker: str = "", at: int = 1) -> None:
        super().__init__()
        self.marker, self.at, self.calls = marker, at, 0

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        self.calls += 1
        due = os.environ.get("RANK") == "1" and self.calls == self.at
        if self.marker and due and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(pixels_B3HW, examples)


@dataclass(frozen=True)
class Told:
    """A program of a group: says who it is, waits to be told to stop, and says so."""

    def __call__(self) -> dict[str, str]:
        print(f"rank {os.environ['RANK']} is here", flush=True)
        assert interrupt.ASKED.wait(PATIENCE)
        print("stopped")
        return {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}


@dataclass(frozen=True)
class Failing:
    """A program of a group that fails in the second process, and therefore in the first."""

    def __call__(self) -> None:
        if os.environ["RANK"] == "1":
            raise NoRoomError("no weights here")
        raise ProcessError("stopped, because process 1 failed")
