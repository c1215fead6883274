"""Pictures as commands name them: files, folders and patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from rewardgen.data.images import KINDS
from rewardgen.errors import ConfigError


def expand(given: Sequence[str]) -> list[Path]:
    """Picture files: of a folder those directly in it, of a pattern (`*`, `**`, `?`) what it matches, both sorted.

    A name that is not there stays, and is reported with the pictures that cannot be read.

    Raises:
        ConfigError: nothing is given, or a folder or pattern without pictures.
    """
    if not given:
        raise ConfigError("name at least one picture, folder or pattern to score")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in KINDS}
    found: list[Path] = []
    for text in given:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
            matched = sorted(p for p in inside if p.is_file())
        elif glob.has_magic(text) and not path.exists():
            matched = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        else:
            matched = [path]
        if not matched:
            raise ConfigError(f"{text}: {'the folder holds no pictures' if path.is_dir() else 'matches no files'}")
        found += matched
    return found
