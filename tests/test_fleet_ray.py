"""Workers on Ray give what a worker in the learner's process gives, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rewardgen.errors import ConfigError
from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.pool import FleetConfig, then
from rewardgen.fleet.ray_pool import RayPool
from rewardgen.rollout import RolloutWorker
from rewardgen.types import Rollout
from tests.fleet_workers import PATIENCE, HostileFactory, ToyFactory, ray_session, toy_policy
from tests.test_rollout import request, weights_of


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def toys() -> Iterator[RayPool]:
    pool = RayPool(ToyFactory(), FleetConfig(pool="ray", workers=2))
    yield pool
    pool.close()


def test_a_rollout_is_the_inline_one_bit_for_bit(toys: RayPool) -> None:
    policies = [toy_policy(1), toy_policy(2)]
    asked = request(4, decode=True)
    for policy in (*policies, policies[0]):
        weights = toys.put(weights_of(policy))
        drawn = [toys.submit("rollout", asked, weights) for _ in range(3)]
        wanted = InlinePool(RolloutWorker(policy)).submit("rollout", asked, weights_of(policy)).result().get()
        for future in drawn:
            found = future.result(timeout=PATIENCE).get()
            assert isinstance(found, Rollout)
            assert torch.equal(found.trajectory.entry_BLC, wanted.trajectory.entry_BLC)
            assert torch.equal(found.trajectory.sigmas_T, wanted.trajectory.sigmas_T)
            assert torch.equal(found.pixels_B3HW, wanted.pixels_B3HW)
            assert found.trajectory.seed_B == asked.seed_B
            assert all(a is b for a, b in zip(found.examples, asked.examples, strict=True)), "they never travelled back"


def test_a_judge_reads_what_a_worker_drew_without_the_learner(toys: RayPool, tmp_path: Path) -> None:
    policy, asked = toy_policy(1), request()
    judges = RayPool(HostileFactory(tmp_path), FleetConfig(pool="ray", workers=1, cpus_per_worker=0.5))
    try:
        drawn = toys.submit("rollout", asked, toys.put(weights_of(policy)))
        scored = then(drawn, lambda handle: judges.submit("score", handle))
        ids, total_B, examples = scored.result(timeout=PATIENCE).get()
        rollout = drawn.result().get()
        refs_B = torch.stack([example.style_refs[0].sum() for example in asked.examples])
        assert ids == [example.id for example in asked.examples]
        assert torch.equal(total_B, rollout.trajectory.entry_BLC.sum((1, 2)) + refs_B)
        assert all(a is b for a, b in zip(examples, asked.examples, strict=True))
    finally:
        judges.close()


def test_the_same_arithmetic_and_folder_as_in_the_learner(toys: RayPool) -> None:
    figures = toys.figures()
    assert figures["workers"] == 2
    assert (figures["retries"], figures["lost_workers"], figures["queue_depth"]) == (0, 0, 0)
    assert toys.figures()["requests_per_worker_second"] == 0


@pytest.mark.parametrize("need", [{"cpus_per_worker": 9.0, "workers": 2}, {"gpus_per_worker": 1.0}])
def test_what_does_not_fit_is_refused_at_once(need: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"do not fit.*1 x 16 CPUs and 0 GPUs"):
        RayPool(ToyFactory(), FleetConfig.model_validate({"pool": "ray"} | need))
