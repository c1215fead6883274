"""A whole training run on a judge of whose calls 30 % fail, in every way there is.

The run learns by GRPO from samples that a served judge scores. It must end, count right, take no failed call for a
score of 0, and come out as a run without any fault whose same samples are masked: bit for bit.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardgen.fleet.inline import InlinePool
from rewardgen.flow.window import WindowConfig
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.reward import Reward, RewardWarning
from rewardgen.rewards.judging.pictures import data_url
from rewardgen.rewards.vlm_judge import VlmJudge
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.scoring import ScoringWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Example, Score, StepReport
from tests.judge_servers import Fault, JudgeServer, asked, belief, digest
from tests.toys import IMAGE_SIZE, ToyDataset, ToyPolicy

STEPS, EXAMPLES, GENERATIONS = 4, 4, 4
ASKED = EXAMPLES * GENERATIONS
"""Questions in a step."""
LASTING: tuple[Fault, ...] = ("429", "500", "hang", "cut", "nonsense", "unsure", "500", "cut", "unsure")
PASSING: tuple[Fault, ...] = ("429", "500", "hang", "cut", "nonsense", "unsure", "429", "nonsense")
"""Faults of so many questions: of both attempts, and of the first alone."""
KINDS: dict[Fault, str] = {
    "429": "rate_limited", "500": "server_error", "hang": "timeout", "cut": "connection", "nonsense": "nonsense",
    "unsure": "nonsense",
}  # fmt: skip
TIMEOUT_S = 4.0
"""What each hanging call costs; a busy machine must answer the others within it."""


class Schedule:
    """Which questions fail, by what is asked: the n-th question with an example's style reference.

    Not by the picture's own bytes, which another processor's rounding or another PNG encoder would change.
    """

    def __init__(self) -> None:
        places = [f"{example}/{number}" for example in range(EXAMPLES) for number in range(STEPS * GENERATIONS)]
        chosen = random.Random(11).sample(places, len(LASTING) + len(PASSING))
        self.lasting = dict(zip(chosen, LASTING, strict=False))
        self.passing = dict(zip(chosen[len(LASTING) :], PASSING, strict=True))
        self._references = [data_url(example.style_refs[0]) for example in ToyDataset(EXAMPLES).examples]
        self._named: dict[str, str] = {}
        self._numbers: Counter[int] = Counter()

    def named(self, body: Any) -> str:
        """`example/number`; the same question has the same name when it is asked again."""
        code = digest(body)
        if code not in self._named:
            first = next(part for part in body["messages"][-1]["content"] if part["type"] == "image_url")
            example = self._references.index(first["image_url"]["url"])
            self._named[code] = f"{example}/{self._numbers[example]}"
            self._numbers[example] += 1
        return self._named[code]

    def plan(self, name: str, before: int) -> Fault | None:
        return self.lasting.get(name) or (self.passing.get(name) if before == 0 else None)

    def retry_after(self, name: str) -> str | None:
        """429s are not charged: one lasts by asking for more patience than there is."""
        return "3600" if self.lasting.get(name) == "429" else None


@dataclass
class Watched:
    """What a run's judge was asked, in order, and what it scored."""

    codes: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    valid: list[bool] = field(default_factory=list)


