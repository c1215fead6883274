"""Losses and gradients that are not finite, through the trainer and the command: skipped, counted, and then stopped."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardgen import cli
from rewardgen.checkpoint import latest_checkpoint, load_checkpoint
from rewardgen.errors import NonFiniteError
from rewardgen.fleet.inline import InlinePool
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.rollout import RolloutWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Example, Score
from tests.test_trainer import ROLLOUT, Reports, same_state
from tests.toys import ToyDataset, ToyPolicy, ToyReward

ROOT = Path(__file__).resolve().parents[2]
SIZE = 4


class BrokenGradient(ToyReward):
    """Finite, valid values; the gradient with respect to the pixels is NaN for the examples named."""

    def __init__(self, broken_ids: Sequence[str] = ()) -> None:
        super().__init__()
        self.broken_ids = frozenset(broken_ids)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        result = super().score(pixels_B3HW, examples)
        values = [
            # The root of 0 is 0 and its derivative infinite; 0 times that is NaN.
            value + (pixels_3HW.sum() * 0).sqrt() if example.id in self.broken_ids else value
            for value, pixels_3HW, example in zip(result.value_B, pixels_B3HW, examples, strict=True)
        ]
        return dataclasses.replace(result, value_B=torch.stack(values))


class Overflowing(ToyDataset):
    """The targets of the examples named are so large that the square of the error is infinite."""

    def __init__(self, size: int = SIZE, broken_ids: Sequence[str] = ()) -> None:
        super().__init__(size)
        self.examples = [
            dataclasses.replace(e, target=torch.full((3, 8, 8), 1e30)) if e.id in broken_ids else e
            for e in self.examples
        ]


def make(folder: Path, *, reward_ids: Sequence[str] = (), target_ids: Sequence[str] = (), **train: Any) -> Trainer:
    """Each step has one micro-batch of two examples of four: a broken example spoils every second step."""
    config = TrainConfig.model_validate(
        {"num_steps": 8, "batch_size": 2, "ema_decay": 0.9, "checkpoint_every": 1, "keep_last": 100} | train
    )
    policy = ToyPolicy()
    learner = Learner(
        policy,
        Objective(
            ObjectiveConfig.model_validate({"rewards": {"style": {"use": "toy", "weight": 0.5}}}),
            {"style": BrokenGradient(reward_ids)},
        ),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5),
        window=ROLLOUT.window,
        ema_decay=config.ema_decay,
        max_nonfinite_steps=config.max_nonfinite_steps,
    )
    dataset = Overflowing(SIZE, target_ids)
    pool = InlinePool(RolloutWorker(policy))
    return Trainer(learner, pool, dataset, rollout=ROLLOUT, config=config, seed=0, folder=folder, reporter=Reports())


def reports_of(trainer: Trainer) -> Reports:
    assert isinstance(trainer._reporter, Reports)
    return trainer._reporter


def tensors_at(trainer: Trainer, step: int) -> dict[str, Tensor]:
    return load_checkpoint(trainer.checkpoints / f"step-{step:06d}")[0]


EVERYBODY = [f"toy-{index:03d}" for index in range(SIZE)]
WAYS = [("reward_ids", "style"), ("target_ids", "flow_matching")]


@pytest.mark.parametrize(("way", "culprit"), WAYS)
def test_a_single_broken_step_is_skipped_and_counted(way: str, culprit: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, **{way: ["toy-001"]})
    trainer.run()
    reports = reports_of(trainer)
    assert len(reports) == 8
    skipped = [report.step for report in reports if report.skipped]
    assert len(skipped) == 4, "once in each epoch of two steps"
    for report in reports:
        spoilt = {*report.terms, *report.grad_norms}
        spoilt = {n for n in spoilt if not math.isfinite(report.terms.get(n, 0.0) + report.grad_norms.get(n, 0.0))}
        assert spoilt == ({culprit} if report.skipped else set())
        if report.step > 0:
            before, after = tensors_at(trainer, report.step), tensors_at(trainer, report.step + 1)
            same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in after)
            assert same == report.skipped, "a skipped step changes nothing, another one something"
    state = load_checkpoint(trainer.checkpoints / "step-000008")[1]["learner"]
    assert state["skipped_steps"] == 4
    assert state["version"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in tensors_at(trainer, 8).values())


@pytest.mark.parametrize(("way", "culprit"), WAYS)
def test_too_many_in_a_row_stop_the_run_and_name_the_culprit(way: str, culprit: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, **{way: EVERYBODY}, max_nonfinite_steps=3)
    with pytest.raises(NonFiniteError, match=rf"step 2: .* 3 steps in a row, because of the term {culprit};"):
        trainer.run()
    path = latest_checkpoint(trainer.checkpoints)
    assert path is not None
    assert path.name == "step-000002"
    tensors, state = load_checkpoint(path)
    assert state["learner"]["skipped_steps"] == state["learner"]["nonfinite_in_a_row"] == 2
    for name, parameter in ToyPolicy().trainable().items():
        assert torch.equal(tensors[f"trainable/{name}"], parameter), "as good as before the first step"


def test_both_culprits_are_named(tmp_path: Path) -> None:
    trainer = make(tmp_path, reward_ids=EVERYBODY, target_ids=EVERYBODY, max_nonfinite_steps=1)
    with pytest.raises(NonFiniteError, match="because of the term flow_matching and style;"):
        trainer.run()


def test_the_count_goes_on_where_a_run_is_resumed(tmp_path: Path) -> None:
    make(tmp_path, reward_ids=EVERYBODY, max_nonfinite_steps=4, num_steps=2).run()
    resumed = make(tmp_path, reward_ids=EVERYBODY, max_nonfinite_steps=4)
    assert resumed.resume() == 2
    with pytest.raises(NonFiniteError, match=r"step 3: .* 4 steps in a row"):
        resumed.run()


def test_a_resumed_run_equals_the_uninterrupted_one_with_skipped_steps(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", reward_ids=["toy-001"])
    whole.run()
    make(tmp_path / "part", reward_ids=["toy-001"], num_steps=3).run()
    resumed = make(tmp_path / "part", reward_ids=["toy-001"])
    resumed.resume()
    resumed.run()
    assert same_state(whole, resumed)


EXPERIMENT = """\
name: broken
policy: {use: "tests.toys:ToyPolicy", args: {hidden: 4}}
data:
  train: {use: "tests.faults.test_nonfinite:Overflowing", args: {size: 4, broken_ids: TARGETS}}
  held_out: {use: "tests.toys:ToyDataset", args: {size: 4, seed: 1}}
