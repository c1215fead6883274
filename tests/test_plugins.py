"""Plug-ins by name: all forms, their faults, and the check of arguments against signatures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from rewardgen import plugins
from rewardgen.errors import ConfigError
from rewardgen.reward import Reward
from rewardgen.types import Example

ROOT = Path(__file__).resolve().parent.parent
REWARD = """
from collections.abc import Sequence
import torch
from rewardgen.reward import Reward
from rewardgen.types import Example, Score

class Mine(Reward):
    differentiable = True
    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        self.level = level
    def score(self, pixels_B3HW: torch.Tensor, examples: Sequence[Example]) -> Score:
        return Score(value_B=pixels_B3HW.mean((1, 2, 3)), valid_B=torch.ones(len(examples), dtype=torch.bool))

class Unfinished(Reward):
    differentiable = True

class Other: ...

def judge(completions, scale: float = 1.0):
    return [scale * image.width for image in completions]

async def later(pixels_B3HW):
    return pixels_B3HW.mean((1, 2, 3))

def helper(path): ...
"""


HALF = """
from __future__ import annotations
def f(a: Unknown, b: int) -> None: ...
class F:
    g = staticmethod(f)
    def __len__(self): return 0
    def __getitem__(self, index): return index
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(REWARD)
    return tmp_path


def test_every_bundled_plugin_resolves_to_the_class_of_its_file() -> None:
    assert plugins.resolve("rewards", "csd").__module__ == "rewardgen.rewards.csd"
    assert plugins.resolve("rewards", "brightness").__module__ == "rewardgen.rewards.brightness"
    assert plugins.resolve("policies", "uso").__module__ == "rewardgen.policies.uso"
    assert plugins.resolve("data", "jsonl").__name__ == "JsonlDataset"


def test_a_dotted_module() -> None:
    assert plugins.resolve("data", "rewardgen.world.dataset:TinyWorld").__name__ == "TinyWorld"
    assert issubclass(plugins.resolve("rewards", "rewardgen.world.witness:StyleWitness"), Reward)


def test_a_module_in_the_working_directory(here: Path) -> None:
    (here / "module_of_a_user.py").write_text(REWARD)
    assert plugins.resolve("rewards", "module_of_a_user:Mine").__name__ == "Mine"
    assert sys.path[-1] == str(here)  # a user's file cannot take the place of a module of the standard library


def test_a_file_is_one_class_however_it_is_named(here: Path) -> None:
    first = plugins.resolve("rewards", "./mine.py:Mine")
    assert plugins.resolve("rewards", "mine.py:Mine") is first
    assert plugins.resolve("rewards", f"{here}/mine.py:Mine") is first
    assert sys.modules[first.__module__].__file__ == str(here / "mine.py")


def test_a_function_is_a_reward_in_either_form(here: Path) -> None:
    (here / "functions_of_a_user.py").write_text(REWARD)
    pixels, examples = torch.rand(2, 3, 4, 8), [Example(id="a"), Example(id="b")]
    for place in ("./mine.py", "functions_of_a_user"):
        judge = plugins.resolve("rewards", f"{place}:judge")
        assert plugins.resolve("rewards", f"{place}:judge") is judge
        args = plugins.check_args(plugins.factory(judge), {"scale": 2}, "args")
        assert plugins.factory(judge)(**args).score(pixels, examples).value_B.tolist() == [16, 16]
        later = plugins.resolve("rewards", f"{place}:later")()
        torch.testing.assert_close(later.score(pixels, examples).value_B, pixels.mean((1, 2, 3)))


def declare(folder: Path, distribution: str, entries: str) -> None:
    """What installing a distribution leaves behind."""
    info = folder / f"{distribution}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[rewardgen.rewards]\n{entries}\n")