class Watching(Reward):
    """A judge whose scores are noted; those of the questions in `masked` are called invalid, their values kept."""

    differentiable = False

    def __init__(self, judge: VlmJudge, masked: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.judge, self.masked, self.seen = judge, masked, Watched()

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        codes = []
        for pixels_3HW, example in zip(pixels_B3HW, examples, strict=True):
            codes.append(digest(asked(self.judge, pixels_3HW, example)))
        found = self.judge.score(pixels_B3HW, examples)
        found = replace(found, valid_B=found.valid_B & torch.tensor([code not in self.masked for code in codes]))
        self.seen.codes += codes
        self.seen.values += found.value_B.tolist()
        self.seen.valid += found.valid_B.tolist()
        return found


class Reports(list[StepReport]):
    """Of a run, and how long the server's log was after each step."""

    def __init__(self, server: JudgeServer) -> None:
        super().__init__()
        self.server, self.marks = server, [0]

    def step(self, report: StepReport) -> None:
        self.append(report)
        self.marks.append(len(self.server.log))


@dataclass
class Run:
    weights: dict[str, Tensor]
    reports: Reports
    seen: Watched


def trained(server: JudgeServer, folder: Path, masked: frozenset[str] = frozenset()) -> Run:
    policy, window = ToyPolicy(), WindowConfig.model_validate({"kind": "refl", "entry_range": [2, 2]})
    judge = VlmJudge(
        "style", (server.url,), "tiny", backoff_s=0.01, timeout_s=TIMEOUT_S, max_attempts=2, concurrency=ASKED
    )
    watching = Watching(judge, masked)
    config = ObjectiveConfig.model_validate(
        {
            "flow_matching": {"weight": 0.1},
            "rewards": {"judge": {"use": "vlm_judge"}},
            "max_failed_share": 0.4,
            "failure_window": ASKED,
            "policy_gradient": {"kind": "grpo", "num_generations": GENERATIONS, "window": {"size": 2, "range": [0, 2]}},
        }
    )
    objective = Objective(config, {"judge": watching})
    learner = Learner(policy, objective, optimizer=OptimizerConfig(lr=1e-2), window=window)
    reports = Reports(server)
    trainer = Trainer(
        learner,
        InlinePool(RolloutWorker(policy)),
        ToyDataset(EXAMPLES),
        rollout=RolloutConfig(image_size=IMAGE_SIZE, num_steps=5, window=window),
        config=TrainConfig(num_steps=STEPS, batch_size=2, accumulation=2),
        seed=0,
        folder=folder,
        reporter=reports,
        scoring=InlinePool(ScoringWorker(objective.sampled)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewardWarning)
        outcome = trainer.run()
    assert outcome.completed_steps == STEPS
    weights = {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
    return Run(weights, reports, watching.seen)


@dataclass
class Runs:
    """With faults; without any but with the same samples masked; and without either."""

    schedule: Schedule
    log: list[tuple[str, Fault | None]]
    faulty: Run
    masked: Run
    whole: Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    schedule = Schedule()
    with JudgeServer(plan=schedule.plan, named=schedule.named) as server:
        server.retry_after = schedule.retry_after
        faulty = trained(server, tmp_path_factory.mktemp("faulty"))
    failed = frozenset(code for code, valid in zip(faulty.seen.codes, faulty.seen.valid, strict=True) if not valid)
    with JudgeServer() as server:
        masked = trained(server, tmp_path_factory.mktemp("masked"), failed)
        whole = trained(server, tmp_path_factory.mktemp("whole"))
        assert not server.faults
    log = faulty.reports.server.log
    return Runs(schedule, log, faulty, masked, whole)


def test_thirty_percent_of_all_calls_fail_and_in_every_way(runs: Runs) -> None:
    failing = [fault for _, fault in runs.log if fault is not None]
    assert len(failing) / len(runs.log) == pytest.approx(0.3, abs=0.02)
    assert set(failing) == set(KINDS)
    assert set(runs.schedule.lasting.values()) == set(runs.schedule.passing.values()) == set(KINDS)


def test_counts_are_those_of_the_proxy_in_every_step(runs: Runs) -> None:
    """A question whose last call failed is a failed score, and no other is; and calls are counted by kind."""
    in_all: Counter[str] = Counter()
    reports = runs.faulty.reports
    for report, (start, end) in zip(reports, pairwise(reports.marks), strict=True):
        calls = runs.log[start:end]
        last = dict(calls)
        assert len(last) == ASKED
        final = {name for name, fault in last.items() if fault is not None}
        assert final == runs.schedule.lasting.keys() & last.keys()
        assert report.valid_counts["judge"] == ASKED - len(final)
        told = {name.removeprefix("reward/judge/"): value for name, value in report.metrics.items()}
        by_kind = Counter(KINDS[fault] for _, fault in calls if fault is not None)
        assert {kind: told[kind] for kind in KINDS.values()} == {kind: by_kind[kind] for kind in KINDS.values()}
        assert (told["failed"], told["attempts"], told["by_logprob"]) == (len(final), len(calls), ASKED - len(final))
        in_all.update(last[name] or "" for name in final)
    assert in_all == Counter(LASTING), "every kind was once the end of a question"


def test_no_failed_call_is_a_score_of_zero(runs: Runs) -> None:
    seen = runs.faulty.seen
    for code, value, valid in zip(seen.codes, seen.values, seen.valid, strict=True):
        assert value == pytest.approx(belief(code), abs=1e-6) if valid else value != value
    assert seen.valid.count(False) == len(LASTING)
    for step, report in enumerate(runs.faulty.reports):
        at = range(step * ASKED, (step + 1) * ASKED)
        expected = [belief(seen.codes[i]) for i in at if seen.valid[i]]
        assert report.reward_means["judge"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_the_result_is_that_of_a_run_without_faults_but_with_the_same_samples_masked(runs: Runs) -> None:
    assert runs.masked.seen.codes == runs.faulty.seen.codes, "both drew the same pictures"
    assert runs.masked.seen.valid == runs.faulty.seen.valid
    assert all(value == value for value in runs.masked.seen.values), "here what is masked has a value"
    for name, tensor in runs.faulty.weights.items():
        assert torch.equal(tensor, runs.masked.weights[name])
    for ours, theirs in zip(runs.faulty.reports, runs.masked.reports, strict=True):
        for key in ("loss", "terms", "reward_means", "valid_counts", "grad_norm", "grad_norms", "skipped"):
            assert getattr(ours, key) == getattr(theirs, key)
        assert not ours.skipped


def test_masked_samples_do_make_a_difference(runs: Runs) -> None:
    """Else the test above would show nothing."""
    assert runs.whole.seen.valid.count(False) == 0
    assert any(not torch.equal(tensor, runs.faulty.weights[name]) for name, tensor in runs.whole.weights.items())
