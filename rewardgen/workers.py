"""Who draws for an experiment: workers in the learner's process, or on a cluster."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from rewardgen.config import Experiment
from rewardgen.construct import make
from rewardgen.distributed import Processes
from rewardgen.errors import ConfigError
from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.pool import Pool
from rewardgen.policy import Policy
from rewardgen.rollout import Precision, RolloutWorker
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
    on_their_way = experiment.train.accumulation * (1 + config.staleness)
    if config.workers > on_their_way:
        warnings.warn(
            f"fleet.workers: of {config.workers} workers no more than {on_their_way} are ever busy: a step draws"
            f" {experiment.train.accumulation} micro-batches, at most {config.staleness} steps ahead; smaller and more"
            " micro-batches (train.batch_size, train.accumulation) occupy more",
            stacklevel=2,
        )
    from rewardgen.fleet.cluster import Needs
    from rewardgen.fleet.ray_pool import RayPool

    device = choose_device(experiment.train.device)
    gpus = float(device.type == "cuda") if config.gpus_per_worker is None else config.gpus_per_worker
    factory = RolloutFactory(
        policy=experiment.policy, precision=experiment.train.precision, device="cuda" if gpus else "cpu"
    )
    return RayPool(factory, config, needs=Needs(cpus=config.cpus_per_worker, gpus=gpus), device=device)
