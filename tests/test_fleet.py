"""The fleet without a cluster: payloads, who runs what, drawing ahead, and the one-worker pool."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from rewardgen.checkpoint import load_checkpoint
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.fleet.cluster import Group, Needs, describe, room
from rewardgen.fleet.dispatch import Dispatcher, Task
from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.payload import ALIGNMENT, Known, examples_in, pack, unpack
from rewardgen.fleet.pool import FleetConfig, FleetError, Handle, Here, then
from rewardgen.fleet.schedule import Ahead
from rewardgen.measure import Clock
from rewardgen.rollout import RolloutWorker, Weights
from rewardgen.types import Score, StepReport
from tests.fleet_workers import toy_policy
from tests.test_rollout import request, weights_of
from tests.test_trainer import Reports, make, said, same_state
from tests.toys import ToyDataset

# --- payloads ---------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.untyped_storage().tolist() == b.untyped_storage().tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans()), max_size=6),
    st.integers(0, 2**31),
)
def test_any_tensors_come_out_with_the_same_bits(kinds: list[tuple[torch.dtype, list[int], bool]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for dtype, shape, transposed in kinds:
        tensor = (torch.randn(shape, generator=generator) * 100).to(dtype)
        tensors.append(tensor.transpose(0, -1) if transposed and shape else tensor)
    value = {"a": tuple(tensors[:2]), "b": [tensors[2:], 7, "x", None]}
    packed = pack(value)
    assert packed.data.dtype == np.uint8
    found = unpack(packed)
    assert found["b"][1:] == [7, "x", None]
    assert isinstance(found["a"], tuple)
    for got, wanted in zip([*found["a"], *found["b"][0]], tensors, strict=True):
        assert same_bits(got.contiguous(), wanted.contiguous().clone())


@pytest.mark.parametrize("change", [None, "a little", "negative", "above"])
def test_pictures_of_eight_bits_travel_as_bytes_and_nothing_is_lost(change: str | None) -> None:
    """Including the case where one pixel of many is no multiple of 1/255."""
    levels = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = levels.to(torch.float32) / 255
    picture[-1, -1, -1] = {"a little": 0.5000001, "negative": -0.0, "above": 1.5}.get(change or "", 1.0)
    packed = pack([picture])
    assert packed.data.nbytes == picture.numel() * (4 if change else 1)
    assert same_bits(unpack(packed)[0], picture)


def test_what_was_packed_is_a_copy_and_so_is_what_comes_out() -> None:
    tensor = torch.zeros(3)
    packed = pack({"x": tensor, "leaf": tensor.requires_grad_()})
    with torch.no_grad():
        tensor += 1
    first, second = unpack(packed), unpack(packed)
    first["x"] += 5
    assert second["x"].tolist() == [0, 0, 0]
    assert not second["leaf"].requires_grad


def test_weights_come_out_as_views_of_the_shared_bytes_and_are_never_written() -> None:
    """Trap: torch writes into read-only arrays of NumPy without a word."""
    policy = toy_policy(3)
    packed = pack(weights_of(policy, 7))
    before = packed.data.copy()
    packed.data.setflags(write=False)  # as Ray hands it out
    weights = unpack(packed)
    start = packed.data.ctypes.data
    assert weights.version == 7
    for name, tensor in weights.tensors.items():
        assert start <= tensor.data_ptr() < start + packed.data.nbytes
        assert (tensor.data_ptr() - start) % ALIGNMENT == 0
        assert torch.equal(tensor, policy.trainable()[name])
    worker = RolloutWorker(toy_policy(0))
    worker.rollout(request(), weights)
    with torch.no_grad():
        for parameter in worker.policy.trainable().values():
            parameter.add_(1)  # were it the shared memory, all other workers would see it
    assert np.array_equal(packed.data, before)


def test_examples_that_the_receiver_has_do_not_travel() -> None:
    examples = ToyDataset(3).examples
    asked = request()
    asked = dataclasses.replace(asked, examples=[examples[2], examples[0]])
    known = examples_in(asked)
    assert known == [examples[2], examples[0]]
    packed = pack({"drawn": asked, "other": examples[1]}, known)
    assert packed.skeleton["drawn"].fields["examples"] == [Known(0), Known(1)]
    found = unpack(packed, known)
    assert found["drawn"].examples[0] is examples[2]
    assert found["other"] is not examples[1]
    assert torch.equal(found["other"].target, examples[1].target)


def test_scores_and_their_metrics_come_through() -> None:
    score = Score(value_B=torch.rand(2), valid_B=torch.tensor([True, False]), metrics={"share": 0.5})
    found = unpack(pack({"style": score}))["style"]
    assert isinstance(found, Score)
    assert torch.equal(found.value_B, score.value_B)
    assert found.valid_B.tolist() == [True, False]
    assert found.metrics == {"share": 0.5}


# --- who runs what ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_task_ends_once_whatever_is_lost(workers: int, number: int, max_tries: int, random: Any) -> None:
    """Against a brute-force record: nothing runs twice at a time, nothing is forgotten, and no task costs too many."""
    dispatcher: Dispatcher[int] = Dispatcher(max_tries=max_tries, deadline_seconds=1e9)
    tasks = [Task(method="work", args=(), about=f"task {index}") for index in range(number)]
    starts: dict[Task, int] = {}
    running: dict[int, Task] = {}
    losses: dict[Task, int] = {}
    left, next_replica = list(tasks), workers
    for replica in range(workers):
        dispatcher.idle(replica)
    while left or running or dispatcher.queue_depth:
        if left and random.random() < 0.5:
            dispatcher.submit(left.pop(0))
        for replica, task in dispatcher.assign(0.0):
            assert replica not in running
            assert task not in running.values()
            running[replica] = task
            starts[task] = starts.get(task, 0) + 1
        if running and random.random() < 0.7:
            replica = random.choice(sorted(running))
            task = running.pop(replica)
            if random.random() < 0.5:
                dispatcher.lose(replica, "lightning")
                losses[task] = losses.get(task, 0) + 1
                dispatcher.idle(next_replica)
                next_replica += 1
            else:
                assert dispatcher.finish(replica, 0.0) is task
                task.future.set_result(starts[task])
    for task in tasks:
        assert task.future.done()
        assert starts[task] <= max_tries
        if losses.get(task, 0) == max_tries:
            with pytest.raises(FleetError, match=f"{task.about} failed .*lightning"):
                task.future.result()
        else:
            assert task.future.result() == starts[task] == losses.get(task, 0) + 1
    assert dispatcher.retries == sum(starts.values()) - number


def test_first_come_first_served_and_a_lost_task_goes_first_again() -> None:
    dispatcher: Dispatcher[str] = Dispatcher(max_tries=3, deadline_seconds=10)
    tasks = [Task(method="m", args=(), about=str(index)) for index in range(3)]
    for task in tasks:
        dispatcher.submit(task)
    dispatcher.idle("a")
    assert [(r, t.about) for r, t in dispatcher.assign(5.0)] == [("a", "0")]
    assert dispatcher.next_deadline() == 15
    assert (dispatcher.overdue(14.9), dispatcher.overdue(15)) == ([], ["a"])
    dispatcher.lose("a", "late")
    dispatcher.idle("b")
    assert [(r, t.about) for r, t in dispatcher.assign(20.0)] == [("b", "0")]
    assert dispatcher.queue_depth == 2


def test_after_a_loss_the_others_are_asked_whether_they_are_there_before_a_task_is() -> None:
    """Or a machine that takes eight idle workers along would pass for a request that kills them."""
    dispatcher: Dispatcher[int] = Dispatcher(max_tries=2, deadline_seconds=10)
    task = Task(method="m", args=())
    for replica in range(8):
        dispatcher.idle(replica)
    dispatcher.submit(task)
    ((first, _),) = dispatcher.assign(0.0)
    dispatcher.lose(first, "its machine is gone")
    recalled = dispatcher.recall(1.0)
    assert len(recalled) == 7
    assert list(dispatcher.assign(1.0)) == [], "nobody is trusted"
    assert dispatcher.overdue(11.0) == recalled, "one that does not answer is not waited for either"
    for replica in recalled[:-1]:
        dispatcher.lose(replica, "its machine is gone")
    assert not task.future.done()
    dispatcher.alive(recalled[-1])
    assert list(dispatcher.assign(2.0)) == [(recalled[-1], task)]
    assert (task.tries, dispatcher.retries) == (1, 1)


def test_cancelled_tasks_are_not_run_and_the_end_leaves_nobody_waiting() -> None:
    dispatcher: Dispatcher[str] = Dispatcher(max_tries=3, deadline_seconds=10)
    cancelled, running, waiting = (Task(method="m", args=(), about=name) for name in ("c", "r", "w"))
    for task in (cancelled, running, waiting):
        dispatcher.submit(task)
    assert cancelled.future.cancel()
    dispatcher.idle("a")
    assert [t.about for _, t in dispatcher.assign(0.0)] == ["r"]
    dispatcher.end()
    assert isinstance(running.future.exception(), FleetError)
    with pytest.raises(CancelledError):
        waiting.future.result()


@pytest.mark.parametrize(
    ("nodes", "needs", "expected"),
    [
        ([{"CPU": 4.0}, {"CPU": 3.0}], Needs(cpus=2), 3),
        ([{"CPU": 4.0}], Needs(cpus=0.1), 40),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 2.0, "GPU": 8.0}], Needs(cpus=1, gpus=1), 10),
        ([{"CPU": 64.0}], Needs(cpus=1, gpus=0.5), 0),
        ([{"CPU": 1.0}], Needs(cpus=0), float("inf")),
        ([], Needs(), 0),
    ],
)
def test_room_is_counted_node_by_node(nodes: list[dict[str, float]], needs: Needs, expected: float) -> None:
    assert room(nodes, needs) == expected


NEEDS = st.builds(Needs, cpus=st.sampled_from([0.0, 0.5, 1.0, 2.0]), gpus=st.sampled_from([0.0, 0.5, 1.0]))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 4), "GPU": st.integers(0, 2)}), max_size=3),
    NEEDS,
    NEEDS,
    st.integers(0, 5),
)
def test_room_beside_others_is_the_best_of_all_ways_to_place_them(
    nodes: list[dict[str, float]], needs: Needs, theirs: Needs, number: int
) -> None:
    found = room(nodes, needs, Group(section="fleet", number=number, needs=theirs))
    if theirs.nothing or needs.nothing:
        assert found == room(nodes, needs)
        return
    ways = []
    for counts in itertools.product(range(number + 1), repeat=len(nodes)):
        left = [
            {"CPU": node["CPU"] - count * theirs.cpus, "GPU": node["GPU"] - count * theirs.gpus}
            for node, count in zip(nodes, counts, strict=True)
        ]
        if sum(counts) == number and all(min(node.values()) >= 0 for node in left):
            ways.append(room(left, needs))
    assert found == max(ways, default=0)


def test_nodes_are_told_in_words() -> None:
    assert describe([{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]) == (
        "2 x 4 CPUs and 0 GPUs, 1 x 2 CPUs and 1 GPUs"
    )
    assert describe([]) == "no nodes"


# --- chains -----------------------------------------------------------------------------------------------------------


def test_a_chain_passes_on_results_and_every_kind_of_failure() -> None:
    def ahead(outcome: Callable[[Future[int]], None], submit: Callable[[int], Future[str]]) -> Future[str]:
        future: Future[int] = Future()
        chained = then(future, submit)
        assert not chained.done()
        outcome(future)
        return chained

    def judged(value: int) -> Future[str]:
        future: Future[str] = Future()
        future.set_result(f"judged {value}")
        return future

    def failing(value: int) -> Future[str]:
        future: Future[str] = Future()
        future.set_exception(KeyError(value))
        return future

    def closed(value: int) -> Future[str]:
        raise RuntimeError("the pool is closed")

    assert ahead(lambda f: f.set_result(3), judged).result(0) == "judged 3"
    assert isinstance(ahead(lambda f: f.set_exception(ValueError()), judged).exception(0), ValueError)
    assert isinstance(ahead(lambda f: f.set_result(3), failing).exception(0), KeyError)
    assert isinstance(ahead(lambda f: f.set_result(3), closed).exception(0), RuntimeError)
    assert isinstance(ahead(lambda f: f.cancel() and None, judged).exception(0), CancelledError)


# --- drawing ahead ----------------------------------------------------------------------------------------------------


def schedule(staleness: int, num_steps: int, starts: set[int]) -> tuple[Ahead[int], list[tuple[int, int]], list[int]]:
    """Records (batch, updates of its weights), in the order asked for; the last list holds the present updates."""
    asked: list[tuple[int, int]] = []
    now = [0]

    def submit(batch: int, weights: Handle[Weights]) -> list[Future[Handle[Any]]]:
        asked.append((batch, weights.get().version))
        future: Future[Handle[Any]] = Future()
        future.set_result(Here(batch))
        return [future]

    ahead = Ahead(
        put=Here,
        plan=lambda step: step,
        needs_weights=lambda step: step in starts,
        submit=submit,
        publish=lambda: Weights(version=now[0], tensors={}),
        staleness=staleness,
        num_steps=num_steps,
    )
    return ahead, asked, now


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(1, 12), st.integers(0, 14), st.data())
def test_batch_k_is_drawn_with_the_weights_after_k_minus_s_updates_also_when_resumed(
    staleness: int, num_steps: int, first: int, data: st.DataObject
) -> None:
    """`first` is the step from which rollouts are needed. Cut anywhere, and resumed, perhaps for longer."""
    cut = data.draw(st.integers(0, num_steps))
    length = data.draw(st.integers(cut, num_steps))  # the first run was to end here, the resumed one at `num_steps`
    needed = set(range(first, num_steps + 20))
    clock = Clock(torch.device("cpu"))
    ahead, asked, now = schedule(staleness, length, needed)
    for step in range(cut):
        now[0] = step
        pending = ahead.ask(step, clock)
        assert pending.batch == step
        assert bool(pending.futures) == (step in needed)
        assert all(batch <= step + staleness and batch < max(length, 1) for batch, _ in asked), "too far ahead"
    resumed, again, now = schedule(staleness, num_steps, needed)
    resumed.restore(cut, ahead.published())
    for step in range(cut, num_steps):
        now[0] = step
        assert resumed.ask(step, clock).batch == step
        assert len(resumed.published()) <= max(staleness, 0)
    for batch, version in asked + again:
        assert version == max(0, batch - staleness)
    seen = [batch for batch, _ in asked if batch < cut] + [batch for batch, _ in again]
    assert seen == [step for step in range(num_steps) if step in needed], "each is drawn once, in order"


def test_weights_that_are_gone_are_not_replaced_by_others() -> None:
    ahead, _, _ = schedule(2, 10, set(range(10)))
    with pytest.raises(ValueError, match="weights after 3 updates, and these are gone"):
        ahead.ask(5, Clock(torch.device("cpu")))


# --- the learner's own worker -----------------------------------------------------------------------------------------


def test_a_colocated_worker_gives_the_policy_its_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, older = toy_policy(1), toy_policy(2)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    wanted = RolloutWorker(older).rollout(request(), weights_of(older)).trajectory.entry_BLC
    worker = RolloutWorker(policy, colocated=True)
    assert torch.equal(worker.rollout(request(), weights_of(older)).trajectory.entry_BLC, wanted)
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())
    monkeypatch.setattr(policy, "decode", lambda *_: pytest.fail("amid the rollout"))
    with pytest.raises(pytest.fail.Exception):
        worker.rollout(request(4, decode=True), weights_of(older))
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())


def ahead_run(folder: Path, staleness: int, **changes: Any) -> tuple[Any, list[StepReport]]:
    trainer, reports = make(folder, staleness=staleness, **changes)
    trainer.pool = InlinePool(RolloutWorker(trainer.learner.policy, colocated=True), copies=True)
    assert isinstance(reports, Reports)
    return trainer, reports


@pytest.mark.parametrize(("staleness", "start_step"), [(0, 0), (1, 0), (2, 0), (2, 3)])
def test_drawing_ahead_uses_the_older_weights_and_nothing_else_changes(
    tmp_path: Path, staleness: int, start_step: int
) -> None:
    """Brute force: the same run with every rollout drawn by a copy of the policy as it was so many updates ago."""
    trainer, reports = ahead_run(tmp_path / "ahead", staleness, start_step=start_step)
    trainer.run()
    by_hand, wanted = make(tmp_path / "by_hand", start_step=start_step)
    history: list[dict[str, Tensor]] = []

    class Late:
        def rollout(self, asked: Any, weights: Weights) -> Any:
            old = toy_policy(0)
            older = history[max(0, asked.step - staleness)]
            return RolloutWorker(old).rollout(asked, Weights(version=weights.version, tensors=older))

    by_hand.pool = InlinePool(Late())
    step = by_hand.learner.step
    history.append({n: p.detach().clone() for n, p in by_hand.learner.policy.trainable().items()})

    def recorded(*args: Any, **rest: Any) -> StepReport:
        report = step(*args, **rest)
        history.append({n: p.detach().clone() for n, p in by_hand.learner.policy.trainable().items()})
        return report

    by_hand.learner.step = recorded  # type: ignore[method-assign]
    by_hand.run()
    assert same_state(trainer, by_hand)
    drawn = [report.step for report in reports if report.entry_step is not None]
    assert [reports[k].policy_version for k in drawn] == [max(0, k - staleness) for k in drawn]
    if staleness:
        assert [reports[k].metrics["fleet/staleness"] for k in drawn] == [float(min(k, staleness)) for k in drawn]
    assert [dataclasses.replace(r, policy_version=0, metrics={}) for r in said(reports)] == [
        dataclasses.replace(r, policy_version=0, metrics={}) for r in said(wanted)
    ]


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_resumed_run_that_draws_ahead_equals_the_uninterrupted_one(tmp_path: Path, cut: int) -> None:
    whole, all_reports = ahead_run(tmp_path / "whole", 2)
    whole.run()
    part, first_reports = ahead_run(tmp_path / "part", 2, train={"num_steps": cut})
    part.run()
    torch.manual_seed(12345)
    tensors, state = load_checkpoint(tmp_path / "part" / "checkpoints" / f"step-{cut:06d}")
    assert {key.split("/")[1] for key in tensors if key.startswith("published/")} == {str(k) for k in range(cut)[-2:]}
    evaluated, _ = make(tmp_path / "evaluated")
    evaluated.learner.load_state(tensors, state["learner"])  # as `rewardgen eval` does, which draws nothing ahead
    assert same_state(evaluated, part)
    resumed, last_reports = ahead_run(tmp_path / "part", 2)
    assert resumed.resume() == cut
    resumed.run()
    assert said(all_reports) == said(first_reports) + said(last_reports)
    assert same_state(whole, resumed)
    synchronous, _ = ahead_run(tmp_path / "synchronous", 0)
    synchronous.run()
    assert not same_state(whole, synchronous), "the older weights make a difference here"
    other, _ = ahead_run(tmp_path / "part", 1)
    with pytest.raises(CheckpointError, match="staleness = 2, this run has 1"):
        other.resume()


# --- configuration ----------------------------------------------------------------------------------------------------


def test_impossible_fleets_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_workers is 3, more than workers, which is 2"):
        FleetConfig(workers=2, min_workers=3)
    with pytest.raises(ValidationError, match="does not use Ray Client; give host:6379"):
        FleetConfig(address="ray://head:10001")


TOY = """\
name: words
policy: {use: "tests.toys:ToyPolicy"}
data:
  train: {use: "tests.toys:ToyDataset"}
  held_out: {use: "tests.toys:ToyDataset"}
