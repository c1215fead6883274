"""The loop: examples -> requests -> rollouts -> learner -> report, evaluation, checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rewardgen.batches import Batch, Batches, Dataset
from rewardgen.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from rewardgen.distributed import Strategy
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.fleet.pool import Handle, Pool
from rewardgen.fleet.schedule import Ahead
from rewardgen.interrupt import stop_signal
from rewardgen.learner import Learner, MicroBatch
from rewardgen.measure import Clock
from rewardgen.rollout import Precision, RolloutConfig, Weights, device_of
from rewardgen.samples import sample_requests, submit_samples
from rewardgen.settings import Settings
from rewardgen.types import Rollout, RolloutRequest, StepReport

__all__ = ["Dataset", "Outcome", "StepReporter", "TrainConfig", "Trainer", "choose_device"]


def _is_off(value: object) -> bool:
    return value is False


class TrainConfig(Settings):
    """Length, batches, arithmetic and safety of a run."""

    num_steps: int = Field(default=1000, ge=1)
    """Optimizer steps of the whole run."""
    batch_size: int = Field(default=1, ge=1)
    """Examples in one forward pass (the micro-batch) of each process."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches of each process in one optimizer step."""
    strategy: Strategy = "ddp"
    """How several processes (`torchrun`, `accelerate launch`) share the model: `ddp` copies it, `fsdp` shards it."""
    precision: Precision = "fp32"
    """Arithmetic of the policy's forward pass; trained parameters and optimizer stay as loaded (fp32)."""
    gradient_checkpointing: bool = False
    """Recompute the activations of the policy and its decoder in the backward pass: less memory, more time."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the average of the weights; the average is then what is evaluated and saved."""
    checkpoint_every: int = Field(default=100, ge=0)
    """Steps between checkpoints; 0 keeps only the one at the end."""
    keep_last: int = Field(default=2, ge=1)
    """How many checkpoints are kept, the newest."""
    keep_best: int = Field(default=0, ge=0)
    """How many more are kept: those of the best evaluations during training, each saved right after its evaluation."""
    keep_best_metric: str | None = None
    """The metric that says which are best, one of the evaluation's; higher is better."""
    max_nonfinite_steps: int = Field(default=5, ge=1)
    """The run stops after so many non-finite gradients in a row; single ones are skipped and counted."""
    term_grad_norms: bool = True
    """Report each reward's own gradient norm. With several rewards: one backward pass through the policy for each.
    False lets them share one, but only where `accumulation` and `rollout.entries_per_rollout` are 1: with more, what
    each reward's gradient is divided by (its valid scores in the whole step) is not known before the last pass."""
    prompt_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that a flow-matching example loses its prompt. Rollouts lose nothing."""
    content_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability that a flow-matching example loses its content references (0.25 in USO's joint training)."""
    style_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability that a flow-matching example loses its style references (0.25 in USO's joint training)."""
    compile: bool = Field(default=False, exclude_if=_is_off)
    """Compile the policy's repeated blocks (`torch.compile`): faster steps after minutes of compiling at the start."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:1`."""

    @model_validator(mode="after")
    def _best_by_something(self) -> Self:
        if self.keep_best and self.keep_best_metric is None:
            raise ValueError(f"keep_best is {self.keep_best}, but keep_best_metric does not say by which metric")
        return self


class StepReporter(Protocol):
    """What the loop needs of a reporter."""

    def step(self, report: StepReport, /) -> None:
        """Record a finished step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended: steps completed in all, whether a signal ended it, and its last checkpoint."""

    completed_steps: int
    interrupted: bool
    checkpoint: Path


class Trainer:
    """Runs the loop.

    Every random choice derives from (seed, purpose, step, example, place in the batch) and the data's order is a
    function of the step, so that a resumed run equals the uninterrupted one, and a step does not depend on how it is
    cut into micro-batches or shared among the learner's processes. Each of these has a trainer and runs it alike; the
    first one's reports and saves.

    Args:
        learner: holds the policy and the objective.
        pool: replicas of `RolloutWorker`.
        scoring: replicas of `ScoringWorker` with the objective's rewards that score samples; needed where it has any.
        dataset: training examples; at least one.
        rollout: how pictures are drawn.
        config: length, batches, safety.
        seed: the run's seed.
        staleness: updates by which the weights of a rollout lag behind, and batches drawn ahead (see `Ahead`).
        folder: checkpoints go to `folder/checkpoints`.
        reporter: gets each step's report.
        evaluate: called with the number of completed steps, every `evaluate_every` steps; returns the metrics' means.
        evaluate_every: 0 never calls it.
    """

    def __init__(
        self,
        learner: Learner,
        pool: Pool,
        dataset: Dataset,
        *,
        rollout: RolloutConfig,
        config: TrainConfig,
        seed: int,
        staleness: int = 0,
        folder: Path,
        reporter: StepReporter,
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
        evaluate_every: int = 0,
        scoring: Pool | None = None,
    ) -> None:
        self.learner = learner
        self.processes = learner.processes
        if learner.objective.sampled and scoring is None:
            raise ConfigError(f"nobody scores the samples for {sorted(learner.objective.sampled)}: pass scoring=")
        self.pool = pool
        self.scoring = scoring
        self.batches = Batches(
            dataset,
            rollout=rollout,
            config=config,
            seed=seed,
            processes=self.processes,
            prepare=lambda example: learner.policy.read_encodings([example]),
        )
        self.config = config
        self.checkpoints = folder / "checkpoints"
        self.completed_steps = 0
        self._reporter = reporter
        self._evaluate = evaluate
        self._evaluate_every = evaluate_every
        self._best: dict[int, dict[str, float]] = {}
        self._ahead = Ahead(
            put=lambda weights: self.pool.put(weights),
            plan=self._plan,
            needs_weights=self._needs_weights,
            submit=self._submit,
            publish=learner.publish,
            staleness=staleness,
            num_steps=config.num_steps,
        )

    def run(self) -> Outcome:
        """Train to `config.num_steps`, from step 0 or from where `resume` left off.

        SIGINT or SIGTERM let the step finish, save a checkpoint and return; a second one acts at once.
        """
        checkpoint: Path | None = None
        with ExitStack() as stack:
            stack.callback(self.batches.close)
            stopped = stack.enter_context(stop_signal())
            while self.completed_steps < self.config.num_steps and not self._any(stopped.is_set()):
                checkpoint = None
                report = self.step(self.completed_steps)
                if self.processes.is_first:
                    self._reporter.step(report)
                self.completed_steps += 1
                among_best = False
                if self._evaluate is not None and _due(self.completed_steps, self._evaluate_every):
                    among_best = self._among_best(self._evaluate(self.completed_steps))
                if among_best or _due(self.completed_steps, self.config.checkpoint_every):
                    checkpoint = self.save()
            return Outcome(
                completed_steps=self.completed_steps,
                interrupted=self.completed_steps < self.config.num_steps,
                checkpoint=checkpoint or self.save(),
            )

    def step(self, step: int) -> StepReport:
        """Run one optimizer step and return its report."""
        clock = Clock(device_of(self.learner.policy))
        pending = self._ahead.ask(step, clock)
        with clock.phase("rollout"):
            drawn: list[Rollout] = [future.result().get() for future in pending.futures]
        figures = self._figures(drawn)
        report = self.learner.step(self._micro_batches(pending.batch, drawn), step=step)
        return dataclasses.replace(
            report,
            policy_version=drawn[0].policy_version if drawn else report.policy_version,
            seconds_by_phase=clock.seconds_by_phase | dict(report.seconds_by_phase),
            metrics=dict(report.metrics) | figures,
        )

    def _plan(self, step: int) -> Batch:
        """The examples of a step; those of the next are read while it is drawn and learned from."""
        batch = self.batches.plan(step)
        if step + 1 < self.config.num_steps:
            self.batches.read_ahead(step + 1)
        return batch

    def _needs_weights(self, step: int) -> bool:
        objective = self.learner.objective
        return objective.needs_rollout(step) or bool(objective.active_samples(step))

    def _submit(self, batch: Batch, weights: Handle[Weights]) -> list[Future[Handle[Any]]]:
        """Ask for everything that is drawn for a batch: a prefix for each micro-batch, then the samples of each."""
        objective, futures = self.learner.objective, []
        if objective.needs_rollout(batch.step):
            futures = [
                self.pool.submit("rollout", request, weights, about=f"the rollout of {_name(request)}")
                for request in self.batches.requests(batch)
            ]
        config = objective.config.policy_gradient
        asked = objective.active_samples(batch.step)
        if config is not None and self.scoring is not None and asked:
            rollout, seed = self.batches.rollout, self.batches.seed
            for micro_batch in batch.micro_batches:
                requests = sample_requests(micro_batch, config, rollout, step=batch.step, seed=seed)
                futures += submit_samples(requests, weights, pool=self.pool, scoring=self.scoring, names=asked)
        return futures

    def _micro_batches(self, batch: Batch, drawn: Sequence[Rollout]) -> list[MicroBatch]:
        """What the learner gets, from what `_submit` asked for, in that order."""
        number = len(batch.micro_batches)
        prefixes = number if self.learner.objective.needs_rollout(batch.step) else 0
        samples, size = drawn[prefixes:], (len(drawn) - prefixes) // number
        made = self.batches.micro_batches(batch, drawn[:prefixes])
        if not samples:
            return made
        return [dataclasses.replace(m, samples=samples[i * size : (i + 1) * size]) for i, m in enumerate(made)]

    def _figures(self, drawn: Sequence[Rollout]) -> dict[str, float]:
        """The fleet's figures, and by how many updates what was drawn lags behind where it may."""
        figures = {f"fleet/{name}": value for name, value in self.pool.figures().items()}
        if self.scoring is not None:
            figures |= {f"judges/{name}": value for name, value in self.scoring.figures().items()}
        if drawn and self._ahead.staleness:
            figures["fleet/staleness"] = float(self.learner.version - drawn[0].policy_version)
        return figures

    def save(self, evaluation: Mapping[str, float] | None = None) -> Path:
        """Write a checkpoint of everything and remove old ones. All processes call it, the first one writes.

        Args:
            evaluation: means of an evaluation at the present step that the loop will not get to see, because the run
                ends with it; the checkpoint may be one of the best by it.
        """
        if evaluation is not None:
            self._among_best(evaluation)
        tensors, state = self.learner.state()
        published = self._ahead.published()
        for number, weights in published.items():
            tensors |= {f"published/{number}/{name}": tensor for name, tensor in weights.tensors.items()}
        if not self.processes.is_first:
            self.processes.exchange("a checkpoint")
            return checkpoint_path(self.checkpoints, self.completed_steps)
        path = save_checkpoint(
            self.checkpoints,
            step=self.completed_steps,
            tensors=tensors,
            state={
                "completed_steps": self.completed_steps,
                "run": self._identity(),
                "learner": state,
                "published": {str(number): weights.version for number, weights in published.items()},
                "best": {str(step): means for step, means in self._best.items()},
            },
        )
        # The new one is named too: where a damaged one of a later step lies there, it is not the newest.
        best = [checkpoint_path(self.checkpoints, step) for step in self._best]
        prune_checkpoints(self.checkpoints, self.config.keep_last, keep=[path, *best])
        self.processes.exchange("a checkpoint")
        return path

    def resume(self, path: Path | None = None) -> int:
        """Continue from a checkpoint, by default the newest whole one; returns the number of completed steps.

        Raises:
            CheckpointError: there is none, or it belongs to a run with other data, seed or batch.
        """
        path = path or latest_checkpoint(self.checkpoints)
        if path is None:
            raise CheckpointError(f"{self.checkpoints} holds no checkpoint to resume from; start without --resume")
        tensors, state = load_checkpoint(path)
        for key, value in self._identity().items():
            found = state.get("run", {}).get(key)
            if found != value:
                raise CheckpointError(f"{path} was made with {key} = {found}, this run has {value}: it cannot go on")
        published = _published(tensors, state.get("published", {}))
        self.learner.load_state(tensors, state["learner"])
        self.completed_steps = int(state["completed_steps"])
        self._ahead.restore(self.completed_steps, published)
        best = {int(step): dict(means) for step, means in state.get("best", {}).items()}
        # One that is gone must not keep another from being among the best. The one just read may lie under another
        # name: its writer died while it replaced it.
        there = {self.completed_steps} | {step for step in best if checkpoint_path(self.checkpoints, step).is_dir()}
        self._best = self._top({step: means for step, means in best.items() if step in there})
        found = sorted(set(self.processes.exchange("the resumed step", self.completed_steps)))
        if len(found) > 1:
            raise CheckpointError(f"the processes found checkpoints of steps {found}: do they share {path.parent}?")
        return self.completed_steps

    def _among_best(self, means: Mapping[str, float]) -> bool:
        """Note an evaluation at the present step; whether its checkpoint is one to keep."""
        if self.config.keep_best:
            finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
            self._best = self._top(self._best | {self.completed_steps: finite})
        return self.completed_steps in self._best

    def _top(self, noted: Mapping[int, dict[str, float]]) -> dict[int, dict[str, float]]:
        """The best evaluations by step; of equals the older. One without a valid score is never among them.

        All its means stay noted: a resumed run may go by another metric.
        """
        metric = self.config.keep_best_metric or ""
        ranked = sorted((-means[metric], step) for step, means in noted.items() if metric in means)
        return {step: noted[step] for _, step in ranked[: self.config.keep_best]}

    def _any(self, flag: bool) -> bool:
        """Whether a flag is up in any process: all must end at the same step."""
        return any(self.processes.exchange("the next step", flag))

    def _identity(self) -> dict[str, int]:
        """What the run's numbers depend on besides its experiment: with another one it would not be the same run."""
        return self.batches.identity() | {"staleness": self._ahead.staleness}


def choose_device(name: str) -> torch.device:
    """The device of `train.device`.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device: '{name}' is no device; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"train.device: '{name}' is not there, torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _due(completed_steps: int, every: int) -> bool:
    return every > 0 and completed_steps % every == 0


def _name(request: RolloutRequest) -> str:
    return f"step {request.step}, examples {', '.join(example.id for example in request.examples)}"


def _published(tensors: dict[str, Tensor], versions: Mapping[str, int]) -> dict[int, Weights]:
    """Take the weights that a checkpoint keeps for rollouts out of its tensors."""
    found = {}
    for number, version in versions.items():
        prefix = f"published/{number}/"
        names = [key for key in tensors if key.startswith(prefix)]
        weights = {key.removeprefix(prefix): tensors.pop(key) for key in names}
        found[int(number)] = Weights(version=version, tensors=weights)
    return found
