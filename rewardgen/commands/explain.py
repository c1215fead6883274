"""`rewardgen score --explain`: what an identity reward saw in each picture, drawn into one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewardgen.data.images import load_image
from rewardgen.errors import ConfigError
from rewardgen.evaluation.faces_grid import explained, stack
from rewardgen.reward import Reward
from rewardgen.types import Example

MOST = 32
"""Pictures that are drawn, the first ones: a file of hundreds is for nobody's eyes."""


def explainer(rewards: Mapping[str, Reward], path: Path, example: Example) -> Any:
    """The first reward that can explain itself.

    Raises:
        ConfigError: none can, there are no identity pictures, or `path` is no place for a PNG file.
    """
    able = [reward for reward in rewards.values() if hasattr(reward, "explain")]
    if not able:
        raise ConfigError(f"--explain: none of {', '.join(rewards)} can explain itself; use --reward matching")
    if not example.identity_refs:
        raise ConfigError("--explain draws faces to their references: name at least one with --identity")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--explain {path}: name a file that ends in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"--explain {path}: there is no folder {path.parent}")
    return able[0]


def save(reward: Any, pictures: Sequence[Path], example: Example, path: Path) -> Path:
    """Draw the matched faces of each picture, one below the other, and write the file; returns its path."""
    pages = [[explained(reward, load_image(name), example, name.name)] for name in pictures[:MOST]]
    try:
        stack(pages).save(path, format="PNG")
    except OSError as error:
        raise ConfigError(f"--explain {path}: cannot be written: {error.strerror or error}") from error
    return path
