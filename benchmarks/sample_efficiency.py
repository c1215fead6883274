"""DiT evaluations to reach the same held-out CSD: by the reward's gradient, and by samples alone. Three seeds.

    python benchmarks/sample_efficiency.py                                # train what is missing, then write the table
    python benchmarks/sample_efficiency.py --arm "Flow-GRPO" --seed 1     # only these cells
    python benchmarks/sample_efficiency.py --check                        # train nothing: are the cells current?

Every arm trains from one base until `BUDGET` evaluations are spent, in the unit of `baselines.py` (a forward pass of
one picture is 1, with its backward pass 3), and is judged every `EVERY` of them on the same held-out pairs with the
same noise. What is told is where its curve first reaches `TARGET_SHARE` of the way from the base's CSD to that of the
true pictures, linear between two judgements, and how far it came in the end. Judging is not counted.

The reward's gradient (`refl`, `draft`) and best of N have the settings of `experiments/uso_srl.yaml`, samples those of
`experiments/uso_grpo.yaml`, but for the learning rate's schedule: here it warms up and stays, since a run that does not
know where it ends cannot plan for it. Best of N draws first, with half of the budget, and learns then.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
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
BUDGET, EVERY = 36_000.0, 3_000.0
TARGET_SHARE = 0.15
HELD_OUT = 64
REFL, BEST, GRPO = "refl (SRL)", f"supervised, best of {baselines.DRAWS} by CSD", "Flow-GRPO"
ARMS: Mapping[str, tuple[Path, tuple[str, ...]]] = {
    REFL: (shared.EXPERIMENT, (baselines.STYLE_ALONE,)),
    "draft, last 2 steps": (shared.EXPERIMENT, (baselines.STYLE_ALONE, "rollout.window={kind: draft, k: 2}")),
    BEST: (shared.EXPERIMENT, NO_REWARD),
    GRPO: (SAMPLES, ()),
    "DiffusionNFT": (SAMPLES, ("objective.policy_gradient={kind: nft, num_generations: 6}",)),
}


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
    def seconds(self) -> float:
        """A rough guess on two cores, with the judgements."""
        steps, judged = self.experiment.train.num_steps, self.experiment.evaluation
        judgements = 2 + steps // max(1, judged.every)
        seen = judgements * judged.num_examples * self.experiment.rollout.num_steps
        return baselines.SECONDS_PER_EVALUATION * (self.begin + steps * self.step_cost + seen)


def plan(arm: str, seed: int, overrides: Sequence[str] = (), *, budget: float = BUDGET, every: float = EVERY) -> Plan:
    """A cell's settings: as many steps as the budget pays, judged as often as whole steps allow.

    Args:
        overrides: of every arm, for tests.
    """
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
    lengths = [
        f"train.num_steps={max(1, int((budget - begin) / step_cost))}",
        f"evaluation.every={max(1, round(every / step_cost))}",
    ]
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


def reached(curve: Sequence[tuple[float, Sequence[float]]], target: float) -> float | None:
    """Evaluations at which a curve's first metric first reaches the target, linear in between; None if never."""
    if curve[0][1][0] >= target:
        return curve[0][0]
    for (before, (low, *_)), (after, (high, *_)) in pairwise(curve):
        if high >= target:
            return before + (after - before) * (target - low) / (high - low)
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
    heads = ["", *lead, *(f"{label}, at the end" for label in METRICS.values())]
    blank = [""] * len(lead)
    rows = [["truth", *blank, *(f"{value:.3f}" for value in ceiling)]]
    rows += [["base", *blank, *(f"{value:.3f}" for value in base)]]
    for arm in dict.fromkeys(cell.arm for cell in plans):
        group = [(cell, data) for cell, data in zip(plans, found, strict=True) if cell.arm == arm]
        spent = [reached(data["curve"], target) for _, data in group]
        texts = [f"{value:,.0f}" if value is not None else "not reached" for value in spent]
        whole = [value for value in spent if value is not None]
        mean = f"{sum(whole) / len(whole):,.0f}" if len(whole) == len(spent) else "-"
        ends = [[data["curve"][-1][1][index] for _, data in group] for index in range(len(METRICS))]
        rows.append(
            [f"**{arm}**", f"{group[0][0].step_cost:,.0f}", *texts, mean, *(f"{sum(v) / len(v):.3f}" for v in ends)]
        )
    note = (
        f"DiT evaluations (a forward pass of one picture is 1, with its backward pass 3) until the CSD of {HELD_OUT}"
        f" held-out pairs has come {TARGET_SHARE:.0%} of the way from the base's to that of the true pictures; judged"
        f" about every {EVERY:,.0f}, linear in between. At the end: after {BUDGET:,.0f}, mean over the seeds."
        f" {shared.WITNESSES}"
    )
    return "\n".join([shared.line(heads), "|" + "---|" * len(heads), *map(shared.line, rows), "", note]) + "\n"


def ledger(plans: Iterable[Plan], outdated: Sequence[Plan]) -> str:
    """What there is and what it would take, a line for each cell."""
    lines = [
        f"{cell.arm:30} seed {cell.seed}: {cell.experiment.train.num_steps:4} steps of {cell.step_cost:5,.0f} DiT"
        f" evaluations, {f'about {cell.seconds / 60:.0f} min' if cell in outdated else 'current'}"
        for cell in plans
    ]
    return "\n".join([*lines, f"to train: about {sum(cell.seconds for cell in outdated) / 60:.0f} min on 2 cores"])


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    shared.make_table(description, TABLE, ARMS, plan=plan, ledger=ledger, run_cell=run_cell, render=render)


if __name__ == "__main__":
    main()
