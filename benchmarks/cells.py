"""What the tables of training runs share: keys of cells, training a cell, and the form of a row.

A cell is one training run. Its file holds the comparison of the trained policy with the common base on the same
examples and noise, and a key over everything the numbers depend on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rewardgen.config import Experiment, load_experiment
from rewardgen.sources import ASSETS

RESULTS = Path(__file__).resolve().parent / "results"
EXPERIMENT = Path(__file__).resolve().parent.parent / "experiments" / "uso_srl.yaml"
SEEDS = (0, 1, 2)
METRICS = {"style": "CSD (the reward)", "palette_texture": "style witness", "layout": "content witness"}
GAP = "CSD gap closed"
SAVING = ("checkpoint_every", "keep_last", "keep_best", "keep_best_metric", "device")
"""Settings of a training that change none of its numbers."""
WARNING = ("drift", "witness_drop", "confidence")
"""Settings of the monitor that say only when it warns."""
PIECES = ("base", "csd", "encoders", "reader", "vae")
"""What of the bundled world these experiments read; the others may change without making a cell outdated."""


def load(seed: int, overrides: Sequence[str] = (), examples: int = 200, path: Path = EXPERIMENT) -> Experiment:
    """A bundled experiment on more held-out pairs, with what a cell changes."""
    common = [f"seed={seed}", f"evaluation.num_examples={examples}", "report.tensorboard=false"]
    return load_experiment(path, "tiny", [*common, *overrides])


def key_of(experiment: Experiment, *, of_the_world: Sequence[str] = PIECES, **more: Any) -> str:
    """What a cell's numbers depend on: the experiment (not how it reports, saves and warns), the files of the world's
    pieces that it reads (none yet of one that is not bundled), and `more`."""
    settings = {k: v for k, v in experiment.model_dump(mode="json").items() if k not in ("name", "report", "flavors")}
    settings["train"] = {k: v for k, v in settings["train"].items() if k not in SAVING}
    if "monitor" in settings and not experiment.monitor.stop_on_drift:  # then a warning changes nothing
        settings["monitor"] = {k: v for k, v in settings["monitor"].items() if k not in WARNING}
    world = files_of(of_the_world)
    everything = [settings, world, more] if more else [settings, world]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def files_of(pieces: Sequence[str]) -> dict[str, Any]:
    """The hashes of the files of the world's pieces, None of one that is not bundled."""
    bundled = json.loads((ASSETS / "world.json").read_text())
    return {name: bundled[name]["files"] if name in bundled else None for name in pieces}


def is_current(path: Path, key: str) -> bool:
    """Whether a cell's file is there and belongs to the key."""
    return path.is_file() and json.loads(path.read_text())["key"] == key


def train(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Train from the start in `folder`, whatever it holds, and return the comparison with the base."""
    from rewardgen import build

    shutil.rmtree(folder, ignore_errors=True)
    if not build.train(experiment, folder=folder):
        raise SystemExit("stopped; the finished cells are kept, start again to go on with the others")
    comparison: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    return comparison


def write(path: Path, cell: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cell, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    cell: dict[str, Any] = json.loads(path.read_text())
    return cell


def rows_of(cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a cell's comparison by metric."""
    return {row["name"]: row for row in cell["comparison"]["rows"]}


class Cell(Protocol):
    """What `make_table` has to know of a cell."""

    @property
    def arm(self) -> str:
        """What it does differently."""

    @property
    def seed(self) -> int:
        """The run's seed."""

    @property
    def path(self) -> Path:
        """Its file."""

    @property
    def key(self) -> str:
        """See `key_of`."""

    @property
    def experiment(self) -> Experiment:
        """What is trained."""

    @property
    def seconds(self) -> float:
        """A rough guess of what it takes on two cores."""


CellT = TypeVar("CellT", bound=Cell)


def ledger(plans: Sequence[Cell], outdated: Sequence[Cell]) -> str:
    """What there is and what it would take, a line for each cell."""
    width = max(len(cell.arm) for cell in plans)
    lines = [
        f"{cell.arm:{width}} seed {cell.seed}: {cell.experiment.train.num_steps:4} steps,"
        f" {f'about {cell.seconds / 60:.0f} min' if cell in outdated else 'current'}"
        for cell in plans
    ]
    return "\n".join([*lines, f"to train: about {sum(cell.seconds for cell in outdated) / 60:.0f} min on 2 cores"])


def make_table(
    description: str,
    table: Path,
    arms: Iterable[str],
    *,
    plan: Callable[[str, int], CellT],
    run_cell: Callable[[CellT, Path], None],
    render: Callable[[Sequence[CellT], Sequence[Mapping[str, Any]]], str],
    seeds: Sequence[int] = SEEDS,
) -> None:
    """The command of a table of arms and seeds: say what is missing, train it cell by cell, write the table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--arm", action="append", choices=list(arms), help="only this arm (may be repeated)")
    parser.add_argument("--seed", action="append", type=int, choices=seeds, help="only this seed (may be repeated)")
    parser.add_argument("--check", action="store_true", help="only say whether the committed cells are current")
    parser.add_argument("--runs", type=Path, default=Path("runs") / table.stem, help="where training runs go")
    arguments = parser.parse_args()
    plans = [plan(arm, seed) for seed in arguments.seed or seeds for arm in arguments.arm or arms]
    outdated = [cell for cell in plans if not is_current(cell.path, cell.key)]
    print(ledger(plans, outdated), flush=True)
    if arguments.check:
        raise SystemExit(1 if outdated else 0)
    for cell in outdated:
        run_cell(cell, arguments.runs)
    whole = [plan(arm, seed) for arm in arms for seed in seeds]
    missing = [cell for cell in whole if not is_current(cell.path, cell.key)]
    if missing:
        print("no table yet, missing: " + "; ".join(f"{cell.arm}, seed {cell.seed}" for cell in missing))
        return
    table.write_text(render(whole, [read(cell.path) for cell in whole]))
    print(table.read_text())


def line(texts: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return "|" + "|".join(f" {text} " if text else " " for text in texts) + "|"


def header(*lead: str) -> list[str]:
    """The first two lines of a table whose rows are named, with columns `lead` between the name and the metrics."""
    texts = ["", *lead, *METRICS.values(), GAP]
    return [line(texts), "|" + "---|" * len(texts)]


def changes(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The metrics' columns of a trained policy: its mean, the change from the base, and the gap closed."""
    means = [f"{rows[metric]['trained']:.3f} ({interval(rows[metric]['change'])})" for metric in METRICS]
    return [*means, interval(rows["style"]["gap_closed"], percent=True)]


def interval(limits: Mapping[str, float], *, percent: bool = False) -> str:
    value, low, high = (limits[name] for name in ("value", "low", "high"))
    if percent:
        return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


WITNESSES = (
    "The witnesses take part in no objective: style is palette and texture against the true picture (1 = the same,"
    " 0 = an unrelated style), content is the share of shapes read at their place."
)
