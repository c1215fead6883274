"""`rewardgen encode`: afterwards a step needs no encoder, and computes what it computes without the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel

from rewardgen import build
from rewardgen.cli import main
from rewardgen.config import load_experiment
from rewardgen.fleet.inline import InlinePool
from rewardgen.rollout import RolloutWorker
from rewardgen.trainer import Trainer
from rewardgen.types import StepReport

EXPERIMENT = Path(__file__).resolve().parent.parent / "experiments" / "uso_srl.yaml"
SMALL = [
    "data.train.args.size=3",
    "data.held_out.args.size=2",
    "evaluation.num_examples=2",
    "evaluation.grid_examples=0",
    "train.batch_size=1",
    "train.prompt_dropout=0.5",
    "rollout.num_steps=2",
    "rollout.window.entry_range=[1, 1]",
]


class Silent:
    def step(self, report: StepReport) -> None:
        pass


def steps(folder: Path, *overrides: str) -> list[StepReport]:
    experiment = load_experiment(EXPERIMENT, "tiny", [*SMALL, *overrides])
    parts = build.assemble(experiment)
    parts.policy.encode(parts.held_out)
    trainer = Trainer(
        parts.learner,
        InlinePool(RolloutWorker(parts.policy)),
        parts.train_data,
        rollout=experiment.rollout,
        config=experiment.train,
        seed=0,
        folder=folder,
        reporter=Silent(),
    )
    return [trainer.step(step) for step in range(3)]


def test_training_after_encoding_is_training_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = steps(tmp_path / "plain")
    encodings = f"policy.args.encodings={tmp_path / 'encodings'}"
    read = FluxTransformer2DModel.from_pretrained
    # A card that has room for the encoders may have none for the DiT.
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", lambda *_, **__: pytest.fail("the DiT was loaded"))
    with pytest.raises(SystemExit) as ended:
        main(["encode", str(EXPERIMENT), *SMALL, encodings])
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", read)
    assert ended.value.code == 0
    assert "5 examples are encoded" in capsys.readouterr().out
    kinds = {path.name: len(list(path.rglob("*.safetensors"))) for path in (tmp_path / "encodings").iterdir()}
    assert kinds["target"] == 3
    assert kinds["style"] == kinds["content"] == 5
    for loader in ("load_text", "load_siglip"):
        monkeypatch.setattr(f"rewardgen.policies.encoders.{loader}", lambda *_: pytest.fail("an encoder was loaded"))
    found = steps(tmp_path / "kept", encodings)
    for one, other in zip(expected, found, strict=True):
        assert (one.loss, one.grad_norm, one.reward_means) == (other.loss, other.grad_norm, other.reward_means)


def test_without_a_folder_it_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["encode", str(EXPERIMENT), *SMALL])
    assert ended.value.code == 2
    assert "give policy.args.encodings=DIR" in capsys.readouterr().err
