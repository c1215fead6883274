"""Kill a training run with SIGKILL, resume it, and compare what it leaves with the undisturbed run: exactly.

The run is the command `rewardgen train` on the toy policy of the tests, with accumulation, warm-up, an average of the
weights, evaluations and `keep_best`. It dies

* at random instants, drawn by the seed over the whole length of the command; every second run a second time, after
  it was resumed; and
* inside a checkpoint write, at each of its named points.

One process imports torch once and forks a child for each run. Equal must be all tensors and the whole state of the
last checkpoint, which checkpoints are kept, the exported weights, the comparison and every line of `metrics.jsonl`
but its times.

    python benchmarks/kill.py [--times 50] [--seed 0] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for tests.toys, from wherever this is called

import scipy.stats  # noqa: E402, F401 - what a run would import late is imported before the forks
import torch  # noqa: E402
import torch._dynamo  # noqa: E402

from rewardgen import build, checkpoint, cli  # noqa: E402, F401
from rewardgen.trainer import Trainer  # noqa: E402
from tests import toys  # noqa: E402, F401

NUM_STEPS = 24
EXPERIMENT = f"""\
name: kill
policy: {{use: "tests.toys:ToyPolicy", args: {{hidden: 64}}}}
data:
  train: {{use: "tests.toys:ToyDataset", args: {{size: 7}}}}
  held_out: {{use: "tests.toys:ToyDataset", args: {{size: 4, seed: 1}}}}
rollout: {{image_size: [8, 8], num_steps: 4, window: {{kind: refl, entry_range: [1, 3]}}}}
objective:
  rewards:
    style: {{use: "tests.toys:ToyReward", weight: 0.5, start_step: 3}}
optimizer: {{lr: 1e-2, warmup_steps: 16}}
train:
  num_steps: {NUM_STEPS}
  batch_size: 2
  accumulation: 2
  ema_decay: 0.9
  checkpoint_every: 2
  keep_last: 2
  keep_best: 1
  keep_best_metric: style
  device: cpu
evaluation: {{num_examples: 4, grid_examples: 0, every: 3}}
report: {{tensorboard: false, console: false}}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """One run that was killed: where, what it had saved, from which step it was resumed, and how the end differs."""

    where: str
    at_seconds: tuple[float, ...] = ()
    resumed_from: tuple[int, ...]
    differences: tuple[str, ...]


# --- one command, in a child -----------------------------------------------------------------------------------------


def train(folder: Path, *, doom: Callable[[], None] | None = None, kill_after: float | None = None) -> int | None:
    """Run `rewardgen train`, resuming where the folder holds a run.

    Args:
        folder: the run's.
        doom: called in the child before the command.
        kill_after: seconds from the start to SIGKILL; None lets it run.

    Returns:
        The exit code, None if it was killed.
    """
    arguments = ["train", str(folder.parent / "kill.yaml"), "--output", str(folder)]
    arguments += ["--resume"] if (folder / "config.yaml").exists() else []

    def command() -> None:
        if doom is not None:
            doom()
        cli.main(arguments)

    return run_in_child(command, Path(f"{folder}.log"), kill_after)


def run_in_child(command: Callable[[], None], log: Path, kill_after: float | None = None) -> int | None:
    """Exit code of a command in a forked child, what it says going to a file; None if it was killed."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return wait(child, kill_after)
    code = 1
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def wait(child: int, kill_after: float | None) -> int | None:
    """Wait for a child's end; None if SIGKILL was its end."""
    start = time.monotonic()
    while kill_after is not None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - start >= kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = None
        else:
            time.sleep(0.0005)
    else:
        status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def saved(folder: Path) -> list[int]:
    """Steps of the checkpoints that a run can be resumed from."""
    found = [path for form in ("step-*", ".replaced-step-*") for path in (folder / "checkpoints").glob(form)]
    return sorted({checkpoint.checkpoint_step(path) for path in found})


# --- where to die inside a write -------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nothing(*_: Any, **__: Any) -> None:
    """Die before the call."""


def half_of_the_tensors(tensors: Any, path: Path, **_: Any) -> None:
    path.write_bytes(os.urandom(10_000))


