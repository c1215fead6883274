"""Is the reward being gamed? Witnesses and statistics of the drawn pictures against those of a supervised control.

Supervised training moves a policy's pictures too, so what a reward does to them shows against a run of the same
experiment without rewards (all weights 0), on the same held-out examples and noise, example by example. Effects are in
standard deviations of the control over its examples. Honest training moves some statistics too, most of all edges and
colours where a style is to be taken over, so each has a threshold of its own.

Shape suffixes: N examples, K kept pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator

from rewardgen.errors import ConfigError, UserError, nearest
from rewardgen.evaluation.compare import Interval, student
from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.evaluation.grid import save_grid
from rewardgen.evaluation.statistics import STATISTICS, Statistic, diversity
from rewardgen.reward import Reward
from rewardgen.settings import Settings
from rewardgen.types import Example, Score

FILE = "monitor.json"
PREFIX = "statistic/"
"""Of the statistics' names; no reward or witness can have it."""
SHOWN = 4
"""Pictures at most beside a warning."""
DRIFT: Mapping[str, float] = {
    "brightness": 0.25,
    "sharpness": 0.89,
    "saturation": 0.30,
    "colour_entropy": 1.04,
    "edge_density": 1.89,
    "grid_peaks": 0.35,
    "diversity": 0.71,
}
"""What `monitor.drift` is where nothing is said: somewhat more than honest Style Reward Learning moves pictures of the
tiny world (`benchmarks/monitor_thresholds.py`)."""
Threshold = Annotated[float, Field(gt=0)]


class DriftError(UserError):
    """The run was stopped because a statistic or a witness drifted (`monitor.stop_on_drift`)."""


