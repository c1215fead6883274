"""Judges that are waited for: a whole step's questions are on their way at once, and nothing but the time shows it."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardgen.errors import ScoringError
from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.payload import pack, unpack
from rewardgen.fleet.replica import Replica, Surroundings
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.reward import Reward, check_reward
from rewardgen.rewards.judging.client import CallError, Reply
from rewardgen.rewards.judging.endpoints import Endpoints
from rewardgen.rewards.vlm_judge import VlmJudge
from rewardgen.rollout import RolloutWorker
from rewardgen.scoring import ScoringWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Begun, Example, Rollout, Score, StepReport
from tests.judge_servers import belief, chosen, digest
from tests.test_policy_gradient import GRPO, ROLLOUT, drawn, make
from tests.test_sample_composition import objective_of
from tests.toys import ToyDataset, ToyJudge, ToyPolicy, ToyReward

PATIENCE = 60.0
"""Seconds after which a test that waits in vain fails."""
PICTURES = 4 * GRPO["num_generations"]
"""Drawn in a step: of four examples."""


class Network:
    """In place of a judge's endpoint. What it thinks follows from the question's bytes, and so does how long it takes.

    Args:
        together: calls that are answered once so many are under way, no earlier.
        fails: whether the question with a digest gets an error of the server.
        breaks: whether it ends in an exception that nobody expects.
    """

    def __init__(
        self,
        together: int = 1,
        fails: Callable[[str], bool] = lambda code: False,
        breaks: Callable[[str], bool] = lambda code: False,
    ) -> None:
        self.barrier = threading.Barrier(together)
        self.fails, self.breaks = fails, breaks
        self.calls: list[str] = []

    def __call__(self, url: str, data: bytes, *, key: str | None, timeout_s: float) -> Reply:
        code = digest(json.loads(data))
        self.calls.append(code)
        self.barrier.wait(PATIENCE)
        time.sleep(int(code[4:6], 16) / 256 * 0.02)  # so that answers do not come in the order of the questions
        if self.breaks(code):
            raise RuntimeError(f"about {code}")
        if self.fails(code):
            raise CallError("server_error", "500")
        p = belief(code)
        return Reply(text="", candidates=(("Yes", math.log(p)), ("No", math.log(1 - p))))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Network]:
    def install(**settings: Any) -> Network:
        made = Network(**settings)
        monkeypatch.setattr("rewardgen.rewards.judging.service.call", made)
        return made

    return install


def judge(**settings: Any) -> VlmJudge:
    given = {"concurrency": PICTURES, "adaptive": False, "backoff_s": 0.001, "max_attempts": 1} | settings
    return VlmJudge("style", ("http://localhost:1/v1",), "tiny", **given)


class InLine(Reward):
    """A judge that is waited for at once, as rewards are that begin nothing."""

    differentiable = False

    def __init__(self, judge: VlmJudge) -> None:
        super().__init__()
        self.judge = judge

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        found: Score = self.judge.score(pixels_B3HW, examples)
        return found


class Reports(list[StepReport]):
    def step(self, report: StepReport) -> None:
        self.append(report)


def trainer_of(
    objective: Objective, folder: Path, *, batch_size: int = 2, num_steps: int = 3, staleness: int = 0
) -> Trainer:
    learner = Learner(ToyPolicy(), objective, optimizer=OptimizerConfig(lr=1e-2), window=ROLLOUT.window)
    config = {"num_steps": num_steps, "batch_size": batch_size, "accumulation": 4 // batch_size, "checkpoint_every": 0}
    return Trainer(
        learner,
        InlinePool(RolloutWorker(learner.policy, colocated=True), copies=staleness > 0),
        ToyDataset(7),
        rollout=ROLLOUT,
        config=TrainConfig.model_validate(config),
        seed=0,
        staleness=staleness,
        folder=folder,
        reporter=Reports(),
        scoring=InlinePool(ScoringWorker(objective.sampled)),
    )


def mixed(judge: Reward, **more: Any) -> Objective:
    """Flow matching, a reward with a gradient, one that scores samples at once, and the judge."""
    rewards: dict[str, Reward] = {"style": ToyReward(), "near": ToyJudge(fail_ids=["toy-002"]), "judge": judge}
    terms: dict[str, dict[str, Any]] = {name: {} for name in rewards}
    return objective_of(terms, rewards, GRPO, flow_matching={"weight": 0.5}, **more)


def said(trainer: Trainer) -> list[dict[str, Any]]:
    """All that a run reports but what its machine was like."""
    assert isinstance(trainer._reporter, Reports)
    reports = [dataclasses.asdict(report) for report in trainer._reporter]
    return [{k: v for k, v in r.items() if k not in ("seconds_by_phase", "peak_memory_bytes")} for r in reports]


def test_all_questions_of_a_step_are_on_their_way_at_once(network: Any, tmp_path: Path) -> None:
    """No answer comes before the last micro-batch is drawn and asked about."""
    made = network(together=PICTURES)
    trainer = trainer_of(mixed(judge()), tmp_path, batch_size=1, num_steps=2)
    trainer.run()
    assert len(made.calls) == 2 * PICTURES
    assert [report["valid_counts"]["judge"] for report in said(trainer)] == [PICTURES, PICTURES]


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.filterwarnings("ignore::rewardgen.reward.RewardWarning")
def test_a_run_is_that_of_a_judge_that_is_waited_for_in_line(network: Any, tmp_path: Path, staleness: int) -> None:
    made = network(fails=lambda code: chosen(code, 0.2))
    begun = trainer_of(mixed(judge()), tmp_path / "begun", staleness=staleness)
    begun.run()
    asked, made.calls = made.calls, []
    in_line = trainer_of(mixed(InLine(judge())), tmp_path / "in_line", staleness=staleness)
    in_line.run()
    assert sorted(asked) == sorted(made.calls)
    assert said(begun) == said(in_line)
    assert any(report["metrics"]["reward/judge/failed"] for report in said(begun))
    trainer_of(mixed(judge()), tmp_path / "part", staleness=staleness, num_steps=2).run()
    resumed = trainer_of(mixed(judge()), tmp_path / "part", staleness=staleness)
    assert resumed.resume() == 2
    resumed.run()
    assert said(resumed) == said(begun)[2:]
    tensors, state = begun.learner.state()
    for other in (in_line, resumed):
        found = other.learner.state()
        assert found[1] == state
        assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("fault", ["fails", "breaks"])
@pytest.mark.filterwarnings("ignore::rewardgen.reward.RewardWarning")
def test_a_judge_that_fails_stops_the_run_with_the_same_error(network: Any, tmp_path: Path, fault: str) -> None:
    network(**{fault: lambda code: chosen(code, 0.4)})
    found = []
    for name, reward in (("begun", judge()), ("in_line", InLine(judge()))):
        config = {
            "rewards": {"judge": {"use": "toy"}},
            "policy_gradient": GRPO,
            "max_failed_share": 0.2,
            "failure_window": PICTURES,
        }
        trainer = trainer_of(Objective(ObjectiveConfig.model_validate(config), {"judge": reward}), tmp_path / name)
        with pytest.raises((ScoringError, RuntimeError)) as caught:
            trainer.run()
        found.append((type(caught.value), str(caught.value), trainer.completed_steps))
    assert found[0] == found[1]
    assert found[0][0] is (ScoringError if fault == "fails" else RuntimeError)


def test_who_only_scores_is_asked_at_once_and_who_begins_gives_the_same(network: Any) -> None:
    network()
    pixels, examples = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ToyDataset(4).examples
    near, asked = ToyJudge(), judge()
    wanted = near.score(pixels, examples)
    assert torch.equal(near.begin(pixels, examples).finish().value_B, wanted.value_B)
    halves = [asked.begin(pixels[i : i + 2], examples[i : i + 2]) for i in (0, 2)]
    second, first = halves[1].finish(), halves[0].finish()
    assert torch.equal(torch.cat([first.value_B, second.value_B]), asked.score(pixels, examples).value_B)
    assert "begun with others" in check_reward(asked)[-1]


class Muddled(ToyJudge):
    """Finishes everything with the pictures that it saw last."""

    def begin(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Begun[Score]:
        self.latest = pixels_B3HW
        return Begun(lambda: self.score(self.latest[-len(examples) :], examples))


def test_a_reward_that_mixes_up_what_it_has_begun_is_found_out() -> None:
    with pytest.raises(ScoringError, match=r"Muddled.*`begin`"):
        check_reward(Muddled())


def waiting_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("judge")}


@pytest.fixture
def held(network: Any, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """A network whose first call is held up until `go`, and says by `there` that it has come."""
    made, there, go = network(), threading.Event(), threading.Event()

    def call(*args: Any, **more: Any) -> Reply:
        there.set()
        assert go.wait(PATIENCE)
        reply: Reply = made(*args, **more)
        return reply

    monkeypatch.setattr("rewardgen.rewards.judging.service.call", call)
    return {"network": made, "there": there, "go": go, "former": waiting_threads()}


@pytest.mark.parametrize("concurrency", [1, 3])
def test_closing_gives_up_what_nobody_waits_for(held: Mapping[str, Any], concurrency: int) -> None:
    reward = judge(concurrency=concurrency)
    pool = InlinePool(ScoringWorker({"judge": reward}))
    pixels, examples = torch.rand(8, 3, 8, 8), ToyDataset(8).examples
    reward.begin(pixels, examples)
    assert held["there"].wait(PATIENCE)
    running = waiting_threads() - held["former"]
    pool.close()
    held["go"].set()
    for thread in running:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in running)
    assert 1 <= len(held["network"].calls) <= concurrency, "those under way, and no other"
    assert reward.score(pixels, examples).valid_B.all(), "it can be asked again"


def test_an_interrupt_while_waiting_ends_the_questions_too(
    held: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = judge(concurrency=1)
    pixels, examples = torch.rand(8, 3, 8, 8), ToyDataset(8).examples
    begun = [reward.begin(pixels, examples), reward.begin(pixels.flip(0), examples)]
    assert held["there"].wait(PATIENCE)
    running = waiting_threads() - held["former"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begun[0].finish()
    held["go"].set()
    for thread in running:
        thread.join(PATIENCE)
    assert len(held["network"].calls) == 1


def test_places_at_an_endpoint_are_given_in_the_order_of_asking() -> None:
    """Else who has just had an answer is the first to ask again, and others wait until they give up."""
    endpoints = Endpoints(["e"], concurrency=1, adaptive=False, eject_after=9, eject_s=1.0)
    lease = endpoints.take()
    assert lease is not None
    got: list[Any] = []
    other = threading.Thread(target=lambda: got.append(endpoints.take(timeout_s=PATIENCE)))
    other.start()
    while not endpoints.waiting:
        time.sleep(0.01)
    endpoints.succeeded(lease)
    assert endpoints.take() is None, "the other one asked first"
    other.join(PATIENCE)
    assert got[0] is not None
    stop = threading.Event()
    stop.set()
    assert endpoints.take(timeout_s=PATIENCE, stop=stop) is None
    endpoints.succeeded(got[0])
    assert endpoints.take() is not None


class Noting(ToyJudge):
    """Notes how many pictures it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        self.asked += len(examples)
        return super().score(pixels_B3HW, examples)


