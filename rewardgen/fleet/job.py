"""What a job does on the cluster before it trains: which rewardgen is this, and is it the one that was submitted?

`rewardgen submit` writes what it has into `submitted.json`, which travels along; there `python -m rewardgen.fleet.job`
compares. Only the standard library is imported: it must be able to say that the rest is missing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rewardgen

REQUIRED = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "protobuf",
    "numpy",
    "scipy",
    "pillow",
    "pyyaml",
    "pydantic",
    "typer",
    "rich",
    "tensorboard",
)
"""What rewardgen itself needs; rewardgen travels along, these do not."""
COMPARED = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "ray")
"""Whose versions may change a result."""
OLDEST_PYTHON = (3, 11)


def package_folders() -> dict[str, Path]:
    """Folders of the package by their names within it: in a checkout two of them stand beside it."""
    top = Path(rewardgen.__file__).resolve().parent
    folders = {"rewardgen": top}
    for name in ("rewards", "policies"):
        spec = importlib.util.find_spec(f"rewardgen.{name}")
        for place in (spec.submodule_search_locations or [])[:1] if spec else []:
            if not Path(place).resolve().is_relative_to(top):
                folders[f"rewardgen/{name}"] = Path(place).resolve()
    return folders


def package_files() -> dict[str, Path]:
    """Every file of the package by its name in a wheel, such as `rewardgen/rewards/csd.py`."""
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in package_folders().items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and "__pycache__" not in path.parts
    }


def code_digest() -> str:
    """SHA-256 over names and contents of the package's Python files: the same in a checkout and in a wheel of it."""
    digest = hashlib.sha256()
    for name, path in sorted(package_files().items()):
        if path.suffix == ".py":
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def describe(*, any_version: bool = False) -> dict[str, Any]:
    """What is here, as JSON. `any_version`: the other side is to go on also with another rewardgen."""
    return {
        "rewardgen": rewardgen.__version__,
        "code": code_digest(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in COMPARED},
        "any_version": any_version,
    }


def refusals(submitted: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Why the job must not go on, as whole sentences."""
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield f"the cluster's Python is {platform.python_version()} ({sys.executable}); rewardgen needs {oldest}"
    missing = [name for name in REQUIRED if _version(name) is None]
    if missing:
        yield (
            f"the cluster's Python ({sys.executable}) lacks {', '.join(missing)}; install them on every node:"
            f" {sys.executable} -m pip install {' '.join(missing)}"
        )
    if submitted.get("any_version"):
        return
    if submitted["rewardgen"] != here["rewardgen"]:
        what = f"rewardgen {here['rewardgen']}, and {submitted['rewardgen']} submitted the job"
    elif submitted["code"] != here["code"]:
        what = f"another code of rewardgen {here['rewardgen']} than the one that submitted the job"
    else:
        return
    yield (
        f"the cluster runs {what} ({rewardgen.__file__}); submit without --installed, so that yours travels along,"
        " or with --any-version to run what is there"
    )


def lines(submitted: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """What runs, and what differs from where the job was submitted."""
    same = submitted["rewardgen"] == here["rewardgen"] and submitted["code"] == here["code"]
    origin = "as submitted" if same else f"not the submitted {submitted['rewardgen']}"
    yield f"rewardgen {here['rewardgen']} from {rewardgen.__file__}, {origin}"
    found = {"python": here["python"], **here["versions"]}
    theirs = {"python": submitted["python"], **submitted["versions"]}
    shown = ", ".join(f"{name} {value}" for name, value in found.items() if value)
    yield f"{shown} ({sys.executable})"
    differing = [
        f"{name} {value or 'missing'} here, {theirs[name]} there"
        for name, value in found.items()
        if theirs.get(name) and theirs[name] != value
    ]
    if differing:
        yield f"differs from where it was submitted: {'; '.join(differing)}"


def main(arguments: Sequence[str]) -> int:
    """Print what runs here; returns 2 where it must not run, having said why."""
    submitted = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    here = describe()
    for line in lines(submitted, here):
        print(line, flush=True)
    reasons = list(refusals(submitted, here))
    for reason in reasons:
        print(f"error: {reason}", file=sys.stderr, flush=True)
    return 2 if reasons else 0


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
