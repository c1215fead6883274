"""Answers on disk, so that the same pictures, question and model are paid for once."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardgen.errors import ConfigError

_VERSION = 1
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a judge said: `value` in [0, 1], and whether it was read from log-probabilities or from the text."""

    value: float
    by_logprob: bool


class AnswerCache:
    """A folder with one small JSON file for each answer, named by its key.

    A file is written whole under another name first, so that neither a crash nor a second process leaves half of one.
    What is damaged, or was not written by this class, counts as not there. Files may be removed at any time.

    Args:
        folder: made if missing.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(f"cache_dir: {folder} cannot be written: {(error.strerror or '').lower()}") from None

    def get(self, key: str) -> Answer | None:
        """The answer stored under a key (hexadecimal), or None."""
        try:
            with self._place(key).open("rb") as file:
                found = json.loads(file.read(_MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return _answer(found, key)

    def put(self, key: str, answer: Answer) -> None:
        """Store an answer. A full disk costs the entry and nothing else."""
        content = {"version": _VERSION, "key": key, "value": answer.value, "by_logprob": answer.by_logprob}
        place = self._place(key)
        temporary: str | None = None
        try:
            place.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=place.parent, suffix=".part")
            with os.fdopen(handle, "w", encoding="ascii") as file:
                json.dump(content, file, allow_nan=False)
            os.replace(temporary, place)
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _place(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def _answer(found: Any, key: str) -> Answer | None:
    if not isinstance(found, Mapping) or found.get("version") != _VERSION or found.get("key") != key:
        return None
    value, by_logprob = found.get("value"), found.get("by_logprob")
    if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(by_logprob, bool):
        return None
    if not math.isfinite(value) or not 0 <= value <= 1:
        return None
    return Answer(value=float(value), by_logprob=by_logprob)
