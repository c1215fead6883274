"""DiT evaluations to reach the same held-out CSD: by the reward's gradient, and by samples alone. Three seeds.

    python benchmarks/sample_efficiency.py                                # train what is missing, then write the table
    python benchmarks/sample_efficiency.py --arm "Flow-GRPO" --seed 1     # only these cells
    python benchmarks/sample_efficiency.py --check                        # train nothing: are the cells current?

Every arm trains from one base until its budget of evaluations is spent (`BUDGETS`), in the unit of `baselines.py` (a
forward pass of one picture is 1, with its backward pass 3), and is judged `JUDGEMENTS` times on the same held-out pairs
with the same noise. What is told is where its curve first reaches `TARGET_SHARE` of the way from the base's CSD to that
of the true pictures, and where the witnesses are there, linear between two judgements. Judging is not counted.

The reward's gradient (`refl`, `draft`) and best of N have the settings of `experiments/uso_srl.yaml`, samples those of
`experiments/uso_grpo.yaml`, but for the learning rate's schedule: here it warms up and stays, since a run that does not
know where it ends cannot plan for it. Best of N draws first, with half of the budget, and learns then.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import baselines
import cells as shared
from baselines import Drawing, step_evaluations
from cells import METRICS
from srl_table import NO_REWARD

from rewardgen.config import Experiment

CELLS = shared.RESULTS / "sample_efficiency"
TABLE = shared.RESULTS / "sample_efficiency.md"
SAMPLES = shared.EXPERIMENT.with_name("uso_grpo.yaml")
TARGET_SHARE, JUDGEMENTS = 0.15, 8
HELD_OUT = 64
Curve = Sequence[tuple[float, Sequence[float]]]
"""Evaluations spent, and the metrics then."""
REFL, DRAFT, GRPO = "refl (SRL)", "draft, last 2 steps", "Flow-GRPO"
BEST = f"supervised, best of {baselines.DRAWS} by CSD"
ARMS: Mapping[str, tuple[Path, tuple[str, ...]]] = {
    REFL: (shared.EXPERIMENT, (baselines.STYLE_ALONE,)),
    DRAFT: (shared.EXPERIMENT, (baselines.STYLE_ALONE, "rollout.window={kind: draft, k: 2}")),
    BEST: (shared.EXPERIMENT, NO_REWARD),
    GRPO: (SAMPLES, ()),
    "DiffusionNFT": (SAMPLES, ("objective.policy_gradient={kind: nft, num_generations: 6}",)),
}


BUDGETS = dict.fromkeys(ARMS, 36_000.0) | {REFL: 12_000.0, DRAFT: 24_000.0, BEST: 24_000.0}
"""Of DiT evaluations: enough to reach the target, where that is known of an arm from `baselines.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a cell trains: `begin` evaluations go into drawing, each step costs `step_cost`."""

    arm: str
    seed: int
    experiment: Experiment
    begin: float
    step_cost: float
    drawing: Drawing | None = None

    @property
    def path(self) -> Path:
        return CELLS / f"{re.sub('[^a-z0-9]+', '_', self.arm.lower()).strip('_')}-{self.seed}.json"

    @property
    def key(self) -> str:
        drawing = {"n": self.drawing.n, "num_examples": self.drawing.num_examples} if self.drawing else None
        return shared.key_of(self.experiment, curve={"begin": self.begin, "drawing": drawing})

    @property
    def spent(self) -> float:
        """Evaluations of the whole cell."""
        return self.begin + self.experiment.train.num_steps * self.step_cost

    @property
    def seconds(self) -> float:
        """A rough guess on two cores, with the judgements."""
        steps, judged = self.experiment.train.num_steps, self.experiment.evaluation
        judgements = 2 + steps // max(1, judged.every)
        seen = judgements * judged.num_examples * self.experiment.rollout.num_steps
        return baselines.SECONDS_PER_EVALUATION * (self.spent + seen)


def plan(arm: str, seed: int, overrides: Sequence[str] = (), *, budget: float | None = None) -> Plan:
    """A cell's settings: as many steps as the budget pays.

    Args:
        overrides: of every arm, for tests.
        budget: by default the arm's.
    """
    budget = BUDGETS[arm] if budget is None else budget
    path, changes = ARMS[arm]
    common = ["optimizer.decay_steps=null", *overrides, *changes]
    experiment = shared.load(seed, common, examples=HELD_OUT, path=path)
    drawing, begin = None, 0.0
    if arm == BEST:
        each = baselines.DRAWS * experiment.rollout.num_steps
        whole = int(experiment.data.train.args["size"])
        drawing = Drawing(n=baselines.DRAWS, num_examples=max(1, min(whole, int(budget / 2 / each))))
        begin = float(each * drawing.num_examples)
    step_cost = step_evaluations(experiment, 0)
    steps = max(1, int((budget - begin) / step_cost))
    lengths = [f"train.num_steps={steps}", f"evaluation.every={max(1, round(steps / JUDGEMENTS))}"]
    experiment = shared.load(seed, [*common, *lengths], examples=HELD_OUT, path=path)
    return Plan(arm=arm, seed=seed, experiment=experiment, begin=begin, step_cost=step_cost, drawing=drawing)


def run_cell(cell: Plan, runs: Path) -> None:
    """Train one cell and write its file: its curve and the means of the true pictures."""
    folder = runs / cell.path.stem
    experiment = cell.experiment
    drawn: dict[str, Any] = {}
    if cell.drawing:
        data, drawn = baselines.draw(experiment, cell.seed, cell.drawing, folder.with_name(f"{folder.name}-data"))
        source = {"use": "jsonl", "args": {"path": str(data)}}
        experiment = Experiment.model_validate(
            experiment.model_dump() | {"data": experiment.data.model_dump() | {"train": source}}
        )
    comparison = shared.train(experiment, folder)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    seen = [line for line in lines if line.get("kind") == "evaluation"]
    curve = [[_evaluations(cell, line["step"]), [line["values"][metric] for metric in METRICS]] for line in seen]
    ceiling = {row["name"]: row["ceiling"] for row in comparison["rows"]}
    found = {"arm": cell.arm, "seed": cell.seed, "key": cell.key, **drawn, "curve": curve}
    shared.write(cell.path, found | {"ceiling": [ceiling[metric] for metric in METRICS]})


def _evaluations(cell: Plan, step: int) -> float:
    """What was spent when the policy of a step was there; the base costs nothing."""
    return cell.begin + step * cell.step_cost if step else 0.0


def reached(curve: Curve, target: float) -> tuple[float, list[float]] | None:
    """Evaluations at which a curve's first metric first reaches the target, and all metrics there, linear in between.

    None if it never does.
    """
    if curve[0][1][0] >= target:
        return curve[0][0], list(curve[0][1])
    for (before, low), (after, high) in pairwise(curve):
        if high[0] >= target:
            share = (target - low[0]) / (high[0] - low[0])
            there = [a + share * (b - a) for a, b in zip(low, high, strict=True)]
            return before + share * (after - before), there
    return None


def target_of(found: Sequence[Mapping[str, Any]]) -> float:
    """The CSD to reach: one for all, since all start from the same base and noise."""
    base, truth = found[0]["curve"][0][1][0], found[0]["ceiling"][0]
    return float(base + TARGET_SHARE * (truth - base))


def render(plans: Sequence[Plan], found: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown: a row for each arm. `found` are the cells of `plans`."""
    target, (base, ceiling) = target_of(found), (found[0]["curve"][0][1], found[0]["ceiling"])
    seeds = sorted({cell.seed for cell in plans})
    lead = ["evaluations a step", *(f"to CSD {target:.3f}, seed {seed}" for seed in seeds), "mean"]
    there, after = list(METRICS.values())[1:], METRICS.values()
    heads = ["", *lead, *(f"{label} there" for label in there), "budget", *(f"{label} after it" for label in after)]
    blank = [""] * (len(lead) + len(there) + 1)
    rows = [
        [name, *blank, *(f"{value:.3f}" for value in values)] for name, values in (("truth", ceiling), ("base", base))
    ]
    for arm in dict.fromkeys(cell.arm for cell in plans):
        first = next(cell for cell in plans if cell.arm == arm)
        curves = [data["curve"] for cell, data in zip(plans, found, strict=True) if cell.arm == arm]
        rows.append([f"**{arm}**", f"{first.step_cost:,.0f}", *_row(curves, target, f"{first.spent:,.0f}")])
    note = (
        f"DiT evaluations (a forward pass of one picture is 1, with its backward pass 3) until the CSD of {HELD_OUT}"
        f" held-out pairs has come {TARGET_SHARE:.0%} of the way from the base's to that of the true pictures; judged"
        f" {JUDGEMENTS} times, linear in between. The witnesses are those where the target is reached, as a mean over"
        f" the seeds that reach it. {shared.WITNESSES}"
    )
    return "\n".join([shared.line(heads), "|" + "---|" * len(heads), *map(shared.line, rows), "", note]) + "\n"


def _row(curves: Sequence[Curve], target: float, budget: str) -> list[str]:
    """From the seeds' evaluations to the metrics after the whole budget."""
    places = [reached(curve, target) for curve in curves]
    texts = [f"{place[0]:,.0f}" if place else "not reached" for place in places]
    there = [place for place in places if place]
    mean = f"{sum(spent for spent, _ in there) / len(there):,.0f}" if len(there) == len(places) else "-"
    witnesses = _means([at for _, at in there])[1:] if there else ["-"] * (len(METRICS) - 1)
    return [*texts, mean, *witnesses, budget, *_means([curve[-1][1] for curve in curves])]


def _means(values: Sequence[Sequence[float]]) -> list[str]:
    return [f"{sum(column) / len(column):.3f}" for column in zip(*values, strict=True)]


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    shared.make_table(description, TABLE, ARMS, plan=plan, run_cell=run_cell, render=render)


if __name__ == "__main__":
    main()