@pytest.fixture
def site(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = here / "site"
    folder.mkdir()
    (folder / "acme_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_entry_points_name_classes_and_functions(site: Path) -> None:
    declare(site, "acme", "sharp = acme_rewards:Mine\nacme-judge = acme_rewards : judge")
    assert plugins.resolve("rewards", "sharp") is plugins.resolve("rewards", "acme_rewards:Mine")
    assert plugins.resolve("rewards", "acme-judge") is plugins.resolve("rewards", "acme_rewards:judge")
    with pytest.raises(ConfigError, match=r"among the bundled rewards\. Did you mean 'sharp'\?"):
        plugins.resolve("rewards", "sharpp")
    with pytest.raises(ConfigError, match=r"no file 'sharp\.py' among the bundled policies"):
        plugins.resolve("policies", "sharp")


def test_one_distribution_found_twice_is_no_conflict_but_two_are(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(site, "acme", "sharp = acme_rewards:Mine")
    declare(site / "again", "acme", "sharp = acme_rewards:Mine")
    monkeypatch.syspath_prepend(str(site / "again"))
    assert plugins.resolve("rewards", "sharp").__name__ == "Mine"
    declare(site, "other", "sharp = elsewhere:Sharp")
    with pytest.raises(ConfigError) as caught:
        plugins.resolve("rewards", "sharp")
    assert str(caught.value) == (
        "'sharp' is declared by 'acme_rewards:Mine' of acme 1.2 and 'elsewhere:Sharp' of other 1.2;"
        " write out the one you mean"
    )


def test_a_bundled_name_stays_what_it_is_whatever_is_installed(site: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = plugins.resolve("rewards", "brightness")
    declare(site, "acme", "brightness = acme_rewards:Mine")
    with pytest.warns(UserWarning, match="'brightness' is the bundled one; write out 'acme_rewards:Mine' of acme 1.2"):
        assert plugins.resolve("rewards", "brightness") is before


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("acme_rewrads:Mine", "there is no module 'acme_rewrads'"),
        ("acme_rewards:Mien", "has no class or function 'Mien'. Did you mean 'Mine'?"),
        ("acme_rewards:Other", "is no subclass of rewardgen's Reward"),
        ("acme_rewards", "it names no class or function"),
    ],
)
def test_a_faulty_entry_point_names_its_distribution(site: Path, value: str, message: str) -> None:
    declare(site, "acme", f"faulty = {value}")
    with pytest.raises(ConfigError) as caught:
        plugins.resolve("rewards", "faulty")
    assert str(caught.value).startswith(f"'faulty' is '{value}' of acme 1.2: ")
    assert message in str(caught.value)


OWN_PACKAGE = (
    REWARD
    + """
from rewards.helper import LEVEL
"""
)
PROGRAM = """
import json, sys
from rewardgen import plugins
from rewardgen.reward import check_reward

uses = ["rewards.mine:Mine", "./rewards/mine.py:Mine", "rewards.mine:judge", "./rewards/mine.py:judge", "brightness"]
found = [plugins.resolve("rewards", use) for use in uses]
for cls in found:
    check_reward(cls())
files = [sys.modules[getattr(cls, "function", cls).__module__].__file__ for cls in found]
print(json.dumps([files, sys.modules["rewardgen.rewards"].__file__, sys.modules["rewards"].__file__]))
"""


@pytest.mark.parametrize("start", ["script", "script with the checkout on the path", "python -c"])
def test_a_folder_with_a_rewards_package_of_its_own(tmp_path: Path, start: str) -> None:
    work = tmp_path / "work"
    (work / "rewards").mkdir(parents=True)
    (work / "rewards" / "__init__.py").touch()
    (work / "rewards" / "helper.py").write_text("LEVEL = 1")
    (work / "rewards" / "mine.py").write_text(OWN_PACKAGE)
    # A script's own folder stands first on the path, as that of the command `rewardgen` does, not the working one.
    script = tmp_path / "bin" / "program.py"
    script.parent.mkdir()
    script.write_text(PROGRAM)
    paths = [str(ROOT)] if start == "script with the checkout on the path" else []
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    done = subprocess.run(
        [sys.executable, *(["-c", PROGRAM] if start == "python -c" else [str(script)])],
        cwd=work,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files, bundled, own = json.loads(done.stdout)
    assert files[:4] == [str(work / "rewards" / "mine.py")] * 4
    assert Path(files[4]).parent == Path(bundled).parent
    assert own == str(work / "rewards" / "__init__.py")


def test_two_files_of_one_name_are_two_modules(here: Path) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "mine.py").write_text(REWARD)
    assert plugins.resolve("rewards", "./mine.py:Mine") is not plugins.resolve("rewards", "./sub/mine.py:Mine")


@pytest.mark.parametrize(
    ("kind", "use", "message"),
    [
        ("rewards", "cds", "no file 'cds.py' among the bundled rewards. Did you mean 'csd'?"),
        ("rewards", "zzzzz", "There are: "),
        ("rewards", "../csd", "no file"),
        ("rewards", "", "no file"),
        ("rewards", "uso", "'uso' is found among policies, but rewards are wanted here"),
        ("rewards", "preprocess", "'preprocess' is a helper among the rewards"),
        ("policies", "packing", "'packing' is a helper among the policies"),
        ("rewards", "./mine.py", "no file"),
        ("rewards", "./mine.py:", "names no class; write it as './mine.py:ClassName'"),
        ("rewards", "./mine.py:Min", "has no class or function 'Min'. Did you mean 'Mine'?"),
        ("rewards", "./mien.py:Mine", "mien.py. Did you mean 'mine.py'?"),
        ("rewards", "./mine.py:jduge", "has no class or function 'jduge'. Did you mean 'judge'?"),
        ("rewards", "./mine.py:helper", "'helper' is no reward function: it takes neither 'completions'"),
        ("data", "./mine.py:judge", "has no class 'judge'."),
        ("policies", "./mine.py:judge", "has no class 'judge'."),
        ("rewards", "./mine.py:Other", "is no subclass of rewardgen's Reward"),
        ("rewards", "./mine.py:Unfinished", "is abstract: it does not define score"),
        ("policies", "./mine.py:Mine", "is no subclass of rewardgen's Policy"),
        ("data", "./mine.py:Mine", "is no dataset: it does not define __len__ and __getitem__"),
        ("rewards", "nowhere.at.all:Mine", "there is no module 'nowhere'"),
        ("rewards", "rewardgen.nowhere:Mine", "there is no module 'rewardgen.nowhere'"),
        ("rewards", "not a module:Mine", "is no module name"),
        ("rewards", "rewardgen.types:tensor", "has no class or function 'tensor'. Did you mean 'Tensor'?"),
    ],
)
def test_what_cannot_be_resolved(here: Path, kind: plugins.Kind, use: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plugins.resolve(kind, use)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_package_nobody_has", "ModuleNotFoundError: No module named 'a_package_nobody_has'"),
        ("from rewardgen.reward import Rewrad", "ImportError: cannot import name 'Rewrad'"),
        ("def broken(:", "SyntaxError"),
        ("\n1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.parametrize("form", ["./{}.py:Mine", "{}:Mine"])
def test_the_plugins_own_import_error_is_shown(here: Path, source: str, message: str, form: str) -> None:
    name = f"broken_{abs(hash((source, form)))}"
    (here / f"{name}.py").write_text(source)
    with pytest.raises(ConfigError, match="could not be imported") as caught:
        plugins.resolve("rewards", form.format(name))
    assert message in str(caught.value)
    if "1 / 0" in source:
        assert f"{name}.py, line 2)" in str(caught.value)
    # A file that failed is tried afresh once it is mended.
    (here / f"{name}.py").write_text(REWARD)
    assert plugins.resolve("rewards", form.format(name)).__name__ == "Mine"


class Plain:
    def __init__(self, size: int = 3) -> None:
        self.size = size


class Loaded(Plain):
    @classmethod
    def from_pretrained(cls, place: str, *, size: int = 5) -> Loaded:
        return cls(size)


def test_the_factory_is_from_pretrained_where_there_is_one() -> None:
    assert plugins.factory(Plain)().size == 3
    assert plugins.factory(Loaded)("x").size == 5
    assert plugins.check_args(plugins.factory(Loaded), {"place": "x", "size": 1}, "p") == {"place": "x", "size": 1}


def target(
    path: Path,
    *,
    parts: Sequence[str] = (),
    size: tuple[int, int] = (1, 1),
    scale: float = 1.0,
    kind: Literal["a", "b"] = "a",
    flag: bool = False,
    limit: int | None = None,
    table: dict[str, float] | None = None,
    loose=None,  # type: ignore[no-untyped-def]
) -> None: ...


def test_arguments_are_converted_as_their_types_say() -> None:
    given = {"path": "a/b", "parts": ["x"], "size": [2, 3], "scale": 2, "limit": None, "table": {"a": 1}, "loose": [1]}
    checked = plugins.check_args(target, given, "args")
    assert checked == {**given, "path": Path("a/b"), "size": (2, 3), "table": {"a": 1.0}}
    assert isinstance(checked["scale"], float)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scael": 1}, "args.scael: unknown argument. Did you mean 'scale'?"),
        ({"zzzzzz": 1}, "args.zzzzzz: unknown argument. It takes: path, parts,"),
        ({"scale": "2"}, "args.scale: input should be a valid number, got '2'"),
        ({"scale": float("nan")}, "args.scale: input should be a finite number"),
        ({"limit": 1.5}, "args.limit: "),
        ({"limit": True}, "args.limit: "),
        ({"flag": 1}, "args.flag: "),
        ({"flag": "yes"}, "args.flag: "),
        ({"kind": "c"}, "args.kind: input should be 'a' or 'b', got 'c'"),
        ({"size": [1]}, "args.size.1: "),
        ({"size": [1, 2, 3]}, "args.size: "),
        ({"parts": "lora"}, "args.parts: "),
        ({"parts": ["a", 3]}, "args.parts.1: "),
        ({"table": {"a": "x"}}, "args.table.a: "),
        ({"path": 3}, "args.path: "),
    ],
)
def test_arguments_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plugins.check_args(target, {"path": "x", **given}, "args")
    assert message in str(caught.value)


def test_a_missing_argument_and_every_fault_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        plugins.check_args(target, {"flag": 3, "sizes": 1}, "args")
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "args.flag",
        "args.sizes",
        "args.path",
    ]


def test_keyword_catch_alls_take_anything() -> None:
    def loose(size: int, **rest: Any) -> None: ...

    assert plugins.check_args(loose, {"size": 1, "other": "x"}, "args") == {"size": 1, "other": "x"}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_without_a_constructor_of_its_own_takes_nothing(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:  # as torch._dynamo's, which takes the place of torch's with the first compilation

        def patched(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("nothing is made here")

        patched.__module__ = "torch._dynamo.mutation_guard"
        monkeypatch.setattr(torch.nn.Module, "__init__", patched)
    cls = plugins.resolve("rewards", "rewardgen.world.witness:StyleWitness")
    with pytest.raises(ConfigError, match=r"args\.size: unknown argument. It takes: no arguments\."):
        plugins.check_args(plugins.factory(cls), {"size": 1}, "args")


def test_annotations_of_other_modules_are_read(here: Path) -> None:
    cls = plugins.resolve("rewards", "./mine.py:Mine")
    assert plugins.check_args(plugins.factory(cls), {"level": 1}, "args") == {"level": 1.0}
    with pytest.raises(ConfigError, match=r"args\.level"):
        plugins.check_args(plugins.factory(cls), {"level": "high"}, "args")


def test_a_name_only_the_type_checker_knows_leaves_the_others_checked(here: Path) -> None:
    (here / "half.py").write_text(HALF)
    function = plugins.resolve("data", "./half.py:F").g
    assert plugins.check_args(function, {"a": "z", "b": 1}, "args") == {"a": "z", "b": 1}
    with pytest.raises(ConfigError, match=r"args\.b"):
        plugins.check_args(function, {"a": 1, "b": "x"}, "args")
