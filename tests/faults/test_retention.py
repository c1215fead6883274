"""Which checkpoints are kept: the newest, and those of the best evaluations, across resumed runs."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rewardgen import cli
from rewardgen.checkpoint import load_checkpoint
from rewardgen.trainer import Trainer
from tests.test_cli import ROOT, TOY
from tests.test_trainer import make, same_state

Scores = Mapping[int, float]


def trainer_with(
    folder: Path, scores: Mapping[int, float | Mapping[str, float]], *, every: int = 1, **train: Any
) -> Trainer:
    """A run whose evaluations say what is given; a step without is one at which no example had a valid score."""

    def evaluate(step: int) -> Mapping[str, float]:
        found = scores.get(step, {})
        return found if isinstance(found, Mapping) else {"style": found, "other": -found}

    settings = {"num_steps": max(scores, default=6), "keep_best_metric": "style", "checkpoint_every": 0} | train
    return make(folder, train=settings, evaluate=evaluate, evaluate_every=every)[0]


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (folder / "checkpoints").iterdir())


def expected(scores: Scores, steps: int, *, checkpoint_every: int, keep_last: int, keep_best: int) -> list[int]:
    """Brute force: the best of what was ever evaluated, and the newest of what was ever saved."""
    best: list[int] = []
    saved: list[int] = []
    for step in range(1, steps + 1):
        if step in scores:
            best = sorted([*best, step], key=lambda s: (-scores[s], s))[:keep_best]
        if step in best or step == steps or (checkpoint_every and step % checkpoint_every == 0):
            saved.append(step)
    return sorted({*best, *saved[-keep_last:]})


@pytest.mark.parametrize("seed", range(6))
def test_the_best_and_the_newest_are_kept_wherever_the_run_is_cut(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    scores = {step: draw.choice([-1.0, 0.0, 0.5, 0.5, 2.0]) for step in range(1, 11) if draw.random() < 0.7}
    rule = {
        "checkpoint_every": draw.choice([0, 2, 3]),
        "keep_last": draw.choice([1, 2]),
        "keep_best": draw.choice([1, 2, 3]),
    }
    whole = trainer_with(tmp_path / "whole", scores, num_steps=10, **rule)
    whole.run()
    assert kept(tmp_path / "whole") == expected(scores, 10, **rule)
    cut = draw.randint(1, 9)
    trainer_with(tmp_path / "part", scores, num_steps=cut, **rule).run()
    resumed = trainer_with(tmp_path / "part", scores, num_steps=10, **rule)
    assert resumed.resume() == cut
    resumed.run()
    assert same_state(whole, resumed)
    best = set(sorted(scores, key=lambda s: (-scores[s], s))[: rule["keep_best"]])
    assert best <= set(kept(tmp_path / "part")), "those from before the cut count too"
    assert set(kept(tmp_path / "part")) == set(kept(tmp_path / "whole")), "and nothing else is kept"


def test_without_keep_best_no_evaluation_saves_anything(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, {1: 1.0, 2: 5.0, 3: 0.0}, keep_last=1)
    trainer.run()
    assert kept(tmp_path) == [3]
    assert load_checkpoint(tmp_path / "checkpoints" / "step-000003")[1]["best"] == {}


def test_what_was_not_measured_is_never_best(tmp_path: Path) -> None:
    scores: dict[int, float | Mapping[str, float]] = {1: -3.0, 2: math.nan, 3: {"other": 9.0}, 4: math.inf, 5: {}}
    trainer_with(tmp_path, scores, keep_best=2, keep_last=1).run()
    assert kept(tmp_path) == [1, 5]


def test_of_equals_the_older_is_kept(tmp_path: Path) -> None:
    trainer_with(tmp_path, {1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 0.0}, keep_best=1, keep_last=1).run()
    assert kept(tmp_path) == [2, 5]


def test_a_resumed_run_may_go_by_another_metric_or_keep_fewer(tmp_path: Path) -> None:
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.0, 5: 2.5}
    first = tmp_path / "first"
    trainer_with(first, scores, num_steps=3, keep_best=3, keep_last=1).run()
    assert kept(first) == [1, 2, 3]
    for settings, left in (
        ({"keep_best": 2, "keep_best_metric": "other"}, [2, 4, 5]),  # other = -style
        ({"keep_best": 1}, [1, 5]),
        ({"keep_best": 0}, [5]),
    ):
        folder = tmp_path / f"{settings}"
        shutil.copytree(first, folder)
        trainer = trainer_with(folder, scores, keep_last=1, **settings)
        trainer.resume()
        trainer.run()
        assert kept(folder) == left


def test_a_best_one_that_is_gone_gives_its_place_up(tmp_path: Path) -> None:
    scores = {1: 9.0, 2: 0.0, 3: 1.0, 4: 0.5}
    trainer_with(tmp_path, scores, num_steps=2, keep_best=1, keep_last=1).run()
    shutil.rmtree(tmp_path / "checkpoints" / "step-000001")
    trainer = trainer_with(tmp_path, scores, keep_best=1, keep_last=1)
    trainer.resume()
    trainer.run()
    assert kept(tmp_path) == [3, 4]


def test_the_new_checkpoint_survives_damaged_later_ones(tmp_path: Path) -> None:
    """Damage that a file's size does not show is found by hashing alone, which removing old ones does not do."""
    trainer_with(tmp_path, {}, num_steps=4, checkpoint_every=1, keep_last=3).run()
    file = tmp_path / "checkpoints" / "step-000004" / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    trainer = trainer_with(tmp_path, {}, num_steps=3, keep_last=1)
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
        assert trainer.resume() == 3
    trainer.save()
    assert kept(tmp_path) == [3, 4]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.keep_best=1"], "train (override): keep_best is 1, but keep_best_metric does not say by which metric"),
        (
            ["train.keep_best=1", "train.keep_best_metric=stile", "evaluation.every=2"],
            "train.keep_best_metric: the evaluation has no metric 'stile'. Did you mean 'style'?",
        ),
        (
            ["train.keep_best=1", "train.keep_best_metric=zzz", "evaluation.every=2"],
            "has no metric 'zzz'. There are: style, light.",
        ),
        (
            ["train.keep_best=1", "train.keep_best_metric=light"],
            "nothing is evaluated during 4 steps of training with evaluation.every = 0",
        ),
        (
            ["train.keep_best=1", "train.keep_best_metric=light", "evaluation.every=5"],
            "nothing is evaluated during 4 steps of training with evaluation.every = 5",
        ),
        (["train.keep_best=-1"], "train.keep_best (override): "),
        (["train.keep_bets=1"], "unknown key. Did you mean 'keep_best'?"),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_what_cannot_be_kept_is_refused_before_any_weight_is_read(
    command: str,
    overrides: Sequence[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("rewardgen.build.make", lambda *_: pytest.fail("something was made"))
    experiment = tmp_path / "toy.yaml"
    experiment.write_text(TOY)
    output = ["--output", str(tmp_path / "run")] if command == "train" else []
    with pytest.raises(SystemExit) as end:
        cli.main([command, str(experiment), *output, *overrides])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_keeps_the_best_by_the_held_out_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The learning rate is so high that the run gets worse: the best is not the newest."""
    monkeypatch.chdir(ROOT)
    experiment, folder = tmp_path / "toy.yaml", tmp_path / "run"
    experiment.write_text(TOY)
    overrides = ["train.num_steps=9", "train.keep_last=1", "train.keep_best=1", "train.keep_best_metric=style"]
    overrides += ["evaluation.every=3", "train.checkpoint_every=2", "optimizer.lr=0.5"]
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(experiment), "-o", str(folder), *overrides])
    assert not end.value.code, capsys.readouterr().err
    state = load_checkpoint(folder / "checkpoints" / "step-000009")[1]
    ((best, means),) = state["best"].items()
    assert set(means) == {"style", "light"}
    assert kept(folder) == sorted({int(best), 9})
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["eval", str(experiment), "--checkpoint", str(folder / "checkpoints" / f"step-{int(best):06d}"), *overrides]
        )
    assert not end.value.code
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{means['style']:.4f}" in shown, "the noted mean is that of the kept weights"
