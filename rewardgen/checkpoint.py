"""Saving and resuming: a run can die at any instant and its last good checkpoint stays whole.

A checkpoint is a folder `step-000123` with `tensors.safetensors` and `state.json`; the latter holds the state, the
size and SHA-256 of the tensors, and a SHA-256 of itself. It is written beside its place and renamed into it, so a
folder of that name is complete; hashes tell what happened to it afterwards.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewardgen.errors import CheckpointError

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

FORMAT, VERSION = "rewardgen-checkpoint", 1
TENSORS, STATE = "tensors.safetensors", "state.json"
# Names no checkpoint has: being written, being replaced by another of its step, being removed.
_WRITING, _REPLACED, _REMOVING = ".writing-", ".replaced-", ".removing-"
_NAME = re.compile(r"(?:\.replaced-)?step-(\d{6,})")


def save_checkpoint(folder: Path, *, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Json]) -> Path:
    """Write `folder/step-000123`, whole or not at all, and return it.

    A checkpoint of the same step is replaced. What dead writers left behind is removed. A folder has one writer at
    a time.

    Args:
        folder: the run's folder of checkpoints, made if missing.
        step: training step, at least 0.
        tensors: any devices and dtypes; tensors that share memory are stored one by one.
        state: all else, as JSON.

    Raises:
        CheckpointError: it could not be written (disk full, not permitted, another writer); what was there is intact.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative")
    target = checkpoint_path(folder, step)
    temporary = folder / f"{_WRITING}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_writer(folder):
            _tidy(folder)
            try:
                temporary.mkdir()
                _write(temporary, step, tensors, state)
                _put_in_place(temporary, target)
            except BaseException:
                _restore(folder, target)
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            _tidy(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: the checkpoint could not be written: {_reason(error)}") from error
    return target


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint's tensors (on the CPU) and state, after checking both against their hashes.

    Raises:
        CheckpointError: a file is missing, damaged or of another format; names the file and the fault.
    """
    document = _read_state(path)
    _check_tensors(path, document)
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / TENSORS}: cannot be read: {_reason(error)}") from error
    state: dict[str, Any] = document["state"]
    return tensors, state


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a training step lies."""
    return folder / f"step-{step:06d}"


def checkpoint_step(path: Path) -> int:
    """The training step in a checkpoint's name. Raises CheckpointError for another name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path}: not a checkpoint's name; expected one such as 'step-000123'")
    return int(match[1])


def latest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step, or None; damaged ones are skipped with a warning."""
    for path in _checkpoints(folder):
        try:
            _check_tensors(path, _read_state(path))
        except CheckpointError as error:
            warnings.warn(f"skipped a damaged checkpoint: {error}", stacklevel=2)
        else:
            return path
    return None


def has_checkpoints(folder: Path) -> bool:
    """Whether a folder holds any checkpoint, whole or not."""
    return bool(_checkpoints(folder))


def prune_checkpoints(folder: Path, keep_last: int, keep: Collection[Path] = ()) -> list[Path]:
    """Remove all but the `keep_last` newest whole checkpoints and those in `keep`; returns the removed.

    A damaged one does not count as whole (by its size, hashes are not computed). One newer than the oldest that is
    kept stays for inspection.

    Raises:
        CheckpointError: one could not be removed.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; the newest checkpoint is always kept")
    spared, whole, removed = {path.resolve() for path in keep}, 0, []
    for path in _checkpoints(folder):
        if whole < keep_last:
            whole += _looks_whole(path)
        elif path.resolve() not in spared:
            # Renamed first: a checkpoint that is half removed must not look like a damaged one.
            gone = folder / f"{_REMOVING}{path.name.lstrip('.')}"
            try:
                shutil.rmtree(gone, ignore_errors=True)
                path.rename(gone)
                shutil.rmtree(gone)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be removed: {_reason(error)}") from error
            removed.append(path)
    return removed


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Json]) -> None:
    path = folder / TENSORS
    save_file(_unshared(tensors), path, metadata={"format": "pt"})
    try:
        # As it will be read back: keys become strings and tuples lists, and the hash is of that.
        plain = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state of step {step} cannot be saved as JSON: {error}") from error
    document = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "tensors": {"bytes": path.stat().st_size, "sha256": file_sha256(path)},
        "state": plain,
    }
    document["sha256"] = _self_hash(document)
    with (folder / STATE).open("x", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
    for name in (path, folder / STATE, folder):
        _sync(name)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename into place. Death between the two renames leaves the old one under a name that readers know."""
    if target.exists():
        target.rename(target.with_name(_REPLACED + target.name))
    temporary.rename(target)
    _sync(target.parent)


def _restore(folder: Path, target: Path) -> None:
    replaced = folder / (_REPLACED + target.name)
    if replaced.exists() and not target.exists():
        with contextlib.suppress(OSError):
            replaced.rename(target)


def _tidy(folder: Path) -> None:
    """Remove what dead writers left and finish what they began. Only for the folder's one writer."""
    for path in folder.glob(f"{_REPLACED}*"):
        _restore(folder, folder / path.name.removeprefix(_REPLACED))
    for prefix in (_WRITING, _REPLACED, _REMOVING):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when a process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{folder}: another process writes checkpoints here; give each run a folder of its own"
            raise CheckpointError(message) from None
        except OSError:
            # Some network file systems have no locks on folders; the rename is atomic without.
            pass
        yield
    finally:
        os.close(descriptor)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which shares memory with another: safetensors refuses such."""
    seen: set[int] = set()
    alone: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        alone[name] = tensor
    return alone


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first; of one step the one in its place before the one it was to replace."""
    found = [path for path in folder.glob("*step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (checkpoint_step(path), not path.name.startswith(".")), reverse=True)


def _read_state(path: Path) -> dict[str, Any]:
    file = path / STATE
    try:
        document = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a state of '{FORMAT}'")
    if document.get("version") != VERSION:
        found = document.get("version")
        raise CheckpointError(
            f"{file}: format version {found!r}, this rewardgen reads {VERSION}; use the one that wrote it"
        )
    try:
        whole = document.pop("sha256", None) == _self_hash(document)
    except ValueError:  # NaN or infinity, which is never written
        whole = False
    if not whole:
        raise CheckpointError(f"{file}: damaged: its content does not match its SHA-256")
    return document


def _check_tensors(path: Path, document: Mapping[str, Any]) -> None:
    file, expected = path / TENSORS, document["tensors"]
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{file}: damaged: {size} bytes instead of {expected['bytes']}")
        if file_sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: damaged: its content does not match its SHA-256")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {_reason(error)}") from error


def _looks_whole(path: Path) -> bool:
    try:
        return bool((path / TENSORS).stat().st_size == _read_state(path)["tensors"]["bytes"])
    except (CheckpointError, OSError):
        return False


def _self_hash(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
