"""Ctrl-C during a run on the fleet: the step is finished, a checkpoint is there, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rewardgen import cli
from rewardgen.checkpoint import latest_checkpoint, load_checkpoint
from tests.faults.test_fleet_ray import is_gone, wait_for
from tests.fleet_workers import PATIENCE, processes_below

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = """\
name: interrupted
policy: {use: "tests.toys:ToyPolicy"}
data:
  train: {use: "tests.toys:ToyDataset"}
  held_out: {use: "tests.toys:ToyDataset", args: {size: 2, seed: 1}}
rollout: {image_size: [8, 8], num_steps: 4, window: {kind: refl, entry_range: [1, 3]}}
objective:
  rewards:
    style: {use: "tests.toys:ToyReward", weight: 0.5}
optimizer: {lr: 1e-3}
train: {num_steps: 1000000, batch_size: 2, checkpoint_every: 3, device: cpu}
evaluation: {num_examples: 2, grid_examples: 0}
fleet: {staleness: 1}
report: {tensorboard: false, console: false}
"""


def test_ctrl_c_saves_a_checkpoint_and_leaves_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the whole group, as a terminal sends it: the workers and Ray itself get it too."""
    monkeypatch.chdir(ROOT)
    experiment, killed, whole = tmp_path / "toy.yaml", tmp_path / "killed", tmp_path / "whole"
    experiment.write_text(EXPERIMENT)
    command = [sys.executable, "-m", "rewardgen", "train", str(experiment), "-o", str(killed), "fleet=ray"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment) as process,
    ):
        checkpoints = killed / "checkpoints"
        wait_for(lambda: process.poll() is not None or any(checkpoints.glob("step-*")), "no checkpoint came")
        started = processes_below(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(PATIENCE) == 130, log.read_text()
    assert len(started) > 3, "Ray's processes and a worker"
    wait_for(lambda: all(map(is_gone, started)), "something is left running")
    saved = latest_checkpoint(checkpoints)
    assert saved is not None
    completed = int(load_checkpoint(saved)[1]["completed_steps"])
    assert f"stopped after step {completed};" in log.read_text()

    length = f"train.num_steps={completed + 2}"
    for folder, more in ((killed, ["--resume"]), (whole, [])):  # what the fleet began goes on without it
        with pytest.raises(SystemExit) as end:
            cli.main(["train", str(experiment), "-o", str(folder), length, *more])
        assert not end.value.code
    assert (killed / "comparison.json").read_text() == (whole / "comparison.json").read_text()
