"""The benchmarks' own arithmetic: what a step costs, equal budgets, keys, and that the bare loop is the same step."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewardgen.config import Experiment
from rewardgen.fleet.inline import InlinePool
from rewardgen.learner import Learner
from rewardgen.objective import Objective
from rewardgen.policy import Mode
from rewardgen.rollout import RolloutWorker
from rewardgen.scoring import ScoringWorker
from rewardgen.trainer import Trainer
from rewardgen.types import Condition, VelocityFn
from tests.toys import ToyDataset, ToyPolicy, ToyReward

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import baselines
import cells
import sample_efficiency
import srl_table
import step_overhead

TINY = (
    "train.num_steps=2",
    "train.batch_size=2",
    "data.train.args.size=8",
    "evaluation.num_examples=4",
    "evaluation.grid_examples=2",
    "optimizer.decay_steps=null",
)
LEARN = "objective.rewards.style.learn_from=samples"
ALONE = "objective.rewards.content.weight=0"
SMALL = ("rollout.image_size=[8, 8]", "train.batch_size=3", "train.num_steps=10", "optimizer.decay_steps=null")


class CountingPolicy(ToyPolicy):
    """Counts pictures that go forward and backward through the velocity."""

    forward_passes = backward_passes = 0

    def velocity_fn(self, condition: Condition, *, mode: Mode, image_size: tuple[int, int]) -> VelocityFn:
        inner = super().velocity_fn(condition, mode=mode, image_size=image_size)

        def count(grad_BLC: Tensor) -> None:
            self.backward_passes += len(grad_BLC)

        def velocity(latents_BLC: Tensor, t_B: Tensor) -> Tensor:
            self.forward_passes += len(latents_BLC)
            result = inner(latents_BLC, t_B)
            if result.requires_grad:
                result.register_hook(count)
            return result

        return velocity


def counted(experiment: Experiment, step: int, folder: Path) -> float:
    """What a step of the engine costs, in the benchmark's unit, by counting."""
    policy = CountingPolicy()
    objective = Objective(experiment.objective, {name: ToyReward() for name in experiment.objective.rewards})
    learner = Learner(
        policy,
        objective,
        optimizer=experiment.optimizer,
        window=experiment.rollout.window,
        term_grad_norms=experiment.train.term_grad_norms,
    )
    trainer = Trainer(
        learner,
        InlinePool(RolloutWorker(policy)),
        ToyDataset(8),
        rollout=experiment.rollout,
        config=experiment.train,
        seed=0,
        folder=folder,
        reporter=step_overhead.Silent(),
        scoring=InlinePool(ScoringWorker(objective.sampled)),
    )
    assert not trainer.step(step).skipped
    return policy.forward_passes + 2 * policy.backward_passes


@pytest.mark.parametrize(
    "changes",
    [
        ["rollout.window.entry_range=[5, 5]"],
        ["rollout.window.entry_range=[0, 0]", "train.accumulation=2"],
        ["rollout.window={kind: draft, k: 2}"],
        ["rollout.window={kind: draft, k: 3, checkpoint_steps: true}"],
        ["rollout.window={kind: alignprop, k_range: [4, 4]}"],
        ["rollout.window={kind: full}", "rollout.num_steps=3"],
        ["rollout.window={kind: draft, k: 2}", "objective.flow_matching.weight=0"],
        ["objective.rewards.style.weight=0", "objective.rewards.content.weight=0"],
        ["rollout.window.entry_range=[5, 5]", "objective.rewards.style.start_step=4"],
        ["rollout.window={kind: draft, k: 2}", "objective.flow_matching.start_step=4"],
        ["rollout.window={kind: draft, k: 2}", "objective.rewards.other={use: brightness}"],
        [
            "rollout.window.entry_range=[5, 5]",
            "objective.rewards.other={use: brightness}",
            "train.term_grad_norms=false",
        ],
        [LEARN, ALONE, "objective.policy_gradient={kind: grpo, num_generations: 3}"],
        [
            LEARN,
            ALONE,
            "objective.policy_gradient={kind: grpo, num_generations: 2, window: {size: 2}, num_iterations: 2}",
        ],
        [
            LEARN,
            ALONE,
            "objective.policy_gradient={kind: nft, times_per_sample: 3}",
            "objective.flow_matching.weight=0",
        ],
        [
            LEARN,
            "objective.policy_gradient={kind: nft, beta: 0.1, num_iterations: 2}",
            "objective.rewards.other={use: brightness}",
            "rollout.window.entry_range=[5, 5]",
        ],
    ],
    ids=" ".join,
)
def test_a_step_costs_what_is_counted(changes: Sequence[str], tmp_path: Path) -> None:
    experiment = cells.load(0, [*SMALL, *changes])
    for step in (3, 4):
        assert baselines.step_evaluations(experiment, step) == counted(experiment, step, tmp_path)


def test_a_range_of_entry_steps_costs_its_mean() -> None:
    def cost(low: int, high: int) -> float:
        return baselines.step_evaluations(cells.load(0, [f"rollout.window.entry_range=[{low}, {high}]"]), 0)

    assert cost(3, 6) == pytest.approx(sum(cost(entry, entry) for entry in (3, 4, 5, 6)) / 4)


