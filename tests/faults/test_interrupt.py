"""A run that a signal ended says the exact command that goes on with it."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest
import yaml

from rewardgen import cli, config
from rewardgen.trainer import Trainer
from rewardgen.types import StepReport
from tests.test_cli import KEYED, ROOT, TOY


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    told = capsys.readouterr()
    return int(end.value.code or 0), told.out, told.err


def interrupted(
    capsys: pytest.CaptureFixture[str], *arguments: str, signals: tuple[signal.Signals, ...] = (signal.SIGINT,)
) -> tuple[int, str, str]:
    """A run that gets signals in its third step."""
    step = Trainer.step

    def signalled(self: Trainer, number: int) -> StepReport:
        if number == 2:
            for name in signals:
                signal.raise_signal(name)
        return step(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", signalled)
        return run(capsys, *arguments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_that_is_named_goes_on_with_the_run(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the run had overrides, and a folder with spaces and brackets in its name."""
    experiment, whole, parts = tmp_path / "toy.yaml", tmp_path / "whole", tmp_path / "two [words]"
    experiment.write_text(TOY)
    overrides = ["optimizer.lr=3e-2", "train.ema_decay=0.5"]
    assert run(capsys, "train", str(experiment), "-o", str(whole), *overrides)[0] == 0
    code, out, _ = interrupted(capsys, "train", str(experiment), "-o", str(parts), *overrides, signals=(number,))
    assert code == 130
    assert "stopped after step 3; " in out
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["rewardgen", "train"]
    assert "--resume" in command
    experiment.unlink()  # the run's folder has all
    code, _, err = run(capsys, *command[1:])
    assert code == 0, err
    assert (whole / "comparison.json").read_text() == (parts / "comparison.json").read_text()


def test_the_experiment_in_a_runs_folder_is_the_one_that_ran(tmp_path: Path) -> None:
    """The resolved file, written and read again, is the same experiment."""
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    first = config.load_experiment(path, overrides=["train.keep_best=2", "train.keep_best_metric=light"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(first.model_dump(mode="json")))
    assert config.load_experiment(tmp_path / "again.yaml") == first


def test_with_secrets_the_first_command_is_needed_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keyed.py").write_text(KEYED)
    experiment, folder = tmp_path / "toy.yaml", tmp_path / "run"
    keyed = f'train: {{use: "{tmp_path}/keyed.py:Keyed", args: {{size: 4, api_key: s3cr3t-s3cr3t}}}}'
    experiment.write_text(TOY.replace('train: {use: "tests.toys:ToyDataset", args: {size: 4}}', keyed))
    code, out, err = interrupted(capsys, "train", str(experiment), "-o", str(folder))
    assert code == 130, err
    assert out.splitlines()[-1].strip() == f"the command that began it, and --output {folder} --resume"
    code, _, err = run(capsys, "train", str(experiment), "--output", str(folder), "--resume")
    assert code == 0, err


def test_a_run_that_died_before_its_first_checkpoint_is_resumed_from_its_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, whole, folder = tmp_path / "toy.yaml", tmp_path / "whole", tmp_path / "run"
    experiment.write_text(TOY)
    assert run(capsys, "train", str(experiment), "-o", str(whole))[0] == 0

    def dies(self: Trainer, number: int) -> StepReport:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dies)
        with pytest.raises(MemoryError):
            cli.main(["train", str(experiment), "-o", str(folder)])
    code, _, err = run(capsys, "train", str(experiment), "-o", str(folder), "--resume", "optimizer.lr=1e-3")
    assert code == 2
    assert "differs in optimizer.lr" in err
    code, _, err = run(capsys, "train", str(experiment), "-o", str(folder), "--resume")
    assert code == 0, err
    assert (whole / "comparison.json").read_text() == (folder / "comparison.json").read_text()


def test_a_second_signal_acts_at_once_and_says_how_to_go_on_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    experiment, folder = tmp_path / "toy.yaml", tmp_path / "run"
    experiment.write_text(TOY)
    twice = (signal.SIGINT, signal.SIGINT)
    code, _, err = interrupted(capfd, "train", str(experiment), "-o", str(folder), signals=twice)
    assert code != 0
    assert "finishing the step, then saving a checkpoint" in err
    command = f"rewardgen train {folder}/config.yaml --output {folder} --resume"
    assert f"go on from step 2 with: {command}\n" in err
    assert "Traceback" not in err
    code, _, err = run(capfd, *shlex.split(command)[1:])
    assert code == 0, err
