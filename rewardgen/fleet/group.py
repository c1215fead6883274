"""A group of processes on a Ray cluster that work together, all of them or none: the learners of one run.

One placement group reserves the place of all. Each process is an actor that runs the same program with the variables
of a launcher in its environment (RANK, WORLD_SIZE, MASTER_ADDR ..), so that what runs under `torchrun` runs here. Ray
restarts nothing: what survives a lost member holds broken connections, so all go, and whoever asked for the group
decides what then.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewardgen.distributed import ProcessError
from rewardgen.errors import ConfigError
from rewardgen.fleet import cluster
from rewardgen.fleet.member import Member
from rewardgen.fleet.pool import FleetConfig, FleetError
from rewardgen.fleet.ray_pool import RemoteError
from rewardgen.fleet.replica import Surroundings, versions

_PATIENCE_SECONDS = 20.0
"""How long after the first fault the others are waited for: who fails because another is gone may be seen first."""
_TICK_SECONDS = 1.0
"""How often a request to stop is looked for."""
_LEAST = 0.001
"""CPUs of a place that is to reserve nothing; Ray has no empty ones."""


class LostError(Exception):
    """A member is gone, or cannot be reached, through no fault of the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What is asked for.

    Args:
        size: number of processes.
        needs: what each reserves.
        config: threads, and how long room is waited for.
    """

    size: int
    needs: cluster.Needs
    config: FleetConfig

    def require_room(self) -> None:
        """Refuse what the cluster can never have room for. What others hold at the moment counts as room.

        Raises:
            ConfigError: what is asked for, and what the nodes have.
        """
        nodes = cluster.alive()
        found = cluster.room(nodes, self.needs)
        if found < self.size:
            raise ConfigError(
                f"fleet.learners: {self.size} learners of {self.needs} each do not fit, the cluster has room for"
                f" {int(found)}: {cluster.describe(nodes)}; ask for fewer learners, or less for each"
                " (fleet.cpus_per_learner, fleet.gpus_per_learner)"
            )

    def require_room_for_workers(self, needs: cluster.Needs) -> None:
        """Refuse workers for which there is no room beside the learners.

        Raises:
            ConfigError: what is asked for, and what the nodes have.
        """
        nodes = cluster.alive()
        left = [dict(node) for node in nodes]
        for _ in range(self.size):
            place = next((node for node in left if cluster.room([node], self.needs) >= 1), {})
            for name, need in (("CPU", self.needs.cpus), ("GPU", self.needs.gpus)):
                place[name] = place.get(name, 0.0) - need
        wanted = self.config.workers if self.config.min_workers is None else self.config.min_workers
        found = cluster.room(left, needs)
        if found < wanted:
            raise ConfigError(
                f"fleet.workers: {wanted} workers of {needs} each do not fit beside {self.size} learners of"
                f" {self.needs} each, there is room for {int(found)}: the cluster has {cluster.describe(nodes)};"
                " ask for fewer, or for less for each (fleet.cpus_per_worker, fleet.gpus_per_worker,"
                " fleet.cpus_per_learner, fleet.gpus_per_learner)"
            )

    def run(
        self, program: Callable[[], Any], *, stopped: threading.Event, show: Callable[[str], None]
    ) -> list[Any] | None:
        """Run the program in each process; returns what each returned, by rank, or None if stopped before they ran.

        Args:
            program: plain data and a function of an importable module; it travels by pickle.
            stopped: once it is set the members are asked to stop.
            show: gets what the first process prints.

        Raises:
            LostError: a member was lost.
            FleetError: there was no room for too long, or other software there.
            Exception: as the program raised it in one of them, with its traceback there as the cause.
        """
        ray = cluster.load_ray()
        with self._place(stopped) as place:
            if place is None:
                return None
            members = [self._member(place, rank) for rank in range(self.size)]
            try:
                environments = self._meet(members)
                sent = ray.put(program)
                runs = [m.run.remote(sent, env) for m, env in zip(members, environments, strict=True)]
                return _follow(runs, members, stopped, show)
            finally:
                for member in members:
                    with contextlib.suppress(Exception):  # it may be dead, or Ray gone
                        ray.kill(member, no_restart=True)

    @contextlib.contextmanager
    def _place(self, stopped: threading.Event) -> Iterator[Any]:
        """A placement group with room for all, as close together as it goes; None if stopped before there was one."""
        ray, seconds = cluster.load_ray(), self.config.start_timeout_seconds
        resources = {"CPU": self.needs.cpus, "GPU": self.needs.gpus}
        bundle = {name: need for name, need in resources.items() if need} or {"CPU": _LEAST}
        place = ray.util.placement_group([bundle] * self.size, strategy="PACK")
        try:
            ready, end = place.ready(), time.monotonic() + seconds
            while not stopped.is_set() and not ray.wait([ready], timeout=_TICK_SECONDS)[0]:
                if time.monotonic() >= end:
                    raise FleetError(
                        f"there was no room for {self.size} learners for {seconds:g} s (fleet.start_timeout_seconds):"
                        f" each needs {self.needs}; {_have_and_free()}"
                    )
            yield None if stopped.is_set() else place
        finally:
            with contextlib.suppress(Exception):
                ray.util.remove_placement_group(place)

    def _member(self, place: Any, rank: int) -> Any:
        actor = (
            cluster.load_ray()
            .remote(Member)
            .options(
                num_cpus=self.needs.cpus,
                num_gpus=self.needs.gpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=4,
                scheduling_strategy=cluster.bundle(place, rank),
            )
        )
        return actor.remote(Surroundings.here(self.config.threads_per_worker))

    def _meet(self, members: Sequence[Any]) -> list[dict[str, str]]:
        """Wait until all are up; returns the environment of each."""
        ray, seconds = cluster.load_ray(), self.config.start_timeout_seconds
        try:
            met = ray.get([member.meet.remote() for member in members], timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            raise FleetError(f"the learners did not start within {seconds:g} s (fleet.start_timeout_seconds)") from None
        except ray.exceptions.RayActorError as error:
            raise LostError(f"a learner died while it started: {cluster.first_line(error)}") from error
        for place, *_ in met:
            if place.versions != versions():
                theirs, ours = (", ".join(map(" ".join, found.items())) for found in (place.versions, versions()))
                raise FleetError(f"{place} has {theirs}, but here is {ours}: install the same there")
        _, address, port = met[0]
        shared = {"WORLD_SIZE": str(self.size), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        # Ray shows each only its own GPU, which is the first for everyone. The number of threads is set already.
        shared |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        shared |= {"OMP_NUM_THREADS": str(Surroundings.here(self.config.threads_per_worker).threads)}
        return [shared | {"RANK": str(rank)} for rank in range(self.size)]


def _have_and_free() -> str:
    """What the cluster has and what of it nobody holds, in words."""
    free = {name: n for name, n in cluster.load_ray().available_resources().items() if name in ("CPU", "GPU")}
    left = ", ".join(f"{number:g} {name}" for name, number in sorted(free.items())) or "nothing"
    return f"the cluster has {cluster.describe(cluster.alive())}, of which {left} free"


def _follow(
    runs: Sequence[Any], members: Sequence[Any], stopped: threading.Event, show: Callable[[str], None]
) -> list[Any]:
    """Wait for all, passing on what the first prints and a request to stop."""
    ray = cluster.load_ray()
    left = {run: rank for rank, run in enumerate(runs)}
    results: dict[int, Any] = {}
    faults: dict[int, BaseException] = {}
    said, asked, end = members[0].said.remote(), False, float("inf")
    while left and time.monotonic() < end:
        done, _ = ray.wait([*left, *([] if said is None else [said])], timeout=_TICK_SECONDS)
        for run in set(done) & left.keys():
            rank = left.pop(run)
            try:
                results[rank] = ray.get(run)
            except Exception as error:
                faults[rank] = error
                end = min(end, time.monotonic() + _PATIENCE_SECONDS)
        if said is not None and runs[0] not in left:  # what it has left to say is said at once
            if _show(said, show):
                _show(members[0].said.remote(), show)
            said = None
        elif said in done:
            said = members[0].said.remote() if _show(said, show) else None
        if stopped.is_set() and not asked:
            asked = True
            for member in members:
                member.stop.remote()
    if faults:
        raise _verdict(faults)
    return [results[rank] for rank in range(len(runs))]


def _show(said: Any, show: Callable[[str], None]) -> bool:
    """Show what a process said; whether it could be asked."""
    try:
        text = cluster.load_ray().get(said, timeout=_PATIENCE_SECONDS)
    except Exception:  # its end is told by its run
        return False
    if text:
        show(text)
    return True


def _verdict(faults: Mapping[int, BaseException]) -> BaseException:
    """What happened, from how each ended that did not end well: one fault is the cause of most of the others."""
    task_error = cluster.load_ray().exceptions.RayTaskError
    lost = {rank: error for rank, error in sorted(faults.items()) if not isinstance(error, task_error)}
    for rank, error in lost.items():
        return LostError(f"learner {rank} was lost: {cluster.first_line(error)}")
    causes = {}
    for rank, error in sorted(faults.items()):
        cause = getattr(error, "cause", error)
        cause.__cause__ = RemoteError(f"\n{error}")
        causes[rank] = cause
    own = [cause for cause in causes.values() if not isinstance(cause, ProcessError)]
    broken = [cause for cause in causes.values() if isinstance(cause, ProcessError) and cause.lost]
    if not own and broken:
        return LostError(str(broken[0]))
    found: BaseException = [*own, *causes.values()][0]
    return found
