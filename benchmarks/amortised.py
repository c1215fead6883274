"""Amortised rollouts: several gradient entries from one no-gradient prefix, at equal DiT evaluations, three seeds.

    python benchmarks/amortised.py                             # train what is missing, then write the table
    python benchmarks/amortised.py --entries 2 --seed 1        # only this cell
    python benchmarks/amortised.py --check                     # train nothing: are the committed cells current?

A rollout pays for its steps without gradient to reach one entry step. With n entries the prefix goes to the latest of
n different entry steps and the window is run from each of them; a step's gradient is the mean. Its cost for each
picture, in the unit of `baselines.py` (a forward pass of the DiT on one picture is 1, its backward pass 2):

    flow matching 1 + 2,  prefix: mean of the latest of n entries,  windows n (1 + 2)

The budget is that of one entry; the other arms get the number of steps that comes nearest to it, and their schedule of
the learning rate is stretched with it. So more entries mean fewer, less noisy steps. The bundled experiment's entry
range has only 4 steps; all of them are used by 4 entries.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import baselines
import cells as shared
import srl_table
from cells import METRICS, SEEDS, key_of

from rewardgen.config import Experiment

CELLS = shared.RESULTS / "amortised"
TABLE = shared.RESULTS / "amortised.md"
ENTRIES = (1, 2, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One training run. `evaluations` is its expected cost."""

    entries: int
    seed: int
    experiment: Experiment
    evaluations: float

    @property
    def path(self) -> Path:
        """The cell's file; that of one entry is the headline table's."""
        if self.entries == 1:
            return srl_table.path_of("SRL", self.seed)
        return CELLS / f"entries_{self.entries}-{self.seed}.json"

    @property
    def key(self) -> str:
        return key_of(self.experiment)


def latest_entry(low: int, high: int, entries: int) -> float:
    """Mean of the latest of so many different entry steps, uniform in [low, high]."""
    return low - 1 + entries * (high - low + 2) / (entries + 1)


def step_evaluations(experiment: Experiment, step: int) -> float:
    """Expected DiT evaluations of one optimizer step whose window is a single step."""
    assert experiment.rollout.window.kind == "refl"
    entries = experiment.rollout.entries_per_rollout
    one = baselines.step_evaluations(experiment, step)
    if not any(term.weight > 0 and step >= term.start_step for term in experiment.objective.rewards.values()):
        return one
    low, high = experiment.rollout.window.entry_bounds(experiment.rollout.num_steps)
    train = experiment.train
    rewards = sum(term.weight > 0 and step >= term.start_step for term in experiment.objective.rewards.values())
    # With several entries each reward's gradient has a pass of its own.
    passes = rewards if train.term_grad_norms or train.accumulation > 1 or entries > 1 else 1
    window = 1 + passes * (2 + train.gradient_checkpointing)
    more = latest_entry(low, high, entries) - (low + high) / 2 + (entries - 1) * window
    if passes > 1 and not train.term_grad_norms and train.accumulation == 1:
        more += (passes - 1) * (2 + train.gradient_checkpointing)
    return one + train.batch_size * train.accumulation * more


def cell_of(entries: int, seed: int, overrides: Sequence[str] = ()) -> Cell:
    """Choose a cell's number of steps such that it costs what one entry costs, as nearly as whole steps allow."""
    one = srl_table.experiment_of("SRL", seed, overrides)
    budget = sum(step_evaluations(one, step) for step in range(one.train.num_steps))
    if entries == 1:
        return Cell(entries=1, seed=seed, experiment=one, evaluations=budget)
    changes = [*overrides, f"rollout.entries_per_rollout={entries}"]
    experiment = srl_table.experiment_of("SRL", seed, changes)
    spent, num_steps = 0.0, 0
    while spent + (cost := step_evaluations(experiment, num_steps)) / 2 <= budget or not num_steps:
        spent, num_steps = spent + cost, num_steps + 1
    lengths = [f"train.num_steps={num_steps}"]
    if one.optimizer.decay_steps is not None:
        decay_steps = math.ceil(one.optimizer.decay_steps * num_steps / one.train.num_steps)
        lengths.append(f"optimizer.decay_steps={max(decay_steps, num_steps)}")
    experiment = srl_table.experiment_of("SRL", seed, [*changes, *lengths])
    return Cell(entries=entries, seed=seed, experiment=experiment, evaluations=spent)


def run_cell(cell: Cell, runs: Path) -> None:
    """Train one cell and write its file."""
    comparison = shared.train(cell.experiment, runs / cell.path.stem)
    shared.write(cell.path, {"entries": cell.entries, "seed": cell.seed, "key": cell.key, "comparison": comparison})


def render(cells: Sequence[Cell], found: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown. `found` are the files of `cells`."""
    header = ["entries, seed", "steps", "DiT evaluations", *METRICS.values(), "CSD gained per 1000 evaluations"]
    lines = [shared.line(header), "|" + "---|" * len(header)]
    gains: dict[int, list[float]] = {}
    for cell, file in zip(cells, found, strict=True):
        rows = shared.rows_of(file)
        gain = 1000 * rows["style"]["change"]["value"] / cell.evaluations
        gains.setdefault(cell.entries, []).append(gain)
        told = [f"{cell.entries}, {cell.seed}", str(cell.experiment.train.num_steps), f"{cell.evaluations:,.0f}"]
        lines.append(shared.line([*told, *shared.changes(rows)[:-1], f"{gain:.5f}"]))
    for entries, values in gains.items():
        told = [f"**{entries}, mean**", "", "", *[""] * len(METRICS), f"**{sum(values) / len(values):.5f}**"]
        lines.append(shared.line(told))
    note = (
        f"{found[0]['comparison']['num_examples']} held-out pairs; in brackets the change from the base with its paired"
        f" 95 % interval. All arms cost the same DiT evaluations as nearly as whole steps allow. {shared.WITNESSES}"
    )
    return "\n".join([*lines, "", note]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", action="append", type=int, choices=ENTRIES, help="only this arm")
    parser.add_argument("--seed", action="append", type=int, choices=SEEDS, help="only this seed")
    parser.add_argument("--check", action="store_true", help="only say whether the committed cells are current")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "amortised", help="where training runs go")
    arguments = parser.parse_args()
    cells = [cell_of(entries, seed) for entries in arguments.entries or ENTRIES for seed in arguments.seed or SEEDS]
    outdated = [cell for cell in cells if not shared.is_current(cell.path, cell.key)]
    for cell in cells:
        state = "to train" if cell in outdated else "current"
        steps = cell.experiment.train.num_steps
        print(f"{cell.entries} entries, seed {cell.seed}: {steps} steps, {cell.evaluations:,.0f} evaluations, {state}")
    if arguments.check:
        raise SystemExit(1 if outdated else 0)
    for cell in outdated:
        run_cell(cell, arguments.runs)
    whole = [cell_of(entries, seed) for entries in ENTRIES for seed in SEEDS]
    if not all(shared.is_current(cell.path, cell.key) for cell in whole):
        print("no table yet: some cells are missing")
        return
    TABLE.write_text(render(whole, [shared.read(cell.path) for cell in whole]))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