rollout: {image_size: [8, 8], num_steps: 4, window: {kind: refl, entry_range: [1, 3]}}
objective:
  rewards:
    style: {use: "tests.toys:ToyReward", weight: 0.5}
evaluation: {num_examples: 1, grid_examples: 0}
"""


@pytest.mark.parametrize(
    ("lines", "overrides", "expected"),
    [
        ("", [], {"pool": "inline", "workers": 1}),
        ("", ["fleet=ray", "fleet.workers=8"], {"pool": "ray", "workers": 8}),
        ("", ["fleet.workers=8", "fleet=ray"], {"pool": "ray", "workers": 8}),
        ("fleet: ray\n", ["fleet.workers=3"], {"pool": "ray", "workers": 3}),
        ("fleet: {pool: ray, workers: 5}\n", ["fleet=inline"], {"pool": "inline", "workers": 5}),
        ("fleet: {workers: 5}\nflavors: {tiny: {fleet: ray}}\n", [], {"pool": "ray", "workers": 5}),
    ],
)
def test_a_word_stands_for_the_pool(tmp_path: Path, lines: str, overrides: list[str], expected: dict[str, Any]) -> None:
    from rewardgen.config import load_experiment

    path = tmp_path / "words.yaml"
    path.write_text(TOY + lines)
    found = load_experiment(path, overrides=overrides).fleet
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fleet=rya"], r"fleet\.pool \(override\): should be 'inline' or 'ray', got 'rya'"),
        (["fleet=ray", "fleet.wokers=2"], r"fleet\.wokers \(override\): unknown key\. Did you mean 'workers'"),
        (["fleet=ray", "train.strategy=fsdp"], "a sharded model draws its own rollouts"),
        (["fleet.staleness=1", "train.strategy=fsdp"], "a sharded model draws its own rollouts"),
        (["fleet=ray", "fleet.judges.workers=2"], r"fleet\.judges \(override\): no reward scores samples"),
    ],
)
def test_what_the_fleet_cannot_be_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    from rewardgen.config import load_experiment

    path = tmp_path / "words.yaml"
    path.write_text(TOY)
    with pytest.raises(ConfigError, match=message):
        load_experiment(path, overrides=overrides)


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from rewardgen.fleet.ray_pool import RayPool

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[ray\]'"):
        RayPool(toy_policy, FleetConfig(pool="ray"))


def test_a_worker_is_made_of_the_policy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewardgen.config import load_experiment
    from rewardgen.distributed import Processes
    from rewardgen.workers import ray_workers

    made: list[Any] = []
    monkeypatch.setattr("rewardgen.fleet.ray_pool.RayPool", lambda *args, **rest: made.append((*args, rest)))
    path = tmp_path / "words.yaml"
    path.write_text(TOY)
    settings = ["fleet=ray", "fleet.workers=3", "fleet.staleness=1", "train.device=cpu"]
    with pytest.warns(UserWarning, match="of 3 workers no more than 2 are ever busy: a step draws 1 micro-batches"):
        ray_workers(load_experiment(path, overrides=settings), Processes())
    ((factory, config, rest),) = made
    assert config.workers == 3
    assert rest == {"needs": Needs(cpus=1.0, gpus=0.0), "device": torch.device("cpu")}
    assert b"ToyPolicy" in pickle.dumps(factory)
    assert b"ToyReward" not in pickle.dumps(factory)
    assert isinstance(factory(), RolloutWorker)
    assert not factory().colocated
    with pytest.raises(ConfigError, match="learners that a launcher starts draw for themselves"):
        ray_workers(load_experiment(path, overrides=settings), Processes(0, 2))
    assert ray_workers(load_experiment(path), Processes(0, 2)) is None
