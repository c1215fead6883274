"""UMO's table: fair arms, keys of the people's pieces, paired changes, honest verdicts, a cell from start to end."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardgen import sources
from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.types import Score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cells
import srl_table
import umo_table
import umo_verdicts
from umo_verdicts import MIMR, OURS, SIR, SUPERVISED

from rewardgen.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")

TINY = (
    "train.num_steps=1",
    "train.batch_size=3",
    "data.train.args.size=6",
    "data.held_out.args.size=6",
    "rollout.num_steps=2",
    "rollout.window.entry_range=[1, 1]",
    "optimizer={lr: 0.05, warmup_steps: 0, decay_steps: null}",
    "train.ema_decay=null",
)


def test_arms_differ_in_the_reward_alone() -> None:
    common = umo_table.settings(MIMR, 1).model_dump(mode="json")
    common["objective"]["rewards"].pop("people")
    assert common["data"]["train"]["args"].get("people") is None, "groups of one to six"
    for arm in umo_table.ARMS:
        found = umo_table.settings(arm, 1).model_dump(mode="json")
        found["objective"]["rewards"].pop("people")
        assert found == common, arm
    rewards = {arm: umo_table.settings(arm, 1).objective.rewards["people"] for arm in umo_table.ARMS}
    assert rewards[SUPERVISED].weight == 0
    assert rewards[SIR].use == "identity"
    official = {"checkpoint", "detector", "references"}
    assert set(rewards[MIMR].args) == official
    assert rewards[OURS].args["normalise"] == "each"
    assert set(rewards[OURS].args) - official == {"normalise", "floor"}


def test_every_cell_has_a_file_and_a_key_of_its_own() -> None:
    plans = [umo_table.plan(arm, seed) for arm in umo_table.ARMS for seed in (0, 1)]
    assert len({plan.path for plan in plans}) == len({plan.key for plan in plans}) == len(plans)
    assert len({umo_table.base_key(plan) for plan in plans}) == 1
    assert umo_table.plan(MIMR, 0, pictures=7).key != umo_table.plan(MIMR, 0).key


def test_the_tables_people_are_those_of_no_choice() -> None:
    own = umo_table.settings(MIMR, 0).data.held_out.args.get("seed", 0)
    seeds = umo_table.SEEDS_OF_DATA
    assert set(seeds) == set(umo_table.NUMBERS)
    # 1 is what the base's recipe was looked at with.
    assert len({own, 1, *seeds.values()}) == 2 + len(seeds)
    pictures = {people: umo_table.held_out(people, 2) for people in seeds}
    assert {people: [len(e.identity_refs) for e in some] for people, some in pictures.items()} == {
        people: [people] * 2 for people in seeds
    }


def test_a_key_depends_on_the_pieces_that_its_table_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> tuple[str, str, str]:
        srl = cells.key_of(srl_table.experiment_of("SRL", 0))
        plan = umo_table.plan(MIMR, 0)
        return srl, plan.key, umo_table.base_key(plan)

    bundled = json.loads((cells.ASSETS / "world.json").read_text())
    monkeypatch.setattr(cells, "ASSETS", tmp_path)

    def with_piece(name: str) -> tuple[str, str, str]:
        (tmp_path / "world.json").write_text(json.dumps(bundled | {name: {"files": {name: "other"}}}))
        return keys()

    (tmp_path / "world.json").write_text(json.dumps(bundled))
    before = keys()
    for name in ("people_vae", "detector", "embedder", "uno"):
        srl, umo, base = with_piece(name)
        assert srl == before[0]
        assert umo != before[1]
        assert base != before[2]
    srl, umo, base = with_piece("csd")
    assert srl != before[0]
    assert (umo, base) == before[1:]


def test_columns_count_faces_and_coverage() -> None:
    def score(values: list[float | None]) -> Score:
        value_B = torch.tensor([torch.nan if v is None else v for v in values], dtype=torch.float64)
        return Score(value_B=value_B, valid_B=~value_B.isnan())

    scores = {
        "id_sim": score([30.0, 40.0, None]),
        "id_conf": score([None, 55.0, None]),
        "missing_faces": score([-2.0, -0.0, None]),
        "extra_faces": score([-0.0, -1.0, None]),
        "likeness": score([0.5, -0.1, 0.3]),
        "apart": score([0.4, 0.1, None]),
        "layout": score([0.25, 1.0, 0.5]),
    }
    found = umo_table.columns(Evaluation(example_ids=("a", "b", "c"), scores=scores))
    assert found == {
        "id_sim": [30.0, 40.0, None],
        "id_conf": [None, 55.0, None],
        "coverage": [0.0, 100.0, None],
        "missing_faces": [2.0, 0.0, None],
        "extra_faces": [0.0, 1.0, None],
        "likeness": [0.5, -0.1, 0.3],
        "apart": [0.4, 0.1, None],
        "layout": [0.25, 1.0, 0.5],
    }


class TestChange:
    def test_a_pictures_change_is_its_mean_over_the_seeds_that_have_one(self) -> None:
        base = [10.0, 20.0, None, 40.0, 50.0]
        ours = [[11.0, None, 30.0, 42.0, None], [13.0, 23.0, 33.0, 42.0, None]]
        found = umo_verdicts.change(ours, [base])
        assert found is not None
        assert found.valid == 3
        assert found.value == pytest.approx((2.0 + 3.0 + 2.0) / 3)
        assert found.seeds == pytest.approx(((1.0 + 2.0) / 2, (3.0 + 3.0 + 2.0) / 3))
        assert 2.0 <= found.low <= found.value <= found.high <= 3.0

    def test_seeds_are_paired_with_seeds_and_turned_round_changes_the_sign(self) -> None:
        rng = torch.Generator().manual_seed(0)
        ours, theirs = torch.rand(2, 3, 50, generator=rng).tolist()
        there, back = umo_verdicts.change(ours, theirs), umo_verdicts.change(theirs, ours)
        assert there is not None
        assert back is not None
        assert back.value == pytest.approx(-there.value)
        assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=2e-3)
        assert umo_verdicts.change(ours[:1], theirs[:1]) == umo_verdicts.change(ours[:1], [theirs[0]])

    def test_its_interval_holds_the_truth_in_19_of_20(self) -> None:
        rng = torch.Generator().manual_seed(1)
        zero = [0.0] * 60
        held = 0
        for _ in range(200):
            found = umo_verdicts.change((1 + torch.randn(1, 60, generator=rng)).tolist(), [zero])
            assert found is not None
            held += found.low <= 1 <= found.high
        assert 178 <= held <= 200

    @pytest.mark.parametrize(
        ("low", "value", "seeds", "answer"),
        [
            (0.1, 1.0, (1.0, 1.0), "yes"),
            (-0.1, 1.0, (1.0, 1.0), "not certain"),
            (0.1, 1.0, (2.1, -0.1), "not certain"),
            (-2.0, -1.0, (-1.0, -1.0), "no"),
            (0.0, 0.0, (0.0, 0.0), "no"),
        ],
    )
    def test_only_what_all_say_is_certain(
        self, low: float, value: float, seeds: tuple[float, ...], answer: str
    ) -> None:
        assert umo_verdicts.Change(value=value, low=low, high=3.0, seeds=seeds, valid=9).rises() == answer

    def test_nothing_in_common_is_no_change(self) -> None:
        assert umo_verdicts.change([[None, 1.0]], [[1.0, None]]) is None

    def test_what_is_kept_is_relative_to_the_base(self) -> None:
        base = [0.8, 0.4, 0.6, None]
        found = umo_verdicts.kept(
            [[0.97 * v if v else None for v in base], [0.99 * v if v else None for v in base]], base
        )
        assert found is not None
        assert found.value == pytest.approx(-0.02)
        assert (found.low, found.high) == pytest.approx((-0.02, -0.02))
        assert found.seeds == pytest.approx((-0.03, -0.01))
        assert umo_verdicts.keeps(umo_verdicts.Change(value=-0.01, low=-0.019, high=0, seeds=(), valid=3)) == "yes"
        assert (
            umo_verdicts.keeps(umo_verdicts.Change(value=-0.01, low=-0.03, high=0, seeds=(), valid=3)) == "not certain"
        )
        assert umo_verdicts.keeps(umo_verdicts.Change(value=-0.03, low=-0.05, high=0, seeds=(), valid=3)) == "no"


def invented(shift: float, *, layout: float = 1.0, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Scores of eight pictures of each number of people, better by `shift` (times the number of people)."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for people in (2, 4, 6):
        some = torch.rand(8, generator=rng)
        gain = shift * people
        found[str(people)] = {
            "id_sim": (40 + some + gain).tolist(),
            "id_conf": (50 + some + gain).tolist(),
            "coverage": [100.0] * 8,
            "missing_faces": (2 + some - gain / 100).tolist(),
            "extra_faces": [0.0] * 8,
            "likeness": (0.2 + some / 10 + gain / 100).tolist(),
            "apart": (0.2 + some / 10 + gain / 100).tolist(),
            "layout": [0.9 * layout] * 8,
        }
    return found


def verdicts_of(shifts: dict[str, float], layout: float = 1.0) -> list[str]:
    arms = {
        arm: [invented(shifts.get(arm, 0.0), layout=layout, seed=seed) for seed in (1, 2)] for arm in umo_table.ARMS
    }
    return umo_verdicts.verdicts(arms, invented(0.0, seed=1))


RISING = {arm: float(place) for place, arm in enumerate(umo_table.ARMS)}


class TestVerdicts:
    def test_as_hoped(self) -> None:
        confusion, identity, likeness, layout, ours = verdicts_of(RISING)
        assert confusion.startswith("**Are people confused less with MIMR than with SIR?** Yes, throughout.")
        # MIMR comes one place after SIR: 2, 4 and 6 more; ours two.
        assert f"| ID-Conf, {MIMR} | yes: +2.0 [+2.0, +2.0] (seeds +2.0, +2.0) | yes: +4.0" in confusion
        assert f"| apart witness, {OURS} | yes: +0.040 [+0.040, +0.040]" in confusion
        # Over all pictures the mean of 2, 4 and 6, with their spread.
        assert "| | 2 people | 4 people | 6 people | all |" in confusion
        (row,) = [line for line in confusion.splitlines() if line.startswith(f"| ID-Conf, {MIMR} |")]
        assert re.search(r"\| yes: \+4\.0 \[\+3\.\d, \+4\.\d\] \(seeds \+4\.0, \+4\.0\) \|$", row)
        assert "Yes, throughout." in likeness
        assert "Yes, throughout." in identity
        assert identity.count("\n|") == 2 + len(umo_table.ARMS) - 1
        assert "Yes, throughout." in layout
        gains = "ID-Sim at 6 people, in likeness witness at 6 people, in apart witness at 6 people"
        assert f"They gain the most in {gains}." in ours
        # Fewer missing faces is better, and is said as a fall; what cannot rise has not risen.
        assert "| missing faces | yes: -0.02 [-0.02, -0.02]" in ours
        assert "extra faces at 2 people (no)" in ours.splitlines()[0]
        assert "| ID-Sim | yes: +2.0 [+2.0, +2.0] (seeds +2.0, +2.0) | yes: +4.0" in ours

    def test_the_other_way_round(self) -> None:
        worse = {arm: -place for arm, place in RISING.items()}
        confusion, identity, likeness, layout, ours = verdicts_of(worse, layout=0.97)
        assert f"Not, or not for certain: ID-Conf, {MIMR} at 2 people (no); ID-Conf, {MIMR} at 4" in confusion
        assert f"{OURS} at 6 people (no)" in likeness
        assert f"{OURS} over all (no)" in likeness
        assert f"{SIR} at 2 people (no)" in identity
        assert f"{SUPERVISED} at 6 people (no)" in layout
        assert "no: -3.0 % [-3.0, -3.0]" in layout
        assert "They gain the most in ID-Sim nowhere, in likeness witness nowhere, in apart witness nowhere." in ours
        assert "ID-Sim at 2 people (no)" in ours

    def test_the_table_has_every_arm_and_seed(self) -> None:
        arms = {arm: [invented(1.0, seed=seed) for seed in (1, 2)] for arm in umo_table.ARMS}
        text = umo_verdicts.render(arms, invented(0.0, seed=1), invented(9.0), steps=5)
        for number in (2, 4, 6):
            section = text.split(f"## {number} people")[1].split("##")[0]
            for arm in umo_table.ARMS:
                assert f"| **{arm}** | " in section
                assert f"| {arm}, seed 0 | " in section
                assert f"| {arm}, seed 1 | " in section
            assert "| truth | " in section
        assert "8 held-out pictures of each number of people, 5 steps." in text


def test_a_cell_from_training_to_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(umo_table, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(umo_table, "OWN_EXAMPLES", 2)
    small = [*TINY, "rollout.num_steps=4", "evaluation.grid_examples=1"]  # with 2 steps there is no face to be found
    plan = umo_table.plan(OURS, 0, small, pictures=2)
    assert not cells.is_current(plan.path, plan.key)
    umo_table.run_cell(plan, tmp_path / "runs")
    assert cells.is_current(plan.path, plan.key)
    cell, base = cells.read(plan.path), cells.read(umo_table.CELLS / "base.json")
    run = tmp_path / "runs" / plan.path.stem
    (step,) = [one for one in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in one]
    assert set(step["terms"]) == {"flow_matching", "people"}
    assert step["valid_counts"]["people"] == 3
    assert (run / "faces.png").is_file()
    # What was judged is what was trained, on the same pictures as the base.
    assert list(cell["scores"]) == list(cell["comparisons"]) == ["2", "4", "6"]
    for people, scores in cell["scores"].items():
        assert set(scores) == set(umo_verdicts.METRICS)
        assert all(len(column) == 2 for column in scores.values())
        before, after = base["scores"][people]["id_sim"], scores["id_sim"]
        assert before != after
        rows = {row["name"]: row for row in cell["comparisons"][people]["rows"]}
        assert rows["id_sim"]["change"]["value"] == pytest.approx(sum(after) / 2 - sum(before) / 2)
        assert cell["comparisons"][people]["method"] == "bootstrap"
        assert sum(base["truth"][people]["layout"]) > 1.5
    # Every arm and seed starts from this base: another one finds it, and would make the same.
    other = umo_table.plan(SIR, 1, small, pictures=2)
    path = umo_table.CELLS / "base.json"
    written = path.read_bytes()
    path.unlink()
    umo_table.base_of(other)
    assert path.read_bytes() == written
    # And a table can be made of it.
    whole = [{"arm": arm, "scores": cell["scores"]} for arm in umo_table.ARMS]
    assert "## What it says" in umo_table.render([plan], whole)


def test_pieces_that_are_not_there_are_named_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "ASSETS", tmp_path)
    monkeypatch.setattr(umo_table, "CELLS", tmp_path / "cells")
    with pytest.raises(ConfigError, match="world:people"):
        umo_table.run_cell(umo_table.plan(MIMR, 0, TINY, pictures=2), tmp_path / "runs")
    assert not (tmp_path / "cells").exists()
