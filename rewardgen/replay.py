"""Scored samples played once more, with gradient: the learner's side of learning without a reward's gradient.

Samples come in rollouts, one micro-batch of pictures each. A replay goes over the places of such a rollout where the
policy's velocity is learned from: the noisy steps (`grpo`), or times at which the finished sample is noised anew
(`nft`). Each place is a forward and a backward pass of its own, with the micro-batch and the arithmetic of the rollout:
memory is that of one forward pass, and before the first update every ratio of likelihoods is exactly 1.

Shape suffixes: B batch, L latent tokens, C channels per token, N samples of this process in a step.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from rewardgen.base_policy import BasePolicy
from rewardgen.distributed import Processes
from rewardgen.flow.advantage import Advantages, group_advantages
from rewardgen.flow.loss import draw_times_and_noise
from rewardgen.flow.stochastic import divergence, kernel, log_density
from rewardgen.gradients import TermSums
from rewardgen.measure import Clock
from rewardgen.policy_gradient import POLICY_GRADIENT, GrpoConfig, NftConfig, clipped_loss, nft_loss
from rewardgen.seeds import derive_seed
from rewardgen.terms import Differentiated, VelocityOf
from rewardgen.transfer import numbers, score_on_host, to_device
from rewardgen.types import Rollout, Score, StepReport

ValueOf = Callable[[Mapping[str, Score], Sequence[int]], Score]
"""What samples are worth by their scores, given their groups: `Objective.sample_values` at a step."""


class Replay(ABC):
    """One rollout of scored samples, and what is learned from it.

    Args:
        rollout: the samples.
        advantages: of these samples.
    """

    def __init__(self, rollout: Rollout, advantages: Advantages) -> None:
        self.rollout = rollout
        self.device = rollout.trajectory.entry_BLC.device
        self.advantage_B = to_device(advantages.value_N, self.device)
        # Which samples take part is known on the CPU: a mask on the device would make the host wait for their number.
        taking_part_M = advantages.taking_part_N.cpu().nonzero()[:, 0]
        self.count = len(taking_part_M)
        self.taking_part_M = to_device(taking_part_M, self.device)
        self.base: list[Tensor] = []
        """The base policy's velocity at each place, once it was asked for."""
        self.seen: defaultdict[str, list[Tensor]] = defaultdict(list)
        """Sums over the samples taking part, at each place since it was last cleared; they stay on the device."""

    def usable(self, found: Tensor) -> Tensor:
        """What is not finite belongs to samples that do not take part; in the network 0 times it would be NaN."""
        return found if self.count == len(self.rollout.group_B) else found.nan_to_num(0.0, 0.0, 0.0)

    @abstractmethod
    def __len__(self) -> int:
        """Number of places."""

    @abstractmethod
    def place(self, index: int) -> tuple[Tensor, Tensor]:
        """State [B, L, C] and times [B] of a place."""

    @abstractmethod
    def loss(self, index: int, v_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """The loss at a place and the divergence from the base there (0 without base), for each sample [B]."""

    def note(self, name: str, value_B: Tensor) -> None:
        """Add to `seen` what a metric is for the samples that take part."""
        self.seen[name].append(value_B.detach()[self.taking_part_M].sum())


class GrpoReplay(Replay):
    """The noisy steps of a trajectory: `-min(ratio A, clip(ratio) A)`.

    The ratio is taken per element of the latents, `exp((log p - log p_old) / elements)`, as in Flow-GRPO's release:
    that of the whole density would leave any interval after one update.
    """

    def __init__(self, rollout: Rollout, advantages: Advantages, config: GrpoConfig) -> None:
        super().__init__(rollout, advantages)
        trajectory = rollout.trajectory
        if trajectory.stochastic is None or trajectory.steps_SBLC is None or trajectory.log_prob_BS is None:
            raise ValueError("a rollout without noisy steps has no likelihoods to learn from")
        self.config = config
        self.steps = trajectory.stochastic.steps
        self.states_SBLC = self.usable(trajectory.steps_SBLC)
        self.old_BS = self.usable(trajectory.log_prob_BS)
        self.times_T = to_device(trajectory.sigmas_T, self.device)
        self.kernels = [kernel(trajectory.sigmas_T, step, trajectory.stochastic) for step in self.steps]

    def __len__(self) -> int:
        return len(self.steps)

    def place(self, index: int) -> tuple[Tensor, Tensor]:
        x_BLC = self.states_SBLC[index]
        return x_BLC, self.times_T[self.steps[index]].expand(len(x_BLC))

    def loss(self, index: int, v_BLC: Tensor) -> tuple[Tensor, Tensor]:
        before_BLC, after_BLC = self.states_SBLC[index], self.states_SBLC[index + 1]
        log_prob_B = log_density(after_BLC, before_BLC, v_BLC, self.kernels[index])
        log_ratio_B = (log_prob_B - self.old_BS[:, index]) / before_BLC[0].numel()
        away_B = (log_ratio_B.detach().exp() - 1).abs()
        self.note("ratio_distance", away_B)
        self.note("outside_clip", away_B > self.config.epsilon)
        loss_B = clipped_loss(log_ratio_B, self.advantage_B, self.config.epsilon)
        if not self.base:
            return loss_B, torch.zeros_like(loss_B)
        return loss_B, divergence(v_BLC, self.base[index], self.kernels[index])


class NftReplay(Replay):
    """The finished samples, noised anew at times drawn from their seeds, alike in all updates of a step.

    The velocity of the policy that drew them is the one found at the first visit, before the step's first update. (A
    fleet's samples may be older than that: the policy is then held to its newest self, not to the one that drew.)
    The divergence from the base is `mean (v - v_base)^2`.
    """

    def __init__(self, rollout: Rollout, advantages: Advantages, config: NftConfig, grid: Tensor) -> None:
        super().__init__(rollout, advantages)
        trajectory = rollout.trajectory
        if trajectory.entry_step != trajectory.num_steps:
            raise ValueError(f"only {trajectory.entry_step} of {trajectory.num_steps} steps are taken: no clean sample")
        self.config = config
        self.clean_BLC = self.usable(trajectory.entry_BLC)
        self._grid = grid
        self._old: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.config.times_per_sample

    def _drawn(self, index: int) -> tuple[Tensor, Tensor]:
        seed_B = [derive_seed("nft", seed, index) for seed in self.rollout.trajectory.seed_B]
        return draw_times_and_noise(seed_B, self.clean_BLC, self._grid)

    def place(self, index: int) -> tuple[Tensor, Tensor]:
        t_B, noise_BLC = self._drawn(index)
        t_B11 = t_B.to(self.clean_BLC)[:, None, None]
        return (1 - t_B11) * self.clean_BLC + t_B11 * noise_BLC, t_B

    def loss(self, index: int, v_BLC: Tensor) -> tuple[Tensor, Tensor]:
        t_B, noise_BLC = self._drawn(index)
        old_BLC = self._old.setdefault(index, v_BLC.detach())
        self.note("moved", (v_BLC - old_BLC).square().mean(dim=(1, 2)))
        loss_B = nft_loss(
            v_BLC,
            old_BLC,
            noise_BLC - self.clean_BLC,
            t_B,
            self.advantage_B,
            nft_beta=self.config.nft_beta,
            advantage_clip=self.config.advantage_clip,
            adaptive=self.config.adaptive,
        )
        if not self.base:
            return loss_B, torch.zeros_like(loss_B)
        return loss_B, (v_BLC - self.base[index]).square().mean(dim=(1, 2))


def replays_of(
    samples: Sequence[Rollout],
    config: GrpoConfig | NftConfig,
    value: ValueOf,
    processes: Processes,
    grid: Tensor,
) -> list[Replay]:
    """Compare the samples of a step within their groups; one replay for each rollout, in order.

    Args:
        samples: this process's scored rollouts; a group lies in one process, but may be spread over rollouts.
        value: what the samples are worth by their scores, given their groups.
        processes: all that make the step. They meet where `scale_rewards` is `batch`.
        grid: the flow-matching loss's times.
    """
    group_N = [group for rollout in samples for group in rollout.group_B]
    scores = {}
    for name in samples[0].scores:
        said_by = [rollout.scores[name] for rollout in samples]
        together = Score(
            value_B=torch.cat([one.value_B for one in said_by]), valid_B=torch.cat([one.valid_B for one in said_by])
        )
        scores[name] = score_on_host(together)  # waits once for each reward: who takes part is decided here
    total = value(scores, group_N)
    everyone = None
    if config.scale_rewards == "batch":
        said = processes.exchange("the samples' scores", total.value_B[total.valid_B].tolist())
        everyone = torch.tensor([value for values in said for value in values], dtype=torch.float64)
    advantages = group_advantages(
        total, group_N, scale=config.scale_rewards, clip=config.advantage_clip, population_V=everyone
    )
    sizes = [len(rollout.group_B) for rollout in samples]
    parts = zip(advantages.value_N.split(sizes), advantages.taking_part_N.split(sizes), strict=True)
    found: list[Replay] = []
    for rollout, (value_B, taking_part_B) in zip(samples, parts, strict=True):
        own = Advantages(value_B, taking_part_B)
        if isinstance(config, GrpoConfig):
            found.append(GrpoReplay(rollout, own, config))
        else:
            found.append(NftReplay(rollout, own, config, grid))
    return found


class Replayer:
    """Plays replays and adds up the gradient of `mean(loss + beta * divergence)`, over samples and places.

    Args:
        model: the policy. With shared blocks every process goes through every replay, also one in which no sample
            takes part.
        config: of the policy gradient.
    """

    def __init__(self, model: Differentiated, config: GrpoConfig | NftConfig) -> None:
        self.model = model
        self.config = config
        self.base = BasePolicy(model.policy.trainable()) if config.beta else None

    def prepare(
        self,
        samples: Sequence[Sequence[Rollout]],
        value: ValueOf,
        velocity_of: VelocityOf,
        *,
        grid: Tensor,
    ) -> list[tuple[Replay, ...]]:
        """Compare a step's samples, micro-batch by micro-batch, and ask the base policy where it has a say.

        Its velocities stay the same over a step's updates. See `replays_of` for the arguments.
        """
        everything = [rollout for batch in samples for rollout in batch]
        replays = replays_of(everything, self.config, value, self.model.processes, grid)
        if self.base is not None:
            with torch.no_grad(), self.base.swapped_in():
                for replay in self._played(replays):
                    velocity = velocity_of(replay.rollout.examples)()
                    replay.base = [velocity(*replay.place(index)) for index in range(len(replay))]
        rest = iter(replays)
        return [tuple(islice(rest, len(batch))) for batch in samples]

    def add(self, replays: Sequence[Replay], velocity_of: VelocityOf, sums: TermSums, clock: Clock) -> None:
        """Add loss, number of samples taking part, and gradient of some replays to a step's sums."""
        sums.add(POLICY_GRADIENT, torch.zeros(()), 0)
        for replay in self._played(replays):
            replay.seen.clear()
            make = velocity_of(replay.rollout.examples)
            for index in range(len(replay)):
                with torch.enable_grad(), clock.phase("replay"):
                    loss_B, divergence_B = replay.loss(index, make()(*replay.place(index)))
                    replay.note("kl", divergence_B)
                    chosen_M = (loss_B + self.config.beta * divergence_B)[replay.taking_part_M]
                    total = chosen_M.sum() / len(replay)
                sums.add(POLICY_GRADIENT, total, replay.count if index == 0 else 0)
                with clock.phase("backward"):
                    sums.add_gradient(POLICY_GRADIENT, self.model.gradient(total))

    def metrics(self, replays: Sequence[Replay]) -> dict[str, float]:
        """Means over the samples that took part in the latest update, of all processes, and the share that did."""
        seen: defaultdict[str, float] = defaultdict(float)
        noted = [(replay, name) for replay in replays for name in replay.seen]
        values = iter(numbers([value for replay, name in noted for value in replay.seen[name]]))
        for replay, name in noted:
            seen[name] += sum(islice(values, len(replay.seen[name])))
        for replay in replays:
            seen["drawn"] += len(replay.rollout.group_B)
            seen["taking_part"] += replay.count
            seen["samples"] += replay.count * len(replay) if replay.seen else 0
        said = self.model.processes.exchange("what the samples were worth", dict(seen))
        total = {name: sum(other.get(name, 0.0) for other in said) for name in sorted({*chain(*said)})}
        share = total.pop("taking_part") / max(1.0, total.pop("drawn"))
        samples = total.pop("samples", 0.0)
        means = {name: value / samples for name, value in total.items() if samples}
        return {f"{POLICY_GRADIENT}/{name}": value for name, value in {"taking_part": share, **means}.items()}

    def _played(self, replays: Sequence[Replay]) -> Iterator[Replay]:
        return (replay for replay in replays if self.model.sharded or replay.count)


def merged(reports: Sequence[StepReport], seconds: Mapping[str, float]) -> StepReport:
    """One report of several updates on the same samples: what the first one scored, what the last one came to.

    Args:
        reports: of the updates, in order.
        seconds: by phase, spent before the first one.
    """
    first, last = reports[0], reports[-1]
    phases = [seconds, *(report.seconds_by_phase for report in reports)]
    return dataclasses.replace(
        last,
        policy_version=first.policy_version,
        reward_means=first.reward_means,
        valid_counts=first.valid_counts,
        skipped=all(report.skipped for report in reports),
        seconds_by_phase={name: sum(p.get(name, 0.0) for p in phases) for name in dict.fromkeys(chain(*phases))},
        peak_memory_bytes=max(report.peak_memory_bytes for report in reports),
    )
