"""Whatever happens to workers on Ray: a result comes once and is right, or the error says what and why."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardgen.fleet.pool import FleetConfig, FleetError
from rewardgen.fleet.ray_pool import RayPool
from tests.fleet_workers import PATIENCE, Broken, Deadly, HostileFactory, NoRoomError, ray_session, toy_policy
from tests.test_rollout import weights_of

TRIES = 2
CONFIG = FleetConfig(pool="ray", workers=2, max_tries=TRIES, deadline_seconds=15)


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def pool(notes: Path) -> Iterator[RayPool]:
    pool = RayPool(HostileFactory(notes), CONFIG)
    yield pool
    pool.close()


def runs(notes: Path, tag: str) -> list[int]:
    """The processes in which something ran, in order."""
    return [int(path.name.rpartition("-")[2]) for path in sorted(notes.glob(f"{tag}-*"))]


def value_of(pool: RayPool, method: str, *args: Any, about: str = "") -> Any:
    return pool.submit(method, *args, about=about).result(PATIENCE).get()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def is_gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def test_a_killed_workers_request_is_done_by_another_and_the_worker_comes_back(pool: RayPool, notes: Path) -> None:
    before = pool.figures()
    assert value_of(pool, "die", "once", 1, 7) == 7
    first, second = runs(notes, "once")
    assert first != second
    wait_for(lambda: pool.figures()["workers"] == 2, "the worker that was killed did not come back")
    after = pool.figures()
    assert (after["retries"] - before["retries"], after["lost_workers"] - before["lost_workers"]) == (1, 1)
    pids = {future.result(PATIENCE).get() for future in [pool.submit("nap", 0.5) for _ in range(4)]}
    assert len(pids) == 2, "both work"
    assert first not in pids


def test_a_request_that_kills_its_workers_is_named_and_costs_no_more_than_it_may(pool: RayPool, notes: Path) -> None:
    poison = pool.submit("die", "poison", 99, 0, about="the rollout of step 3, examples a, b")
    others = [pool.submit("double", index) for index in range(8)]
    with pytest.raises(FleetError, match=rf"the rollout of step 3, examples a, b failed after {TRIES} tries: ") as end:
        poison.result(PATIENCE)
    assert len(runs(notes, "poison")) == TRIES
    assert f"process {runs(notes, 'poison')[-1]} on " in str(end.value), "where the last one was"
    assert [future.result(PATIENCE).get() for future in others] == [2 * index for index in range(8)]


def test_a_worker_that_hangs_is_killed_once_and_its_request_done_by_another(pool: RayPool, notes: Path) -> None:
    """It was stopped by SIGSTOP: it neither works nor dies, and only the deadline notices."""
    before = pool.figures()["lost_workers"]
    assert value_of(pool, "hang", "hung", 1, 5) == 5
    hung, other = runs(notes, "hung")
    assert hung != other
    wait_for(lambda: is_gone(hung), "the worker that hung was not killed")
    assert pool.figures()["lost_workers"] == before + 1


def test_an_error_of_the_users_keeps_its_type_and_is_not_tried_again(pool: RayPool, notes: Path) -> None:
    before = pool.figures()["lost_workers"]
    error = pool.submit("fail", "the disk is full").exception(PATIENCE)
    assert type(error) is NoRoomError
    assert str(error) == "the disk is full"
    assert "raise NoRoomError(tag)" in str(error.__cause__), "the traceback over there"
    assert len(runs(notes, "the disk is full")) == 1
    assert pool.figures()["lost_workers"] == before
    with pytest.raises(TypeError, match="pickle"):
        pool.submit("double", threading.Lock()).result(PATIENCE)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        pool.submit("nothing_of_the_kind").result(PATIENCE)
    assert value_of(pool, "double", 4) == 8


def test_what_was_put_and_lost_is_named(pool: RayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads of workers can be made again (see `test_fleet_nodes`); weights that the learner has dropped cannot."""
    from ray.exceptions import ObjectLostError

    handle: Any = pool.put(torch.zeros(3))

    def lost(ref: Any, **_: Any) -> None:
        raise ObjectLostError(ref.hex(), None, "")

    monkeypatch.setattr("ray.get", lost)
    with pytest.raises(FleetError, match="only the learner could make it"):
        handle.get()


