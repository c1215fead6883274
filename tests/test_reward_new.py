"""`rewardgen reward new` and `reward check`: what is written passes as it stands, and each way to break it is told."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from rewardgen import plugins
from rewardgen.cli import main
from rewardgen.errors import ConfigError
from rewardgen.reward import Reward, check_reward
from rewardgen.reward_function import FunctionReward
from rewardgen.reward_template import write_reward
from rewardgen.types import Example


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        told = capsys.readouterr()
        return int(stopped.value.code or 0), told.out, told.err

    return command


def test_a_new_class_passes_as_it_stands(here, run, capsys):
    code, out, err = run("reward", "new", "edge_sharpness", "--output", "mine/rewards")
    assert (code, err) == (0, "")
    use = "./mine/rewards/edge_sharpness.py:EdgeSharpness"
    assert out.splitlines()[0] == "wrote mine/rewards/edge_sharpness.py"
    assert use in out
    cls = plugins.resolve("rewards", use)
    assert cls.differentiable
    assert len(check_reward(cls(level=0.2))) == 6
    check_reward(cls(), image_size=(8, 24))
    code, out, err = run("reward", "check", use, "level=0.25", "needs_style=true")
    assert (code, err) == (0, "")
    assert out.count("ok: ") == 6
    capsys.readouterr()
    runpy.run_path("mine/rewards/edge_sharpness.py", run_name="__main__")
    assert capsys.readouterr().out.count("ok: ") == 6


def test_its_values_and_its_mask_are_as_its_docstring_says(here):
    path, symbol = write_reward("level", here)
    cls = plugins.resolve("rewards", f"{path}:{symbol}")
    pixels = torch.stack([torch.full((3, 4, 4), level) for level in (0.5, 0.0, 1.0)])
    examples = [Example(id="a", style_refs=(pixels[0],)), Example(id="b"), Example(id="c")]
    score = cls(level=0.5, needs_style=True).score(pixels, examples)
    torch.testing.assert_close(score.value_B, torch.tensor([0.0, -0.25, -0.25]))
    assert score.valid_B.tolist() == [True, False, False]


def test_a_new_function_passes_as_it_stands(here, run, capsys):
    code, out, err = run("reward", "new", "calm", "--function")
    assert (code, err) == (0, "")
    assert "under evaluation.witnesses" in out
    cls = plugins.resolve("rewards", "./calm.py:calm")
    assert issubclass(cls, FunctionReward)
    pixels = torch.stack([torch.full((3, 4, 4), 0.6), torch.zeros(3, 4, 4)])
    score = cls(level=0.4).score(pixels, [Example(id="a", prompt="x"), Example(id="b")])
    assert score.valid_B.tolist() == [True, False]
    assert score.value_B[0].item() == pytest.approx(-0.2, abs=1e-6)
    assert run("reward", "check", "./calm.py:calm", "level=0.25")[0] == 0
    capsys.readouterr()
    runpy.run_path("calm.py", run_name="__main__")
    assert capsys.readouterr().out.count("ok: ") == 7


def test_arguments_of_what_is_written_are_checked(here, run):
    path, symbol = write_reward("level", here)
    use = f"{path}:{symbol}"
    for arguments, message in {
        ("lewel=0.4",): "reward.args.lewel: unknown argument. Did you mean 'level'?",
        ("level=high",): "reward.args.level: input should be a valid number, got 'high'",
        ("level=1.5",): "reward.args.level: 1.5 is not in [0, 1]",
        ("needs_style=1",): "reward.args.needs_style: ",
        ("level",): "argument 'level': expected 'name=value'",
        ("level=[",): "argument 'level=[', line 1: ",
        ("level=1", "level=0"): "argument 'level=0': 'level' is given twice",
    }.items():
        code, _, err = run("reward", "check", use, *arguments)
        assert code == 2
        assert err.startswith(f"error: {message}")
        assert err.count("\n") == 1


BREAKS = {
    "another shape": ("mean((1, 2))\n", "mean(2)\n", "value_B of shape (3, 64); expected (3,)"),
    "no Score": ("return Score(value_B=value_B, valid_B=", "return value_B, (", "returned tuple; expected a Score"),
    "whole numbers": (
        "square().mean((1, 2))\n",
        "square().mean((1, 2)).round().long()\n",
        "value_B of torch.int64; expected a floating-point type",
    ),
    "a mask of numbers": ("torch.tensor(applies,", "1.0 * torch.tensor(applies,", "expected torch.bool"),
    "not finite outside [0, 1]": ("float().mean(1)", "float().sqrt().mean(1)", "a value that is not finite"),
    "pictures changed": ("pixels_B3HW.float()", "pixels_B3HW.clamp_(0.1, 0.9)", "changed the pictures in place"),
    "chance": ("value_B = -(", "value_B = torch.rand(()) - (", "another score the second time"),
    "neighbours": ("- self.level)", "- brightness_BHW.mean())", "depends on the other pictures of its batch"),
    "the first example for all": (
        "bool(example.style_refs) or not self.needs_style",
        "examples[0].id == 'check-0'",
        "depends on the order of the batch",
    ),
    "detached": ("pixels_B3HW.float()", "pixels_B3HW.detach().float()", "does not depend on the pixels"),
    "rounded": ("pixels_B3HW.float()", "(255 * pixels_B3HW).round()", "the gradient is zero"),
    "a gradient it does not promise": (
        "differentiable = True",
        "differentiable = False",
        "say `differentiable = True`, or detach",
    ),
    "no word on the gradient": ("    differentiable = True\n", "", "does not say `differentiable"),
    "gradients turned on": (
        "        brightness_BHW = pixels_B3HW.float().mean(1)\n",
        "        with torch.enable_grad():\n            brightness_BHW = pixels_B3HW.float().mean(1)\n"
        "        torch.set_grad_enabled(True)\n",
        "turned gradients on by itself",
    ),
    "nothing applies": ("or not self.needs_style", "and False", "finds no example valid"),
    "an exception": ("self.level).square()", "self.lewel).square()", "raised AttributeError: "),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_way_to_break_what_is_written_is_told(here, run, name):
    before, after, message = BREAKS[name]
    path, symbol = write_reward("mine", here)
    text = path.read_text()
    assert text.count(before) == 1, "the template has changed"
    path.write_text(text.replace(before, after))
    code, out, err = run("reward", "check", f"{path}:{symbol}")
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: Mine")
    assert err.count("\n") == 1


FUNCTION_BREAKS = {
    "one short": ("return scores\n", "return scores[1:]\n", "'mine' returned 2 scores for 3 pictures"),
    "no list": ("return scores\n", "return sum(scores)\n", "'mine' returned float; expected a list"),
    "nan": ("-abs(brightness - level)", "float('nan')", "'mine' returned nan for picture 0; return None"),
    "an exception": ("ImageStat.Stat(", "ImageStat.Stst(", "'mine' raised AttributeError: "),
    "no such column": ("prompts: list[str],", "prompts: list[str], caption: list[str],", "needs the column 'caption'"),
    "no pictures": ("completions: list[Image.Image], ", "pictures: list[Image.Image], ", "needs the column 'pictures'"),
}


@pytest.mark.parametrize("name", FUNCTION_BREAKS)
def test_each_way_to_break_the_written_function_is_told(here, run, name):
    before, after, message = FUNCTION_BREAKS[name]
    path, symbol = write_reward("mine", here, function=True)
    text = path.read_text()
    assert text.count(before) == 1, "the template has changed"
    path.write_text(text.replace(before, after))
    code, _, err = run("reward", "check", f"{path}:{symbol}")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_check_on_ones_own_examples(here, run):
    path, _ = write_reward("mine", here, function=True)
    path.write_text(path.read_text().replace("prompts: list[str],", "prompts: list[str], caption: list[str],"))
    Image.new("RGB", (8, 8)).save("style.png")
    rows = [{"prompt": "x", "extras": {"caption": "y"}}] * 6 + [{"style": "nowhere.png"}]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:6]))
    code, out, err = run("reward", "check", f"{path}:mine", "--data", "rows.jsonl")
    assert (code, err) == (0, "")
    assert "scores 4 pictures of 64x64, 4 of them valid" in out
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    code, _, err = run("reward", "check", f"{path}:mine", "--data", "rows.jsonl")
    assert code == 2
    assert "there is no picture" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Edge-Sharpness", "'Edge-Sharpness' will not do as a name: .* Did you mean 'edge_sharpness'?"),
        ("EdgeSharpness", "Did you mean 'edge_sharpness'?"),
        ("2fast", "Did you mean 'fast'?"),
        ("sharp.py", "Did you mean 'sharp_py'?"),
        ("../up", "Did you mean 'up'?"),
        ("", "will not do as a name"),
        ("___", "will not do as a name"),
        ("größe", "will not do as a name"),
        ("class", "'class' is a word of Python itself"),
        ("list", "'list' is a word of Python itself"),
        ("torch", "'torch' is the name of a module already"),
        ("rewardgen", "'rewardgen' is the name of a module already"),
        ("json", "'json' is the name of a module already"),
    ],
)
def test_names_that_will_not_do(here, run, name, message):
    code, _, err = run("reward", "new", name)
    assert code == 2
    before, _, after = message.partition(".* ")
    assert before in err
    assert after in err
    assert err.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["reward", "score", "tensor", "sequence", "none", "config_error", "exception"])
@pytest.mark.parametrize("function", [False, True])
def test_names_that_the_file_itself_uses_still_work(here, name, function):
    path, symbol = write_reward(name, here / str(function), function=function)
    cls = plugins.resolve("rewards", f"{path}:{symbol}")
    assert issubclass(cls, Reward)
    check_reward(cls())


def test_nothing_is_overwritten(here, run):
    Path("mine.py").write_text("precious")
    code, _, err = run("reward", "new", "mine")
    assert (code, err) == (2, "error: mine.py is there already; choose another name or --output\n")
    assert Path("mine.py").read_text() == "precious"
    code, _, err = run("reward", "new", "other", "-o", "mine.py")
    assert code == 2
    assert "mine.py/other.py: cannot be written" in err


def test_a_name_of_another_file_in_the_way(here):
    """A link to nowhere is a file too: it is not written through."""
    os.symlink(here / "elsewhere.py", here / "mine.py")
    with pytest.raises(ConfigError, match="is there already"):
        write_reward("mine", here)
    assert not (here / "elsewhere.py").exists()
