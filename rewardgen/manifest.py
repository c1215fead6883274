"""The manifest: what made a run, so that it can be made again."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
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
    line; no environment variables and no host name, and secrets are blotted out (`redact`). `write_counts` adds what
    the rewards counted.

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
            "command": _blot_command(sys.argv),
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


def write_counts(folder: Path, counts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Add to a run's manifest what its rewards counted; what an earlier call added is replaced.

    So a manifest says of each judge how its answers came, `by_logprob` or `by_text`, and how many failed.
    Where there is no manifest, or a damaged one, nothing is written: the run itself does not depend on it.

    Args:
        folder: the run's folder.
        counts: by `training` and `evaluation`, then by reward or witness, then by what it counts.

    Raises:
        UserError: the manifest cannot be written.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(manifest, dict):
        return
    manifest["counts"] = {part: dict(of) for part, of in counts.items()}
    temporary = folder / f".{MANIFEST}"  # death amid the write must not cost the run its manifest
    try:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: the manifest needs it: {error.strerror}") from error


_SECRET_NAME = (
    r"token(?!s|iz)|(?:api|access|auth|hub|bearer)[_\-]?tokens|secret|password|passwd|passphrase|credential|bearer"
    r"|authorization|(?:api|access|auth|private|account|signing|encryption)[_.\-]?key"
)
_SECRET = re.compile(_SECRET_NAME, re.IGNORECASE)
_IN_URL = re.compile(r"(:/{1,2})[^/?#\s'\"]+@")  # a URL taken for a path has one slash left
# What comes before the name is left out where it can be: each `*` in front of it would cost a pass over long texts.
_PARAMETER = re.compile(rf"([?&](?:[^=&?\s]*(?:{_SECRET_NAME}|signature)[^=&?\s]*|key|sig)=)[^&#\s'\"]+", re.IGNORECASE)
_ENTRY = re.compile(
    rf"((?:{_SECRET_NAME})[\w.\-]{{0,80}}[\"']?\s?[:=]\s?)(\"[^\"]*\"?|'[^']*'?|[^,}}\]\n]+)", re.IGNORECASE
)
_SHORTEST_SECRET = 8
"""Shorter values of environment variables are placeholders such as EMPTY, and words that may stand anywhere."""
BLOT = "***"


def is_secret(key: str) -> bool:
    """Whether a key's name says that its value is a secret: `api_key`, `hub_token`, `password`; not `max_tokens`."""
    return _SECRET.search(key) is not None


def redact(value: Any, key: str = "") -> Any:
    """A copy of nested JSON in which secrets are blotted out.

    These are the strings under keys such as `api_key` or `hub_token` at any depth, numbers under a password or secret,
    and in all other strings what `blot` finds.
    """
    if isinstance(value, Mapping):
        return {name: redact(inner, f"{key}.{name}" if is_secret(key) else str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner, key) for inner in value]
    if isinstance(value, str):
        return BLOT if is_secret(key) else blot(value)
    # A number may be a password; one under `token` or the like counts something.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return BLOT if number and re.search(r"(?i)passw|secret|credential", key) else value


def blot(text: str) -> str:
    """Text without the values of secret environment variables and without credentials in URLs."""
    values = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST_SECRET}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, BLOT)
    return _PARAMETER.sub(rf"\1{BLOT}", _IN_URL.sub(rf"\1{BLOT}@", text))


def blot_entries(text: str) -> str:
    """As `blot`, and without what follows a secret's name: `judge={args: {api_key: ***}}`. For arguments, not prose."""
    key, equals, _ = text.partition("=")
    if equals and is_secret(key):
        return f"{key}={BLOT}"
    return blot(_ENTRY.sub(rf"\1{BLOT}", text))


def _blot_command(arguments: Sequence[str]) -> list[str]:
    """A command line for showing: also the argument after an option such as `--token` goes."""
    after = ["", *arguments]
    return [
        BLOT if before.startswith("-") and "=" not in before and is_secret(before) else blot_entries(argument)
        for before, argument in zip(after, arguments, strict=False)
    ]


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
