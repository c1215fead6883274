"""The house: packaging, pins and habits that no other test would miss."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rewardgen

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"rewardgen": "rewardgen", "rewards": "rewardgen.rewards", "policies": "rewardgen.policies"}
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] not in "#"
)
UNSAFE = {f"{module}.{name}" for module in ("pickle", "dill", "joblib") for name in ("load", "loads", "dump", "dumps")}
UNSAFE |= {"pickle.Unpickler", "pickle.Pickler", "shelve.open", "yaml.load", "yaml.unsafe_load", "eval", "exec"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_is_listed() -> None:
    found = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_bundled_asset_is_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["rewardgen.world"]
    world = ROOT / "rewardgen" / "world"
    packaged = {path for pattern in patterns for path in world.glob(pattern)}
    assets = {path for path in (world / "assets").rglob("*") if path.is_file()}
    assert assets <= packaged, f"not in package-data: {sorted(map(str, assets - packaged))}"


def test_no_bundled_asset_names_a_folder_of_the_machine_that_made_it() -> None:
    texts = {path: path.read_text() for path in (ROOT / "rewardgen" / "world" / "assets").rglob("*.json")}
    assert texts
    assert not [path for path, text in texts.items() if re.search(r'"(/|~|[A-Z]:)[^"]*/[^"]*"', text)]


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pins = {canonical(name): pin for name, pin in PINS.items()}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["dev"]]:
        requirement = Requirement(text)
        pin = pins[canonical(requirement.name)]
        assert requirement.specifier.contains(pin, prereleases=True), f"{text}, but constraints.txt has {pin}"


def test_every_import_is_a_requirement() -> None:
    names = {"pil": "pillow", "yaml": "pyyaml"}
    declared = {canonical(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    extras = PROJECT["project"]["optional-dependencies"]
    declared |= {canonical(Requirement(text).name) for name in extras if name != "dev" for text in extras[name]}
    declared |= {"rewardgen"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                top = module.split(".")[0].lower()
                known = top in sys.stdlib_module_names or canonical(names.get(top, top)) in declared
                assert known, f"{path}: '{module}' is no dependency in pyproject.toml"


def test_the_version_is_one() -> None:
    assert rewardgen.__version__ == version("rewardgen")
    assert requires("rewardgen") is not None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_pickle_and_no_loose_ends(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute | ast.Name):
            assert ast.unparse(node) not in UNSAFE, f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True", f"line {node.lineno}"
        if isinstance(node, ast.FunctionDef):
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            assert not any("no_grad" in name or "inference_mode" in name for name in decorators), node.name
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|NotImplementedError", text)
    assert len(text.splitlines()) <= 400


@pytest.mark.parametrize("module", ["rewardgen.cli", "rewardgen.errors", "rewardgen.strict_yaml", "rewardgen.plugins"])
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_scripts_are_well_formed() -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=False).returncode == 0
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"train", "test"} <= targets
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
