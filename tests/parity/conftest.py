"""Numbers of the public reference code, from a fixture set: `pytest tests/parity --fixtures DIR`.

Every size and every case is read from the set itself, so that a set of other sizes runs by the same command.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

DEFAULT_SET = Path(__file__).parents[1] / "fixtures" / "dev"
FOLDER = pytest.StashKey[Path]()
ERRORS = pytest.StashKey[dict[str, float]]()


class FixtureSet:
    """One folder of golden tensors (`*.safetensors`) and numbers (`*.json`), named without their extension."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = self.json("config")

    def path(self, file_name: str) -> Path:
        return self.folder / file_name

    def tensors(self, name: str) -> dict[str, Tensor]:
        return dict(_load_tensors(self.folder / f"{name.removesuffix('.safetensors')}.safetensors"))

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name.removesuffix('.json')}.json").read_text(encoding="utf-8"))


@cache
def _load_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def set_of(config: pytest.Config) -> FixtureSet:
    """The set chosen on the command line; for `pytest_generate_tests`, which runs before any fixture."""
    return FixtureSet(config.stash.get(FOLDER, DEFAULT_SET))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Read `--fixtures DIR`. pytest has a flag of that name, to list its fixtures; followed by a folder it is ours."""
    given = [str(argument) for argument in config.invocation_params.args]
    folder = next((after for flag, after in itertools.pairwise(given) if flag == "--fixtures"), "-")
    if folder.startswith("-"):
        return
    if not (Path(folder) / "config.json").is_file():
        raise pytest.UsageError(f"--fixtures {folder}: no golden fixture set there (it has no config.json)")
    config.stash[FOLDER] = Path(folder)
    config.option.showfixtures = False
    config.args.remove(folder)  # pytest took it for a path to collect


@pytest.fixture(scope="session")
def fixture_set(pytestconfig: pytest.Config) -> FixtureSet:
    return set_of(pytestconfig)


@pytest.fixture(scope="session")
def record_error(pytestconfig: pytest.Config) -> Callable[[str, float], None]:
    """`record_error(group, value)` keeps the largest error of each group for the summary."""
    errors = pytestconfig.stash.setdefault(ERRORS, {})

    def record(group: str, value: float) -> None:
        errors[group] = max(errors.get(group, 0.0), float(value))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    errors = config.stash.get(ERRORS, {})
    if errors:
        terminalreporter.section("largest error against the reference code")
        for group, value in sorted(errors.items()):
            terminalreporter.line(f"{group:<40} {value:.2e}")
