"""The command line, from arguments to exit code: whole runs on the toys, and bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from rewardgen import build, config, run_folder, sources
from rewardgen.cli import main
from rewardgen.errors import ConfigError
from rewardgen.trainer import Trainer
from rewardgen.types import StepReport

ROOT = Path(__file__).resolve().parent.parent
TOY = """\
name: small
policy: {use: "tests.toys:ToyPolicy", args: {hidden: 4}}
data:
  train: {use: "tests.toys:ToyDataset", args: {size: 4}}
  held_out: {use: "tests.toys:ToyDataset", args: {size: 6, seed: 1}}
rollout: {image_size: [8, 8], num_steps: 3, window: {kind: refl, entry_range: [1, 2]}}
objective:
  rewards:
    style: {use: "tests.toys:ToyReward", weight: 0.5}
optimizer: {lr: 1e-2}
train: {num_steps: 4, batch_size: 2, checkpoint_every: 2, device: cpu}
evaluation:
  num_examples: 6
  grid_examples: 2
  witnesses: {light: {use: brightness}}
report: {tensorboard: false}
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def toy(tmp_path: Path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    told = capsys.readouterr()
    return int(stopped.value.code or 0), told.out, told.err


def test_a_run_leaves_everything_in_its_folder(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    code, out, err = run(capsys, "train", toy, "--output", str(folder))
    assert code == 0, err
    for name in ("style", "light"):
        assert name in out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2, 3]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["num_steps"] == 4
    assert json.loads((folder / "manifest.json").read_text())
    assert json.loads((folder / "comparison.json").read_text())
    assert "style" in (folder / "comparison.md").read_text()
    assert load_file(folder / "weights" / "toy.safetensors")["outer"].shape == (6, 4)
    assert Image.open(folder / "grid.png").size[0] >= 4 * 128
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-000002", "step-000004"]

    # The same run cannot be started over, only continued.
    code, out, err = run(capsys, "train", toy, "--output", str(folder))
    assert code == 2
    assert "holds a run already: go on with --resume" in err

    # Judged again from its checkpoint it gives the same numbers.
    before = json.loads((folder / "comparison.json").read_text())
    code, out, err = run(capsys, "eval", toy, "--run", str(folder), "--json")
    assert code == 0, err
    assert json.loads(out)["comparison"] == before
    code, out, _ = run(capsys, "eval", toy, "--checkpoint", str(folder / "checkpoints" / "step-000002"))
    assert code == 0
    assert "style" in out


def test_a_resumed_run_equals_the_uninterrupted_one(
    toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(capsys, "train", toy, "-o", str(whole))[0] == 0
    assert run(capsys, "train", toy, "-o", str(parts), "train.num_steps=2")[0] == 0
    code, _, err = run(capsys, "train", toy, "-o", str(parts), "--resume")
    assert code == 0, err
    first, second = (load_file(folder / "weights" / "toy.safetensors") for folder in (whole, parts))
    assert all((first[name] == second[name]).all() for name in first)
    assert (whole / "comparison.json").read_text() == (parts / "comparison.json").read_text()
    steps = [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert steps == [0, 1, 2, 3]
    code, _, err = run(capsys, "train", toy, "-o", str(parts), "--resume", "optimizer.lr=1e-3")
    assert code == 2
    assert "differs in optimizer.lr" in err


def test_a_resumed_run_may_fail_more_often_and_ask_another_server(tmp_path: Path) -> None:
    """What the error of too many failures advises, and what happens when a judge's machine moves."""
    grpo = ROOT / "experiments" / "uso_grpo.yaml"
    judge = "objective.rewards.judge={use: vlm_judge, args: {question: style, urls: [http://a/v1], served_model: m}}"
    first = config.load_experiment(grpo, overrides=[judge])
    run_folder.open_folder(tmp_path / "run", first, resume=False)
    allowed = ["objective.rewards.style.max_failed_share=0.9", "objective.failure_window=8"]
    allowed += ["train.max_nonfinite_steps=9", "objective.rewards.judge.args.urls=[http://b/v1]"]
    allowed += ["objective.rewards.judge.args.timeout_s=5"]
    run_folder.open_folder(tmp_path / "run", config.load_experiment(grpo, overrides=[judge, *allowed]), resume=True)
    for key in ("objective.rewards.judge.args.served_model=n", "objective.rewards.style.weight=9"):
        changed = config.load_experiment(grpo, overrides=[judge, *allowed, key])
        with pytest.raises(ConfigError, match=f"differs in {key.partition('=')[0]}$"):
            run_folder.open_folder(tmp_path / "run", changed, resume=True)


def test_a_run_whose_checkpoints_are_all_damaged_says_what_to_do(tmp_path: Path, toy: str) -> None:
    experiment = config.load_experiment(Path(toy))
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ConfigError, match="all checkpoints are damaged"):
        run_folder.open_folder(tmp_path, experiment, resume=False)


def test_an_impossible_report_is_refused_before_weights_are_read(
    toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setattr(build, "assemble", lambda experiment: pytest.fail("the parts were made"))
    code, _, err = run(capsys, "train", toy, "-o", str(tmp_path / "run"), "report.wandb={project: x}")
    assert code == 2
    assert "report.wandb is asked for" in err
    assert "pip install -e '.[wandb]'" in err
    assert not (tmp_path / "run").exists()


KEYED = """
from tests.toys import ToyDataset

class Keyed(ToyDataset):
    def __init__(self, size: int, api_key: str) -> None:
        super().__init__(size)
"""


def test_no_secret_is_shown_or_kept(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keyed.py").write_text(KEYED)
    experiment, folder = tmp_path / "toy.yaml", tmp_path / "run"
    keyed = f'train: {{use: "{tmp_path}/keyed.py:Keyed", args: {{size: 4, api_key: s3cr3t}}}}'
    experiment.write_text(TOY.replace('train: {use: "tests.toys:ToyDataset", args: {size: 4}}', keyed))
    code, out, err = run(capsys, "check", toy)
    assert (code, err) == (0, "")
    assert "api_key: '***'" in out
    assert "s3cr3t" not in out
    assert run(capsys, "train", toy, "-o", str(folder), "train.num_steps=2")[0] == 0
    assert "api_key: '***'" in (folder / "config.yaml").read_text()
    assert [path for path in folder.rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()] == []
    # The run is still known as the same one.
    code, _, err = run(capsys, "train", toy, "-o", str(folder), "--resume", "train.num_steps=2")
    assert code == 0, err


def test_a_signal_ends_a_run_with_a_checkpoint(
    toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGTERM in the middle of the second step: it is finished, saved, and the run goes on from there."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(capsys, "train", toy, "-o", str(whole))[0] == 0
    step = Trainer.step

    def interrupted(self: Trainer, number: int) -> StepReport:
        if number == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        code, out, _ = run(capsys, "train", toy, "-o", str(parts))
    assert code == 130
    assert f"stopped after step 2; go on with --resume --output {parts}" in out
    assert run(capsys, "train", toy, "-o", str(parts), "--resume")[0] == 0
    assert (whole / "comparison.json").read_text() == (parts / "comparison.json").read_text()


def test_check_says_what_is_read_and_what_is_trained(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", toy, "train.num_steps=7")
    assert code == 0, err
    assert "num_steps: 7" in out
    assert "parameters in 3 tensors" in out


FULL_SCALE = [
    "policy={use: uso, args: {base: nobody-at-all/NO.base, lora: 'nobody-at-all/none:part/lora.safetensors'}}",
    "data.train={use: jsonl, args: {path: none.jsonl}}",
]


def test_check_of_the_full_scale_says_what_it_would_need(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", toy, *FULL_SCALE)
    assert code == 0, err
    assert "from the hub when training starts: nobody-at-all/NO.base, nobody-at-all/none:part/lora.safetensors" in out
    assert "to be put in place before training: none.jsonl" in out
    assert "trained:" not in out


@pytest.mark.parametrize("command", ["train", "check", "eval"])
def test_a_missing_bundled_asset_is_named(
    command: str, toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    override = ["objective.rewards.style={use: csd, args: {checkpoint: world:cds.safetensors}}"]
    options = {"train": ["-o", str(tmp_path / "run")], "eval": ["--run", str(tmp_path)], "check": []}[command]
    code, _, err = run(capsys, command, toy, *options, *override)
    assert code == 2
    assert "objective.rewards.style.args.checkpoint: 'world:cds.safetensors' is not among the bundled assets" in err
    assert "`rewardgen world build` makes them" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "there is no experiment file nowhere.yaml"),
        (["train", "TOY", "trin.x=1"], "unknown key. Did you mean 'train'?"),
        (["train", "TOY", "--flavor", "huge"], "has no flavor 'huge'"),
        (["train", "TOY", "evaluation.num_examples=7"], "data.held_out has only 6 examples"),
        (["train", "TOY", "rollout.image_size=[9, 9]"], "image size 9x9 is not a multiple of 4"),
        (["train", "TOY", "train.device=abacus"], "'abacus' is no device"),
        (["train", "TOY", "--resume"], "holds no run to resume"),
        (["eval", "TOY"], "either --run DIR or --checkpoint DIR"),
        (["eval", "TOY", "--run", "."], ". holds no whole checkpoint"),
        (["eval", "TOY", "--checkpoint", "nowhere"], "there is no such file"),
        (["world", "build", "vea"], "there is no piece 'vea'"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [toy if argument == "TOY" else argument for argument in arguments]
    given += ["--output", str(tmp_path / "run")] if given[0] == "train" else []
    code, _, err = run(capsys, *given)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_made(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "train", toy, "--output", f"{toy}/inside")
    assert code == 2
    assert "the run's folder cannot be written: not a directory" in err


@pytest.mark.parametrize("arguments", [[], ["trin"], ["train"], ["train", "x.yaml", "--flavour"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *arguments)[0] == 2


def test_the_module_runs_and_its_errors_have_no_traceback() -> None:
    command = [sys.executable, "-m", "rewardgen", "check", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "error: there is no experiment file nowhere.yaml\n"
    assert done.stdout == ""


def test_sources_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ASSETS", tmp_path)
    (tmp_path / "part.safetensors").write_bytes(b"")
    args = {
        "a": "world:part.safetensors",
        "b": "world:../part.safetensors",
        "c": ["owner/name:folder/file.safetensors", "owner/name"],
        "d": {"e": "data/rows.jsonl", "f": "./file", "g": "official", "h": 3},
    }
    found = {source.path: (source.kind, source.location is not None) for source in sources.find_sources(args, "x")}
    assert found == {
        "x.a": ("world", True),
        "x.b": ("world", False),
        "x.c.0": ("hub file", False),
        "x.c.1": ("hub repository", False),
        "x.d.e": ("local", False),
        "x.d.f": ("local", False),
    }
    assert sources.materialise({"a": args["a"], "d": args["d"]}, "x") == {
        "a": str(tmp_path / "part.safetensors"),
        "d": args["d"],
    }
