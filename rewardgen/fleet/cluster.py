"""The one door to Ray: joining or starting a cluster, and what it has room for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewardgen.errors import ConfigError
from rewardgen.fleet.pool import FleetError

_STARTS = 3
"""Times that Ray is started on this machine: it gives its processes 30 s to come up, which a busy one may not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What one worker reserves."""

    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def nothing(self) -> bool:
        """Whether there is room for any number."""
        return not (self.cpus or self.gpus)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Workers of one kind that must find room at the start.

    Args:
        section: of the experiment, which says so.
        number: how many.
        needs: what each reserves.
    """

    section: str
    number: int
    needs: Needs


def load_ray() -> Any:
    """Import Ray. Raises ConfigError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"fleet.pool: 'ray' needs Ray, which cannot be imported ({error}): pip install -e '.[ray]' in the checkout"
        ) from None
    return ray


def connect(address: str | None) -> bool:
    """Join the cluster at an address, or RAY_ADDRESS's, or else start one on this machine.

    Returns:
        Whether this call connected; False where this process is connected already, and someone else disconnects.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    ray = load_ray()
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None:
        # These are read by the processes that Ray starts. At Ray's own niceness of 15 workers on the learner's machine
        # would only get what the learner leaves; and nothing is to be reported to anyone.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for left in reversed(range(_STARTS)):
        try:
            _join(ray, address)
        except Exception as error:  # Ray raises that very class where its own processes do not come up in time
            ray.shutdown()
            if address is None and left:
                continue
            where = f"no Ray cluster can be joined at '{address}'" if address else "Ray cannot be started here"
            raise ConfigError(f"fleet.address: {where}: {first_line(error)}") from error
        break
    return True


def _join(ray: Any, address: str | None) -> None:
    """Connect; without an address start a Ray of one's own, where Ray would join whatever was last started here."""
    options: dict[str, Any] = {} if address else {"include_dashboard": False}
    ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **options)


def first_line(error: object) -> str:
    """The gist of one of Ray's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def require_room(group: Group, beside: Group | None = None) -> None:
    """Refuse workers for which the cluster has no room at all, which Ray would wait for in silence.

    What other runs hold at the moment counts as room: it comes free.

    Args:
        group: the workers.
        beside: others of this run, which hold theirs to its end.

    Raises:
        ConfigError: what is asked for, and what the nodes have.
    """
    nodes = alive()
    found = room(nodes, group.needs, beside)
    if found < group.number:
        section = group.section
        others = f" beside {beside.section}.workers, {beside.number} of {beside.needs}" if beside else ""
        raise ConfigError(
            f"{section}.workers: {group.number} workers of {group.needs} each do not fit{others}, the cluster has room"
            f" for {int(found)}: {describe(nodes)}; ask for fewer workers, or less for each ({section}.cpus_per_worker,"
            f" {section}.gpus_per_worker), or let the rest join later (fleet.min_workers)"
        )


def alive() -> list[Mapping[str, float]]:
    """The resources of each node that is up."""
    ray = load_ray()
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(nodes: Iterable[Mapping[str, float]], needs: Needs, beside: Group | None = None) -> float:
    """Workers that fit on nodes; infinity where they need nothing.

    With others beside them, the most that fit however those are spread over the nodes; 0 where those alone do not fit.
    """
    if beside is None or needs.nothing or beside.needs.nothing:
        return sum(_on_node(node, needs) for node in nodes)
    # After each node: how many fit at best, by how many of the others have their room already.
    best = np.full(beside.number + 1, -np.inf)
    best[0] = 0.0
    for node in nodes:
        after = best + _on_node(node, needs)
        for number in range(1, min(beside.number, int(_on_node(node, beside.needs))) + 1):
            rest = {
                "CPU": node.get("CPU", 0.0) - number * beside.needs.cpus,
                "GPU": node.get("GPU", 0.0) - number * beside.needs.gpus,
            }
            after[number:] = np.maximum(after[number:], best[:-number] + _on_node(rest, needs))
        best = after
    return max(0.0, float(best[-1]))


def describe(nodes: Iterable[Mapping[str, float]]) -> str:
    """Nodes in words, alike ones together."""
    kinds = [f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "no nodes"


def nothing_came(seconds: float, group: Group) -> FleetError:
    """What to say when there was no worker for so long."""
    ray = load_ray()
    free = {name: value for name, value in ray.available_resources().items() if name in ("CPU", "GPU")}
    left = ", ".join(f"{value:g} {name}" for name, value in sorted(free.items())) or "nothing"
    return FleetError(
        f"{group.section}: there was no worker for {seconds:g} s (fleet.start_timeout_seconds): one needs"
        f" {group.needs}; the cluster has {describe(alive())}, of which {left} free"
    )


def bundle(place: Any, index: int) -> Any:
    """The scheduling strategy of an actor that is to be in one of a placement group's bundles."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(placement_group=place, placement_group_bundle_index=index)


def _on_node(node: Mapping[str, float], needs: Needs) -> float:
    shares = [
        int(node.get(name, 0.0) / need + 1e-9) for name, need in (("CPU", needs.cpus), ("GPU", needs.gpus)) if need
    ]
    return min(shares, default=float("inf"))
