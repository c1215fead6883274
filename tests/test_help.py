"""The command line explains itself: every command has a purpose, examples that parse, and options with defaults.

Help and completion answer at a key press, so neither may import torch.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command

from rewardgen import plugins
from rewardgen.cli import app
from rewardgen.commands import completion
from rewardgen.config import load_experiment
from rewardgen.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 78
"""Columns for help on a terminal of 80; a longer line would be broken in an odd place."""


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command and group with the words that call it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, f"{path} {name}")


def examples(command: Any) -> list[str]:
    """The lines under `Examples:`, continued ones joined."""
    text = inspect.cleandoc(command.help or "").replace("\\\n", " ")
    _, found, block = text.partition("\nExamples:\n")
    return [line.strip() for line in block.splitlines() if line.strip()] if found else []


def faults(path: str, command: Any) -> Iterator[str]:
    """What a reader of `path --help` would miss."""
    purpose, *more = inspect.cleandoc(command.help or "").split("\n\n")
    if not purpose.endswith("."):
        yield "no purpose in one sentence"
    if "\n" in purpose or any(len(line) > WIDTH for part in more for line in part.splitlines()):
        yield "a line that is too long or broken"
    if not any(shlex.split(example)[: len(path.split())] == path.split() for example in examples(command)):
        yield "no example of its own"
    for parameter in command.params:
        name = "/".join(parameter.opts)
        if not parameter.help:
            yield f"{name}: no help"
        shown = isinstance(parameter.show_default, str) or (parameter.show_default and parameter.default is not None)
        if not (parameter.required or shown or getattr(parameter, "is_flag", False)):
            yield f"{name}: no default shown"


COMMANDS = dict(walk(get_command(app), "rewardgen"))
EXAMPLES = [example for command in COMMANDS.values() for example in examples(command)]


def parse(example: str) -> dict[str, Any]:
    """The parameters of an example, as typer parses them; raises its usage errors."""
    words = shlex.split(example)
    depth = max(depth for depth in range(1, len(words) + 1) if " ".join(words[:depth]) in COMMANDS)
    path, rest = " ".join(words[:depth]), words[depth:]
    context = COMMANDS[path].make_context(path, list(rest))
    if hasattr(COMMANDS[path], "commands") and rest and not rest[0].startswith("-"):
        COMMANDS[path].resolve_command(context, rest)  # a word of its own that is no command
    found: dict[str, Any] = context.params
    return found


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_explains_itself(path: str) -> None:
    assert list(faults(path, COMMANDS[path])) == []


def test_the_check_of_help_catches() -> None:
    poor = typer.Typer()

    @poor.command()
    def draw(
        number: Annotated[int, typer.Option(show_default=False)] = 3,
        size: Annotated[str | None, typer.Option(help="Side in pixels.")] = None,
    ) -> None:
        """Draw"""

    found = list(faults("draw", get_command(poor)))
    assert "no purpose in one sentence" in found
    assert "no example of its own" in found
    assert "--number: no help" in found
    assert "--number: no default shown" in found
    assert "--size: no default shown" in found


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_parses(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options exist and have fitting values; where it names an experiment, flavor and overrides fit that too."""
    monkeypatch.chdir(ROOT)
    if example.endswith("-completion"):
        return  # it would be carried out while it is parsed; below
    given = parse(example)
    experiment = given.get("experiment")
    if experiment is not None and str(experiment).startswith("experiments/"):
        load_experiment(Path(experiment), given.get("flavor"), given.get("overrides") or ())


@pytest.mark.parametrize(
    "example",
    ["rewardgen train --fast experiments/uso_srl.yaml", "rewardgen sample x.yaml --num-steps 0", "rewardgen worlds"],
)
def test_the_check_of_examples_catches(example: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whose click it is depends on typer's version
        parse(example)
    assert "UsageError" in [kind.__name__ for kind in type(caught.value).__mro__]


def in_a_shell(body: str, **environment: str) -> str:
    """What Python prints for `body` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", body],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80", "TERM": "dumb"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CALL = """
import sys
from rewardgen.cli import main
sys.argv = ["rewardgen"]
for path in {paths!r}:
    try:
        main(path)
    except SystemExit as stopped:
        assert not stopped.code, stopped.code
heavy = {{"torch", "numpy", "PIL", "transformers", "diffusers"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_of_every_command_is_shown_without_torch() -> None:
    paths = [[*path.split()[1:], "--help"] for path in COMMANDS]
    shown = in_a_shell(CALL.format(paths=paths))
    for example in EXAMPLES:
        assert example.partition(" \\")[0].split("  ")[0] in shown


def complete(words: str) -> list[str]:
    """What bash would offer for the last word."""
    where = str(len(words.split(" ")) - 1)
    environment = {"_REWARDGEN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": where}
    return in_a_shell(CALL.format(paths=[None]), **environment).split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("rewardgen sa", {"sample"}),
        ("rewardgen score a.png --reward bri", {"brightness"}),
        ("rewardgen train experiments/uso_srl.yaml --flavor ", {"tiny", "flux-dev"}),
        ("rewardgen sample experiments/uso_srl.yaml -f fl", {"flux-dev"}),
        ("rewardgen train nowhere.yaml --flavor ", set()),
        ("rewardgen train --flavor ", set()),
    ],
)
def test_the_shell_completes_without_torch(words: str, offered: set[str]) -> None:
    assert set(complete(words)) == offered


def test_the_completion_script_is_printed() -> None:
    script = in_a_shell(
        CALL.format(paths=[["--show-completion", "bash"]]), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )
    assert re.search(r"complete .*rewardgen", script)


def test_completed_rewards_are_those_that_can_be_used() -> None:
    def usable(name: str) -> bool:
        try:
            plugins.resolve("rewards", name)
        except ConfigError:
            return False
        return True

    assert completion.rewards() == [name for name in plugins.bundled("rewards") if usable(name)]
