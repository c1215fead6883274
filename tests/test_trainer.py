"""The loop: order, seeds, dropout, resume and signals."""

import dataclasses
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.fleet.inline import InlinePool
from rewardgen.learner import Learner, MicroBatch, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.seeds import derive_seed
from rewardgen.trainer import TrainConfig, Trainer, choose_device
from rewardgen.types import Score, StepReport
from tests.toys import ToyDataset, ToyPolicy, ToyReward

ROLLOUT = RolloutConfig.model_validate(
    {"image_size": [8, 8], "num_steps": 4, "window": {"kind": "refl", "entry_range": [1, 3]}}
)


class Reports(list[StepReport]):
    def step(self, report: StepReport) -> None:
        self.append(report)


def make(
    folder: Path, *, seed: int = 0, start_step: int = 0, size: int = 7, train: dict[str, Any] | None = None, **rest: Any
) -> tuple[Trainer, Reports]:
    config = TrainConfig.model_validate(
        {"num_steps": 6, "batch_size": 2, "accumulation": 2, "ema_decay": 0.9, "checkpoint_every": 0} | (train or {})
    )
    policy, reports = ToyPolicy(), Reports()
    reward = {"use": "toy", "weight": 0.5, "start_step": start_step, "max_failed_share": 1.0}
    learner = Learner(
        policy,
        Objective(
            ObjectiveConfig.model_validate({"rewards": {"style": reward}}),
            {"style": ToyReward(fail_ids=["toy-002"])},
        ),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5),
        window=ROLLOUT.window,
        ema_decay=config.ema_decay,
    )
    trainer = Trainer(
        learner,
        InlinePool(RolloutWorker(policy)),
        ToyDataset(size),
        rollout=ROLLOUT,
        config=config,
        seed=seed,
        folder=folder,
        reporter=reports,
        **rest,
    )
    return trainer, reports


def said(reports: list[StepReport]) -> list[StepReport]:
    """The reports without what differs between runs by nature."""
    return [dataclasses.replace(report, seconds_by_phase={}, peak_memory_bytes=0) for report in reports]


def same_state(a: Trainer, b: Trainer) -> bool:
    (tensors_a, json_a), (tensors_b, json_b) = a.learner.state(), b.learner.state()
    equal = all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a.keys() | tensors_b.keys())
    return equal and json_a == json_b


