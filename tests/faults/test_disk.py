"""A disk that is full or may not be written: one clear error, exit code 2, the last good checkpoint, and a way on."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rewardgen.checkpoint import save_checkpoint
from rewardgen.errors import CheckpointError, ConfigError, UserError
from rewardgen.interrupt import resumable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of `disk_trials.py`, in a process that may fork and give its rights away."""
    # Readable for the user that a trial becomes, which pytest's own folders are not.
    scratch = tmp_path_factory.mktemp("disk")
    for folder in (scratch, *scratch.parents[:3]):  # pytest's own, one more under xdist
        folder.chmod(folder.stat().st_mode | 0o111)
    command = [sys.executable, "-m", "tests.faults.disk_trials", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("name", "message", "left"),
    [
        ("full at the tensors", "step-000004: the checkpoint could not be written: ", [2, 3]),
        ("full at the report", "metrics.jsonl: cannot be written: File too large", [3, 4]),
        ("read-only at the checkpoint", "step-000004: the checkpoint could not be written: Permission denied", [2, 3]),
    ],
)
def test_a_failing_disk_ends_the_run_with_one_line_and_a_way_on(
    name: str, message: str, left: list[int], trials: dict[str, Any]
) -> None:
    trial = trials[name]
    assert trial["code"] == 2
    first, error = trial["said"].splitlines()
    assert "parameters trained" in first
    assert error.startswith("error: ")
    assert message in error
    assert f"; go on from step {left[-1]} with: rewardgen train " in error
    assert trial["left"] == [f"step-{step:06d}" for step in left], "all that is left is whole, nothing else is there"
    assert trial["command"].endswith(" --resume")
    assert trial["end"] == [], "that command ends as the undisturbed run"


def test_a_run_in_a_read_only_folder_is_refused_at_once(trials: dict[str, Any]) -> None:
    trial = trials["read-only from the start"]
    assert trial["code"] == 2
    assert trial["said"].count("\n") == 1
    assert "the run's folder cannot be written: permission denied" in trial["said"]
    assert trial["left"] == ["step-000022", "step-000024"]


def raising(error: BaseException, folder: Path, becomes: type[BaseException] | None = None) -> str:
    with pytest.raises(becomes or type(error)) as caught, resumable(folder, "COMMAND"):
        raise error
    return str(caught.value)


def test_what_ends_a_run_says_how_to_go_on_only_where_that_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(CheckpointError("full"), tmp_path) == "full", "there is nothing to go on from"
    save_checkpoint(tmp_path, step=7, tensors={}, state={})
    assert raising(CheckpointError("full"), tmp_path) == "full; go on from step 7 with: COMMAND"
    assert raising(ConfigError("wrong"), tmp_path) == "wrong"
    assert raising(OSError(errno.ECONNREFUSED, "no judge"), tmp_path) == "[Errno 111] no judge", "that is no disk"
    full = OSError(errno.ENOSPC, "No space left", "/x/y")
    assert raising(full, tmp_path, UserError) == "/x/y: No space left; go on from step 7 with: COMMAND"
    full.__context__ = OSError(errno.ENOSPC, "No space left", "/x/z")
    full.__context__.__context__ = UserError("first")
    assert raising(full, tmp_path, UserError) == "first; go on from step 7 with: COMMAND", "what came first is told"
    raising(KeyboardInterrupt(), tmp_path)
    assert capsys.readouterr().err == "go on from step 7 with: COMMAND\n"
