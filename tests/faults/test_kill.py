"""A run that is killed and resumed ends as the run that was not: the benchmark in small, and one real command."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rewardgen.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "kill.json"


@pytest.fixture(scope="module")
def kill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill", ROOT / "benchmarks" / "kill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_two_random_kills_and_one_at_every_point_of_the_write_are_exact(kill: ModuleType, tmp_path: Path) -> None:
    """In a process of its own: it forks, and this one may have threads."""
    command = [sys.executable, "benchmarks/kill.py", "--times", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "kill.json").read_text())
    assert [death["differences"] for death in result["deaths"] + result["points"]] == [[]] * (2 + 16)
    assert {death["where"] for death in result["points"]} == {*kill.POINTS, *kill.REPLACING}
    assert all(death["at_seconds"] for death in result["deaths"])
    resumed_from = {death["where"]: death["resumed_from"] for death in result["points"]}
    assert resumed_from["before the rename"] == [3], "what was being written does not count"
    assert resumed_from["after the rename"] == [4]
    assert "**2** |" in (tmp_path / "kill.md").read_text()


def test_the_committed_result_is_of_fifty_and_all_are_exact() -> None:
    result = json.loads(RESULT.read_text())
    assert result["times"] == result["exact"] == len(result["deaths"]) == 50
    assert result["exact_points"] == len(result["points"]) == 16
    assert not [death for death in result["deaths"] + result["points"] if death["differences"]]
    assert len({death["where"] for death in result["deaths"]}) >= 3, "the instants lie in different parts of the run"


def finished_run(folder: Path, *, weight: torch.Tensor, moment: float = 1.0, loss: float = 0.5, kept: int = 2) -> Path:
    for step in range(4 - kept, 4):
        tensors = {"trainable/w": weight, "adamw/exp_avg/w": torch.tensor([moment])}
        save_checkpoint(folder / "checkpoints", step=step, tensors=tensors, state={"version": step})
    (folder / "weights").mkdir()
    (folder / "weights" / "toy.safetensors").write_bytes(b"")
    (folder / "comparison.json").write_text("{}")
    line = {"kind": "step", "step": 0, "loss": loss, "seconds_by_phase": {"data": time.monotonic()}}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_the_comparison_misses_nothing(kill: ModuleType, tmp_path: Path) -> None:
    zero = torch.zeros(2)
    reference = finished_run(tmp_path / "reference", weight=zero)
    assert list(kill.differences(finished_run(tmp_path / "same", weight=zero), reference)) == []
    others = {
        "trainable/w": finished_run(tmp_path / "sign", weight=-zero),  # equal as numbers, not as bits
        "adamw/exp_avg/w": finished_run(tmp_path / "moment", weight=zero, moment=1 + 2e-7),
        "metrics.jsonl": finished_run(tmp_path / "loss", weight=zero, loss=0.5000001),
        "checkpoints kept": finished_run(tmp_path / "kept", weight=zero, kept=1),
    }
    for what, folder in others.items():
        assert what in " ".join(kill.differences(folder, reference))


def test_the_command_itself_killed_and_resumed(kill: ModuleType, tmp_path: Path) -> None:
    experiment, killed, whole = tmp_path / "kill.yaml", tmp_path / "killed", tmp_path / "whole"
    experiment.write_text(kill.EXPERIMENT.replace("num_steps: 24", "num_steps: 100"))
    command = [sys.executable, "-m", "rewardgen", "train", str(experiment), "-o", str(killed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not kill.saved(killed):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 0 < kill.saved(killed)[-1] < 100
    assert not (killed / "comparison.json").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    # A process of its own as well: the tests before this one may have left another number of threads here.
    undisturbed = [*command[:-1], str(whole)]
    done = subprocess.run(undisturbed, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(killed / "checkpoints" / "step-000100")[1]["learner"]["version"] == 100
    assert list(kill.differences(killed, whole)) == []
