"""The headline table: SRL beside as many supervised steps, three seeds, 200 held-out pairs.

    python benchmarks/srl_table.py             # train what is missing, cell by cell, then write the table
    python benchmarks/srl_table.py --check     # train nothing: do the committed cells belong to the current recipe?

A cell is one training run. Its file holds the comparison of the trained policy with the common base on the same
examples and noise, and a key over the resolved experiment and the bundled world; a cell whose key still fits is not
run again. The ledger: 2 arms x 3 seeds x about 6 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from rewardgen.config import Experiment, load_experiment
from rewardgen.sources import ASSETS

ROOT = Path(__file__).resolve().parent
EXPERIMENT = ROOT.parent / "experiments" / "uso_srl.yaml"
CELLS = ROOT / "results" / "srl_tiny"
TABLE = ROOT / "results" / "srl_tiny.md"
ARMS = {"SRL": (), "supervised only": ("objective.rewards.style.weight=0",)}
SEEDS = (0, 1, 2)
METRICS = {"style": "CSD (the reward)", "palette_texture": "style witness", "layout": "content witness"}


def experiment_of(arm: str, seed: int, examples: int = 200) -> Experiment:
    """The experiment of a cell: the bundled one, on more held-out pairs."""
    overrides = [f"seed={seed}", f"evaluation.num_examples={examples}", "report.tensorboard=false", *ARMS[arm]]
    return load_experiment(EXPERIMENT, "tiny", overrides)


def key_of(experiment: Experiment) -> str:
    """What the cell's numbers depend on: the experiment (not its reporting) and every file of the world."""
    settings = {k: v for k, v in experiment.model_dump(mode="json").items() if k not in ("name", "report", "flavors")}
    world = {name: entry["files"] for name, entry in json.loads((ASSETS / "world.json").read_text()).items()}
    return hashlib.sha256(json.dumps([settings, world], sort_keys=True).encode()).hexdigest()


def path_of(arm: str, seed: int) -> Path:
    return CELLS / f"{arm.replace(' ', '_').lower()}-{seed}.json"


def is_current(arm: str, seed: int) -> bool:
    path = path_of(arm, seed)
    return path.is_file() and json.loads(path.read_text())["key"] == key_of(experiment_of(arm, seed))


def run_cell(arm: str, seed: int, runs: Path) -> None:
    """Train one cell and write its file."""
    from rewardgen import build

    experiment, folder = experiment_of(arm, seed), runs / path_of(arm, seed).stem
    shutil.rmtree(folder, ignore_errors=True)
    build.train(experiment, folder=folder)
    comparison = json.loads((folder / "comparison.json").read_text())
    cell = {"arm": arm, "seed": seed, "key": key_of(experiment), "comparison": comparison}
    CELLS.mkdir(parents=True, exist_ok=True)
    path_of(arm, seed).write_text(json.dumps(cell, indent=1) + "\n")


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
    return [json.loads(path_of(arm, seed).read_text()) for arm in ARMS for seed in SEEDS]


def render(found: list[dict[str, Any]], references: dict[str, dict[str, float]]) -> str:
    """The table in Markdown."""
    by_metric = [{row["name"]: row for row in cell["comparison"]["rows"]} for cell in found]
    lines = ["| | " + " | ".join(METRICS.values()) + " | CSD gap closed |", "|---|" + "---|" * (len(METRICS) + 1)]
    for name, means in references.items():
        lines.append(f"| {name} | " + " | ".join(f"{means[metric]:.3f}" for metric in METRICS) + " | |")
    lines.append("| base | " + " | ".join(f"{by_metric[0][metric]['base']:.3f}" for metric in METRICS) + " | |")
    for cell, rows in zip(found, by_metric, strict=True):
        gap = rows["style"]["gap_closed"]
        row = " | ".join(f"{rows[m]['trained']:.3f} ({_interval(rows[m]['change'])})" for m in METRICS)
        lines.append(f"| {cell['arm']}, seed {cell['seed']} | {row} | {_interval(gap, percent=True)} |")
    number = found[0]["comparison"]["num_examples"]
    lines.append("")
    lines.append(
        f"{number} held-out pairs; in brackets the change from the base with its paired 95 % interval. The witnesses"
        " take part in no objective: style is palette and texture against the true picture (1 = the same, 0 = an"
        " unrelated style), content is the share of shapes read at their place."
    )
    return "\n".join(lines) + "\n"


def _interval(interval: dict[str, float], *, percent: bool = False) -> str:
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    if percent:
        return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


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
