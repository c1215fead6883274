"""`rewardgen score`: the numbers are the rewards' own, and nothing that could not be scored looks like a score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rewardgen import sources
from rewardgen.cli import main
from rewardgen.commands.score import BATCH_SIZE, TINY_ARGS, expand, split
from rewardgen.config import load_experiment
from rewardgen.data.images import load_image
from rewardgen.errors import ConfigError
from rewardgen.reward import score
from rewardgen.rewards.csd import CsdReward
from rewardgen.types import Example

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = "experiments/uso_srl.yaml"
REWARDS = '''
import torch
print("imported")
from rewardgen.reward import Reward
from rewardgen.types import Score

class Asked(Reward):
    """Tells what it was given: characters of the prompt + 10 content + 100 style + 1000 identity pictures."""
    differentiable = False
    def __init__(self, scale: float = 1.0, table: dict[str, float] | None = None) -> None:
        super().__init__()
        print("made")
        self.scale = scale + sum((table or {}).values())
    def score(self, pixels_B3HW, examples):
        print("asked")
        found = [len(e.prompt) + 10 * len(e.content_refs) + 100 * len(e.style_refs) + 1000 * len(e.identity_refs)
                 for e in examples]
        return Score(value_B=self.scale * torch.tensor(found).float(), valid_B=torch.ones(len(found)) > 0)

class Dark(Reward):
    """Applies to dark pictures only."""
    differentiable = False
    def score(self, pixels_B3HW, examples):
        value_B = pixels_B3HW.mean((1, 2, 3))
        return Score(value_B=value_B.where(value_B < 0.5, torch.nan), valid_B=value_B < 2)

class Broken(Reward):
    differentiable = False
    def score(self, pixels_B3HW, examples):
        return {}["missing"]
'''


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(REWARDS)
    return str(tmp_path / "mine.py")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `score`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["score", *arguments])
    told = capsys.readouterr()
    return int(stopped.value.code or 0), told.out, told.err


def scored(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The document of a successful `score --json`."""
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (64, 64)) -> Path:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path)
    return path


