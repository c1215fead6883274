"""Examples from tar shards in WebDataset's layout, read at any place: files of one example share their name's stem."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from rewardgen.data.images import ImageError, decode_image, picture_size
from rewardgen.data.jsonl import DatasetError, check_limit
from rewardgen.strict_yaml import show
from rewardgen.types import Example

_FIELDS = {"content": "content_refs", "style": "style_refs", "identity": "identity_refs"}
_PICTURE = re.compile(r"(?P<field>content|style|identity|target)(\.(?P<number>\d+))?\.(?P<ending>\w+)")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a member's bytes lie in a shard."""

    shard: Path
    name: str
    offset: int
    size: int


@dataclass(slots=True)
class _Entry:
    """The members of one example."""

    meta: _Piece | None = None
    target: _Piece | None = None
    pictures: dict[str, dict[int, _Piece]] = field(default_factory=dict)


class ShardDataset:
    """Tar files with members `KEY.json`, `KEY.target.png`, `KEY.content.png`, `KEY.style.0.jpg`, `KEY.style.1.jpg` ...

    `KEY.json` (or `KEY.txt`, the prompt alone) holds `prompt` and, if need be, `id` and `extras`. Every other member is
    a picture: `target`, or a `content`, `style` or `identity` reference, numbered where there are several. The key is
    what comes before the first dot of a member's name, folders included; in all shards together it is unique.

    The shards' tables of contents are read when the dataset is made, members when an example is asked for. So the
    order is the trainer's, a function of the step: a run that was killed goes on with the very next example.

    Args:
        path: shards, by a pattern with `*` or with a range such as `data/train-{0000..0015}.tar`.
        limit: use the first `limit` examples only.

    Raises:
        DatasetError: no such shard, one that is damaged, or members that make no example.
    """

    read_ahead: ClassVar[bool] = True
    """Examples may be read by another thread, see `read_ahead.py`."""

    def __init__(self, path: str, limit: int | None = None) -> None:
        check_limit(limit)
        self.shards = list(_shards(path))
        entries: dict[str, _Entry] = {}
        home: dict[str, Path] = {}
        for shard in self.shards:
            for key, entry in _index(shard).items():
                if key in home:
                    raise DatasetError(f"{shard}: the example '{show(key)}' stands in {home[key]} already")
                entries[key], home[key] = entry, shard
        if not entries:
            raise DatasetError(f"{path}: the shards hold no examples")
        self._entries = list(entries.items())[:limit]

    @classmethod
    def check_arguments(cls, *, limit: int | None, **_: Any) -> None:
        """Refuse values before a shard is read. Raises DatasetError."""
        check_limit(limit)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        """The example at `index`. Raises ImageError or DatasetError for a member that cannot be read."""
        key, entry = self._entries[index]
        meta = _meta(entry.meta)
        refs = {
            target: tuple(_picture(piece) for _, piece in sorted(entry.pictures.get(name, {}).items()))
            for name, target in _FIELDS.items()
        }
        return Example(
            id=meta.get("id") or key,
            prompt=meta.get("prompt", ""),
            target=None if entry.target is None else _picture(entry.target),
            extras=meta.get("extras", {}),
            **refs,
        )

    def target_size(self, index: int) -> tuple[int, int] | None:
        """(height, width) of the target at `index` without decoding it, None where there is none."""
        piece = self._entries[index][1].target
        if piece is None:
            return None
        try:
            with piece.shard.open("rb", buffering=0) as file:
                return picture_size(cast(BinaryIO, _Member(file, piece)), f"{piece.shard}: {piece.name}")
        except OSError as error:
            raise ImageError(f"{piece.shard}: cannot be read: {(error.strerror or str(error)).lower()}") from None