def half_of_the_state(document: Any, file: Any, **_: Any) -> None:
    text = json.dumps(document)
    file.write(text[: len(text) // 2])
    file.flush()


def half_of_the_removal(path: Path, **_: Any) -> None:
    (path / checkpoint.TENSORS).unlink()


Point = tuple[Any, str, int, Callable[..., None]]
"""Whose attribute, which, its how-manieth call since the write began, what still happens in its stead."""

POINTS: dict[str, Point] = {
    "before the new folder": (Path, "mkdir", 2, nothing),
    "before the tensors": (checkpoint, "save_file", 1, nothing),
    "amid the tensors": (checkpoint, "save_file", 1, half_of_the_tensors),
    "before the tensors' hash": (checkpoint, "file_sha256", 1, nothing),
    "before the state": (json, "dump", 1, nothing),
    "amid the state": (json, "dump", 1, half_of_the_state),
    "before the tensors' fsync": (os, "fsync", 1, nothing),
    "before the state's fsync": (os, "fsync", 2, nothing),
    "before the folder's fsync": (os, "fsync", 3, nothing),
    "before the rename": (Path, "rename", 1, nothing),
    "after the rename": (os, "fsync", 4, nothing),
    "before an old one is set aside": (Path, "rename", 2, nothing),
    "amid the removal of an old one": (shutil, "rmtree", 2, half_of_the_removal),
}
# The same step once more, as when a finished run is resumed: the old one is set aside, then the new one put in place.
REPLACING: dict[str, Point] = {
    "replacing: before the old one is set aside": (Path, "rename", 1, nothing),
    "replacing: between the two renames": (Path, "rename", 2, nothing),
    "replacing: amid the removal of the old one": (shutil, "rmtree", 1, half_of_the_removal),
}


def doom(point: Point, write: int) -> Callable[[], None]:
    """What lets a process kill itself at a point of its `write`-th checkpoint write, pruning included."""
    owner, attribute, call, instead = point
    real, save = getattr(owner, attribute), Trainer.save
    counts = {"writes": 0, "calls": 0}

    def counted_save(self: Trainer) -> Path:
        counts["writes"] += 1
        return save(self)

    def counted_call(*args: Any, **options: Any) -> Any:
        counts["calls"] += counts["writes"] == write
        if counts["writes"] == write and counts["calls"] == call:
            instead(*args, **options)
            die()
        return real(*args, **options)

    def arm() -> None:
        Trainer.save = counted_save  # type: ignore[method-assign]
        setattr(owner, attribute, counted_call)

    return arm


# --- what must be equal ----------------------------------------------------------------------------------------------


def differences(folder: Path, reference: Path) -> Iterator[str]:
    """Everything in which a finished run differs from another."""
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (folder, reference)]
    if names[0] != names[1]:
        yield f"checkpoints kept: {names[0]} instead of {names[1]}"
    for name in sorted(set(names[0]) & set(names[1])):
        (tensors, state), (wanted, wanted_state) = (
            checkpoint.load_checkpoint(run / "checkpoints" / name) for run in (folder, reference)
        )
        if state != wanted_state:
            yield f"{name}: state"
        for key in sorted(tensors.keys() | wanted.keys()):
            if key not in tensors or key not in wanted or not same_bits(tensors[key], wanted[key]):
                yield f"{name}: tensor {key}"
    for name in ("weights/toy.safetensors", "comparison.json"):
        if (folder / name).read_bytes() != (reference / name).read_bytes():
            yield name
    if timeless(folder) != timeless(reference):
        yield "metrics.jsonl"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without times and memory; evaluations are made again, so their place may differ."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("seconds_by_phase", "peak_memory_bytes")} for line in lines]
    return sorted(kept, key=lambda line: (line["kind"], line["step"]))


# --- the trials ------------------------------------------------------------------------------------------------------


def kill_at_random(folder: Path, reference: Path, seconds: float, generator: random.Random, kills: int) -> Death:
    """Kill a run, and the runs that resume it, at instants within `seconds`; then let it finish."""
    instants: list[float] = []
    resumed: list[int] = []
    where = ""
    while len(instants) < kills:
        instant = generator.uniform(0, seconds)
        code = train(folder, kill_after=instant)
        if code is None:
            instants.append(instant)
            where = where or place_of_death(folder)
            resumed.append(max(saved(folder), default=0))
        elif instants or code:  # the rest was shorter than that; a fault comes again when it is to finish
            break
        else:  # it was faster than the undisturbed run
            shutil.rmtree(folder)
    return Death(
        where=where, at_seconds=tuple(instants), resumed_from=tuple(resumed), differences=finish(folder, reference)
    )


def kill_at_point(folder: Path, reference: Path, name: str) -> Death:
    """Kill a run at a named point of its third checkpoint write, or of the write that replaces its last one."""
    if name in REPLACING:
        shutil.copytree(reference, folder)
        code = train(folder, doom=doom(REPLACING[name], 1))
    else:
        code = train(folder, doom=doom(POINTS[name], 3))
    resumed = (max(saved(folder), default=0),)
    if code is not None:
        return Death(where=name, resumed_from=resumed, differences=(f"never got there: exit code {code}",))
    return Death(where=name, resumed_from=resumed, differences=finish(folder, reference))


def finish(folder: Path, reference: Path) -> tuple[str, ...]:
    code = train(folder)
    if code != 0:
        return (f"exit code {code}: {Path(f'{folder}.log').read_text()[-2000:]}",)
    return tuple(differences(folder, reference))


def place_of_death(folder: Path) -> str:
    if any((folder / "checkpoints").glob(".*-step-*")):
        return "inside a checkpoint write"
    steps = saved(folder)
    if not steps:
        return "before the first checkpoint"
    return "after the last checkpoint" if steps[-1] == NUM_STEPS else "between checkpoints"


def run(times: int, seed: int, *, report: Callable[[str], None] = print) -> dict[str, Any]:
    """All trials; `deaths` at random instants and `points` inside the write, with the number that ended exactly."""
    torch.set_num_threads(1)
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "kill.yaml").write_text(EXPERIMENT)
        seconds = 0.0
        for name in ("first", "reference"):  # the first one warms the file system's cache
            start = time.monotonic()
            reference = Path(scratch) / name
            if train(reference) != 0:
                raise RuntimeError(Path(f"{reference}.log").read_text())
            seconds = time.monotonic() - start
        deaths = []
        for number in range(times):
            folder = Path(scratch) / f"random-{number}"
            deaths.append(kill_at_random(folder, reference, seconds, generator, kills=1 + number % 2))
            report(line(f"{number + 1}/{times}", deaths[-1]))
        points = []
        for number, name in enumerate([*POINTS, *REPLACING]):
            points.append(kill_at_point(Path(scratch) / f"point-{number}", reference, name))
            report(line("point", points[-1]))
    return {
        "times": times,
        "seed": seed,
        "num_steps": NUM_STEPS,
        "seconds_of_undisturbed_run": round(seconds, 2),
        "exact": sum(not death.differences for death in deaths),
        "exact_points": sum(not death.differences for death in points),
        "deaths": [asdict(death) for death in deaths],
        "points": [asdict(death) for death in points],
    }


