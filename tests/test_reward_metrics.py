"""What a reward reports beside its scores comes through to the logs: means over valid examples, and sums of counts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardgen.adaptive import ScoreSums
from rewardgen.distributed import Processes
from rewardgen.fleet.inline import InlinePool
from rewardgen.flow.window import WindowConfig
from rewardgen.gradients import TermSums
from rewardgen.learner import Learner, MicroBatch, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.report import METRICS, ReportConfig, Reporter
from rewardgen.reward import Reward
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.scoring import ScoringWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Example, RolloutRequest, Score
from tests.toys import IMAGE_SIZE, ToyDataset, ToyJudge, ToyPolicy, ToyReward

EXAMPLES = ToyDataset(6).examples
FAILING = ("toy-001", "toy-004", "toy-005")
WINDOW = WindowConfig.model_validate({"kind": "refl", "entry_range": [2, 2]})


def with_extras(score: Score, examples: Sequence[Example]) -> Score:
    """The mean number of the valid examples (absent without one), and how many were asked about and failed."""
    numbers = [int(e.id[-3:]) for e, valid in zip(examples, score.valid_B.tolist(), strict=True) if valid]
    mean = {"number": sum(numbers) / len(numbers)} if numbers else {}
    counts = {"asked": len(examples), "failed": len(examples) - len(numbers)}
    return Score(value_B=score.value_B, valid_B=score.valid_B, metrics=mean, counts=counts)


class Telling(ToyReward):
    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        return with_extras(super().score(pixels_B3HW, examples), examples)


class TellingJudge(ToyJudge):
    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        return with_extras(super().score(pixels_B3HW, examples), examples)


def objective(reward: Reward, **settings: Any) -> Objective:
    config = {"flow_matching": {"weight": 0.0}, "rewards": {"told": {"use": "toy"}}, "max_failed_share": 1.0}
    return Objective(ObjectiveConfig.model_validate(config | settings), {"told": reward})


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 3, 2), (1,) * 6])
def test_a_step_reports_means_over_its_valid_examples_however_it_is_cut(sizes: tuple[int, ...]) -> None:
    optimizer = OptimizerConfig(lr=1e-3)
    learner = Learner(ToyPolicy(), objective(Telling(fail_ids=FAILING)), optimizer=optimizer, window=WINDOW)
    batches, start = [], 0
    for size in sizes:
        examples, seed_B = EXAMPLES[start : start + size], tuple(range(start, start + size))
        request = RolloutRequest(
            step=0, examples=examples, seed_B=seed_B, image_size=IMAGE_SIZE, num_steps=4, stop_step=2
        )
        rollout = RolloutWorker(learner.policy).rollout(request, learner.publish())
        batches.append(MicroBatch(examples=examples, seed_B=seed_B, image_size=IMAGE_SIZE, rollout=rollout))
        start += size
    metrics = learner.step(batches, step=0).metrics
    told = {name: value for name, value in metrics.items() if name.startswith("reward/")}
    # Valid are 0, 2 and 3. A mean of the batches' means would be 5/4 for (3, 3), (0 + 5/2) / 2 for (1, 3, 2).
    assert told == {
        "reward/told/asked": 6.0,
        "reward/told/failed": 3.0,
        "reward/told/number": pytest.approx(5 / 3, abs=1e-12),
    }


class OneOfTwo(Processes):
    """The second of two processes, to which the first has said already what JSON made of its sums."""

    def __init__(self, first: Any = None) -> None:
        super().__init__()
        self.first, self.said = first, ""

    def exchange(self, topic: str, value: Any = None) -> list[Any]:
        self.said = json.dumps(value)
        mine = json.loads(self.said)
        return [mine] if self.first is None else [json.loads(self.first), mine]


def test_sums_over_processes_are_those_of_all_examples() -> None:
    scores = [
        Score(
            value_B=torch.tensor([0.5, math.nan]),
            valid_B=torch.tensor([True, False]),
            metrics={"mass": 0.25},
            counts={"asked": 2, "late": 1},
        ),
        Score(
            value_B=torch.tensor([1.0, 2.0, 3.0]),
            valid_B=torch.ones(3, dtype=torch.bool),
            metrics={"mass": 0.75, "own": 4.0},
            counts={"asked": 3},
        ),
        # None is valid: what it calls a mean is of nothing.
        Score(value_B=torch.zeros(2), valid_B=torch.zeros(2) > 0, metrics={"mass": 9.0}, counts={"asked": 2}),
    ]
    first, second = TermSums(), TermSums()
    first.add_score("told", scores[0])
    for score in scores[1:]:
        second.add_score("told", score)
    counted_by = {"told": ["told"]}
    said = OneOfTwo()
    first.sum_over(said, [], counted_by, "sums")
    second.sum_over(OneOfTwo(said.said), [], counted_by, "sums")
    found = second.scores["told"]
    assert (found.count, found.total, found.squares) == (4, 6.5, 14.25)
    assert found.extras() == {"asked": 7.0, "late": 1.0, "mass": (0.25 + 3 * 0.75) / 4, "own": 4.0}
    assert list(found.extras()) == sorted(found.extras())
    assert sum((ScoreSums.of(score) for score in scores), ScoreSums()) == found


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_samples_tell_once_and_it_stands_in_the_log(num_iterations: int, tmp_path: Path) -> None:
    """Two updates on the same samples ask the judge once."""
    policy = ToyPolicy()
    judged = objective(
        TellingJudge(fail_ids=FAILING),
        policy_gradient={"kind": "nft", "num_generations": 3, "num_iterations": num_iterations},
    )
    learner = Learner(policy, judged, optimizer=OptimizerConfig(lr=1e-3), window=WINDOW)
    rollout = RolloutConfig(image_size=IMAGE_SIZE, num_steps=4, window=WINDOW)
    with Reporter(tmp_path, ReportConfig(tensorboard=False, console=False), num_steps=1) as reporter:
        trainer = Trainer(
            learner,
            InlinePool(RolloutWorker(policy)),
            ToyDataset(6),
            rollout=rollout,
            config=TrainConfig(num_steps=1, batch_size=3, accumulation=2),
            seed=0,
            folder=tmp_path,
            reporter=reporter,
            scoring=InlinePool(ScoringWorker(judged.sampled)),
        )
        trainer.run()
    (line,) = (json.loads(text) for text in (tmp_path / METRICS).read_text().splitlines())
    told = {name: value for name, value in line["metrics"].items() if name.startswith("reward/")}
    assert told == {
        "reward/told/asked": 18.0,
        "reward/told/failed": 9.0,
        "reward/told/number": pytest.approx(5 / 3, abs=1e-12),
    }
    assert line["valid_counts"]["told"] == 9
