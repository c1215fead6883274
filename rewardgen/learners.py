"""Learners that are placed on a Ray cluster, and started again from the last checkpoint when one of them is lost."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rewardgen.checkpoint import latest_checkpoint
from rewardgen.config import Experiment
from rewardgen.errors import ConfigError
from rewardgen.fleet import cluster
from rewardgen.fleet.group import Group, LostError
from rewardgen.fleet.pool import FleetError
from rewardgen.interrupt import resumable, stop_signal
from rewardgen.run_folder import CONFIG, open_folder, resume_command


@dataclass(frozen=True, slots=True)
class _Learner:
    """What each process runs."""

    train: Callable[[], bool]
    folder: Path

    def __call__(self) -> bool:
        if not (self.folder / CONFIG).is_file():
            raise ConfigError(
                f"{self.folder} is not there for a learner on {os.uname().nodename}: where learners are on a cluster"
                " --output must be a folder that all machines share"
            )
        return self.train()


def train_on_cluster(experiment: Experiment, train: Callable[[], bool], folder: Path, *, resume: bool) -> bool:
    """Train with `fleet.learners` processes on a Ray cluster, which draw for themselves or have workers there.

    A group that has lost a learner is torn down and started again; it goes on from the last checkpoint and makes what
    an undisturbed one would have made. It may be lost `fleet.max_tries` times in a row without coming to another
    checkpoint.

    Args:
        experiment: one with `fleet.places_learners`.
        train: one process's share of the run, resumed where there is a checkpoint; it travels by pickle.
        folder: the run's, which all machines must see.
        resume: whether a run that is there is to go on.

    Returns:
        Whether the run is finished; False where a signal ended it early.

    Raises:
        ConfigError: Ray is missing, there is no such cluster, or it has no room for the learners.
        FleetError: the learners were lost too often.
        UserError: as a learner raised it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("fleet.learners: Ray starts the learners; start one process, without torchrun")
    open_folder(folder, experiment, resume=resume)
    connected = cluster.connect(experiment.fleet.address)
    try:
        group = Group(size=experiment.fleet.learners, needs=_needs(experiment), config=experiment.fleet)
        group.require_room()
        _require_workers(experiment, group)
        with stop_signal() as stopped:
            return _until_done(experiment, group, _Learner(train, folder), stopped)
    finally:
        if connected:
            cluster.load_ray().shutdown()


def _until_done(experiment: Experiment, group: Group, learner: _Learner, stopped: threading.Event) -> bool:
    checkpoints, losses = learner.folder / "checkpoints", 0
    while True:
        before = latest_checkpoint(checkpoints)
        try:
            finished = group.run(learner, stopped=stopped, show=_show)
            return finished is not None and finished[0]
        except LostError as error:
            losses = losses + 1 if latest_checkpoint(checkpoints) == before else 1
            if stopped.is_set() or losses >= experiment.fleet.max_tries:
                often = f"{losses} times in a row without another checkpoint; the last: " if losses > 1 else ""
                with resumable(checkpoints, resume_command(experiment, learner.folder, 1)):
                    raise FleetError(f"the learners were lost: {often}{error}") from error
            latest = latest_checkpoint(checkpoints)
            where = "the beginning" if latest is None else latest.name
            print(f"{error}; all learners start again from {where}", file=sys.stderr, flush=True)


def _require_workers(experiment: Experiment, group: Group) -> None:
    config = experiment.fleet
    if config.remote_rollouts:
        gpus = group.needs.gpus if config.gpus_per_worker is None else config.gpus_per_worker
        needs = cluster.Needs(cpus=config.cpus_per_worker, gpus=gpus)
        group.require_room_for_workers(needs)


def _needs(experiment: Experiment) -> cluster.Needs:
    config, gpus = experiment.fleet, experiment.fleet.gpus_per_learner
    if gpus is None:
        gpus = int(experiment.train.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in cluster.alive()))
    return cluster.Needs(cpus=config.cpus_per_learner, gpus=gpus)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
