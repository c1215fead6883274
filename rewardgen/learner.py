"""The learner: the gradient of one optimizer step, and the step.

    L = w_fm * mean(L_fm) - sum_r w_r * mean(r(decode(clean_hat)))        (USO section 3: L_pre + lambda * L_SRL)

where a term may also depend on the scores of several rewards, t(r_1 .. r_k) in r's place (`composition`); and, for
rewards that score samples instead, plus w_pg times the loss of `policy_gradient.py` on these.

With several processes each has micro-batches of its own, and every mean goes over the valid examples of all of them.

Shape suffixes: B batch, L latent tokens, C channels per token, H and W pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rewardgen import sharding
from rewardgen.adaptive import ScoreSums
from rewardgen.base_policy import split_state
from rewardgen.distributed import Processes
from rewardgen.errors import CheckpointError, ConfigError, NonFiniteError
from rewardgen.flow.window import WindowConfig
from rewardgen.gradients import TermSums, geometry, projected, weighted_sum
from rewardgen.measure import Clock
from rewardgen.objective import FLOW_MATCHING, Objective
from rewardgen.optimizer import Optimizer, OptimizerConfig
from rewardgen.policy import Policy
from rewardgen.policy_gradient import POLICY_GRADIENT
from rewardgen.replay import Replay, Replayer, merged
from rewardgen.rollout import Precision, Weights, device_of
from rewardgen.seeds import derive_seed, seed_globals
from rewardgen.terms import MERGED, Differentiated, FlowMatchingTerm, MicroBatch, RewardTerms
from rewardgen.types import Rollout, StepReport

__all__ = ["Learner", "MicroBatch", "OptimizerConfig"]

_Updated: TypeAlias = tuple[StepReport, Mapping[str, ScoreSums]]


class Learner:
    """Turns micro-batches into updates of the policy's trained parameters.

    Args:
        policy: the policy; its trained parameters are changed in place.
        objective: the loss.
        optimizer: AdamW's settings.
        window: which steps of a rollout carry gradient.
        precision: arithmetic of the policy's forward pass; parameters and optimizer keep their own dtype.
        ema_decay: decay of the average of the weights, None for none.
        max_nonfinite_steps: the run stops after so many non-finite gradients in a row.
        term_grad_norms: report each reward's own gradient norm. With several rewards this costs one backward pass
            through the policy for each; without it they share one, where the step is a single micro-batch entered
            once. Of several, each term's sum is kept apart until its number of valid scores in the whole step is known.
        processes: all that train this policy, each with a learner of its own; by default this one alone. They start
            with equal weights (see `sharding.spread`) and stay equal.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        *,
        optimizer: OptimizerConfig,
        window: WindowConfig,
        precision: Precision = "fp32",
        ema_decay: float | None = None,
        max_nonfinite_steps: int = 5,
        term_grad_norms: bool = True,
        processes: Processes | None = None,
    ) -> None:
        if not policy.trainable():
            raise ConfigError("the policy trains nothing; name at least one of its parts in policy.args.train")
        self.policy = policy
        self.objective = objective
        self.max_nonfinite_steps = max_nonfinite_steps
        self.term_grad_norms = term_grad_norms
        self._projects = objective.config.conflicts == "project"
        self.processes = processes or Processes()
        self.version = 0
        self._names = list(policy.trainable())
        self._model = model = Differentiated(policy, precision, self.processes)
        self._flow_matching = FlowMatchingTerm(model)
        self._rewards = RewardTerms(model, objective, window)
        sampled = objective.config.policy_gradient
        self._replayer = None if sampled is None else Replayer(model, sampled)
        self._complete = sharding.summing(model.parameters)
        self._optimizer = Optimizer(policy.trainable(), optimizer, ema_decay=ema_decay)
        self._nonfinite_in_a_row = 0
        self._skipped_steps = 0

    @property
    def precision(self) -> Precision:
        """Arithmetic of the policy's forward pass."""
        return self._model.precision

    def step(self, micro_batches: Sequence[MicroBatch], *, step: int) -> StepReport:
        """One training step: an update, or as many as are to be made on the same samples.

        Raises:
            NonFiniteError: too many non-finite gradients in a row.
            ScoringError: a reward failed too often, or broke its contract.
            ProcessError: another process failed or is gone.
        """
        if self._replayer is not None and any(batch.samples for batch in micro_batches):
            report, scores = self._updates(self._replayer, micro_batches, step=step)
        else:
            report, scores = self._update(micro_batches, [()] * len(micro_batches), step=step)
        metrics = self.objective.metrics(scores, step)
        # Once in a step, after all its updates: weights and composition are frozen within it.
        self.objective.update(scores, step)
        return dataclasses.replace(report, metrics=metrics | dict(report.metrics))

    def _updates(self, replayer: Replayer, micro_batches: Sequence[MicroBatch], *, step: int) -> _Updated:
        """As many updates as are to be made on the same samples, as one report; the scores are the first one's."""
        clock = Clock(device_of(self.policy))
        with clock.phase("advantages"):
            image_size = micro_batches[0].image_size
            replays = replayer.prepare(
                [batch.samples for batch in micro_batches],
                lambda scores, group_N: self.objective.sample_values(scores, group_N, step),
                self._model.sampling_velocity(image_size),
                grid=self.policy.training_sigmas(image_size),
            )
        report, scores = self._update(micro_batches, replays, step=step)
        reports = [report]
        for iteration in range(1, replayer.config.num_iterations):
            again = [
                # Fresh times and noise for flow matching; the samples' scores were counted before.
                dataclasses.replace(
                    batch, seed_B=[derive_seed("again", iteration, seed) for seed in batch.seed_B], samples=()
                )
                for batch in micro_batches
            ]
            reports.append(self._update(again, replays, step=step)[0])
        return merged(reports, clock.seconds_by_phase), scores

    def _update(
        self, micro_batches: Sequence[MicroBatch], replays: Sequence[Sequence[Replay]], *, step: int
    ) -> _Updated:
        """One optimizer step on all micro-batches of all processes together: its report, and what the rewards scored.

        A step whose gradient is not finite, or in which no term has a valid example, changes nothing and is reported
        as skipped.
        """
        clock = Clock(device_of(self.policy))
        sums = TermSums()
        entries = max([1, *(len(batch.rollout.trajectory.kept_steps) for batch in micro_batches if batch.rollout)])
        merge = len(micro_batches) == 1 and not (self.term_grad_norms or self._projects) and entries == 1
        for batch, lessons in zip(micro_batches, replays, strict=True):
            # What a plug-in draws from the global generators belongs to the micro-batch, whichever process has it.
            seed_globals(derive_seed("micro_batch", step, *batch.seed_B))
            if self.objective.weight(FLOW_MATCHING, step) > 0:
                with clock.phase("flow_matching"):
                    self._flow_matching.add(batch, sums)
            if batch.rollout is not None:
                self._rewards.add(batch.rollout, batch.image_size, sums, step=step, merge=merge, clock=clock)
            if self._replayer is not None and lessons:
                self._count_scores(batch.samples, sums, step)
                self._replayer.add(lessons, self._model.sampling_velocity(batch.image_size), sums, clock)
        with clock.phase("optimizer"):
            self._sum_over_processes(sums, step)

        # L = sum_k c_k S_k and grad L = sum_k c_k grad S_k, with 1 / (valid examples of the whole step) in c_k.
        coefficients = {name: self.objective.coefficient(name, step, count) for name, count in sums.counts.items()}
        terms = {name: coefficients[name] * sums.values[name] for name, count in sums.counts.items() if count}
        parts = {name: coefficients.get(name, 1.0) for name in sums.gradients}
        with clock.phase("optimizer"):
            counted = projected(sums.gradients, parts, step, self._complete) if self._projects else parts
            gradient = weighted_sum(sums.gradients, counted) if sums.gradients else None
            grad_norm, grad_norms, cosines = geometry(gradient, sums.gradients, parts, self._complete)
            finite = math.isfinite(grad_norm) and all(map(math.isfinite, terms.values()))
            applied = gradient is not None and finite
            if gradient is not None and finite:
                self._optimizer.update(gradient, grad_norm, step=step)
        lessons = [replay for group in replays for replay in group]
        sampled = self._replayer.metrics(lessons) if self._replayer is not None and lessons else {}
        drawn_by = self.version
        self._count(applied, finite, culprits=_not_finite(terms, grad_norms), step=step)
        report = StepReport(
            step=step,
            policy_version=drawn_by,
            loss=sum(terms.values()),
            terms=terms,
            reward_means={name: of.total / of.count for name, of in sums.scores.items() if of.count},
            valid_counts=sums.valid_counts(),
            grad_norm=grad_norm,
            grad_norms=grad_norms,
            lr=self._optimizer.lr(step),
            entry_step=next((b.rollout.trajectory.entry_step for b in micro_batches if b.rollout is not None), None),
            skipped=not applied,
            seconds_by_phase=clock.seconds_by_phase,
            peak_memory_bytes=clock.peak_memory_bytes(),
            metrics=(cosines if finite else {}) | sampled,
        )
        return report, sums.scores

    def _sum_over_processes(self, sums: TermSums, step: int) -> None:
        """Make every sum one over the examples of all processes, and judge each reward by all its scores."""
        rewards = list(self.objective.config.rewards)
        counted_by = {name: [name] for name in (FLOW_MATCHING, POLICY_GRADIENT, *rewards)} | {MERGED: rewards}
        valid = sums.sum_over(self.processes, self._model.parameters, counted_by, f"the sums of step {step}")
        for name, flags in valid.items():
            self.objective.observe(name, torch.tensor(flags))

    def _count_scores(self, samples: Sequence[Rollout], sums: TermSums, step: int) -> None:
        """Add what the samples scored to the report's means and counts of valid scores."""
        for name in self.objective.active_samples(step):
            for rollout in samples:
                sums.add_score(name, rollout.scores[name])

    def _count(self, applied: bool, finite: bool, *, culprits: Iterable[str], step: int) -> None:
        self.version += applied
        self._skipped_steps += not applied
        self._nonfinite_in_a_row = 0 if finite else self._nonfinite_in_a_row + 1
        if self._nonfinite_in_a_row >= self.max_nonfinite_steps:
            raise NonFiniteError(
                f"step {step}: loss or gradient was not finite for {self._nonfinite_in_a_row} steps in a row,"
                f" because of the term {' and '.join(culprits) or 'sum'}; lower optimizer.lr or that term's weight,"
                " or train in fp32"
            )

    def publish(self) -> Weights:
        """The trained weights and their version, for rollout workers. The tensors are the live ones, not copies."""
        tensors = zip(self._names, self._model.parameters, strict=True)
        return Weights(version=self.version, tensors={name: parameter.detach() for name, parameter in tensors})

    def averaged(self) -> AbstractContextManager[None]:
        """While the block lasts the policy has its averaged weights; without `ema_decay` its own."""
        return self._optimizer.averaged()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a resumed run needs, as (tensors, JSON). Warm-up is a function of the step and needs nothing."""
        counters = {"nonfinite_in_a_row": self._nonfinite_in_a_row, "skipped_steps": self._skipped_steps}
        kept = {} if self._replayer is None or self._replayer.base is None else self._replayer.base.state()
        return self._optimizer.state() | kept, {
            "version": self.version,
            **counters,
            "objective": self.objective.state(),
        }

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore `state()`.

        Raises:
            CheckpointError: the checkpoint belongs to another policy, optimizer or objective.
        """
        missing = {"version", "nonfinite_in_a_row", "skipped_steps", "objective"} - state.keys()
        if missing:
            raise CheckpointError(f"the checkpoint's state lacks {sorted(missing)}: it is not one of a training run")
        self.objective.load_state(state["objective"])
        tensors, kept = split_state(tensors)
        self._optimizer.load_state(tensors)
        if self._replayer is not None and self._replayer.base is not None:
            self._replayer.base.load_state(kept)
        self.version = int(state["version"])
        self._nonfinite_in_a_row = int(state["nonfinite_in_a_row"])
        self._skipped_steps = int(state["skipped_steps"])


def _not_finite(*values: Mapping[str, float]) -> list[str]:
    return sorted({name for mapping in values for name, value in mapping.items() if not math.isfinite(value)})