def test_what_workers_share_is_never_written(pool: RayPool) -> None:
    handle = pool.put(weights_of(toy_policy(4)))
    zeros = pool.put(torch.zeros(1000))
    for _ in range(4):  # each doubles a copy of its own
        assert float(value_of(pool, "spoil", zeros)) == 1000
    assert torch.equal(handle.get().tensors["inner"], toy_policy(4).inner)


def test_workers_may_be_added_while_it_runs(pool: RayPool) -> None:
    naps = [pool.submit("nap", 1.0) for _ in range(4)]
    pool.grow(1)
    for future in naps:
        future.result(PATIENCE)
    wait_for(lambda: pool.figures()["workers"] == 3, "the new worker did not come")
    assert pool.size == 3
    assert len({future.result(PATIENCE).get() for future in [pool.submit("nap", 1.0) for _ in range(3)]}) == 3


def test_a_constructor_that_raises_ends_the_pool_at_once(tmp_path: Path) -> None:
    pool = RayPool(Broken(tmp_path), FleetConfig(pool="ray", workers=1))
    try:
        error = pool.submit("pid").exception(PATIENCE)
        assert type(error) is NoRoomError
        assert str(error) == "no weights here"
        assert "__call__" in str(error.__cause__)
        assert type(pool.submit("pid").exception(PATIENCE)) is NoRoomError
        assert len(runs(tmp_path, "broken")) == 1, "and it is not tried again"
    finally:
        pool.close()


def test_a_worker_with_another_torch_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"Python": "3.11.0", "torch": "9.9", "rewardgen": "0.1"}
    monkeypatch.setattr("rewardgen.fleet.ray_pool.versions", lambda: ours)
    pool = RayPool(HostileFactory(tmp_path), FleetConfig(pool="ray", workers=1))
    try:
        with pytest.raises(FleetError, match=r"process \d+ on .* has Python .*, but the learner has .*torch 9\.9"):
            pool.submit("pid").result(PATIENCE)
    finally:
        pool.close()


def test_a_constructor_that_kills_its_process_ends_the_pool_after_some_tries(tmp_path: Path) -> None:
    pool = RayPool(Deadly(tmp_path), FleetConfig(pool="ray", workers=1, max_tries=TRIES))
    try:
        with pytest.raises(FleetError, match=f"{TRIES} workers in a row died while they started"):
            pool.submit("pid").result(PATIENCE)
        assert len(runs(tmp_path, "deadly")) == TRIES
    finally:
        pool.close()


def test_a_cluster_that_never_has_room_is_not_waited_for_in_silence(tmp_path: Path) -> None:
    config = FleetConfig(pool="ray", workers=1, min_workers=0, cpus_per_worker=99, start_timeout_seconds=1)
    pool = RayPool(HostileFactory(tmp_path), config)
    try:
        with pytest.raises(FleetError, match=r"no worker for 1 s .*one needs 99 CPUs; the cluster has 1 x 16 CPUs"):
            pool.submit("pid").result(PATIENCE)
    finally:
        pool.close()


def test_closing_cancels_what_waits_and_leaves_no_process(tmp_path: Path) -> None:
    pool = RayPool(HostileFactory(tmp_path), FleetConfig(pool="ray", workers=1))
    pid = value_of(pool, "pid")
    running, waiting = pool.submit("nap", 600.0), pool.submit("nap", 600.0)
    wait_for(running.running, "it does not run")
    pool.close()
    pool.close()
    assert isinstance(running.exception(PATIENCE), FleetError)
    assert waiting.cancelled()
    wait_for(lambda: is_gone(pid), "the worker still runs")
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("pid")
    assert os.getpid() != pid
