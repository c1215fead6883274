"""The benchmark of amortised rollouts: what a step costs by counting, equal budgets, and the table."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import amortised
import cells

from tests.test_benchmarks import SMALL, counted

RESULT = {"value": 0.1, "low": 0.05, "high": 0.15}


def test_the_latest_of_several_entries() -> None:
    for low, high, entries in ((4, 7, 1), (4, 7, 2), (4, 7, 4), (0, 9, 3)):
        choices = list(itertools.combinations(range(low, high + 1), entries))
        expected = sum(map(max, choices)) / len(choices)
        assert amortised.latest_entry(low, high, entries) == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes",
    [
        ["rollout.window.entry_range=[4, 5]", "rollout.entries_per_rollout=2"],
        ["rollout.window.entry_range=[4, 7]", "rollout.entries_per_rollout=4", "train.accumulation=2"],
        ["rollout.window.entry_range=[5, 5]"],
        [
            "rollout.window.entry_range=[4, 5]",
            "rollout.entries_per_rollout=2",
            "objective.rewards.other={use: brightness}",
            "train.term_grad_norms=false",
        ],
    ],
    ids=" ".join,
)
def test_a_step_costs_what_is_counted(changes: list[str], tmp_path: Path) -> None:
    experiment = cells.load(0, [*SMALL, *changes])
    assert amortised.step_evaluations(experiment, 3) == counted(experiment, 3, tmp_path)


def test_all_arms_cost_the_same_as_nearly_as_whole_steps_allow() -> None:
    found = [amortised.cell_of(entries, 1) for entries in amortised.ENTRIES]
    for cell in found:
        step = amortised.step_evaluations(cell.experiment, 0)
        assert cell.evaluations == pytest.approx(step * cell.experiment.train.num_steps)
        assert abs(cell.evaluations - found[0].evaluations) <= step / 2
    steps = [cell.experiment.train.num_steps for cell in found]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == 130
    assert len({cell.key for cell in found}) == len({cell.path for cell in found}) == 3


def test_the_table_tells_reward_per_evaluation() -> None:
    found = [amortised.cell_of(entries, seed) for entries in (1, 2) for seed in (0, 1)]
    row = {"base": 0.7, "trained": 0.8, "change": RESULT, "gap_closed": RESULT}
    rows = [{"name": name, **row} for name in cells.METRICS]
    files = [json.loads(json.dumps({"comparison": {"num_examples": 200, "rows": rows}})) for _ in found]
    table = amortised.render(found, files)
    assert f"{100 / found[0].evaluations:.5f}" in table
    assert "**2, mean**" in table
    assert table.count("\n|") == 1 + 4 + 2