class _Member(io.RawIOBase):
    """A member of an open shard as a file of its own, of which only what is asked for is read.

    Raises:
        ImageError: the shard ends before the member does.
    """

    def __init__(self, file: RawIOBase, piece: _Piece) -> None:
        if os.fstat(file.fileno()).st_size < piece.offset + piece.size:
            raise ImageError(_cut_off(piece))
        self._file, self._piece, self._at = file, piece, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a place in the member, or beyond its end."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._piece.size}[whence])
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Read what is left of the member, at most as much as the buffer holds."""
        wanted = min(len(buffer), max(0, self._piece.size - self._at))
        self._file.seek(self._piece.offset + self._at)
        content = self._file.read(wanted) or b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _cut_off(piece: _Piece) -> str:
    return f"{piece.shard}: '{show(piece.name)}' is cut off"


def _shards(path: str) -> Iterator[Path]:
    written = str(Path(path).expanduser())
    if match := _BRACES.search(written):
        first, last = match.groups()
        for number in range(int(first), int(last) + 1):
            shard = Path(written[: match.start()] + str(number).zfill(len(first)) + written[match.end() :])
            if not shard.is_file():
                raise DatasetError(f"{shard}: there is no such shard")
            yield shard
        return
    found = sorted(glob.glob(written, recursive=True))
    if not found:
        raise DatasetError(f"{path}: there are no such shards")
    yield from map(Path, found)


def _index(shard: Path) -> dict[str, _Entry]:
    """The examples of a shard by key, in its order. Raises DatasetError."""
    entries: dict[str, _Entry] = {}
    try:
        with tarfile.open(shard, "r:") as tar:  # uncompressed: a member must be reached without what is before it
            for member in tar:
                if member.isfile():
                    _place(entries, _Piece(shard, member.name, member.offset_data, member.size))
    except (OSError, tarfile.TarError) as error:
        raise DatasetError(f"{shard}: no readable uncompressed tar file: {str(error).lower()}") from None
    for key, entry in entries.items():
        for name, pictures in entry.pictures.items():
            if sorted(pictures) != list(range(len(pictures))):
                raise DatasetError(f"{shard}: the pictures {show(key)}.{name}.* are not numbered 0, 1, 2 ...")
    return entries


def _place(entries: dict[str, _Entry], piece: _Piece) -> None:
    folder, _, name = piece.name.rpartition("/")
    stem, _, rest = name.partition(".")
    entry = entries.setdefault(f"{folder}/{stem}" if folder else stem, _Entry())
    match = _PICTURE.fullmatch(rest)
    if rest in ("json", "txt"):
        if entry.meta is not None:
            raise DatasetError(f"{piece.shard}: '{show(piece.name)}' and '{show(entry.meta.name)}' are one example's")
        entry.meta = piece
    elif match is None:
        raise DatasetError(
            f"{piece.shard}: '{show(piece.name)}' is neither KEY.json, KEY.txt, KEY.target.png nor a reference such as"
            " KEY.content.png or KEY.style.0.jpg"
        )
    elif match["field"] == "target":
        entry.target = piece
    else:
        pictures = entry.pictures.setdefault(match["field"], {})
        number = int(match["number"] or 0)
        if number in pictures:
            raise DatasetError(f"{piece.shard}: '{show(piece.name)}' has the number of '{show(pictures[number].name)}'")
        pictures[number] = piece


def _bytes(piece: _Piece) -> bytes:
    try:
        with piece.shard.open("rb") as file:
            file.seek(piece.offset)
            content = file.read(piece.size)
    except OSError as error:
        raise ImageError(f"{piece.shard}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    if len(content) < piece.size:
        raise ImageError(_cut_off(piece))
    return content


def _picture(piece: _Piece) -> Any:
    return decode_image(_bytes(piece), f"{piece.shard}: {piece.name}")


def _meta(piece: _Piece | None) -> dict[str, Any]:
    if piece is None:
        return {}
    place = f"{piece.shard}: '{show(piece.name)}'"
    try:
        text = _bytes(piece).decode("utf-8")
        if piece.name.endswith(".txt"):
            return {"prompt": text.strip()}
        meta = json.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DatasetError(f"{place} is not what its name says: {error}") from None
    kinds = {"id": str, "prompt": str, "extras": dict}
    if not isinstance(meta, dict):
        raise DatasetError(f"{place} must hold an object")
    for key, value in meta.items():
        if key not in kinds or not isinstance(value, kinds[key]):
            raise DatasetError(
                f"{place}: '{show(str(key))}' must be one of id and prompt (text) and extras (an object)"
            )
    return meta
