"""Who draws and scores for an experiment: workers and judges in the learner's process, or on a cluster."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rewardgen import plugins
from rewardgen.config import Experiment
from rewardgen.construct import make
from rewardgen.distributed import Processes
from rewardgen.errors import ConfigError
from rewardgen.fleet.cluster import Group, Needs
from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.pool import FleetConfig, Pool
from rewardgen.objective import learns_from_samples
from rewardgen.policy import Policy
from rewardgen.reward import Reward
from rewardgen.rollout import Precision, RolloutWorker
from rewardgen.scoring import ScoringWorker
from rewardgen.settings import Plugin
from rewardgen.trainer import choose_device


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutFactory:
    """Makes a rollout worker in whatever process it is called in; plain data until then. It knows no reward.

    Args:
        policy: the experiment's. What is trained of it comes with every request.
        precision: as in the learner.
        device: where the policy goes.
    """

    policy: Plugin
    precision: Precision
    device: str

    def __call__(self) -> RolloutWorker:
        policy: Policy = make("policy", "policies", self.policy)
        return RolloutWorker(policy.to(torch.device(self.device)), precision=self.precision)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringFactory:
    """Makes a judge in whatever process it is called in; plain data until then. It knows no policy.

    Args:
        rewards: those that score samples, by term name.
        device: where they go.
    """

    rewards: Mapping[str, Plugin]
    device: str

    def __call__(self) -> ScoringWorker:
        device, made = torch.device(self.device), dict[str, Reward]()
        for name, plugin in self.rewards.items():
            reward: Reward = make(f"objective.rewards.{name}", "rewards", plugin)
            made[name] = reward.requires_grad_(False).eval().to(device)
        return ScoringWorker(made, device=device)


def inline_workers(experiment: Experiment, policy: Policy) -> Pool:
    """One worker in this process, with the learner's policy."""
    worker = RolloutWorker(policy, precision=experiment.train.precision, colocated=True)
    return InlinePool(worker, copies=experiment.fleet.staleness > 0)


def share_of(experiment: Experiment, processes: Processes) -> Experiment:
    """The experiment with this learner's share of the workers; the whole one where it is the only learner."""

    def share(number: int | None) -> int | None:
        return number and number // processes.size + (processes.rank < number % processes.size)

    numbers = {name: share(getattr(experiment.fleet, name)) for name in ("workers", "min_workers")}
    fleet = experiment.fleet.model_copy(update=numbers)
    return experiment if processes.size == 1 else experiment.model_copy(update={"fleet": fleet})


def ray_workers(experiment: Experiment, processes: Processes) -> Pool | None:
    """The workers of `fleet.pool: ray`, which are on their way when this returns; None where learners draw themselves.

    Raises:
        ConfigError: Ray is missing, there is no such cluster, it has no room for the workers, or a launcher started
            several learners.
    """
    config = experiment.fleet
    if not config.remote_rollouts:
        return None
    if processes.size > 1 and not config.places_learners:
        raise ConfigError("fleet.pool: learners that a launcher starts draw for themselves; set fleet.learners instead")
    micro_batches, ahead = _micro_batches(experiment), config.staleness
    if config.workers > micro_batches * (1 + ahead):
        warnings.warn(
            f"fleet.workers: of {config.workers} workers no more than {micro_batches * (1 + ahead)} are ever busy: a"
            f" step draws {micro_batches} micro-batches, at most {ahead} steps ahead; smaller and more micro-batches"
            " (train.batch_size, train.accumulation) occupy more",
            stacklevel=2,
        )
    from rewardgen.fleet.ray_pool import RayPool

    group = _group(experiment, "fleet", config)
    factory = RolloutFactory(
        policy=experiment.policy, precision=experiment.train.precision, device=_device(group.needs)
    )
    return RayPool(factory, config, needs=group.needs, device=choose_device(experiment.train.device))


def ray_judges(experiment: Experiment) -> Pool | None:
    """The judges of `fleet.pool: ray`, a pool beside `ray_workers`'s, which comes first; None where there are none.

    Raises:
        ConfigError: the cluster has no room for them beside the workers.
    """
    config, rewards = experiment.fleet, _sampled(experiment)
    if not config.remote_rollouts or not rewards:
        return None
    from rewardgen.fleet.ray_pool import RayPool

    group = _group(experiment, "fleet.judges", config.for_judges())
    return RayPool(
        ScoringFactory(rewards=rewards, device=_device(group.needs)),
        config.for_judges(),
        needs=group.needs,
        section=group.section,
        beside=_group(experiment, "fleet", config),
        device=choose_device(experiment.train.device),
    )


def _sampled(experiment: Experiment) -> dict[str, Plugin]:
    """The rewards that score samples. Imports modules, reads no weight."""
    return {
        name: Plugin(use=term.use, args=term.args)
        for name, term in experiment.objective.rewards.items()
        if learns_from_samples(term, plugins.resolve("rewards", term.use))
    }


def _micro_batches(experiment: Experiment) -> int:
    """Requests of one step: a prefix for the rewards with a gradient, and each generation of the samples."""
    sampled, config = _sampled(experiment), experiment.objective.policy_gradient
    generations = config.num_generations if config is not None and sampled else 0
    prefixes = int(len(experiment.objective.rewards) > len(sampled))
    return experiment.train.accumulation * max(1, prefixes + generations)


def _group(experiment: Experiment, section: str, config: FleetConfig) -> Group:
    """What the workers, or the judges, of a run reserve."""
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = float(choose_device(experiment.train.device).type == "cuda")
    return Group(section=section, number=config.first_workers, needs=Needs(cpus=config.cpus_per_worker, gpus=gpus))


def _device(needs: Needs) -> str:
    return "cuda" if needs.gpus else "cpu"
