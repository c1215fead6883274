"""The bundled experiment itself, shortened: two runs agree bit for bit, and so does one that was cut and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewardgen import build
from rewardgen.checkpoint import latest_checkpoint, load_checkpoint
from rewardgen.config import load_experiment

EXPERIMENT = Path(__file__).resolve().parent.parent / "experiments" / "uso_srl.yaml"
SHORT = (
    "data.train.args.size=10",
    "data.held_out.args.size=4",
    "evaluation.num_examples=4",
    "evaluation.grid_examples=2",
    "train.batch_size=2",
    "train.accumulation=2",
    "optimizer.decay_steps=null",
    "report.tensorboard=false",
)


def final(folder: Path, num_steps: int, *, resume: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Train to `num_steps` and return everything the last checkpoint holds."""
    experiment = load_experiment(EXPERIMENT, "tiny", [*SHORT, f"train.num_steps={num_steps}", f"seed={seed}"])
    assert build.train(experiment, folder=folder, resume=resume)
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    assert path.name == f"step-{num_steps:06d}"
    return load_checkpoint(path)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return final(tmp_path_factory.mktemp("runs") / "whole", 3)


def test_two_runs_of_one_seed_are_identical(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    again, other = final(tmp_path / "again", 3), final(tmp_path / "other", 3, seed=1)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_a_resumed_run_equals_the_uninterrupted_one(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    final(tmp_path / "cut", 1)
    resumed = final(tmp_path / "cut", 3, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
