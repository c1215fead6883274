"""docs/custom_rewards.md, followed to the letter: its files are written, its commands run, its experiments trained."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewardgen.cli import main
from rewardgen.config import overlay
from rewardgen.plugins import ENTRY_POINT_GROUP

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "custom_rewards.md").read_text(encoding="utf-8")
BLOCKS = [(found[1], found[2]) for found in re.finditer(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]
BASE: dict[str, Any] = {
    "name": "small",
    "policy": {"use": "tests.toys:ToyPolicy", "args": {"hidden": 4}},
    "data": {
        "train": {"use": "tests.toys:ToyDataset", "args": {"size": 4}},
        "held_out": {"use": "./coloured.py:Coloured"},
    },
    "rollout": {"image_size": [8, 8], "num_steps": 3, "window": {"kind": "refl", "entry_range": [1, 2]}},
    "train": {"num_steps": 1, "batch_size": 2, "device": "cpu"},
    "evaluation": {"num_examples": 4, "grid_examples": 0},
    "report": {"tensorboard": False},
}
COLOURED = """
from dataclasses import replace
from tests.toys import ToyDataset

class Coloured(ToyDataset):
    def __init__(self):
        super().__init__(4, seed=1)
        colours = [[128, 128, 128], None, [0, 0, 0], [255, 255, 255]]
        pairs = zip(self.examples, colours)
        self.examples = [replace(example, extras={"colour": colour}) for example, colour in pairs]
        self.examples.append(replace(self.examples.pop(), extras={}))
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, and a path that finds what lies in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT), str(tmp_path)])
    (tmp_path / "coloured.py").write_text(COLOURED)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def run(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    program, *arguments = command.split()
    assert program == "rewardgen"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    told = capsys.readouterr()
    assert not stopped.value.code, told.err
    return told.out


def test_the_page_as_it_stands(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, experiment = [], BASE
    for kind, text in BLOCKS:
        if kind == "console":
            command, _, expected = text.removeprefix("$ ").partition("\n")
            assert run(command, capsys) == expected
        elif kind == "python" and (file := re.match(r"# (\w+\.py)\n", text)):
            (stranger / file[1]).write_text(text)
        elif kind == "python":
            exec(compile(text, "custom_rewards.md", "exec"), {"__name__": "page"})
        elif kind == "yaml":
            experiment = overlay(experiment, yaml.safe_load(text))
        elif kind == "toml":
            declared = tomllib.loads(text)["project"]["entry-points"][ENTRY_POINT_GROUP]
            assert declared == {"sharp": "my_package.rewards:Sharpness"}
        done.append(kind)
    assert [done.count(kind) for kind in ("console", "python", "yaml", "toml")] == [3, 4, 2, 1]

    (stranger / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    run("rewardgen train experiment.yaml --output run", capsys)
    lines = [json.loads(line) for line in (stranger / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if "loss" in line]
    assert step["valid_counts"]["sharp"] == 2
    assert step["reward_means"]["sharp"] > 0
    rows = json.loads((stranger / "run" / "comparison.json").read_text())["rows"]
    # Of the four held-out examples one has no colour and one has no such column.
    assert {row["name"]: row["trained_valid"] for row in rows} == {"sharp": 4, "coarse": 4, "colour": 2}


def test_what_the_page_shows_of_errors_is_what_is_said(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (quoted,) = [text for kind, text in BLOCKS if kind == "text"]
    (source,) = [text for kind, text in BLOCKS if kind == "python" and text.startswith("# sharpness.py")]
    (stranger / "sharpness.py").write_text(source.replace("pixels_B3HW.float()", "pixels_B3HW.round()"))
    with pytest.raises(SystemExit) as stopped:
        main(["reward", "check", "./sharpness.py:Sharpness"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == quoted


def test_a_function_in_the_objective_is_refused(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = [text for kind, text in BLOCKS if kind == "python" and text.startswith("# judges.py")]
    (stranger / "judges.py").write_text(source)
    experiment = overlay(BASE, {"objective": {"rewards": {"colour": {"use": "./judges.py:right_colour"}}}})
    (stranger / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    with pytest.raises(SystemExit) as stopped:
        main(["check", "experiment.yaml"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "objective.rewards.colour: right_colour has no gradient, but the gradient window needs one" in told
    assert "move it to evaluation.witnesses" in told
