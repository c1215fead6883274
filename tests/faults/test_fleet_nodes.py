"""Machines come and go during a run. Emulated: each node has its own raylet and object store on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.pool import FleetConfig, Pool
from rewardgen.fleet.ray_pool import RayPool
from rewardgen.rollout import RolloutWorker
from rewardgen.trainer import Trainer
from rewardgen.types import StepReport
from tests.faults.test_fleet_ray import wait_for
from tests.fleet_workers import PATIENCE, HostileFactory, ToyFactory, patiently, processes_below
from tests.test_trainer import make, same_state

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without room for workers, and two nodes with room for one each."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")
    head = NODE | {"num_cpus": 0, "include_dashboard": False}
    cluster: Any = patiently(lambda: Cluster(initialize_head=True, head_node_args=head), lambda: None)
    try:
        for _ in range(2):
            patiently(lambda: cluster.add_node(**NODE), lambda: None)
        patiently(lambda: ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR"), ray.shutdown)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def run(folder: Path, pool: Pool | None, events: dict[int, Any] | None = None) -> Trainer:
    settings = {"num_steps": 8, "batch_size": 1, "accumulation": 4}
    trainer, _ = make(folder, staleness=1, train=settings)
    trainer.pool = pool or InlinePool(RolloutWorker(trainer.learner.policy, colocated=True), copies=True)
    step = trainer.step

    def eventful(number: int) -> StepReport:
        if events and number in events:
            events[number]()
        return step(number)

    trainer.step = eventful  # type: ignore[method-assign]
    trainer.run()
    return trainer


def test_a_node_is_removed_and_another_added_during_a_run(cluster: Any, tmp_path: Path) -> None:
    pool = RayPool(ToyFactory(seconds=0.1), FleetConfig(pool="ray", workers=2))
    try:
        wait_for(lambda: pool.figures()["workers"] == 2, "two nodes, two workers")
        events = {
            2: lambda: cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False),
            5: lambda: patiently(lambda: cluster.add_node(**NODE), lambda: None),
        }
        assert same_state(run(tmp_path / "ray", pool, events), run(tmp_path / "inline", None))
        wait_for(lambda: pool.figures()["workers"] == 2, "the new node has a worker")
        assert pool.figures()["lost_workers"] >= 1
    finally:
        pool.close()


def test_a_payload_goes_with_its_node_and_is_made_again(cluster: Any, tmp_path: Path) -> None:
    """The learner had not read it yet. Two nodes are left by the test before, or are there from the start."""
    pool = RayPool(HostileFactory(tmp_path), FleetConfig(pool="ray", workers=1))
    try:
        handle: Any = pool.submit("large", "payload", 1_000_000).result(PATIENCE)
        (pid,) = (int(path.name.rpartition("-")[2]) for path in tmp_path.glob("payload-*"))
        (node,) = (node for node in cluster.worker_nodes if pid in processes_below(raylet_of(node)))
        cluster.remove_node(node, allow_graceful=False)
        patiently(lambda: cluster.add_node(**NODE), lambda: None)
        wanted = torch.arange(1_000_000, dtype=torch.float32)
        doubled = pool.submit("double", handle, about="a judge's score")  # reads it before the learner does
        assert torch.equal(doubled.result(PATIENCE).get(), wanted * 2)
        assert torch.equal(handle.get(), wanted)
        assert len(list(tmp_path.glob("payload-*"))) == 2
    finally:
        pool.close()


def raylet_of(node: Any) -> int:
    (info,) = node.all_processes["raylet"]
    return int(info.process.pid)
