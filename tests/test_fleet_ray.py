"""Workers on Ray give what a worker in the learner's process gives, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rewardgen.errors import ConfigError
from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.pool import FleetConfig, Pool, then
from rewardgen.fleet.ray_pool import RayPool
from rewardgen.fleet.replica import Surroundings
from rewardgen.rollout import RolloutWorker
from rewardgen.trainer import Trainer
from rewardgen.types import Rollout, StepReport
from tests.fleet_workers import PATIENCE, HostileFactory, ToyFactory, ray_session, toy_policy
from tests.test_rollout import request, weights_of
from tests.test_trainer import make, same_state


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def pools(session: None) -> Iterator[dict[int, RayPool]]:
    """Of one and of three workers, for all tests: what they have loaded in one run must not show in the next."""
    config = FleetConfig(pool="ray", workers=3)
    three = RayPool(ToyFactory(seconds=0.05), config)
    one = RayPool(ToyFactory(), config.model_copy(update={"workers": 1}))
    yield {1: one, 3: three}
    one.close()
    three.close()


@pytest.fixture(scope="module")
def toys(pools: dict[int, RayPool]) -> RayPool:
    return pools[3]


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


def test_workers_have_the_arithmetic_and_the_folder_of_the_learner(toys: RayPool) -> None:
    here = Surroundings.here()
    assert here.threads == 1
    for _ in range(4):
        assert toys.submit("surroundings").result(PATIENCE).get() == here


@pytest.mark.parametrize("need", [{"cpus_per_worker": 9.0, "workers": 2}, {"gpus_per_worker": 1.0}])
def test_what_does_not_fit_is_refused_at_once(need: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"do not fit.*1 x 16 CPUs and 0 GPUs"):
        RayPool(ToyFactory(), FleetConfig.model_validate({"pool": "ray"} | need))


# --- a whole run ------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 6
SETTINGS = {"num_steps": NUM_STEPS, "batch_size": 1, "accumulation": 4}


def run(folder: Path, pool: Pool | None, staleness: int, after_step: Callable[[int], None] | None = None) -> Trainer:
    """Train with the pool, or with a worker that shares the learner's policy."""
    trainer, reports = make(
        folder, staleness=staleness, train={"num_steps": NUM_STEPS, "batch_size": 1, "accumulation": 4}
    )
    worker = RolloutWorker(trainer.learner.policy, colocated=True)
    trainer.pool = pool or InlinePool(worker, copies=staleness > 0)
    step = trainer.step

    def observed(number: int) -> StepReport:
        report = step(number)
        if after_step is not None:
            after_step(number)
        return report

    trainer.step = observed  # type: ignore[method-assign]
    trainer.run()
    assert len(reports) == NUM_STEPS
    return trainer


@pytest.mark.parametrize("staleness", [0, 1])
def test_final_weights_are_the_same_inline_and_on_one_and_three_workers(
    tmp_path: Path, pools: dict[int, RayPool], staleness: int
) -> None:
    inline = run(tmp_path / "inline", None, staleness)
    for number, pool in pools.items():
        assert same_state(run(tmp_path / str(number), pool, staleness), inline)
    if staleness:
        assert not same_state(run(tmp_path / "synchronous", None, 0), inline), "the older weights make a difference"


def test_final_weights_are_the_same_with_a_worker_killed_on_the_way(tmp_path: Path, pools: dict[int, RayPool]) -> None:
    inline = run(tmp_path / "inline", None, 1)
    pool = pools[3]
    before = pool.figures()["lost_workers"]

    def kill(step: int) -> None:
        if step == 2:  # the batch of step 4 will soon be asked for, and that of step 3 is on its way
            os.kill(pool.places()[0].pid, signal.SIGKILL)

    assert same_state(run(tmp_path / "killed", pool, 1, kill), inline)
    assert pool.figures()["lost_workers"] == before + 1


def test_a_run_begun_on_the_fleet_may_go_on_inline_and_the_other_way_round(
    tmp_path: Path, pools: dict[int, RayPool]
) -> None:
    whole = run(tmp_path / "whole", None, 2)
    for name, first, second in (("there", pools[1], None), ("back", None, pools[1])):
        part, _ = make(tmp_path / name, staleness=2, train=SETTINGS | {"num_steps": 3})
        part.pool = first or InlinePool(RolloutWorker(part.learner.policy, colocated=True), copies=True)
        part.run()
        resumed, _ = make(tmp_path / name, staleness=2, train=SETTINGS)
        resumed.pool = second or InlinePool(RolloutWorker(resumed.learner.policy, colocated=True), copies=True)
        assert resumed.resume() == 3
        resumed.run()
        assert same_state(resumed, whole)


def test_a_step_reports_the_fleet(tmp_path: Path, pools: dict[int, RayPool]) -> None:
    trainer, reports = make(tmp_path, staleness=1)
    trainer.pool = pools[1]
    trainer.run()
    wanted = {"workers", "queue_depth", "retries", "lost_workers", "requests_per_worker_second", "busy_share"}
    for report in reports[1:]:
        assert {f"fleet/{name}" for name in wanted | {"staleness"}} <= set(report.metrics)
        assert report.metrics["fleet/workers"] == report.metrics["fleet/staleness"] == 1
        assert 0 < report.metrics["fleet/busy_share"] <= 1
        assert {"weights", "rollout"} <= set(report.seconds_by_phase)


def test_two_workers_killed_at_random_moments(pools: dict[int, RayPool]) -> None:
    """The benchmark in small; its full result is committed."""
    spec = importlib.util.spec_from_file_location("fleet_kill", ROOT / "benchmarks" / "fleet_kill.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules["fleet_kill"] = benchmark  # dataclasses look their module up
    spec.loader.exec_module(benchmark)
    result = benchmark.run(2, seed=3, pool=pools[3])
    assert result["undisturbed_exact"]
    assert result["exact"] == 2
    assert sum(trial["lost_workers"] for trial in result["trials"]) == 2
    assert "| **all** | 2 | **2** |" in benchmark.render(result)