def test_rewards_that_do_not_count_at_a_step_are_not_asked(tmp_path: Path) -> None:
    terms: dict[str, dict[str, Any]] = {
        "always": {"gate": {"reward": "gating", "above": -10.0}},
        "never": {"weight": 0.0},
        "gating": {"weight": 0.0},
        "late": {"start_step": 2},
        "fading": {"schedule": [[0, 1.0], [1, 0.0]]},
        "bounded": {"floor": -10.0, "start_step": 1},
    }

    def run(names: Sequence[str]) -> tuple[dict[str, int], Trainer]:
        rewards = {name: Noting() for name in names}
        objective = objective_of({name: terms[name] for name in names}, {**rewards}, GRPO)
        trainer = trainer_of(objective, tmp_path / str(len(names)))
        trainer.run()
        return {name: reward.asked for name, reward in rewards.items()}, trainer

    asked, trainer = run(list(terms))
    steps = {"always": 3, "never": 0, "gating": 3, "late": 1, "fading": 1, "bounded": 2}
    assert asked == {name: number * PICTURES for name, number in steps.items()}
    _, without = run([name for name in terms if name != "never"])
    assert said(trainer) == said(without)


def test_a_judge_in_another_process_waits_there(network: Any) -> None:
    """What a worker process runs, without one: `begin` comes back scored, by the rewards that were named alone."""
    network()
    replica = Replica(Surroundings.here())
    replica.start(lambda: ScoringWorker({"judge": judge(), "near": ToyJudge(), "far": ToyJudge(sign=-1)}))
    (sent,) = drawn(make(GRPO), [(0, ToyDataset(1).examples[0])])[:1]
    pictures = dataclasses.replace(sent, pixels_B3HW=torch.rand(1, 3, 8, 8), scores={})
    _, packed = replica.call("begin", [None, None], pack(pictures), pack(("near", "judge")))
    found = unpack(packed, pictures.examples)
    assert isinstance(found, Rollout)
    assert list(found.scores) == ["near", "judge"]
    assert pictures.pixels_B3HW is not None
    expected = judge().score(pictures.pixels_B3HW, pictures.examples)
    assert torch.equal(found.scores["judge"].value_B, expected.value_B)
