"""The loop: examples -> requests -> rollouts -> learner -> report, evaluation, checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from pydantic import Field, model_validator

from rewardgen.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from rewardgen.distributed import Strategy
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.fleet.pool import Pool
from rewardgen.flow.window import draw_entry
from rewardgen.interrupt import stop_signal
from rewardgen.learner import Learner, MicroBatch
from rewardgen.measure import Clock
from rewardgen.rollout import Precision, RolloutConfig, device_of
from rewardgen.samples import sample_requests, submit_samples
from rewardgen.seeds import derive_seed, seed_globals
from rewardgen.settings import Settings
from rewardgen.types import Example, Rollout, RolloutRequest, StepReport


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
    """Report each reward's own gradient norm. With several rewards: one backward pass through the policy for each."""
    prompt_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that a flow-matching example loses its prompt. Rollouts lose nothing."""
    content_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability that a flow-matching example loses its content references (0.25 in USO's joint training)."""
    style_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability that a flow-matching example loses its style references (0.25 in USO's joint training)."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:1`."""

    @model_validator(mode="after")
    def _best_by_something(self) -> Self:
        if self.keep_best and self.keep_best_metric is None:
            raise ValueError(f"keep_best is {self.keep_best}, but keep_best_metric does not say by which metric")
        return self


class Dataset(Protocol):
    """Examples by position."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int, /) -> Example:
        """The example at an index in [0, len)."""


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
        folder: Path,
        reporter: StepReporter,
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
        evaluate_every: int = 0,
        scoring: Pool | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise ConfigError("data.train has no examples")
        self.learner = learner
        self.processes = learner.processes
        if learner.objective.sampled and scoring is None:
            raise ConfigError(f"nobody scores the samples for {sorted(learner.objective.sampled)}: pass scoring=")
        self.pool = pool
        self.scoring = scoring
        self.dataset = dataset
        self.rollout = rollout
        self.config = config
        self.seed = seed
        self.checkpoints = folder / "checkpoints"
        self.completed_steps = 0
        self._reporter = reporter
        self._evaluate = evaluate
        self._evaluate_every = evaluate_every
        self._best: dict[int, dict[str, float]] = {}

    def run(self) -> Outcome:
        """Train to `config.num_steps`, from step 0 or from where `resume` left off.

        SIGINT or SIGTERM let the step finish, save a checkpoint and return; a second one acts at once.
        """
        checkpoint: Path | None = None
        with stop_signal() as stopped:
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
        seed_globals(derive_seed(self.seed, "globals", step))
        clock = Clock(device_of(self.learner.policy))
        with clock.phase("data"):
            batches = self._examples(step)
        with clock.phase("rollout"):
            rollouts = self._rollouts(step, batches)
            samples = self._samples(step, batches)
        micro_batches = [
            MicroBatch(
                examples=[self._drop(example, step, place) for place, example in batch],
                seed_B=[derive_seed(self.seed, "flow_matching", step, example.id, place) for place, example in batch],
                image_size=self.rollout.image_size,
                rollout=rollout,
                samples=drawn,
            )
            for batch, rollout, drawn in zip(batches, rollouts, samples, strict=True)
        ]
        report = self.learner.step(micro_batches, step=step)
        return dataclasses.replace(report, seconds_by_phase=clock.seconds_by_phase | dict(report.seconds_by_phase))

    def _examples(self, step: int) -> list[list[tuple[int, Example]]]:
        """This process's micro-batches of the step: (place in the batch of all processes, example).

        Each epoch is a permutation of the data, and each process has the places after those of the one before it.
        """
        size, share = len(self.dataset), self.config.batch_size * self.config.accumulation
        chosen = []
        for place in range(self.processes.rank * share, (self.processes.rank + 1) * share):
            epoch, position = divmod(step * share * self.processes.size + place, size)
            chosen.append((place, self.dataset[_permutation(derive_seed(self.seed, "order", epoch), size)[position]]))
        return [chosen[i : i + self.config.batch_size] for i in range(0, share, self.config.batch_size)]

    def _rollouts(self, step: int, batches: list[list[tuple[int, Example]]]) -> list[Rollout] | list[None]:
        """Draw the prefixes for the reward terms; fresh noise, full conditions, one entry step for the whole batch."""
        if not self.learner.objective.needs_rollout(step):
            return [None] * len(batches)
        num_steps = self.rollout.num_steps
        entry_step = draw_entry(self.rollout.window, num_steps, derive_seed(self.seed, "entry_step", step))
        weights = self.pool.put(self.learner.publish())
        requests = [
            RolloutRequest(
                step=step,
                examples=[example for _, example in batch],
                seed_B=tuple(derive_seed(self.seed, "rollout", step, example.id, place) for place, example in batch),
                image_size=self.rollout.image_size,
                num_steps=num_steps,
                stop_step=entry_step,
            )
            for batch in batches
        ]
        futures = []
        for request in requests:
            # What a plug-in draws from the global generators belongs to the micro-batch, whichever process has it.
            seed_globals(derive_seed("rollout", *request.seed_B))
            futures.append(self.pool.submit("rollout", request, weights))
        return [future.result().get() for future in futures]

    def _samples(self, step: int, batches: list[list[tuple[int, Example]]]) -> list[list[Rollout]]:
        """Draw and score the samples of each micro-batch, for rewards that are learned from through them."""
        config = self.learner.objective.config.policy_gradient
        if config is None or self.scoring is None or not self.learner.objective.active_samples(step):
            return [[] for _ in batches]
        weights = self.pool.put(self.learner.publish())
        drawn = []
        for batch in batches:
            requests = sample_requests(batch, config, self.rollout, step=step, seed=self.seed)
            drawn.append(submit_samples(requests, weights, pool=self.pool, scoring=self.scoring))
        return [[future.result().get() for future in futures] for futures in drawn]

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

    def save(self) -> Path:
        """Write a checkpoint of everything and remove old ones. All processes call it, the first one writes."""
        tensors, state = self.learner.state()
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
        self.learner.load_state(tensors, state["learner"])
        self.completed_steps = int(state["completed_steps"])
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
        """What the order of the data depends on: with another one the run would not be the same run."""
        whole = self.config.batch_size * self.config.accumulation * self.processes.size
        return {"seed": self.seed, "number of examples": len(self.dataset), "examples in a step": whole}


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


@lru_cache(maxsize=2)
def _permutation(seed: int, size: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
