"""Which files of a folder stay at home: the patterns of `.gitignore` and `.rayignore`, read as git reads them.

Ray has a reader of its own within its private modules, and follows only the files below the folder that travels. Here
the choice is made before anything is uploaded, so it must be ours: what is checked is what travels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rewardgen.errors import UserError

IGNORE_FILES = (".gitignore", ".rayignore")
"""In each folder; of two patterns the later one decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """One line of an ignore file.

    Args:
        folder: where the file lies; the pattern says nothing of what is outside.
        parts: its words between slashes; `**` stands for any number of folders.
        excludes: False for a line that begins with `!`.
        only_folders: whether it ends with a slash.
        line: as written, for messages.
    """

    folder: Path
    parts: tuple[str, ...]
    excludes: bool
    only_folders: bool
    line: str

    def matches(self, path: Path, is_folder: bool) -> bool:
        """Whether the pattern speaks of this very path (not of what is inside it)."""
        if (self.only_folders and not is_folder) or not path.is_relative_to(self.folder):
            return False
        return _match(self.parts, path.relative_to(self.folder).parts)


def parse(text: str, folder: Path) -> list[Pattern]:
    """The patterns of an ignore file that lies in `folder`."""
    return [pattern for line in text.splitlines() if (pattern := _parse_line(line, folder)) is not None]


def read(folder: Path) -> list[Pattern]:
    """The patterns of a folder's ignore files. Raises UserError for one that is no text."""
    found: list[Pattern] = []
    for name in IGNORE_FILES:
        path = folder / name
        if path.is_file():
            try:
                found += parse(path.read_text(encoding="utf-8"), folder)
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read as text: {error}") from error
    return found


def above(folder: Path) -> list[Pattern]:
    """The patterns that a git repository around `folder` has for it, outermost first; none outside of one."""
    chain = []
    for parent in folder.parents if not (folder / ".git").exists() else ():
        chain.append(parent)
        if (parent / ".git").exists():
            return [pattern for place in reversed(chain) for pattern in read(place)]
    return []


def decides(patterns: Sequence[Pattern], path: Path, is_folder: bool) -> Pattern | None:
    """The pattern that leaves `path` out, or None. What is inside an ignored folder is for the caller not to visit."""
    last = next((pattern for pattern in reversed(patterns) if pattern.matches(path, is_folder)), None)
    return last if last is not None and last.excludes else None


def _parse_line(line: str, folder: Path) -> Pattern | None:
    text = re.sub(r"(?<!\\) +$", "", line.rstrip("\r\n"))
    excludes = not text.startswith("!")
    text = text if excludes else text[1:]
    if not text or text.startswith("#"):
        return None
    only_folders = text.endswith("/")
    parts = text.strip("/").split("/")
    # Without a slash before its end a pattern holds at every depth.
    if "/" not in text.rstrip("/"):
        parts.insert(0, "**")
    if not all(parts):
        return None
    return Pattern(
        folder=folder,
        parts=tuple(_as_glob(part) for part in parts),
        excludes=excludes,
        only_folders=only_folders,
        line=line.strip(),
    )


def _as_glob(part: str) -> str:
    """One word between slashes, in the form of Python's fnmatch: it knows no backslash, and `!` where git has `^`."""
    escaped = re.sub(r"\\(.)", lambda found: f"[{found[1]}]" if found[1] in "*?[" else found[1], part)
    return escaped.replace("[^", "[!")


def _match(pattern: Sequence[str], path: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(path)
        return any(_match(pattern[1:], path[skipped:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _match(pattern[1:], path[1:])


def always(lines: Iterable[str], folder: Path) -> list[Pattern]:
    """Patterns that hold before any ignore file is read, so that a line `!name` there takes them back."""
    return parse("\n".join(lines), folder)
