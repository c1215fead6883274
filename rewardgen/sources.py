"""Where weights and data come from: strings in an experiment that name a bundled asset, a hub file or a local path."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rewardgen import hub
from rewardgen.errors import CheckpointError, ConfigError, nearest
from rewardgen.manifest import is_secret
from rewardgen.strict_yaml import show

ASSETS = Path(__file__).resolve().parent / "world" / "assets"
"""The bundled tiny world: `world:NAME` is a file or folder below it."""

_HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[\w.-]+(/[\w.-]+)*)")
_HUB_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NOT_READ = {"encodings", "cache_dir", "served_model"}
"""Arguments that look like a source and are none: folders to be written, the name of a model on a server."""
_FILE_ENDINGS = {".safetensors", ".json", ".jsonl", ".pt", ".pth", ".onnx", ".bin", ".ckpt", ".yaml", ".txt"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Something an experiment reads.

    Args:
        path: dotted path in the experiment.
        text: as written there; values under keys that name a secret are never taken for sources.
        kind: `world` (bundled), `hub file` (`owner/name:file`), `hub repository` (`owner/name`) or `local`.
        location: where it lies on this machine, None where it is not here (yet).
    """

    path: str
    text: str
    kind: Literal["world", "hub file", "hub repository", "local"]
    location: Path | None


def find_sources(args: Any, path: str) -> Iterator[Source]:
    """Yield every source named in (nested) plug-in arguments. Contacts no host: the hub's cache is looked into."""
    if isinstance(args, Mapping):
        for key, value in args.items():
            if not is_secret(str(key)) and key not in _NOT_READ:
                yield from find_sources(value, f"{path}.{show(str(key))}")
    elif isinstance(args, list | tuple):
        for index, value in enumerate(args):
            yield from find_sources(value, f"{path}.{index}")
    elif isinstance(args, str):
        source = _find(args, path)
        if source is not None:
            yield source


def materialise(args: Any, path: str, *, fetch: bool = True) -> Any:
    """Replace `world:NAME` and `owner/name:file` by paths on this machine, fetching hub files that are not here.

    Args:
        fetch: without it hub files that are not here stay as they are written.

    Raises:
        ConfigError: a bundled asset does not exist.
        CheckpointError: a hub file cannot be had; says where it is named, and what `hub.fetch` says.
    """
    if isinstance(args, Mapping):
        kept = {key: value for key, value in args.items() if is_secret(str(key)) or key in _NOT_READ}
        return {
            key: kept[key] if key in kept else materialise(value, f"{path}.{show(str(key))}", fetch=fetch)
            for key, value in args.items()
        }
    if isinstance(args, list | tuple):
        return [materialise(value, f"{path}.{index}", fetch=fetch) for index, value in enumerate(args)]
    source = _find(args, path) if isinstance(args, str) else None
    if source is None or source.kind in ("local", "hub repository"):
        return args
    if source.kind == "hub file" and source.location is None:
        return str(_fetch(source)) if fetch else args
    require(source)
    return str(source.location)


def require(source: Source) -> None:
    """Raise ConfigError for a bundled asset that is not there; other sources may still arrive."""
    if source.kind == "world" and source.location is None:
        name = source.text.removeprefix("world:")
        there = [str(asset.relative_to(ASSETS)) for asset in ASSETS.rglob("*")] if ASSETS.is_dir() else []
        raise ConfigError(
            f"{source.path}: 'world:{show(name)}' is not among the bundled assets in {ASSETS}.{nearest(name, there)}"
            " `rewardgen world build` makes them."
        )


def _find(text: str, path: str) -> Source | None:
    if text.startswith("world:"):
        place = ASSETS / text.removeprefix("world:")
        inside = _exists(place) and place.resolve().is_relative_to(ASSETS) and place.resolve() != ASSETS
        return Source(path=path, text=text, kind="world", location=place.resolve() if inside else None)
    if (Path(text).suffix in _FILE_ENDINGS and ":" not in text) or text.startswith(("./", "../", "/", "~/")):
        place = _at_home(text)
        return Source(path=path, text=text, kind="local", location=place if _exists(place) else None)
    if match := _HUB_FILE.fullmatch(text):
        return Source(path=path, text=text, kind="hub file", location=hub.cached(match["repo"], match["file"]))
    if _HUB_REPO.fullmatch(text):
        if _exists(Path(text)):
            return Source(path=path, text=text, kind="local", location=Path(text))
        here = hub.cached(text, "model_index.json") or hub.cached(text, "config.json")
        return Source(path=path, text=text, kind="hub repository", location=here.parent if here else None)
    return None


def _at_home(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # nobody of that name has a home here
        return Path(text)


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # not a name that a file can have: too long, say
        return False


def _fetch(source: Source) -> Path:
    try:
        return hub.fetch(source.text)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
