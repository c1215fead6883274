"""The headline table: SRL beside as many supervised steps, three seeds, 200 held-out pairs.

    python benchmarks/srl_table.py             # train what is missing, cell by cell, then write the table
    python benchmarks/srl_table.py --check     # train nothing: do the committed cells belong to the current recipe?

A cell whose key still fits is not run again. The ledger: 2 arms x 3 seeds x about 6 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import cells as shared
from cells import METRICS, SEEDS, key_of

from rewardgen.config import Experiment

__all__ = ["ARMS", "SEEDS", "TABLE", "cells", "experiment_of", "is_current", "key_of", "path_of", "render", "run_cell"]

CELLS = shared.RESULTS / "srl_tiny"
TABLE = shared.RESULTS / "srl_tiny.md"
NO_REWARD = ("objective.rewards.style.weight=0", "objective.rewards.content.weight=0")
ARMS = {"SRL": (), "supervised only": NO_REWARD}


def experiment_of(arm: str, seed: int, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a cell: the bundled one, on more held-out pairs."""
    return shared.load(seed, [*ARMS[arm], *overrides])


def path_of(arm: str, seed: int) -> Path:
    return CELLS / f"{arm.replace(' ', '_').lower()}-{seed}.json"


def is_current(arm: str, seed: int) -> bool:
    return shared.is_current(path_of(arm, seed), key_of(experiment_of(arm, seed)))


def run_cell(arm: str, seed: int, runs: Path) -> None:
    """Train one cell and write its file."""
    experiment, path = experiment_of(arm, seed), path_of(arm, seed)
    comparison = shared.train(experiment, runs / path.stem)
    shared.write(path, {"arm": arm, "seed": seed, "key": key_of(experiment), "comparison": comparison})


def reference_rows() -> dict[str, dict[str, float]]:
    """Means of pictures that no model drew: the truth, the content copied, the content in another's style."""
    import torch

    from rewardgen import build
    from rewardgen.evaluation.score import reference_scores, score_pictures, target_scores

    experiment = experiment_of("SRL", 0)
    parts = build.assemble(experiment)
    others = [example.extras["another_style"] for example in parts.held_out]
    with torch.no_grad():
        rows = {
            "truth": target_scores(parts.held_out, parts.metrics),
            "content copied": reference_scores(parts.held_out, parts.metrics, image_size=(64, 64))["content copied"],
            "right content, random style": score_pictures(parts.held_out, others, parts.metrics),
        }
    return {name: evaluation.means() for name, evaluation in rows.items()}


def cells() -> list[dict[str, Any]]:
    return [shared.read(path_of(arm, seed)) for arm in ARMS for seed in SEEDS]


def render(found: list[dict[str, Any]], references: dict[str, dict[str, float]]) -> str:
    """The table in Markdown."""
    base = shared.rows_of(found[0])
    rows = [[name, *(f"{means[metric]:.3f}" for metric in METRICS), ""] for name, means in references.items()]
    rows += [["base", *(f"{base[metric]['base']:.3f}" for metric in METRICS), ""]]
    rows += [[f"{cell['arm']}, seed {cell['seed']}", *shared.changes(shared.rows_of(cell))] for cell in found]
    note = (
        f"{found[0]['comparison']['num_examples']} held-out pairs; in brackets the change from the base with its"
        f" paired 95 % interval. {shared.WITNESSES}"
    )
    return "\n".join([*shared.header(), *map(shared.line, rows), "", note]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the committed cells are current")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "srl_table", help="where training runs go")
    arguments = parser.parse_args()
    outdated = [(arm, seed) for seed in SEEDS for arm in ARMS if not is_current(arm, seed)]
    if arguments.check:
        print("\n".join(f"outdated: {arm}, seed {seed}" for arm, seed in outdated) or "all cells are current")
        raise SystemExit(1 if outdated else 0)
    for arm, seed in outdated:
        run_cell(arm, seed, arguments.runs)
    references = reference_rows()
    (CELLS / "references.json").write_text(json.dumps(references, indent=1) + "\n")
    TABLE.write_text(render(cells(), references))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