@pytest.mark.parametrize("overrides", [(), ("train.num_steps=40", "rollout.num_steps=12", "train.batch_size=4")])
def test_all_arms_cost_the_same_as_nearly_as_whole_steps_allow(overrides: Sequence[str]) -> None:
    plans = {arm: baselines.plan(arm, 1, ["optimizer.decay_steps=null", *overrides]) for arm in baselines.ARMS}
    budget = plans[baselines.SRL].evaluations
    for arm, plan in plans.items():
        experiment, drawing = plan.experiment, plan.drawing
        drawn = drawing.n * drawing.num_examples * experiment.rollout.num_steps if drawing else 0
        trained = sum(baselines.step_evaluations(experiment, step) for step in range(experiment.train.num_steps))
        assert plan.evaluations == pytest.approx(drawn + trained), arm
        assert abs(plan.evaluations - budget) <= baselines.step_evaluations(experiment, 0) / 2, arm
        assert (drawing is not None) == (arm == baselines.BEST)
        if drawing:
            assert 0.45 * budget < drawn <= 0.5 * budget
    assert len({plan.path for plan in plans.values()}) == len({plan.key for plan in plans.values()}) == len(plans)


def test_a_schedule_is_stretched_with_the_number_of_steps() -> None:
    plan = baselines.plan("supervised, more steps", 0, ["train.num_steps=10", "optimizer.decay_steps=20"])
    assert plan.experiment.optimizer.decay_steps == 2 * plan.experiment.train.num_steps > 20


def test_the_srl_arm_is_the_headline_tables() -> None:
    for seed in cells.SEEDS:
        plan = baselines.plan(baselines.SRL, seed)
        assert plan.path == srl_table.path_of("SRL", seed)
        assert plan.key == srl_table.key_of(srl_table.experiment_of("SRL", seed))


def test_a_best_of_n_cell_depends_on_its_drawing() -> None:
    plan = baselines.plan(baselines.BEST, 0)
    assert plan.drawing is not None
    others = [dataclasses.replace(plan.drawing, n=3), dataclasses.replace(plan.drawing, num_examples=7), None]
    keys = {plan.key, *(dataclasses.replace(plan, drawing=other).key for other in others)}
    assert len(keys) == 4


def test_a_best_of_n_cell_from_drawing_to_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "CELLS", tmp_path / "cells")
    plan = baselines.plan(baselines.BEST, 0, TINY)
    assert plan.drawing is not None
    assert not cells.is_current(plan.path, plan.key)
    baselines.run_cell(plan, tmp_path / "runs")
    assert cells.is_current(plan.path, plan.key)
    assert not cells.is_current(plan.path, dataclasses.replace(plan, drawing=None).key)
    cell = cells.read(plan.path)
    assert cell["best_of_n"]["examples"] == plan.drawing.num_examples
    assert cell["best_of_n"]["without_a_score"] == 0
    # It was trained on what was drawn, without the reward.
    run = tmp_path / "runs" / plan.path.stem
    steps = [row for text in (run / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(text))]
    assert [set(row["terms"]) for row in steps] == [{"flow_matching"}] * plan.experiment.train.num_steps
    assert "jsonl" in (run / "config.yaml").read_text()
    table = baselines.render([plan], [cell])
    assert f"| {plan.arm} | {plan.experiment.train.num_steps} |" in table
    assert f"| {plan.arm}, seed 0 |" in table


def test_an_arms_row_is_the_mean_of_its_seeds() -> None:
    def cell(shift: float) -> dict[str, object]:
        limits = {"value": 0.1 + shift, "low": 0.05 + shift, "high": 0.2 + shift}
        row = {"base": 0.5, "trained": 0.6 + shift, "ceiling": 0.9, "change": limits, "gap_closed": limits}
        rows = [{"name": metric, **row} for metric in cells.METRICS]
        return {"comparison": {"rows": rows, "num_examples": 200}}

    plans = [baselines.plan(baselines.SRL, seed) for seed in (0, 1)]
    table = baselines.render(plans, [cell(0.0), cell(0.02)])
    (mean,) = [line for line in table.splitlines() if line.startswith("| SRL |")]
    assert mean.count("0.610 (+0.110 [+0.060, +0.210])") == len(cells.METRICS)
    assert "11 % [6, 21]" in mean


