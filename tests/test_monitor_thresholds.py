"""The benchmark that sets the monitor's thresholds: its arithmetic, its games, and a cell from training to table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.evaluation.monitor import DRIFT, MonitorConfig, find
from rewardgen.reward import check_reward
from rewardgen.types import Score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cells
import monitor_thresholds as benchmark
from monitor_thresholds import CONTROL, GAMES, HONEST, JUDGING, SETTING
from planted_games import RandomNetwork, UndertrainedCsd

pytestmark = pytest.mark.filterwarnings("ignore")


def one(step: int, kind: str, effect: float, name: str = "statistic/sharpness") -> dict[str, Any]:
    return {"step": step, "kind": kind, "name": name, "effect": effect}


def cell(arm: str, seed: int, *findings: dict[str, Any]) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "findings": list(findings)}


def test_thresholds_come_from_the_honest_runs_of_the_setting_seeds_alone() -> None:
    found = [
        cell(HONEST, SETTING[0], one(13, "drift", -0.8), one(26, "drift", 0.4), one(26, "drift", 0.1, "statistic/b")),
        cell(HONEST, SETTING[1], one(26, "witness", -0.02, "layout")),
        cell(HONEST, JUDGING[0], one(26, "drift", 7.0)),
        cell("brightness", SETTING[0], one(26, "drift", 9.0)),
    ]
    limits = benchmark.thresholds(found)
    assert set(limits) == {*DRIFT, "witness"}
    assert limits.pop("sharpness") == pytest.approx(0.8 * benchmark.MARGIN)
    assert set(limits.values()) == {benchmark.LEAST}
    limits |= {"sharpness": 1.2, "b": benchmark.LEAST}
    assert not any(benchmark.first_warning(c, limits) for c in found if c["arm"] == HONEST and c["seed"] in SETTING)
    assert benchmark.first_warning(found[2], limits) == (26, "sharpness")


def test_the_first_warning_is_the_earliest_and_of_its_step_the_strongest() -> None:
    findings = [one(39, "drift", 9.0, "late"), one(26, "drift", 1.5, "a"), one(26, "witness", -0.9, "layout")]
    findings += [one(13, "drift", 0.9, "small")]
    limits = dict.fromkeys(("late", "a", "small"), 1.0)
    assert benchmark.first_warning(cell("x", 0, *findings), limits | {"witness": 0.5}) == (26, "layout")
    assert benchmark.first_warning(cell("x", 0, *findings), limits | {"witness": 0.7}) == (26, "a")
    assert benchmark.first_warning(cell("x", 0, *findings), dict.fromkeys(limits, 10.0) | {"witness": 1.0}) is None


@pytest.mark.parametrize(("drift", "drop"), [(0.2, 0.1), (0.6, 0.4), (1.5, 1.0)])
def test_what_was_kept_says_what_the_monitor_would_have_said_with_any_threshold(drift: float, drop: float) -> None:
    rng = torch.Generator().manual_seed(5)
    names = ["style", "layout", "palette_texture", *(f"statistic/{name}" for name in DRIFT)]

    def drawn(base: dict[str, torch.Tensor] | None) -> Evaluation:
        scores = {}
        for name in names:
            value_N = torch.randn(30, generator=rng, dtype=torch.float64)
            if base is not None:
                shift = torch.randn((), generator=rng, dtype=torch.float64) + (1.0 if name == "style" else 0.0)
                value_N = base[name] + shift + 0.3 * value_N
            scores[name] = Score(value_B=value_N, valid_B=torch.ones(30, dtype=torch.bool))
        return Evaluation(example_ids=tuple(map(str, range(30))), scores=scores)

    control = drawn(None)
    now = drawn({name: score.value_B for name, score in control.scores.items()})
    experiment = benchmark.plan(HONEST, 0, ["objective.rewards.content.weight=0"]).experiment
    kept = benchmark.findings(experiment, {0: now, 13: now, 26: now}, {0: control, 13: control})
    assert {finding.step for finding in kept} == {13}
    own = {"sharpness": 0.9}
    limits = dict.fromkeys(DRIFT, drift) | own | {"witness": drop}
    loud = {
        (f.kind, f.name)
        for f in kept
        if abs(f.effect) > limits[benchmark.threshold_of({"kind": f.kind, "name": f.name})]
    }
    config = MonitorConfig(drift=dict.fromkeys(DRIFT, drift) | own, witness_drop=drop)
    said = find(13, now, control, rewards=["style"], witnesses=list(experiment.evaluation.witnesses), config=config)
    assert loud == {(finding.kind, finding.name) for finding in said}


def test_games_are_rewards_with_a_gradient() -> None:
    check_reward(RandomNetwork())
    check_reward(UndertrainedCsd(steps=1, lessons=1))


def test_cells_have_files_and_keys_of_their_own_and_hang_on_their_control() -> None:
    plans = {arm: benchmark.plan(arm, 5) for arm in benchmark.ARMS}
    assert len({plan.path for plan in plans.values()}) == len({plan.key for plan in plans.values()}) == len(plans)
    for arm, plan in plans.items():
        trained = {name for name, term in plan.experiment.objective.rewards.items() if term.weight}
        assert trained == ({"style", "content"} if arm == HONEST else set() if arm == CONTROL else {"game"})
        changed = benchmark.plan(arm, 5, ["optimizer.lr=1e-3"])
        assert changed.key != plan.key
        assert plan.control == ("" if arm == CONTROL else plans[CONTROL].key)


def test_cells_from_training_to_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CELLS", tmp_path / "cells")
    tiny = ["train.batch_size=2", "data.train.args.size=8", "optimizer.decay_steps=null", "evaluation.grid_examples=2"]
    tiny += ["evaluation.every=1", "monitor.diversity_examples=2", "rollout.num_steps=4"]
    tiny += ["rollout.window.entry_range=[2, 3]"]
    monkeypatch.setattr(benchmark, "STEPS", 1)
    monkeypatch.setattr(benchmark, "GAME_STEPS", 1)
    monkeypatch.setattr(benchmark, "HELD_OUT", 4)
    control, game = benchmark.plan(CONTROL, 0, tiny), benchmark.plan("brightness", 0, tiny)
    with pytest.raises(SystemExit, match="control of seed 0 first"):
        benchmark.run_cell(game, tmp_path / "runs")
    for plan in (control, game):
        benchmark.run_cell(plan, tmp_path / "runs")
        assert cells.is_current(plan.path, plan.key)
    assert set(cells.read(control.path)["evaluations"]) == {"0", "1"}
    found = [cells.read(game.path), cell(HONEST, 0, one(13, "drift", 0.5)), cell(HONEST, 5)]
    assert json.dumps(found[0]["findings"])
    table = benchmark.render([], found)
    assert "| **honest SRL** | setting | 0 of 1 |" in table
    assert "| `monitor.drift.sharpness` | 0.75 |" in table
    assert "| `monitor.witness_drop` | 0.25 |" in table
    assert all(f"**{name}**" in table for name in GAMES)
