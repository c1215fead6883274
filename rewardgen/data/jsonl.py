"""Examples from a JSON Lines file: one object a line, pictures as paths relative to the file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from rewardgen.data.images import ImageError, load_image, picture_size
from rewardgen.errors import UserError, nearest
from rewardgen.strict_yaml import show
from rewardgen.types import Example

_LISTS = {"content": "content_refs", "style": "style_refs", "identity": "identity_refs"}
_KEYS = ("id", "prompt", *_LISTS, "target", "extras")
_MAX_FAULTS = 10


class DatasetError(UserError):
    """A dataset file that cannot be used; names the lines."""


def check_limit(limit: int | None) -> None:
    """Raise DatasetError for a limit that leaves no example."""
    if limit is not None and limit < 1:
        raise DatasetError(f"limit: {limit} examples; at least 1 is needed")


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    prompt: str
    refs: dict[str, tuple[Path, ...]]
    target: Path | None
    extras: dict[str, Any]


class JsonlDataset:
    """Rows `{"id", "prompt", "content", "style", "identity", "target", "extras"}`, every key optional.

    `content`, `style` and `identity` hold a path or a list of paths, `target` a path, `extras` a mapping. Paths are
    relative to the JSON Lines file. A row without `id` is named after its line. The file is checked as a whole when
    the dataset is made, pictures are decoded when an example is asked for.

    Args:
        path: the JSON Lines file (UTF-8; empty lines are passed over).
        limit: use the first `limit` rows only.

    Raises:
        DatasetError: an unreadable file, or up to ten faulty rows with their line numbers.
    """

    read_ahead: ClassVar[bool] = True
    """Examples may be read by another thread, see `read_ahead.py`."""

    def __init__(self, path: str, limit: int | None = None) -> None:
        self.path = _at_home(path)
        check_limit(limit)
        self._rows = _read(self.path)[:limit]

    @classmethod
    def check_arguments(cls, *, limit: int | None, **_: Any) -> None:
        """Refuse values before the file is read. Raises DatasetError."""
        check_limit(limit)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """The example at `index`, its pictures [3, H, W] in [0, 1]. Raises ImageError for an unreadable picture."""
        row = self._rows[index]
        refs = {_LISTS[key]: tuple(load_image(path) for path in paths) for key, paths in row.refs.items()}
        target = load_image(row.target) if row.target else None
        return Example(id=row.id, prompt=row.prompt, target=target, extras=row.extras, **refs)

    def target_size(self, index: int) -> tuple[int, int] | None:
        """(height, width) of the target at `index` without decoding it, None where there is none."""
        target = self._rows[index].target
        if target is None:
            return None
        try:
            with target.open("rb", buffering=0) as file:
                return picture_size(cast(BinaryIO, file), str(target))
        except OSError as error:
            raise ImageError(f"{target}: cannot be read: {(error.strerror or str(error)).lower()}") from None


def _read(path: Path) -> list[_Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no such dataset file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DatasetError(f"{path}: the dataset cannot be read: {(reason or str(error)).lower()}") from None
    rows: list[_Row] = []
    faults: list[str] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line, number, path.parent)
            if row.id in first_line:
                raise ValueError(f"the id '{show(row.id)}' stands on line {first_line[row.id]} already")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            continue
        first_line[row.id] = number
        rows.append(row)
    if faults:
        more = [f"and {len(faults) - _MAX_FAULTS} more faulty lines"] if len(faults) > _MAX_FAULTS else []
        raise DatasetError("\n  ".join([f"{path}: faulty rows", *faults[:_MAX_FAULTS], *more]))
    if not rows:
        raise DatasetError(f"{path}: the dataset has no rows")
    return rows


def _parse(line: str, number: int, folder: Path) -> _Row:
    """One row; ValueError says what is wrong with it."""
    try:
        row = json.loads(line, object_pairs_hook=_once, parse_constant=_no_number)
        _check_text(row)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg.lower()} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("a row must be an object")
    for key in row:
        if key not in _KEYS:
            raise ValueError(
                f"unknown key '{show(key)}'.{nearest(key, _KEYS) or ' There are: ' + ', '.join(_KEYS) + '.'}"
            )
    for key in ("id", "prompt"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"'{key}' must be text")
    if not isinstance(row.get("extras", {}), dict):
        raise ValueError("'extras' must be an object")
    target = row.get("target")
    return _Row(
        id=row.get("id") or f"{number:06d}",
        prompt=row.get("prompt", ""),
        refs={key: tuple(_path(value, key, folder) for value in _as_list(row.get(key))) for key in _LISTS},
        target=None if target is None else _path(target, "target", folder),
        extras=row.get("extras", {}),
    )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _path(value: Any, key: str, folder: Path) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError(f"'{key}' must be a path or a list of paths" if key != "target" else "'target' must be a path")
    place = folder / _at_home(value)
    try:
        there = place.is_file()
    except OSError as error:
        raise ValueError(f"'{key}': no path that can be: {(error.strerror or str(error)).lower()}") from None
    if not there:
        raise ValueError(f"'{key}': there is no picture {show(str(place), 300)}")
    return place


def _at_home(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # nobody of that name has a home here
        return Path(path)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of two equal keys; which one was meant is not ours to say."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{show(next(name for name in names if names.count(name) > 1))}' stands twice")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"not JSON: {name} is no number of it")


def _check_text(value: Any) -> None:
    """Refuse text that is none: half a surrogate pair cannot be written to any file again."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_text(key)
            _check_text(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner)
    elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("text with half a surrogate pair, which is no character")