def test_the_bare_loop_computes_the_same_gradient_and_another_is_told_apart(tmp_path: Path) -> None:
    overrides = ["train.batch_size=2", "data.train.args.size=4", "optimizer.decay_steps=null"]
    pair = step_overhead.make(overrides, folder=tmp_path)
    tensors, state = pair.trainer.learner.state()
    start = {name: tensor.clone() for name, tensor in tensors.items()}
    weight = pair.bare.reward_weight

    pair.bare.reward_weight = 1.01 * weight
    assert step_overhead.gradient_difference(pair) > step_overhead.GRADIENT_TOLERANCE

    pair.trainer.learner.load_state(start, state)
    weights = [tensor for name, tensor in start.items() if name.startswith("trainable/")]
    with torch.no_grad():
        for parameter, tensor in zip(pair.bare.parameters, weights, strict=True):
            parameter.copy_(tensor)
    pair.bare.adamw.state.clear()
    pair.bare.reward_weight = weight
    assert step_overhead.gradient_difference(pair) < 1e-5
    # The next steps too, whatever entry step and dropped prompts they draw.
    for step in (1, 2):
        inputs = step_overhead.inputs_of(pair, step)
        report = pair.trainer.step(step)
        fm_loss, reward = pair.bare.step(inputs, step)
        assert report.entry_step == inputs.entry_step
        assert report.terms["flow_matching"] == pytest.approx(pair.bare.fm_weight * fm_loss, rel=1e-3)
        assert report.reward_means["style"] == pytest.approx(reward, rel=1e-3)


def test_the_ratio_is_that_of_the_pairs() -> None:
    bare = [1.0, 2.0, 5.0, 0.5]
    logs = [0.02, 0.05, -0.01, 0.03]
    found = step_overhead.ratio([b * math.exp(x) for b, x in zip(bare, logs, strict=True)], bare)
    mean = sum(logs) / 4
    error = math.sqrt(sum((x - mean) ** 2 for x in logs) / 3 / 4)
    assert found["value"] == pytest.approx(math.exp(mean))
    assert found["low"] == pytest.approx(math.exp(mean - 3.182446 * error))  # Student's t, 3 degrees of freedom
    assert found["high"] == pytest.approx(math.exp(mean + 3.182446 * error))
    assert found["median"] == pytest.approx(math.exp(0.025))


def test_live_bytes_are_exact() -> None:
    before = torch.zeros(1_000_000)

    def run() -> None:
        first, second = torch.zeros(250_000), torch.zeros(500_000)
        del first
        third = torch.zeros(125_000)
        del second, third

    assert step_overhead.live_bytes(run) == 4 * 750_000
    assert step_overhead.live_bytes(lambda: before.sum()) < 10_000


@pytest.mark.parametrize(("high", "memory", "met"), [(1.05, 1.03, True), (1.051, 1.0, False), (1.0, 1.031, False)])
def test_the_verdict_needs_time_and_memory(high: float, memory: float, met: bool) -> None:
    ratios = {"live_bytes": memory, "resident_bytes": 1.0}
    assert step_overhead.met({"wall": {"high": high}, "memory": {"ratios": ratios}}) == met


def test_arms_of_sample_efficiency_spend_their_budgets() -> None:
    for arm in sample_efficiency.ARMS:
        plan = sample_efficiency.plan(arm, 0)
        spent = plan.begin + plan.experiment.train.num_steps * plan.step_cost
        assert sample_efficiency.BUDGETS[arm] - plan.step_cost < spent <= sample_efficiency.BUDGETS[arm], arm
        judged = plan.experiment.train.num_steps / plan.experiment.evaluation.every
        assert judged == pytest.approx(sample_efficiency.JUDGEMENTS, abs=1)
        assert plan.experiment.optimizer.decay_steps is None
        assert (plan.drawing is not None) == (arm == sample_efficiency.BEST) == (plan.begin > 0)
    keys = {sample_efficiency.plan(arm, seed).key for arm in sample_efficiency.ARMS for seed in (0, 1)}
    assert len(keys) == 2 * len(sample_efficiency.ARMS)


def test_a_curve_is_read_between_its_points() -> None:
    curve = [(0.0, [0.5, 1.0]), (100.0, [0.6, 3.0]), (200.0, [0.7, 2.0]), (300.0, [0.65, 9.0])]
    for target, spent, other in ((0.5, 0.0, 1.0), (0.55, 50.0, 2.0), (0.6, 100.0, 3.0), (0.69, 190.0, 2.1)):
        found = sample_efficiency.reached(curve, target)
        assert found is not None
        assert found[0] == pytest.approx(spent)
        assert found[1] == pytest.approx([target, other])
    assert sample_efficiency.reached(curve, 0.71) is None


def test_a_sample_efficiency_cell_from_training_to_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_efficiency, "CELLS", tmp_path / "cells")
    small = ["train.batch_size=1", "data.train.args.size=8", "evaluation.num_examples=2", "evaluation.grid_examples=0"]
    arm = "DiffusionNFT"
    step = sample_efficiency.plan(arm, 0, small).step_cost
    plan = sample_efficiency.plan(arm, 0, small, budget=2.5 * step)
    sample_efficiency.run_cell(plan, tmp_path / "runs")
    assert cells.is_current(plan.path, plan.key)
    cell = cells.read(plan.path)
    assert [spent for spent, _ in cell["curve"]] == [0, step, 2 * step]
    assert all(len(values) == len(cells.METRICS) for _, values in cell["curve"])
    table = sample_efficiency.render([plan], [cell])
    assert f"| **{arm}** | {step:,.0f} |" in table