def spied(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[list[MicroBatch]]:
    seen: list[list[MicroBatch]] = []
    step: Callable[..., StepReport] = trainer.learner.step

    def spy(micro_batches: list[MicroBatch], *, step_: Callable[..., StepReport] = step, **rest: Any) -> StepReport:
        seen.append(micro_batches)
        return step_(micro_batches, **rest)

    monkeypatch.setattr(trainer.learner, "step", spy)
    return seen


def test_two_runs_of_one_seed_are_identical_and_another_seed_differs(tmp_path: Path) -> None:
    (first, one), (second, two), (third, other) = (make(tmp_path / str(i), seed=i // 2) for i in range(3))
    for trainer in (first, second, third):
        outcome = trainer.run()
        assert (outcome.completed_steps, outcome.interrupted) == (6, False)
    assert said(one) == said(two) != said(other)
    assert same_state(first, second)
    assert not same_state(first, third)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, cut: int) -> None:
    whole, all_reports = make(tmp_path / "whole")
    whole.run()
    part, first_reports = make(tmp_path / "part", train={"num_steps": cut})
    part.run()
    torch.manual_seed(12345)
    resumed, last_reports = make(tmp_path / "part")
    resumed.learner.policy.load_state_dict(ToyPolicy(seed=9).state_dict() | dict(ToyPolicy().named_buffers()))
    assert resumed.resume() == cut
    resumed.run()
    assert said(all_reports) == said(first_reports) + said(last_reports)
    assert same_state(whole, resumed)


def test_plug_ins_that_use_the_global_generators_repeat_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[tuple[float, float, float]] = []
    score = ToyReward.score

    def noisy(self: ToyReward, *args: Any) -> Score:
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return score(self, *args)

    monkeypatch.setattr(ToyReward, "score", noisy)
    for _ in range(2):
        make(tmp_path)[0].run()
        torch.rand(3)
    assert draws[:12] == draws[12:]
    assert len(set(draws)) == 12


def test_cutting_the_batch_differently_gives_the_same_run(tmp_path: Path) -> None:
    runs = [make(tmp_path / str(b), train={"batch_size": b, "accumulation": 4 // b}) for b in (1, 2, 4)]
    for trainer, _ in runs:
        trainer.run()
    for name, tensor in runs[0][0].learner.state()[0].items():
        for trainer, _ in runs[1:]:
            torch.testing.assert_close(trainer.learner.state()[0][name], tensor, atol=1e-5, rtol=1e-4)
    counts = [[report.valid_counts for report in reports] for _, reports in runs]
    assert counts[0] == counts[1] == counts[2]


def test_each_epoch_is_a_permutation_and_seeds_are_never_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = make(tmp_path, size=3, train={"num_steps": 6})
    seen = spied(trainer, monkeypatch)
    trainer.run()
    batches = [batch for step in seen for batch in step]
    order = [example.id for batch in batches for example in batch.examples]
    epochs = [order[i : i + 3] for i in range(0, 24, 3)]
    assert all(sorted(epoch) == ["toy-000", "toy-001", "toy-002"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    seeds = [seed for batch in batches for seed in batch.seed_B]
    seeds += [seed for batch in batches if batch.rollout is not None for seed in batch.rollout.trajectory.seed_B]
    assert len(seeds) == 48 == len(set(seeds))
    entries = [{b.rollout.trajectory.entry_step for b in step if b.rollout is not None} for step in seen]
    assert all(len(entry) == 1 and entry <= {1, 2, 3} for entry in entries)


def test_dropout_acts_on_flow_matching_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropouts = {"prompt_dropout": 0.5, "content_dropout": 1.0, "style_dropout": 0.0}
    trainer, _ = make(tmp_path, train={"num_steps": 10} | dropouts)
    seen = spied(trainer, monkeypatch)
    trainer.run()
    batches = [batch for step in seen for batch in step]
    dropped = Counter(example.prompt == "" for batch in batches for example in batch.examples)
    assert 8 <= dropped[True] <= 32
    for batch in batches:
        assert batch.rollout is not None
        assert [e.id for e in batch.examples] == [e.id for e in batch.rollout.examples]
        assert all(e.content_refs == () and e.style_refs and e.target is not None for e in batch.examples)
        assert all(e.prompt and e.content_refs and e.style_refs for e in batch.rollout.examples)


def test_nothing_is_drawn_before_the_first_reward_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, reports = make(tmp_path, start_step=2, train={"num_steps": 4})
    seen = spied(trainer, monkeypatch)
    trainer.run()
    assert [step[0].rollout is not None for step in seen] == [False, False, True, True]
    assert [report.entry_step is None for report in reports] == [True, True, False, False]
    assert [set(report.terms) for report in reports][1:3] == [{"flow_matching"}, {"flow_matching", "style"}]
    assert {"data", "weights", "rollout", "flow_matching", "window", "decode", "score", "backward", "optimizer"} == set(
        reports[-1].seconds_by_phase
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(tmp_path: Path, number: signal.Signals) -> None:
    trainer, reports = make(tmp_path)
    record = trainer.learner.step

    def step(micro_batches: list[MicroBatch], *, step: int) -> StepReport:
        if step == 2:
            os.kill(os.getpid(), number)
        return record(micro_batches, step=step)

    before = signal.getsignal(number)
    trainer.learner.step = step  # type: ignore[assignment,method-assign]
    outcome = trainer.run()
    assert (outcome.completed_steps, outcome.interrupted, len(reports)) == (3, True, 3)
    assert signal.getsignal(number) == before
    resumed, _ = make(tmp_path)
    assert resumed.resume() == 3
    resumed.run()
    whole, _ = make(tmp_path / "whole")
    whole.run()
    assert same_state(whole, resumed)


def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    trainer, reports = make(tmp_path)

    def step(micro_batches: list[MicroBatch], *, step: int) -> StepReport:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    trainer.learner.step = step  # type: ignore[assignment,method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert reports == []


def test_evaluations_and_checkpoints_come_when_due(tmp_path: Path) -> None:
    evaluated: list[int] = []
    settings = {"num_steps": 5, "checkpoint_every": 2, "keep_last": 2}
    trainer, _ = make(tmp_path, train=settings, evaluate=evaluated.append, evaluate_every=2)
    outcome = trainer.run()
    assert evaluated == [2, 4]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith("step"))
    assert kept == ["step-000004", "step-000005"]
    assert outcome.checkpoint.name == "step-000005"


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        make(tmp_path)[0].resume()
    make(tmp_path, train={"num_steps": 1})[0].run()
    for other, what in (
        ({"seed": 1}, "seed = 0"),
        ({"size": 5}, "number of examples = 7"),
        ({"train": {"batch_size": 1}}, "examples in a step = 4"),
    ):
        with pytest.raises(CheckpointError, match=what):
            make(tmp_path, **other)[0].resume()
    make(tmp_path, train={"batch_size": 4, "accumulation": 1})[0].resume()


def test_empty_data_and_missing_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train has no examples"):
        make(tmp_path, size=0)
    with pytest.raises(ConfigError, match="is no device"):
        choose_device("gpu")
    with pytest.raises(ConfigError, match="CUDA devices"):
        choose_device("cuda:99")
    assert choose_device("cpu").type == "cpu"


def test_seeds_depend_on_every_part_and_its_order() -> None:
    parts: list[tuple[int | str, ...]] = [(1, "a"), ("a", 1), ("1", "a"), (1, "a", 0), (1, "b"), (2, "a"), (1,)]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Checkpoints outlive versions of Python and of this project: the value must stay what it was.
    assert derive_seed(0, "rollout", 3, "x") == 3_012_212_647_644_276_959
    with pytest.raises(TypeError, match="float"):
        derive_seed(1.0)  # type: ignore[arg-type]