rollout: {image_size: [8, 8], num_steps: 3, window: {kind: refl, entry_range: [1, 2]}}
objective:
  rewards:
    style: {use: "tests.faults.test_nonfinite:BrokenGradient", args: {broken_ids: REWARDED}, weight: 0.5}
train: {num_steps: 6, batch_size: 2, checkpoint_every: 1, max_nonfinite_steps: 2, device: cpu}
evaluation: {num_examples: 4, grid_examples: 0}
report: {tensorboard: false, console: false}
"""


@pytest.mark.parametrize(("way", "culprit"), [("REWARDED", "style"), ("TARGETS", "flow_matching")])
def test_the_command_stops_with_one_line_and_a_checkpoint(
    way: str, culprit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    experiment, folder = tmp_path / "broken.yaml", tmp_path / "run"
    text = EXPERIMENT.replace(way, json.dumps(EVERYBODY)).replace("REWARDED", "[]").replace("TARGETS", "[]")
    experiment.write_text(text)
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(experiment), "-o", str(folder)])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: step 1: ")
    assert f"because of the term {culprit}; lower optimizer.lr" in err
    assert "--resume" not in err, "the same command would meet the same"
    tensors, _ = load_checkpoint(folder / "checkpoints" / "step-000001")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    (line,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert line["skipped"] is True
    assert line["grad_norms"][culprit] is None
