"""What a step consists of, and what its parts take on one GPU: stated in a file, or read from a run's metrics."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rewardgen.errors import ConfigError, nearest
from rewardgen.settings import Settings

_ONCE = frozenset({"data", "optimizer"})
"""Phases of the learner that a step has once, however many micro-batches it has."""
_NOT_LEARNING = _ONCE | {"rollout", "weights"}
_LATEST = 50
"""Steps of a run that are looked at, the latest."""


class Costs(Settings):
    """Seconds that the parts of a step take on one GPU. A micro-batch is `train.batch_size` examples."""

    rollout_seconds: float = Field(ge=0)
    """Drawing one request: a micro-batch up to where the gradient window is entered, or one sample of each example."""
    learner_seconds: float = Field(ge=0)
    """All of the learner's passes for one micro-batch: window, decoding, rewards, flow matching, backward."""
    judge_seconds: float = Field(default=0.0, ge=0)
    """Scoring the samples of one request, where rewards score samples."""
    fixed_seconds: float = Field(default=0.0, ge=0)
    """What the learner does once in a step: data, summing gradients, optimizer."""
    weights_seconds: float = Field(default=0.0, ge=0)
    """Making new weights available to workers, once in a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a step asks for.

    Args:
        micro_batches: of all learners together.
        prefixes: requests of a micro-batch for rewards with a gradient: 1, or 0 where there are none.
        samples: requests of a micro-batch that are scored without one.
    """

    micro_batches: int
    prefixes: int = 1
    samples: int = 0

    @property
    def requests(self) -> int:
        """Requests of a step."""
        return self.micro_batches * (self.prefixes + self.samples)

    @property
    def judged(self) -> int:
        """Requests of a step whose pictures are scored without a gradient."""
        return self.micro_batches * self.samples


def stated(path: Path) -> Costs:
    """Costs from a JSON file with the fields of `Costs`.

    Raises:
        ConfigError: it cannot be read, lacks a cost or has one that is not known.
    """
    try:
        return Costs.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or '').lower()}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(Costs.model_fields)
            raise ConfigError(
                f"{path}: {key}: unknown cost.{nearest(key, Costs.model_fields) or f' There are: {known}.'}"
            ) from None
        raise ConfigError(f"{path}: {f'{key}: ' if key else ''}{first['msg'].lower()}") from None


def measured(metrics: Path, work: Work, *, remote: bool) -> Costs:
    """Costs from a run's `metrics.jsonl`: medians over its latest steps that drew, without the run's first.

    Scoring without a gradient in the learner's process is part of drawing there, so it is counted to `rollout_seconds`.

    Args:
        metrics: the file.
        work: of one of the run's processes.
        remote: the run drew on workers, so that the learner's `rollout` is only how long it waited.

    Raises:
        ConfigError: there is no such file, or none of its steps drew.
    """
    steps = [line for line in _steps(metrics) if line.get("reward_means") and not line.get("skipped")]
    steps = (steps[1:] or steps)[-_LATEST:]
    if not steps:
        raise ConfigError(f"{metrics}: no step of the run drew pictures: there is nothing to plan a fleet by")

    def median(names: Collection[str]) -> float:
        sums = (sum(float(step["seconds_by_phase"].get(name, 0.0)) for name in names) for step in steps)
        return float(statistics.median(sums))

    learning = {name for step in steps for name in step["seconds_by_phase"]} - _NOT_LEARNING
    drawing = _worker_seconds(metrics, steps) if remote else median({"rollout"}) / work.requests
    return Costs(
        rollout_seconds=drawing,
        judge_seconds=_judge_seconds(steps),
        learner_seconds=median(learning) / work.micro_batches,
        fixed_seconds=median(_ONCE),
        weights_seconds=median({"weights"}),
    )


def _worker_seconds(metrics: Path, steps: Sequence[Mapping[str, Any]]) -> float:
    """How long a worker is busy with a request."""
    found = _busy_seconds("fleet", steps)
    if not found:
        raise ConfigError(f"{metrics}: the run drew on workers, but its steps do not say how busy they were")
    return float(statistics.median(found))


def _judge_seconds(steps: Sequence[Mapping[str, Any]]) -> float:
    """How long a judge of the fleet is busy with a request; 0 where there is none, and whoever draws scores."""
    found = _busy_seconds("judges", steps)
    return float(statistics.median(found)) if found else 0.0


def _busy_seconds(pool: str, steps: Sequence[Mapping[str, Any]]) -> list[float]:
    figures = [step.get("metrics", {}) for step in steps]
    return [
        figure[f"{pool}/busy_share"] / figure[f"{pool}/requests_per_worker_second"]
        for figure in figures
        if figure.get(f"{pool}/requests_per_worker_second")
    ]


def _steps(metrics: Path) -> list[dict[str, Any]]:
    try:
        text = metrics.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{metrics}: cannot be read: {(error.strerror or '').lower()}") from None
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # the last line of a run that is being written
            continue
        if isinstance(value, dict) and value.get("kind") == "step" and "seconds_by_phase" in value:
            found.append(value)
    return found
