"""Weights from files, before anything is made of them: safetensors only, sizes and values told from the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rewardgen import hub
from rewardgen.errors import CheckpointError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError when it is missing or not one."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from error
    return tensors


def _why_unreadable(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as reason:
        return f"cannot be read: {reason.strerror}"
    # What torch.save writes: a zip archive, or in old versions a bare pickle.
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        return "a torch file (pickle), which can run code when it is read; only safetensors files are"
    return f"not a readable safetensors file ({error})"


def resolve_file(source: str) -> Path:
    """A local path, or `owner/repository:path/in/it` on the Hugging Face hub (`hub.fetch`), as a local path.

    Raises:
        CheckpointError: neither of the two can be found.
    """
    try:
        if Path(source).is_file():
            return Path(source)
    except OSError as error:
        raise CheckpointError(f"{source[:80]}: no path that can be: {error.strerror}") from None
    if hub.split(source) is None:
        raise CheckpointError(f"{source}: no such file (on the hub write 'owner/repository:path/in/it')")
    return hub.fetch(source)


def count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many consecutive numbers, from 0, some key shows at the group of `pattern`."""
    found = {int(match.group(1)) for key in tensors if (match := re.match(pattern, key))}
    return next(number for number in range(len(found) + 1) if number not in found)


def need(tensors: Mapping[str, Tensor], key: str, source: str) -> Tensor:
    """A tensor that tells sizes; its own number of dimensions follows from what its key names."""
    if key not in tensors:
        raise CheckpointError(f"{source}: tensor '{key}' is missing")
    tensor = tensors[key]
    ndim = 1 if key.endswith((".scale", ".bias")) else 4 if ".conv" in key else 2
    if tensor.ndim != ndim or not tensor.numel():
        shape = tuple(tensor.shape)
        raise CheckpointError(f"{source}: tensor '{key}' has shape {shape}; it needs {ndim} dimensions, none of them 0")
    return tensor


def check_values(key: str, tensor: Tensor, source: str) -> None:
    """Raise CheckpointError unless a tensor holds finite floating-point numbers."""
    if not tensor.is_floating_point():
        raise CheckpointError(f"{source}: tensor '{key}' holds {tensor.dtype}, not floating-point numbers")
    # The extremes need no copy, and a NaN is its own extreme. There is no arithmetic in 8 bits.
    low, high = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(f"{source}: tensor '{key}' holds values that are not finite")