def line(label: str, death: Death) -> str:
    instants = ", ".join(f"{instant:.2f} s" for instant in death.at_seconds)
    steps = ", ".join(map(str, death.resumed_from))
    end = "exact" if not death.differences else f"DIFFERS: {'; '.join(death.differences)}"
    return f"{label:>7}  {death.where}{f' ({instants})' if instants else ''}, from step {steps}: {end}"


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for death in result["deaths"]:
        groups.setdefault(death["where"], []).append(death)
    twice = sum(len(death["at_seconds"]) > 1 for death in result["deaths"])
    rows = ["| killed with SIGKILL | runs | ended bit for bit as the undisturbed run |", "|---|---|---|"]
    for where, found in sorted(groups.items()):
        rows.append(f"| at a random instant: {where} | {len(found)} | {exact(found)} |")
    rows.append(f"| **at a random instant, all** | {result['times']} | **{result['exact']}** |")
    rows += [f"| {death['where']} | 1 | {exact([death])} |" for death in result["points"]]
    rows.append(f"| **at a named point of the write, all** | {len(result['points'])} | **{result['exact_points']}** |")
    note = (
        f"`python benchmarks/kill.py --times {result['times']} --seed {result['seed']}`: toy policy, {NUM_STEPS} steps,"
        " accumulation 2, warm-up, average of the weights, `keep_best`. Each run was then resumed to its end;"
        f" {twice} of those at random instants were killed once more on the way."
    )
    return "\n".join([*rows, "", note, ""])


def exact(deaths: Sequence[dict[str, Any]]) -> int:
    return sum(not death["differences"] for death in deaths)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="runs that are killed at a random instant")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of kill.json, .md")
    options = parser.parse_args()
    os.chdir(ROOT)
    result = run(options.times, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kill.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "kill.md").write_text(render(result), encoding="utf-8")
    print("\n" + render(result))
    return 0 if (result["exact"], result["exact_points"]) == (options.times, len(result["points"])) else 1


if __name__ == "__main__":
    sys.exit(main())