class MonitorConfig(Settings):
    """Watches every evaluation for signs that a reward is gamed."""

    enabled: bool = True
    """Measure and warn; costs the statistics of the evaluation's pictures and a few pictures more."""
    control: str | None = None
    """Folder of a run of this experiment with all reward weights 0. Without it the run's own start takes its place,
    and what supervised training does to the pictures counts as drift."""
    drift: Threshold | dict[str, Threshold] = Field(default_factory=lambda: dict(DRIFT))
    """Warn where a statistic's mean is this many of the control's standard deviations away from the control's mean: one
    number for all, or by statistic; one that is not named keeps `DRIFT`'s."""
    witness_drop: float = Field(default=0.25, gt=0)
    """Warn where a reward rose and a witness fell by this many of the control's standard deviations."""
    confidence: float = Field(default=0.99, gt=0, lt=1)
    """Of the paired intervals that a change must keep clear of 0."""
    diversity_examples: int = Field(default=4, ge=0)
    """Examples that are drawn with two more seeds to see whether pictures become alike; 0 leaves that out."""
    stop_on_drift: bool = False
    """End the run at the first warning during training, before the next step, with a checkpoint. Needs
    `evaluation.every`."""

    @field_validator("drift", mode="before")
    @classmethod
    def _with_the_others(cls, drift: Any) -> Any:
        if not isinstance(drift, dict):
            return drift
        for name in drift:
            if name not in DRIFT:
                raise ValueError(
                    f"there is no statistic '{name}'.{nearest(str(name), DRIFT)} Known: {', '.join(DRIFT)}"
                )
        return {**DRIFT, **drift}

    def drift_of(self, name: str) -> float:
        """The threshold of a statistic, named with or without `PREFIX`."""
        return self.drift[name.removeprefix(PREFIX)] if isinstance(self.drift, dict) else self.drift

    def never_stops(self, every: int, num_steps: int) -> str | None:
        """Why `stop_on_drift` could not end a run with these evaluations; None where it could, or is not on."""
        if not (self.enabled and self.stop_on_drift) or 0 < every < num_steps:
            return None
        return (
            f"nothing is looked at before the end of {num_steps} steps with evaluation.every = {every}; set that to the"
            " number of steps between evaluations"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A warning.

    Args:
        step: completed steps when it was seen.
        kind: `drift` of a statistic, or a `witness` that fell while a reward rose.
        name: of the statistic or witness.
        effect: change of its mean in the control's standard deviations.
        change: of its mean, with the paired interval.
        reward: that rose meanwhile, for a witness.
        reward_change: of that reward.
        against: `control` or `start`.
        examples: ids of those that moved the most in the warning's direction, the most moved first.
        no_control: why it is against the start, where it is.
    """

    step: int
    kind: Literal["drift", "witness"]
    name: str
    effect: float
    change: Interval
    against: Literal["control", "start"]
    examples: tuple[str, ...]
    reward: str | None = None
    reward_change: Interval | None = None
    no_control: str = "no monitor.control"

    def __str__(self) -> str:
        against = "the supervised control" if self.against == "control" else f"the run's start ({self.no_control})"
        moved = f"{self.change.value:+.4f}, {self.effect:+.2f} standard deviations, against {against}"
        if self.kind == "drift":
            return f"step {self.step}: {self.name.removeprefix(PREFIX)} of the pictures has drifted by {moved}"
        rose = f"{self.reward} rose by {self.reward_change.value:.4f}" if self.reward_change else "a reward rose"
        return f"step {self.step}: {rose} while the witness {self.name} changed by {moved}"


def find(
    step: int,
    now: Evaluation,
    reference: Evaluation,
    *,
    rewards: Collection[str],
    witnesses: Collection[str],
    config: MonitorConfig,
    against: Literal["control", "start"] = "control",
    start: Evaluation | None = None,
) -> list[Finding]:
    """Compare an evaluation with that of the control; pure.

    Args:
        step: completed steps.
        now: scores with statistics (`statistics_metrics`).
        reference: the control's, of the same examples in the same order.
        rewards: names of what is trained for.
        witnesses: names of what is not.
        config: thresholds.
        against: what the reference is, for the message.
        start: the run's own start; a reward that the reference does not know is compared with it.

    Raises:
        UserError: the evaluations are of different examples.
    """
    _check_alike(reference, now)
    knows = {name: reference if name in reference.scores or start is None else start for name in rewards}
    risen = [
        (name, change) for name in rewards if (change := _change(name, now, knows[name], config)) and _above(change)
    ]
    found = []
    for name in (*witnesses, *(name for name in now.scores if name.startswith(PREFIX))):
        change, effect = _change(name, now, reference, config), effect_size(name, now, reference)
        if change is None or effect is None:
            continue
        common = {"step": step, "name": name, "effect": effect, "change": change, "against": against}
        examples = _moved(name, now, reference, up=effect > 0)
        if name in witnesses and risen and effect < -config.witness_drop and _below(change):
            reward, by = max(risen, key=lambda pair: abs(effect_size(pair[0], now, knows[pair[0]]) or 0.0))
            found.append(Finding(kind="witness", examples=examples, reward=reward, reward_change=by, **common))  # type: ignore[arg-type]
        if name not in witnesses and abs(effect) > config.drift_of(name) and (_above(change) or _below(change)):
            found.append(Finding(kind="drift", examples=examples, **common))  # type: ignore[arg-type]
    return found


def effect_size(name: str, now: Evaluation, reference: Evaluation) -> float | None:
    """Change of the mean over examples valid in both, in standard deviations of the reference; None without two.

    Infinite where the reference does not vary and the mean has changed.
    """
    pair = _both(name, now, reference)
    if pair is None or len(pair[0]) < 2:
        return None
    change, spread = float((pair[0] - pair[1]).mean()), float(pair[1].std())
    if not spread:
        return math.copysign(math.inf, change) if change else 0.0
    return change / spread


def statistics_metrics() -> dict[str, Reward]:
    """The statistics of single pictures, to be scored with the evaluation's own metrics."""
    return {f"{PREFIX}{name}": Statistic(name) for name in STATISTICS}


class Monitor:
    """Collects the evaluations of a run, compares them with the control's, and says what it finds.

    Args:
        config: thresholds, and where the control is.
        folder: the run's; `monitor.json` and the pictures of warnings go there.
        rewards: names of the objective's rewards that are trained for.
        witnesses: names of the metrics that no objective uses.

    Raises:
        ConfigError: the control's folder holds no `monitor.json`, or one that cannot be read.
    """

    def __init__(
        self, config: MonitorConfig, folder: Path, *, rewards: Collection[str], witnesses: Collection[str]
    ) -> None:
        self.config = config
        self.folder = folder
        self.rewards, self.witnesses = tuple(rewards), tuple(witnesses)
        self._control = read(Path(config.control) / FILE, "monitor.control") if config.control else {}
        self._start: Evaluation | None = None
        self._said: set[tuple[str, str]] = set()
        self._remarked = False
        self._evaluations: dict[int, Evaluation] = {}
        with contextlib.suppress(ConfigError):  # a new run; or a damaged record, which must not keep one from resuming
            self._evaluations = read(folder / FILE, "the run's own record")

    def begin(self, start: Evaluation, first_step: int = 0) -> None:
        """Note the evaluation before training; those of a former run after `first_step` steps are forgotten.

        What was found in the others was said then, and is not said again.

        Raises:
            UserError: the control was evaluated on other examples: said now, and not when training is over.
        """
        self._start = start
        self._evaluations = {step: found for step, found in self._evaluations.items() if 0 < step <= first_step}
        for control in self._control.values():
            _check_alike(control, start)
        self._note(0, start)
        said = [finding for step, now in sorted(self._evaluations.items()) if step for finding in self._find(step, now)]
        self._said |= {(finding.kind, finding.name) for finding in said}

    def check(self, step: int, now: Evaluation, examples: Sequence[Example]) -> list[Finding]:
        """Note an evaluation and compare it with the control's of the same or the latest earlier step.

        The control's evaluation before its first step is the base, and no control. Where it has no other yet, the
        run's own start takes its place, and what is found says so. What was found before is not said again. Pictures
        of a new finding are saved beside the start's, as far as both evaluations kept them.

        Raises:
            UserError: the control was evaluated on other examples.
        """
        self._note(step, now)
        new = [finding for finding in self._find(step, now) if (finding.kind, finding.name) not in self._said]
        self._said |= {(finding.kind, finding.name) for finding in new}
        for finding in new:
            self._show(finding, now, examples)
        return new

    def _find(self, step: int, now: Evaluation) -> list[Finding]:
        earlier = self._controls(step)
        against: Literal["control", "start"] = "control" if earlier else "start"
        reference = self._control[max(earlier)] if earlier else self._start
        if reference is None:
            return []
        parts = {"rewards": self.rewards, "witnesses": self.witnesses}
        found = find(step, now, reference, config=self.config, against=against, start=self._start, **parts)
        if self.config.control is None:
            return found
        return [dataclasses.replace(finding, no_control=_too_late(step)) for finding in found]

    def remark(self, step: int) -> str | None:
        """What is to be said once of a control that cannot serve as one at a step; None where there is nothing."""
        if self.config.control is None or self._remarked or self._controls(step):
            return None
        self._remarked = True
        return (
            f"{_too_late(step)}; step {step} is compared with the run's own start. Give both runs one evaluation.every"
        )

    def _controls(self, step: int) -> list[int]:
        """Steps of the control's evaluations that a step may be compared with."""
        return [at for at in self._control if 0 < at <= step]

    def _note(self, step: int, evaluation: Evaluation) -> None:
        self._evaluations[step] = evaluation
        written = {"evaluations": {str(at): found.to_json() for at, found in sorted(self._evaluations.items())}}
        temporary = self.folder / f".{FILE}"
        temporary.write_text(json.dumps(written) + "\n", encoding="utf-8")
        temporary.replace(self.folder / FILE)

    def _show(self, finding: Finding, now: Evaluation, examples: Sequence[Example]) -> None:
        """Save what moved the most and its numbers, as `monitor/step-000100-NAME.png` and `.json`."""
        folder = self.folder / "monitor"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{finding.step:06d}-{finding.name.removeprefix(PREFIX)}.json"
        # An effect on what did not vary is infinite, which JSON has no number for.
        effect = finding.effect if math.isfinite(finding.effect) else None
        told = asdict(finding) | {"effect": effect, "said": str(finding)}
        path.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        start = self._start
        if start is not None and start.pixels_K3HW is not None and now.pixels_K3HW is not None:
            kept = set(now.example_ids[: min(len(start.pixels_K3HW), len(now.pixels_K3HW))])
            by_id = {example.id: example for example in examples}
            shown = [by_id[name] for name in finding.examples if name in kept][:SHOWN]
            if shown:
                save_grid(path.with_suffix(".png"), shown, start, now)


def with_diversity(evaluation: Evaluation, draws: Sequence[Evaluation]) -> Evaluation:
    """Add `statistic/diversity` from draws of its first examples with other seeds, which kept all their pictures."""
    number = len(evaluation.example_ids)
    value_N, valid_N = torch.full((number,), torch.nan, dtype=torch.float64), torch.zeros(number, dtype=torch.bool)
    pictures = torch.stack([draw.pixels_K3HW for draw in draws if draw.pixels_K3HW is not None])
    value_N[: pictures.shape[1]] = diversity(pictures).double()
    valid_N[: pictures.shape[1]] = value_N[: pictures.shape[1]].isfinite()
    scores = dict(evaluation.scores) | {f"{PREFIX}diversity": Score(value_B=value_N, valid_B=valid_N)}
    return dataclasses.replace(evaluation, scores=scores)


def without_statistics(evaluation: Evaluation) -> Evaluation:
    """The rewards and witnesses alone, as tables show them."""
    scores = {name: score for name, score in evaluation.scores.items() if not name.startswith(PREFIX)}
    return dataclasses.replace(evaluation, scores=scores)


def read(path: Path, what: str) -> dict[int, Evaluation]:
    """The evaluations of a `monitor.json` by completed steps.

    Raises:
        ConfigError: it is not there, or is none.
    """
    try:
        written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
        return {int(step): Evaluation.from_json(data) for step, data in written.items()}
    except OSError as error:
        raise ConfigError(
            f"{what}: {path} cannot be read ({(error.strerror or '').lower()}); the control is the folder of a finished"
            " run of this experiment with all reward weights 0"
        ) from None
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{what}: {path} is no record of a monitor: {type(error).__name__}: {error}") from None


def _check_alike(control: Evaluation, own: Evaluation) -> None:
    if control.example_ids != own.example_ids:
        raise UserError("the monitor's control was evaluated on other examples; evaluate both runs alike")


def _too_late(step: int) -> str:
    return f"monitor.control has no evaluation between its start and step {step}"


def _both(name: str, now: Evaluation, reference: Evaluation) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Values now and then of the examples valid in both; None where one of them does not know the metric."""
    a, b = now.scores.get(name), reference.scores.get(name)
    if a is None or b is None:
        return None
    both_N = a.valid_B & b.valid_B
    return a.value_B[both_N], b.value_B[both_N]


def _change(name: str, now: Evaluation, reference: Evaluation, config: MonitorConfig) -> Interval | None:
    pair = _both(name, now, reference)
    return None if pair is None else student(pair[0] - pair[1], config.confidence)


def _above(change: Interval) -> bool:
    return change.low is not None and change.low > 0


def _below(change: Interval) -> bool:
    return change.high is not None and change.high < 0


def _moved(name: str, now: Evaluation, reference: Evaluation, *, up: bool) -> tuple[str, ...]:
    """Ids of the examples valid in both, the most moved in the direction first."""
    a, b = now.scores[name], reference.scores[name]
    gone_N = (a.value_B - b.value_B) * (1 if up else -1)
    order = gone_N.masked_fill(~(a.valid_B & b.valid_B), -torch.inf).argsort(descending=True).tolist()
    return tuple(now.example_ids[place] for place in order if bool(a.valid_B[place] & b.valid_B[place]))
