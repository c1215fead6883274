"""Plans: the loop on a virtual clock against closed forms and brute force, and what costs are read from."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rewardgen.commands import plan as command
from rewardgen.config import load_experiment
from rewardgen.errors import ConfigError
from rewardgen.fleet import plan
from rewardgen.fleet.costs import Costs, Work, measured, stated
from rewardgen.fleet.inline import InlinePool
from rewardgen.fleet.plan import Split, best, bound, forecast, splits
from tests.test_placement import EXPERIMENT

ROOT = Path(__file__).resolve().parents[1]
SECONDS = st.floats(0.1, 9)
PARTS = Costs(rollout_seconds=3.0, learner_seconds=2.0, fixed_seconds=0.5, weights_seconds=0.25)


def seconds(work: Work, split: Split, staleness: int = 0, costs: Costs = PARTS) -> float:
    return forecast(work, costs, split, staleness).seconds_per_step


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_worker_and_one_learner_take_turns_or_overlap(micro_batches: int) -> None:
    work, split = Work(micro_batches=micro_batches), Split(learners=1, workers=1)
    drawing, learning = 3.0 * micro_batches, 2.0 * micro_batches + 0.5 + 0.25
    assert seconds(work, split) == pytest.approx(drawing + learning)
    for staleness in (1, 2):
        assert seconds(work, split, staleness) == pytest.approx(max(drawing, learning))
    slow_learner = PARTS.model_copy(update={"learner_seconds": 5.0})
    assert seconds(work, split, 1, slow_learner) == pytest.approx(5.0 * micro_batches + 0.75)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), SECONDS, SECONDS)
def test_workers_take_as_many_rounds_as_it_needs(workers: int, requests: int, drawing: float, learning: float) -> None:
    costs = Costs(rollout_seconds=drawing, learner_seconds=learning)
    work, split = Work(micro_batches=requests), Split(learners=1, workers=workers)
    rounds = math.ceil(requests / workers) * drawing
    assert seconds(work, split, 0, costs) == pytest.approx(rounds + requests * learning)
    if requests % workers == 0:
        assert seconds(work, split, 1, costs) == pytest.approx(max(rounds, requests * learning))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2))
def test_learners_that_draw_for_themselves_overlap_nothing(learners: int, each: int, staleness: int) -> None:
    work, split = Work(micro_batches=learners * each), Split(learners=learners)
    found = forecast(work, PARTS, split, staleness)
    assert found.seconds_per_step == pytest.approx(each * (3.0 + 2.0) + 0.5)
    assert found.learners_busy == pytest.approx(1.0)
    assert found.workers_busy is found.judges_busy is None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), SECONDS, SECONDS)
def test_judges_score_what_is_there_while_the_next_is_drawn(samples: int, drawing: float, scoring: float) -> None:
    """Two machines in a row and equal jobs: the slower one is passed by all, the faster one by the last."""
    costs = Costs(rollout_seconds=drawing, judge_seconds=scoring, learner_seconds=1.0)
    work = Work(micro_batches=1, prefixes=0, samples=samples)
    pipeline = samples * max(drawing, scoring) + min(drawing, scoring)
    assert seconds(work, Split(learners=1, workers=1, judges=1), 0, costs) == pytest.approx(pipeline + 1.0)
    # Without judges who draws also scores.
    assert seconds(work, Split(learners=1), 0, costs) == pytest.approx(samples * (drawing + scoring) + 1.0)


def test_only_samples_are_scored() -> None:
    """One prefix for the gradient window and two samples, a worker for each, one judge."""
    costs = Costs(rollout_seconds=3.0, judge_seconds=1.0, learner_seconds=2.0)
    work = Work(micro_batches=1, prefixes=1, samples=2)
    found = forecast(work, costs, Split(learners=1, workers=3, judges=1), 0)
    assert found.seconds_per_step == pytest.approx(3.0 + 2 * 1.0 + 2.0)
    assert found.judges_busy == pytest.approx(2.0 / 7.0)
    assert found.workers_busy == pytest.approx(3 * 3.0 / 3 / 7.0)


def test_learners_share_micro_batches_equally_or_not_at_all() -> None:
    work = Work(micro_batches=4)
    assert seconds(work, Split(learners=2, workers=4)) == pytest.approx(3.0 + 2 * 2.0 + 0.75)
    with pytest.raises(ConfigError, match="4 micro-batches cannot be shared equally by 3 learners"):
        seconds(work, Split(learners=3, workers=1))


# --- the best split ---------------------------------------------------------------------------------------------------

WORKS = st.builds(Work, micro_batches=st.integers(1, 6), prefixes=st.integers(0, 1), samples=st.integers(0, 3))
COSTS = st.builds(
    Costs,
    rollout_seconds=SECONDS,
    learner_seconds=SECONDS,
    judge_seconds=st.sampled_from([0.0, 0.7, 4.0]),
    weights_seconds=st.sampled_from([0.0, 0.3]),
)


@settings(max_examples=60, deadline=None)
@given(WORKS, COSTS, st.integers(0, 2), st.data())
def test_nothing_is_faster_than_the_bound(work: Work, costs: Costs, staleness: int, data: st.DataObject) -> None:
    assume(work.requests)
    ways = [w for c in (True, False) for w in splits(work, 5, staleness, colocated=c, judged=bool(work.judged))]
    assume(ways)
    split = data.draw(st.sampled_from(ways))
    found, least = seconds(work, split, staleness, costs), bound(work, costs, split, staleness)
    # A window of steps may begin with batches that were drawn before it.
    ahead = (1 + staleness) / plan._MEASURED_STEPS if staleness and split.workers else 0.0
    assert found >= least * (1 - ahead - 1e-9)


@settings(max_examples=25, deadline=None)
@given(WORKS, COSTS, st.integers(2, 6), st.integers(0, 1), st.booleans())
def test_the_best_split_is_that_of_brute_force(
    work: Work, costs: Costs, gpus: int, staleness: int, colocated: bool
) -> None:
    assume(work.requests)
    judged = bool(work.judged and costs.judge_seconds) and not colocated
    ways = list(splits(work, gpus, staleness, colocated=colocated, judged=judged))
    found = best(work, costs, gpus, staleness, colocated=colocated)
    if not ways:
        assert found is None or colocated
        return
    assert found is not None
    assert found.split.gpus <= gpus
    fastest = min(seconds(work, way, staleness, costs) for way in ways)
    assert found.seconds_per_step <= fastest / plan._ENOUGH**2


def test_only_splits_are_offered_that_the_fleet_takes() -> None:
    """A learner that draws its own samples scores them too, and several learners draw theirs."""
    work, costs = Work(micro_batches=4, samples=8), Costs(rollout_seconds=10.0, judge_seconds=10.0, learner_seconds=4.0)
    together, apart = (best(work, costs, 8, 0, colocated=colocated) for colocated in (True, False))
    assert together is not None
    assert together.split == Split(learners=4)
    assert apart is not None
    assert apart.split.learners == 1
    assert apart.split.judges > 0
    assert f"fleet.judges.workers={apart.split.judges}" in command._overrides(apart, work)


def test_gpus_without_work_are_left_out_and_many_take_no_time() -> None:
    one = Work(micro_batches=1)
    found = best(one, PARTS, 64, 0, colocated=False)
    assert found is not None
    assert found.split == Split(learners=1, workers=1)
    many = best(Work(micro_batches=256), PARTS, 256, 1, colocated=False)
    assert many is not None
    # Drawing costs 3, learning 2 of each: about 3 of 5 GPUs draw.
    assert many.split.learners in (64, 128)
    assert many.workers_busy is not None
    assert many.workers_busy > 0.9
    assert found.price(1000, 3.6) == pytest.approx(1000 * found.seconds_per_step / 3600 * 2 * 3.6)


def test_a_plan_needs_no_torch() -> None:
    code = "import rewardgen.fleet.plan, rewardgen.fleet.costs, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- costs ------------------------------------------------------------------------------------------------------------


def test_stated_costs_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"rollout_seconds": 3, "learner_seconds": 2.5, "judge_seconds": 1}')
    assert stated(path) == Costs(rollout_seconds=3.0, learner_seconds=2.5, judge_seconds=1.0)
    for text, said in (
        ('{"rollout_seconds": 3}', "learner_seconds: field required"),
        ('{"rollout_seconds": -3, "learner_seconds": 1}', "rollout_seconds: input should be greater"),
        ('{"rollout_second": 3, "rollout_seconds": 3, "learner_seconds": 1}', "Did you mean 'rollout_seconds'"),
        ("[", "invalid json"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            stated(path)
    with pytest.raises(ConfigError, match="no such file"):
        stated(tmp_path / "nowhere.json")


def line(step: int, rollout: float, **more: Any) -> str:
    phases = {"data": 0.25, "weights": 0.5, "rollout": rollout, "window": 2.0, "backward": 4.0, "optimizer": 0.75}
    return json.dumps({"kind": "step", "step": step, "reward_means": {"a": 1.0}, "seconds_by_phase": phases} | more)


def test_costs_of_a_run_are_medians_of_its_steps_that_drew(tmp_path: Path) -> None:
    path, work = tmp_path / "metrics.jsonl", Work(micro_batches=2, samples=1)
    lines = [line(0, 1e-6, reward_means={}), line(1, 900.0)]  # before rewards started, and the first that drew
    lines += [line(2, 8.0), line(3, 8.0), line(4, 800.0), line(5, 99.0, skipped=True)]
    lines += [json.dumps({"kind": "evaluation", "step": 5, "values": {}}), '{"kind": "st']
    path.write_text("\n".join(lines))
    found = measured(path, work, remote=False)
    assert found == Costs(rollout_seconds=2.0, learner_seconds=3.0, fixed_seconds=1.0, weights_seconds=0.5)
    figures = {"fleet/busy_share": 0.75, "fleet/requests_per_worker_second": 0.25}
    path.write_text("\n".join([lines[1], line(2, 0.01, metrics=figures)]))
    assert measured(path, work, remote=True).rollout_seconds == pytest.approx(3.0), "not how long the learner waited"
    assert measured(path, work, remote=True).judge_seconds == 0.0
    figures |= {"judges/busy_share": 1.0, "judges/requests_per_worker_second": 0.125}
    path.write_text("\n".join([lines[1], line(2, 0.01, metrics=figures)]))
    assert measured(path, work, remote=True).judge_seconds == pytest.approx(8.0)
    path.write_text(lines[0])
    with pytest.raises(ConfigError, match="no step of the run drew"):
        measured(path, work, remote=False)


# --- the command ------------------------------------------------------------------------------------------------------


def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str], *overrides: str, **options: Any) -> Any:
    path, costs = tmp_path / "placed.yaml", tmp_path / "costs.json"
    path.write_text(EXPERIMENT)
    costs.write_text(PARTS.model_dump_json())
    loaded = load_experiment(path, overrides=overrides)
    command.run(loaded, **({"gpus": 6, "costs": costs, "from_run": None, "price": 2.0} | options))
    return capsys.readouterr().out


def test_the_command_names_keys_that_the_best_split_can_be_set_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "train.accumulation=4"
    said = json.loads(planned(tmp_path, capsys, few, as_json=True))
    rows = said["splits"]
    assert [(row["placement"], row["staleness"]) for row in rows] == [
        ("colocated", 0),
        ("disaggregated", 0),
        ("disaggregated", 1),
    ]
    assert said["work"] == {"micro_batches": 4, "prefixes": 1, "samples": 0}
    assert said["best"] == min(rows[:2], key=lambda row: row["seconds_per_step"]), "staleness 1 is another run"
    for row in rows:
        assert row["gpus"] <= 6
        assert row["price"] == pytest.approx(5 * row["seconds_per_step"] / 3600 * row["gpus"] * 2.0)
        again = load_experiment(tmp_path / "placed.yaml", overrides=[few, *row["overrides"]])
        work = dataclasses.asdict(command.work_of(again))
        assert work == said["work"], "the step is the same one"
    text = planned(tmp_path, capsys, few)
    assert "best at staleness 0: fleet=ray fleet.placement=colocated fleet.learners=4 train.accumulation=1" in text
    assert "4 micro-batches of 2, 4 requests" in text
    assert text.count("disaggregated") == 2
    assert "price of 5 steps" in text
    unpriced = planned(tmp_path, capsys, few, price=None)
    assert "price" not in unpriced
    assert unpriced.count("disaggregated") == 2


def test_a_plan_from_a_run_of_another_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ConfigError, match="it is no run's folder"):
        planned(tmp_path, capsys, costs=None, from_run=run)
    (run / "config.yaml").write_text(EXPERIMENT)
    (run / "metrics.jsonl").write_text("\n".join(line(step, 8.0) for step in range(3)))
    said = json.loads(planned(tmp_path, capsys, costs=None, from_run=run, as_json=True))
    assert said["costs"]["rollout_seconds"] == 4.0
    with pytest.raises(ConfigError, match=r"measured train.batch_size = 2, the experiment has 1"):
        planned(tmp_path, capsys, "train.batch_size=1", costs=None, from_run=run)
    with pytest.raises(ConfigError, match="either --costs FILE or --from-run DIR"):
        planned(tmp_path, capsys, costs=None)
    with pytest.raises(ConfigError, match="the objective needs no rollout"):
        planned(tmp_path, capsys, "objective.rewards.style.weight=0")


def test_the_benchmark_measures_and_plans_the_same_settings() -> None:
    """In small, on pools in this process that only seem to sleep: the times mean nothing."""
    spec = importlib.util.spec_from_file_location("fleet_plan", ROOT / "benchmarks" / "fleet_plan.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules["fleet_plan"] = benchmark  # dataclasses look their module up
    spec.loader.exec_module(benchmark)
    names = ("workers", "staleness", "judges")
    costs = Costs(rollout_seconds=1e-4, learner_seconds=1e-4, judge_seconds=1e-4)
    calls: list[str] = []

    class Noting(benchmark.Sleeper):  # type: ignore[misc]
        def rollout(self, seconds: float, weights: Any = None) -> float:
            calls.append("rollout")
            return seconds

        def score(self, drawn: float, seconds: float) -> None:
            assert drawn == seconds == 1e-4
            calls.append("score")

    rows = [
        benchmark.row(setting, InlinePool(Noting()), InlinePool(Noting()), costs, requests=2, steps=1)
        for setting in (
            benchmark.Setting(workers=1, staleness=0),
            benchmark.Setting(workers=2, staleness=0, judges=1),
        )
    ]
    assert (calls.count("rollout"), calls.count("score")) == (2 * 6, 2 * 3)
    assert [row["stated"] for row in rows] == pytest.approx([4e-4, 5e-4])
    for row, setting in zip(rows, ((1, 0, 0), (2, 0, 1)), strict=True):
        parts = Costs.model_validate(row["timed_parts"])
        again = benchmark.planned(benchmark.Setting(**dict(zip(names, setting, strict=True))), parts, 2)
        assert row["timed"] == again
        assert parts.learner_seconds >= 1e-4, "a sleep is never shorter"
    load = {"load_average_before": 0.0, "load_average_after": 0.0, "cores": 2}
    found = {
        "requests": 2,
        "costs": costs.model_dump(),
        "steps": 1,
        "rows": rows,
        "worst": 0.01,
        "worst_stated": 0.02,
        **load,
    }
    assert "| 2 | 0 | 1 |" in benchmark.render(found)
    assert "Largest error 1.0 % from timed parts, 2.0 %" in benchmark.render(found)