def test_csd_is_the_reward_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [picture(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    looks = [picture(tmp_path / f"look{seed}.png", seed) for seed in (1, 7)]
    reward = CsdReward.from_pretrained(str(sources.ASSETS / "csd.safetensors"))
    example = Example(id="x", style_refs=tuple(load_image(path) for path in looks))
    expected = score(reward, torch.stack([load_image(path) for path in paths]), [example] * 3, enable_grad=False)
    command = [*map(str, paths), "-r", "csd", *(word for look in looks for word in ("--style", str(look)))]
    found = scored(capsys, *command)
    assert [row["path"] for row in found["pictures"]] == [str(path) for path in paths]
    values = [row["scores"]["csd"] for row in found["pictures"]]
    assert values == pytest.approx(expected.value_B.tolist(), abs=1e-6)
    assert np.std(values) > 0.01
    assert found["rewards"]["csd"]["mean"] == pytest.approx(np.mean(values))
    assert (found["rewards"]["csd"]["valid"], found["num_pictures"], found["num_unreadable"]) == (3, 3, 0)

    code, out, err = run(capsys, *command)
    assert code == 0
    assert "csd is scored with the bundled tiny world's weights" in err
    lines = out.splitlines()
    assert [line.split() for line in lines[2:5]] == [[str(p), f"{v:.4f}"] for p, v in zip(paths, values, strict=True)]
    assert [line.split() for line in lines[-2:]] == [["mean", f"{np.mean(values):.4f}"], ["valid", "3/3"]]
    assert len({len(line) for line in lines}) == 1


def test_many_pictures_of_several_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More than a batch, mixed: each keeps its own score. The truth is Pillow's luminance."""
    sizes = [(8, 8), (8, 12), (5, 7)]
    paths = [picture(tmp_path / f"{n:02d}.png", n, sizes[n % 3 if n % 4 else 0]) for n in range(2 * BATCH_SIZE + 3)]
    found = scored(capsys, str(tmp_path), "-r", "brightness")
    values = {row["path"]: row["scores"]["brightness"] for row in found["pictures"]}
    assert list(values) == [str(path) for path in paths]
    for path in paths:
        assert values[str(path)] == pytest.approx(np.asarray(Image.open(path).convert("L")).mean() / 255, abs=3e-3)


def test_a_score_does_not_depend_on_the_other_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(picture(tmp_path / f"{seed}.png", seed)) for seed in range(3)]
    command = ["-r", "csd", "-s", str(picture(tmp_path / "look.png", 9))]
    together = [row["scores"]["csd"] for row in scored(capsys, *paths, *command)["pictures"]]
    alone = [scored(capsys, path, *command)["pictures"][0]["scores"]["csd"] for path in paths]
    assert together == pytest.approx(alone, abs=1e-5)


def test_unreadable_pictures_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [picture(tmp_path / f"{seed}.png", seed) for seed in (1, 2)]
    cut = tmp_path / "cut.png"
    cut.write_bytes(good[0].read_bytes()[:300])
    gone = tmp_path / "gone.png"
    command = [str(path) for path in (good[0], cut, gone, good[1])]
    found = scored(capsys, *command, "-r", "brightness")
    assert [row["scores"]["brightness"] is None for row in found["pictures"]] == [False, True, True, False]
    assert ["error" in row for row in found["pictures"]] == [False, True, True, False]
    values = [row["scores"]["brightness"] for row in found["pictures"] if "error" not in row]
    assert found["rewards"]["brightness"] == {
        "use": "brightness",
        "args": {},
        "mean": pytest.approx(np.mean(values)),
        "valid": 2,
    }
    assert (found["num_pictures"], found["num_unreadable"]) == (4, 2)

    code, out, err = run(capsys, *command, "-r", "brightness")
    assert code == 0
    assert [line.split(": ")[:2] for line in err.splitlines()] == [["error", str(cut)], ["error", str(gone)]]
    assert [line.split()[1] for line in out.splitlines() if line.startswith((str(cut), str(gone)))] == 2 * [
        "unreadable"
    ]
    assert out.splitlines()[-1].split() == ["valid", "2/4"]

    code, out, err = run(capsys, str(cut), str(gone), "-r", "brightness", "--json")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "error: none of the 2 pictures could be read"


def test_what_does_not_apply_is_null_and_counted(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, colour in (("a", 20), ("b", 240), ("c", 60)):
        Image.new("RGB", (4, 4), (colour,) * 3).save(tmp_path / f"{name}.png")
    command = [str(tmp_path), "-r", f"{mine}:Dark", "-r", "csd"]
    found = scored(capsys, *command)
    assert [row["scores"]["Dark"] for row in found["pictures"]] == [
        pytest.approx(20 / 255),
        None,
        pytest.approx(60 / 255),
    ]
    assert found["rewards"]["Dark"]["mean"] == pytest.approx(40 / 255)
    assert found["rewards"]["Dark"]["valid"] == 2
    assert [row["scores"]["csd"] for row in found["pictures"]] == [None] * 3
    assert found["rewards"]["csd"]["mean"] is None
    code, out, err = run(capsys, *command)
    assert code == 0
    assert "csd applies to none of the pictures" in err
    assert "Dark applies to none" not in err
    assert [line.split()[1:] for line in out.splitlines()[-2:]] == [["0.1569", "n.a."], ["2/3", "0/3"]]


def test_prompt_references_and_arguments_reach_the_reward_and_its_prints_do_not_reach_stdout(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(picture(tmp_path / "a.png"))
    command = [path, "-r", f"{mine}:Asked", "-p", "four", "-c", path, "-s", path, "-s", path, "-i", path]
    code, out, err = run(capsys, *command, "Asked.scale=0.5", "Asked.table.a=0.25", "--json")
    assert code == 0
    assert json.loads(out)["pictures"][0]["scores"] == {"Asked": 0.75 * 1214}
    assert json.loads(out)["rewards"]["Asked"]["args"] == {"scale": 0.5, "table": {"a": 0.25}}
    assert err.split() == ["imported", "made", "asked"]


def test_arguments_come_from_the_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = yaml.safe_load((ROOT / EXPERIMENT).read_text())
    raw["objective"]["rewards"]["style"]["args"]["round_8bit"] = True
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(raw))
    path = str(picture(tmp_path / "a.png"))
    command = [path, "-s", path, "-e", str(changed)]
    code, out, err = run(capsys, *command, "-r", "csd", "--json")
    assert (code, err) == (0, "")  # the weights were named, so no note
    assert json.loads(out)["rewards"]["csd"]["args"] == {"checkpoint": "world:csd.safetensors", "round_8bit": True}
    # By the name it has there; the command line's argument wins.
    found = scored(capsys, *command, "-r", "style", "style.round_8bit=false")
    assert found["rewards"]["style"]["use"] == "csd"
    assert found["rewards"]["style"]["args"]["round_8bit"] is False
    # All of them, and a run's folder in the file's place; the witnesses know only the tiny world's own examples.
    changed.rename(tmp_path / "config.yaml")
    found = scored(capsys, path, "-s", path, "-e", str(tmp_path))
    assert {name: reward["valid"] for name, reward in found["rewards"].items()} == {
        "style": 1,
        "content": 0,  # no content reference was named
        "palette_texture": 0,
        "layout": 0,
    }


def test_a_reward_that_the_experiment_has_twice_must_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load((ROOT / EXPERIMENT).read_text())
    raw["objective"]["rewards"]["other"] = {
        "use": "csd",
        "args": {"checkpoint": "world:csd.safetensors"},
        "weight": 1.0,
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(raw))
    code, _, err = run(capsys, "a.png", "-r", "csd", "-e", str(tmp_path / "two.yaml"))
    assert code == 2
    assert "the experiment has several; name one of other, style" in err


def test_the_tiny_worlds_arguments_are_those_of_the_bundled_experiments() -> None:
    bundled = {}
    for path in sorted((ROOT / "experiments").glob("*.yaml")):
        experiment = load_experiment(path)
        for plugin in [*experiment.objective.rewards.values(), *experiment.evaluation.witnesses.values()]:
            weights = {k: v for k, v in plugin.args.items() if isinstance(v, str) and v.startswith("world:")}
            if weights and plugin.use in TINY_ARGS:
                bundled[plugin.use] = weights
    # `identity` is what the experiment of `matching` says to try instead.
    assert bundled | {"identity": bundled["matching"]} == TINY_ARGS


def test_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "inside/c.png", "x[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(*given: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in expand([str(tmp_path / text) for text in given])]

    assert names(".") == ["a.JPG", "b.png", "x[1].png"]
    assert names("*.png") == ["b.png", "x[1].png"]
    assert names("**/*.png") == ["b.png", "inside/c.png", "x[1].png"]
    assert names("x[1].png") == ["x[1].png"]
    assert names("gone.png", "inside", "b.png") == ["gone.png", "inside/c.png", "b.png"]


def test_arguments_are_told_from_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["a.png", "csd.checkpoint=w.pth", "lr=0.1/a.png", "csd.x.y=[1, 2]", "runs/lr=0.1.png", "csd.x.z=true"]
    arguments, pictures = split(given, ["csd"])
    assert arguments == {"csd": {"checkpoint": "w.pth", "x": {"y": [1, 2], "z": True}}}
    assert pictures == ["a.png", "lr=0.1/a.png", "runs/lr=0.1.png"]
    for text, message in {
        "cds.checkpoint=x": "no reward 'cds' is asked for. Did you mean 'csd'?",
        "csd=x": "expected 'NAME.KEY=VALUE'",
        "csd..a=x": "expected 'NAME.KEY=VALUE'",
        "csd.checkpoint.a=x": "another argument has given 'checkpoint' a value",
        "csd.a=[": "csd.a=",
    }.items():
        with pytest.raises(ConfigError) as caught:
            split(["csd.checkpoint=w.pth", text], ["csd"])
        assert message in str(caught.value)
    # A picture may be called as an argument is.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed.v=1.png").touch()
    assert split(["seed.v=1.png"], ["csd"])[1] == ["seed.v=1.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PICTURE"], "name what to score with: --reward csd"),
        (["PICTURE", "-r", "cds"], "Did you mean 'csd'?"),
        (["PICTURE", "-r", "csd", "-r", "csd"], "there is a reward 'csd' already"),
        (["PICTURE", "-r", "csd", "csd.check=x"], "csd.check: unknown argument. Did you mean 'checkpoint'?"),
        (["PICTURE", "-r", "csd", "csd.checkpoint=3"], "csd.checkpoint: "),
        (["PICTURE", "-r", "csd", "csd.checkpoint=none.safetensors"], "none.safetensors does not exist"),
        (["csd.checkpoint=x.pth", "-r", "csd"], "name at least one picture"),
        (["PICTURE", "-r", "csd", "--style", "none.png"], "none.png: there is no such picture"),
        (["PICTURE", "-r", "csd", "--flavor", "tiny"], "give --experiment FILE too"),
        (["PICTURE", "-r", "csd", "-e", "nowhere.yaml"], "there is no experiment file nowhere.yaml"),
        (["EMPTY", "-r", "brightness"], "the folder holds no pictures"),
        (["EMPTY/*.png", "-r", "brightness"], "matches no files"),
        (["PICTURE", "-r", "MINE:Nothing"], "Nothing"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"PICTURE": str(picture(tmp_path / "a.png")), "EMPTY": str(tmp_path / "empty"), "MINE": mine}
    given = list(arguments)
    for word, place in places.items():
        given = [argument.replace(word, place) for argument in given]
    code, out, err = run(capsys, *given)
    lines = [line for line in err.splitlines() if line != "imported" and not line.startswith("note: ")]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_a_reward_that_breaks_says_where(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, str(picture(tmp_path / "a.png")), "-r", f"{mine}:Broken")
    assert (code, out) == (2, "")
    line = REWARDS.splitlines().index('        return {}["missing"]') + 1
    assert err == f"imported\nerror: Broken failed: KeyError: 'missing' ({mine}, line {line})\n"
