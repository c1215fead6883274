"""What the experiments with a judge and without a reward's gradient do, as they are bundled: three seeds, 200 pairs.

    python benchmarks/judged_table.py                                  # train what is missing, then write the table
    python benchmarks/judged_table.py --arm uso_vlm_judge --seed 1     # only this cell
    python benchmarks/judged_table.py --check                          # train nothing: are the cells current?

`uso_vlm_judge.yaml` trains on a fitted judge's P(yes) and CSD under a floor for the content; `uso_grpo.yaml` on CSD's
values without their gradient. The ledger: 2 arms x 3 seeds x about 9 CPU minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import cells as shared

from rewardgen.adaptive import OfBase
from rewardgen.config import Experiment

CELLS = shared.RESULTS / "judged"
TABLE = shared.RESULTS / "judged.md"
PIECES = (*shared.PIECES, "judge")
ARMS = ("uso_vlm_judge", "uso_grpo")
COLUMNS: Mapping[str, str] = {"judge": "judge, P(yes)", "content": "structure (has the floor)"} | shared.METRICS


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a cell trains: a bundled experiment."""

    arm: str
    seed: int
    experiment: Experiment

    @property
    def path(self) -> Path:
        return CELLS / f"{self.arm}-{self.seed}.json"

    @property
    def key(self) -> str:
        return shared.key_of(self.experiment, of_the_world=PIECES)

    @property
    def seconds(self) -> float:
        """A rough guess on two cores."""
        return 400.0


def plan(arm: str, seed: int, overrides: Sequence[str] = ()) -> Plan:
    """A cell's settings. `overrides` are for tests."""
    path = shared.EXPERIMENT.with_name(f"{arm}.yaml")
    return Plan(arm=arm, seed=seed, experiment=shared.load(seed, overrides, path=path))


def run_cell(cell: Plan, runs: Path) -> None:
    """Train one cell and write its file."""
    comparison = shared.train(cell.experiment, runs / cell.path.stem)
    shared.write(cell.path, {"arm": cell.arm, "seed": cell.seed, "key": cell.key, "comparison": comparison})


def render(plans: Sequence[Plan], found: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown. `found` are the cells of `plans`."""
    heads = ["", *COLUMNS.values(), "structure, trained / base"]
    lines = [shared.line(heads), "|" + "---|" * len(heads)]
    for cell in found:
        rows = shared.rows_of(cell)
        values = [
            f"{rows[name]['base']:.3f} -> {rows[name]['trained']:.3f} ({shared.interval(rows[name]['change'])})"
            if name in rows
            else ""
            for name in COLUMNS
        ]
        floor = f"{rows['content']['trained'] / rows['content']['base']:.3f}" if "content" in rows else ""
        lines.append(shared.line([f"{cell['arm']}, seed {cell['seed']}", *values, floor]))
    floor_percent = 100.0 + floor_of(plans)
    note = (
        f"{found[0]['comparison']['num_examples']} held-out pairs; in brackets the change with its paired 95 %"
        f" interval. The floor is {floor_percent:g} % of the base's own value of `structure`: held within 2 %, the last"
        f" column is {0.98 * floor_percent / 100:.3f} or more. {shared.WITNESSES}"
    )
    return "\n".join([*lines, "", note]) + "\n"


def floor_of(plans: Sequence[Plan]) -> float:
    """Of the experiment with a judge, in per cent above the base's value."""
    (floor,) = {plan.experiment.objective.rewards["content"].floor for plan in plans if plan.arm == "uso_vlm_judge"}
    assert isinstance(floor, OfBase)
    assert floor.base_percent is not None
    return floor.base_percent


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    shared.make_table(description, TABLE, ARMS, plan=plan, run_cell=run_cell, render=render)


if __name__ == "__main__":
    main()
