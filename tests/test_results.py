"""Committed tables belong to the current recipes, and README shows what was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import amortised
import cells as shared
import judged_table
import monitor_thresholds
import sample_efficiency
import umo_table

from rewardgen.evaluation.monitor import DRIFT, MonitorConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORLD = ROOT / "rewardgen" / "world" / "assets" / "world.json"


@pytest.fixture(scope="module")
def srl_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("srl_table", ROOT / "benchmarks" / "srl_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_cell_of_the_headline_table_is_current(srl_table: ModuleType) -> None:
    cells = [(arm, seed) for arm in srl_table.ARMS for seed in srl_table.SEEDS]
    assert [cell for cell in cells if not srl_table.is_current(*cell)] == []


def test_the_table_is_what_the_cells_say(srl_table: ModuleType) -> None:
    references = json.loads((RESULTS / "srl_tiny" / "references.json").read_text())
    assert srl_table.render(srl_table.cells(), references) == srl_table.TABLE.read_text()


@pytest.mark.parametrize("name", ["srl_tiny.md", "baselines.md", "judge.md"])
def test_readme_shows_the_measured_table(name: str) -> None:
    whole = (RESULTS / name).read_text().split("<details>")[0].strip()  # seed by seed it is in its own file alone
    assert whole
    assert whole in (ROOT / "README.md").read_text()


def test_the_gate_was_passed_by_the_bundled_faces() -> None:
    gate, world = json.loads((RESULTS / "faces_gate.json").read_text()), json.loads(WORLD.read_text())
    assert gate["files"] == {name: world[name]["files"] for name in ("people_vae", "detector", "embedder")}
    assert gate["figures"]["recall"] >= 0.95
    assert gate["figures"]["gap"] >= 0.4


def test_a_cell_of_another_recipe_is_outdated(srl_table: ModuleType) -> None:
    experiment = srl_table.experiment_of("SRL", 0)
    other = experiment.model_copy(update={"seed": 7})
    assert srl_table.key_of(experiment) != srl_table.key_of(other)
    assert srl_table.key_of(experiment) == srl_table.key_of(experiment.model_copy(update={"name": "another"}))


def test_the_table_of_amortised_rollouts_is_current_and_what_its_cells_say() -> None:
    plans = [amortised.cell_of(entries, seed) for entries in amortised.ENTRIES for seed in amortised.SEEDS]
    assert [plan.path.name for plan in plans if not amortised.shared.is_current(plan.path, plan.key)] == []
    cells = [amortised.shared.read(plan.path) for plan in plans]
    assert amortised.render(plans, cells) == amortised.TABLE.read_text()


def test_the_table_of_sample_efficiency_is_current_and_what_its_cells_say() -> None:
    plans = [sample_efficiency.plan(arm, seed) for arm in sample_efficiency.ARMS for seed in shared.SEEDS]
    assert [plan.path.name for plan in plans if not shared.is_current(plan.path, plan.key)] == []
    assert sample_efficiency.render(plans, [shared.read(plan.path) for plan in plans]) == (
        sample_efficiency.TABLE.read_text()
    )


@pytest.mark.parametrize(
    ("table", "seeds"),
    [(judged_table, shared.SEEDS), (monitor_thresholds, monitor_thresholds.SETTING + monitor_thresholds.JUDGING)],
)
def test_committed_cells_are_current_and_the_table_is_what_they_say(table: ModuleType, seeds: tuple[int, ...]) -> None:
    """As many as there are: none yet is as good as all of them, one of an older recipe is not."""
    plans = [table.plan(arm, seed) for arm in table.ARMS for seed in seeds]
    there = [plan for plan in plans if plan.path.is_file()]
    assert [plan.path.name for plan in there if not shared.is_current(plan.path, plan.key)] == []
    assert table.TABLE.is_file() == (len(there) == len(plans))
    if table.TABLE.is_file():
        assert table.render(plans, [shared.read(plan.path) for plan in plans]) == table.TABLE.read_text()


def test_the_monitor_s_thresholds_are_those_of_the_setting_seeds() -> None:
    benchmark = monitor_thresholds
    plans = [benchmark.plan(benchmark.HONEST, seed) for seed in benchmark.SETTING]
    limits = benchmark.thresholds([shared.read(plan.path) for plan in plans])
    assert MonitorConfig().witness_drop == round(limits.pop(benchmark.WITNESS), 2)
    assert dict(DRIFT) == {name: round(limit, 2) for name, limit in limits.items()}


@pytest.fixture(scope="module")
def umo_plans() -> list[umo_table.Plan]:
    return [umo_table.plan(arm, seed) for arm in umo_table.ARMS for seed in umo_table.shared.SEEDS]


def test_committed_cells_of_umos_table_are_current(umo_plans: list[umo_table.Plan]) -> None:
    """As many as there are: none yet is as good as all of them, one of an older recipe is not."""
    known = {plan.path: plan.key for plan in umo_plans}
    known[umo_table.CELLS / "base.json"] = umo_table.base_key(umo_plans[0])
    found = {path: umo_table.shared.read(path)["key"] for path in umo_table.CELLS.glob("*.json")}
    assert found == {path: known.get(path) for path in found}


def test_umos_table_is_what_its_cells_say(umo_plans: list[umo_table.Plan]) -> None:
    whole = all(plan.path.is_file() for plan in umo_plans)
    assert umo_table.TABLE.is_file() == whole
    if whole:
        cells = [umo_table.shared.read(plan.path) for plan in umo_plans]
        assert umo_table.render(umo_plans, cells) == umo_table.TABLE.read_text()
