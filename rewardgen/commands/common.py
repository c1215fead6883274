"""What several commands share: where an experiment lies, pictures by option, a stdout for the answer alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from torch import Tensor

from rewardgen.data.images import load_image
from rewardgen.errors import ConfigError
from rewardgen.run_folder import CONFIG
from rewardgen.types import Example


def experiment_file(place: Path) -> Path:
    """The experiment file at `place`, which may be a run's folder. Raises ConfigError for any other folder."""
    if not place.is_dir():
        return place
    if not (place / CONFIG).is_file():
        raise ConfigError(f"{place} is a folder without {CONFIG}: it is no run's folder; name an experiment file")
    return place / CONFIG


def request(prompt: str, *, content: Sequence[Path], style: Sequence[Path], identity: Sequence[Path]) -> Example:
    """The example that the options describe, with its pictures read. Raises ImageError for the first unreadable one."""

    def pictures(paths: Sequence[Path]) -> tuple[Tensor, ...]:
        return tuple(load_image(path) for path in paths)

    return Example(
        id="request",
        prompt=prompt,
        content_refs=pictures(content),
        style_refs=pictures(style),
        identity_refs=pictures(identity),
    )


@contextlib.contextmanager
def chatter_to_stderr() -> Iterator[TextIO]:
    """Yield stdout for the command's answer; what plug-ins and libraries print meanwhile goes to stderr."""
    answer = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield answer
