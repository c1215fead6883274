"""Runs whose disk fails, each in a forked child of one process: `python -m tests.faults.disk_trials DIR NAME`.

Prints JSON: the exit code, what was said on stderr and stdout, the checkpoints that are left, and, after the fault was
taken away and the run went on by the command that it named, how the end differs from the undisturbed run.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rewardgen import checkpoint, cli
from rewardgen.report import Reporter
from rewardgen.trainer import Trainer
from rewardgen.types import StepReport

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
NOBODY = 65534
AT = 4
"""The fault comes after so many steps; step 3 has a checkpoint."""


def at_save(fault: Callable[[], None]) -> Callable[[], None]:
    """The fault comes when the checkpoint of step AT is about to be written."""
    save = Trainer.save

    def faulty(self: Trainer) -> Path:
        if self.completed_steps == AT:
            fault()
        return save(self)

    def arm() -> None:
        Trainer.save = faulty  # type: ignore[method-assign]

    return arm


def at_report(fault: Callable[[], None]) -> Callable[[], None]:
    """The fault comes when the line of the step after AT is about to be written."""
    step = Reporter.step

    def faulty(self: Reporter, report: StepReport) -> None:
        if report.step == AT:
            fault()
        step(self, report)

    def arm() -> None:
        Reporter.step = faulty  # type: ignore[method-assign]

    return arm


def no_file_above(size: int) -> Callable[[], None]:
    """The system refuses what a full disk refuses: further bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_only(folder: Path) -> Callable[[], None]:
    def fault() -> None:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.getuid() == 0:  # who may write everywhere
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    return fault


def writable(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def trial(name: str, folder: Path, reference: Path) -> dict[str, Any]:
    """One fault, what it leaves, and the way on."""
    import kill

    faults = {
        "full at the tensors": at_save(no_file_above(20_000)),
        "full at the report": at_report(no_file_above(1000)),
        "read-only at the checkpoint": at_save(read_only(folder)),
        "read-only from the start": read_only(folder),
    }
    if name == "read-only from the start":
        shutil.copytree(reference, folder)
    code = kill.train(folder, doom=faults[name])
    said = Path(f"{folder}.log").read_text()
    left = {path.name: checkpoint.load_checkpoint(path)[1] for path in (folder / "checkpoints").iterdir()}
    writable(folder)
    _, named, command = said.strip().rpartition("with: ")
    again = kill.run_in_child(lambda: cli.main(shlex.split(command)[1:]), Path(f"{folder}.log")) if named else None
    end = list(kill.differences(folder, reference)) if again == 0 else None
    return {"code": code, "said": said, "left": sorted(left), "command": command if named else "", "end": end}


def main(scratch: Path) -> None:
    import kill

    torch.set_num_threads(1)
    os.chdir(ROOT)
    scratch.chmod(0o755)
    (scratch / "kill.yaml").write_text(kill.EXPERIMENT)
    assert kill.train(scratch / "reference") == 0, (scratch / "reference.log").read_text()
    names = ["full at the tensors", "full at the report", "read-only at the checkpoint", "read-only from the start"]
    print(json.dumps({n: trial(n, scratch / f"{i}", scratch / "reference") for i, n in enumerate(names)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
