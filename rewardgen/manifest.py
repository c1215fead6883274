"""The manifest: what made a run, so that it can be made again."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rewardgen
from rewardgen.checkpoint import file_sha256
from rewardgen.errors import UserError

MANIFEST = "manifest.json"


def write_manifest(
    folder: Path,
    *,
    experiment: Mapping[str, Any],
    weights: Mapping[str, Path] | None = None,
    seeds: Mapping[str, int] | None = None,
) -> Path:
    """Write `manifest.json`: what made this run. An older one is kept as `manifest-001.json` and so on.

    It holds the experiment, versions, the checkout's commit, the weights' SHA-256, platform, devices and command
    line; no environment variables and no host name, and what looks like a secret is blotted out.

    Args:
        folder: the run's folder, made if missing.
        experiment: the resolved experiment, as JSON.
        weights: files or folders of files that the run reads, by a name of their use.
        seeds: further seeds, by purpose.

    Raises:
        UserError: a file of weights cannot be read, or the manifest not be written.
    """
    try:
        manifest = {
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": [_blot(argument) for argument in sys.argv],
            "versions": _versions(),
            "git": _git(Path(rewardgen.__file__).resolve().parent.parent),
            "platform": {"system": platform.platform(), "machine": platform.machine(), "devices": _devices()},
            "seeds": dict(seeds or {}),
            "weights": {name: _hashes(path) for name, path in (weights or {}).items()},
            "experiment": redact(experiment),
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST
        if path.exists():
            number = next(n for n in range(1, 10**6) if not (folder / f"manifest-{n:03d}.json").exists())
            path.rename(folder / f"manifest-{number:03d}.json")
        path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or folder}: the manifest needs it: {error.strerror}") from error
    return path


_SECRET = re.compile(r"(?i)(^|[_.\-])((api|access|secret|private)_?key|token|secret|password|passwd|credentials?)$")


def redact(value: Any, key: str = "") -> Any:
    """A copy of nested JSON in which strings under keys such as `api_key` or `hub_token` are blotted out."""
    if isinstance(value, Mapping):
        return {name: redact(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner, key) for inner in value]
    return "***" if isinstance(value, str) and _SECRET.search(key) else value


def _blot(argument: str) -> str:
    key, equals, _ = argument.partition("=")
    return f"{key}=***" if equals and _SECRET.search(key) else argument


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "rewardgen": rewardgen.__version__}
    for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _git(checkout: Path) -> dict[str, Any] | None:
    """Commit of the project's own checkout and whether anything differs from it; None outside of one."""

    def ask(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(checkout), *command], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        # An installed package may lie within some other repository, whose commit says nothing.
        if not os.path.samefile(ask("rev-parse", "--show-toplevel"), checkout):
            return None
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _hashes(path: Path) -> dict[str, Any]:
    """Path and SHA-256 of a file, or of each file of a folder by its name there."""
    if path.is_file():
        return {"path": str(path), "sha256": file_sha256(path)}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise UserError(f"{path}: there are no weights")
    return {"path": str(path), "sha256": {file.relative_to(path).as_posix(): file_sha256(file) for file in files}}
