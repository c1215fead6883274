"""Examples from Hugging Face datasets: of the hub, in local folders, or in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self, cast

from torch import Tensor

from rewardgen.data.images import ImageError, decode_image, load_image, picture_size
from rewardgen.data.jsonl import DatasetError, check_limit
from rewardgen.errors import nearest
from rewardgen.types import Example

_REFERENCES = {"content": "content_refs", "style": "style_refs", "identity": "identity_refs"}


class HuggingFaceDataset:
    """Rows of a dataset with columns for prompt, references and target, decoded when they are asked for.

    A column of pictures holds what `datasets` calls an `Image`, a list of them, or paths. Columns of the default names
    may be absent; one that is named must be there. A row is named after the `id` column, else after its number.

    Args:
        path: hub id, folder written by `save_to_disk`, or folder that `load_dataset` reads (Parquet, JSON, pictures).
        name: configuration of the dataset.
        split: its split.
        revision: commit, tag or branch on the hub.
        prompt, content, style, identity, target, id: names of the columns; null leaves that field empty.
        extras: columns that rewards get under their own names (`Example.extras`), such as the `label` that a judge is
            taught with; null hands on all others that hold no bytes (pictures, sound). Class labels come by name. A
            column `extras` of mappings stands for what it holds, as in JSON Lines.
        limit: use the first `limit` rows only.

    Raises:
        DatasetError: `datasets` is not installed, or there is no such dataset, split or column.
    """

    read_ahead: ClassVar[bool] = True
    """Examples may be read by another thread, see `read_ahead.py`."""

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        prompt: str | None = "prompt",
        content: str | None = "content",
        style: str | None = "style",
        identity: str | None = "identity",
        target: str | None = "target",
        id: str | None = "id",
        extras: list[str] | None = None,
        limit: int | None = None,
    ) -> None:
        check_limit(limit)  # before anything is fetched
        columns = {"prompt": prompt, "content": content, "style": style, "identity": identity}
        columns |= {"target": target, "id": id}
        self._take(_load(path, name, split, revision), path, columns, extras, limit)

    @classmethod
    def check_arguments(cls, *, limit: int | None, **_: Any) -> None:
        """Refuse values before anything is fetched. Raises DatasetError."""
        check_limit(limit)

    @classmethod
    def from_dataset(cls, rows: Any, *, extras: list[str] | None = None, **columns: str | None) -> Self:
        """Examples of a `datasets.Dataset` in memory; `extras` and `columns` as in the constructor."""
        self = cls.__new__(cls)
        defaults = {key: key for key in ("prompt", *_REFERENCES, "target", "id")}
        self._take(rows, "the dataset", defaults | columns, extras, None)
        return self

    def _take(
        self, rows: Any, place: str, columns: Mapping[str, str | None], extras: list[str] | None, limit: int | None
    ) -> None:
        there = list(rows.column_names)
        for key, column in columns.items():
            if column is not None and column != key and column not in there:
                hint = nearest(column, there) or f" There are: {', '.join(there)}."
                raise DatasetError(f"{place}: {key}: there is no column '{column}'.{hint}")
        self._columns = {key: column for key, column in columns.items() if column in there}
        if not self._columns.keys() - {"id"}:
            raise DatasetError(f"{place}: none of its columns is known: {', '.join(there)}; name them in `args`")
        # As Arrow holds them: pictures stay bytes, for our own reader turns, checks and names what it reads.
        self._rows = rows.select(range(min(limit or len(rows), len(rows)))).with_format("arrow")
        if not len(self._rows):
            raise DatasetError(f"{place}: the dataset has no rows")
        left = [name for name in there if name not in self._columns.values()]
        for name in extras or ():
            if name not in left:
                what = "is another field's" if name in there else f"is not there.{nearest(name, there)}"
                raise DatasetError(f"{place}: extras: the column '{name}' {what}")
        kinds = self._rows.features.arrow_schema
        self._extras = [name for name in left if _holds_no_bytes(kinds.field(name).type)] if extras is None else extras
        # Views of what is needed: the other columns' bytes are not even touched.
        self._asked = self._rows.select_columns([*dict.fromkeys([*self._columns.values(), *self._extras])])
        target = self._columns.get("target")
        self._targets = None if target is None else self._rows.select_columns([target])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """The example of row `index`. Raises ImageError or DatasetError for what cannot be read."""
        row = self._asked[int(index) : int(index) + 1].to_pylist()[0]
        found = {key: row[column] for key, column in self._columns.items()}
        name = str(found["id"]) if found.get("id") not in (None, "") else f"{index:06d}"
        target = found.get("target")
        references: dict[str, Any] = {
            field: tuple(_picture(value, f"row {name}: {self._columns[key]}") for value in _as_list(found.get(key)))
            for key, field in _REFERENCES.items()
        }
        return Example(
            id=name,
            prompt=found.get("prompt") or "",
            target=None if target is None else _picture(target, f"row {name}: {self._columns['target']}"),
            extras=self._extras_of(row),
            **references,
        )

    def _extras_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in self._extras:
            value, kind = row[name], self._rows.features[name]
            if name == "extras" and isinstance(value, Mapping):
                found |= value
            elif hasattr(kind, "int2str") and isinstance(value, int):
                found[name] = kind.int2str(value) if value >= 0 else None  # the library writes -1 where none is known
            else:
                found[name] = value
        return found

    def target_size(self, index: int) -> tuple[int, int] | None:
        """(height, width) of the target of row `index` without decoding it, None where there is none.

        Of the row only the target's head is read (`picture_size`). Raises ImageError or DatasetError.
        """
        if self._targets is None:
            return None
        import pyarrow

        cell = self._targets[int(index) : int(index) + 1].column(0)[0]
        place = f"row {index:06d}: {self._columns['target']}"
        content = cell["bytes"] if isinstance(cell, pyarrow.StructScalar) and "bytes" in cell else None
        if content is not None and content.is_valid:
            return picture_size(pyarrow.BufferReader(content.as_buffer()), place)
        value = cell.as_py()
        path = value.get("path") if isinstance(value, Mapping) else value
        if value is None:
            return None
        if not isinstance(path, str):
            raise _no_picture(value, place)
        try:
            with Path(path).open("rb", buffering=0) as file:
                return picture_size(cast(BinaryIO, file), path)
        except OSError as error:
            raise ImageError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None


def _holds_no_bytes(kind: Any) -> bool:
    """Whether an Arrow type is, all the way down, something else than bytes."""
    import pyarrow

    within = [kind.field(place).type for place in range(kind.num_fields)]
    tests = (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_fixed_size_binary)
    return not any(test(kind) for test in tests) and all(map(_holds_no_bytes, within))


def _load(path: str, name: str | None, split: str, revision: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise DatasetError("Hugging Face datasets need `datasets`: pip install -e '.[hub]' in the checkout") from None
    folder = Path(path).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(folder))
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise DatasetError(f"{path}: there is no split '{split}'.{nearest(split, found)}")
                found = found[split]
            return found
        # Never code from a repository: `datasets` reads data files alone from version 4 on.
        return datasets.load_dataset(str(folder) if folder.is_dir() else path, name, split=split, revision=revision)
    except DatasetError:
        raise
    except Exception as error:
        # The library raises what its file formats, the hub and the network raise.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DatasetError(f"{path}: the dataset cannot be loaded: {reason}") from None


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _picture(value: Any, place: str) -> Tensor:
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return decode_image(value["bytes"], place)
    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(path, str):
        return load_image(Path(path))
    raise _no_picture(value, place)


def _no_picture(value: Any, place: str) -> DatasetError:
    return DatasetError(f"{place}: a {type(value).__name__} is no picture")
