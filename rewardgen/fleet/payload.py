"""What travels between processes: a value without its tensors, and all its tensors as one flat array of bytes.

One array of bytes is what a cluster's object store shares best: a worker reads it in place, without a copy and
without unpickling it tensor by tensor, and bf16, which NumPy does not know, travels like everything else.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewardgen.rollout import Weights
from rewardgen.types import Example

ALIGNMENT = 64
"""Bytes; each tensor begins at a multiple of it."""
_PIXELS = 4096
"""Elements from which on a float32 tensor is looked at: it may hold a picture of 8 bits."""


@dataclass(frozen=True, slots=True)
class Slot:
    """In place of a tensor: where its bytes lie. `as_bytes`: it held k / 255 in float32, and each k is one byte."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    as_bytes: bool = False

    @property
    def size(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * (1 if self.as_bytes else self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Known:
    """In place of an example that the receiver has already: its index there."""

    index: int


@dataclass(frozen=True, slots=True)
class Record:
    """In place of a dataclass instance. A dataclass may check its fields, and these are not yet what it expects."""

    cls: type[Any]
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Packed:
    """A value on its way. `data` is uint8, one-dimensional, and may be shared with other processes: it is only read."""

    skeleton: Any
    data: np.ndarray[Any, np.dtype[np.uint8]]


def pack(value: Any, known: Sequence[Example] = ()) -> Packed:
    """Copy a value into a form that travels, detached. Later changes of its tensors do not show.

    Float32 tensors whose every element is k / 255, as pictures read from 8 bits are, travel as one byte per element;
    nothing is lost.

    Args:
        value: dataclasses, mappings, tuples and lists down to tensors and to what pickles by itself.
        known: examples that the receiver has; those of the value that are the same objects do not travel.
    """
    index = {id(example): place for place, example in enumerate(known)}
    parts: list[tuple[Slot, Tensor]] = []
    end = 0

    def leaf(found: Any) -> Any:
        nonlocal end
        if isinstance(found, Example):
            return Known(index[id(found)]) if id(found) in index else _NOT_A_LEAF
        if not isinstance(found, Tensor):
            return _NOT_A_LEAF
        tensor = found.detach().cpu().contiguous()
        levels = _levels(tensor)
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        slot = Slot(offset, tuple(tensor.shape), tensor.dtype, levels is not None)
        parts.append((slot, tensor if levels is None else levels))
        end = offset + slot.size
        return slot

    skeleton = _walk(value, leaf)
    data = np.empty(end, dtype=np.uint8)
    for slot, tensor in parts:
        data[slot.offset : slot.offset + slot.size] = tensor.reshape(-1).view(torch.uint8).numpy()
    return Packed(skeleton, data)


def unpack(packed: Packed, known: Sequence[Example] = (), *, device: torch.device | None = None) -> Any:
    """The value of `pack`.

    Tensors are copies of one's own. The exception are those of `Weights`: they are large and only read to be copied
    into parameters, so on the CPU they are views of memory that all workers of a machine may share, where writing in
    place would change the weights of the others.

    Args:
        packed: what came.
        known: as in `pack`.
        device: where tensors go, but for those of `Weights`; None leaves them on the CPU.
    """
    data, place = _tensor_of(packed.data), device or torch.device("cpu")

    def tensor(slot: Slot, *, shared: bool) -> Tensor:
        flat = data[slot.offset : slot.offset + slot.size]
        if slot.as_bytes:
            return (flat.to(torch.float32) / 255).view(slot.shape).to(place)
        # An empty tensor's bytes cannot be viewed as another type.
        view = (flat.view(slot.dtype) if slot.size else torch.empty(0, dtype=slot.dtype)).view(slot.shape)
        return view if shared else view.to(place, copy=True)

    def node(found: Any, shared: bool) -> Any:
        match found:
            case Slot():
                return tensor(found, shared=shared)
            case Known():
                return known[found.index]
            case Record():
                inside = shared or found.cls is Weights
                return found.cls(**{name: node(value, inside) for name, value in found.fields.items()})
            case dict():
                return {key: node(value, shared) for key, value in found.items()}
            case tuple() if hasattr(found, "_fields"):
                return type(found)(*(node(value, shared) for value in found))
            case tuple() | list():
                return type(found)(node(value, shared) for value in found)
        return found

    return node(packed.skeleton, False)


def examples_in(value: Any) -> list[Example]:
    """The examples within a value, in a fixed order; what is packed in reply may leave them out."""
    found: list[Example] = []

    def leaf(inner: Any) -> Any:
        if isinstance(inner, Example):
            found.append(inner)
            return None
        return inner if isinstance(inner, Tensor) else _NOT_A_LEAF

    _walk(value, leaf)
    return found


_NOT_A_LEAF = object()


def _walk(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Copy nested containers, with each value for which `leaf` has something in its place replaced."""
    replaced = leaf(value)
    if replaced is not _NOT_A_LEAF:
        return replaced
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return Record(type(value), {name: _walk(getattr(value, name), leaf) for name in fields})
    if isinstance(value, Mapping):
        return {key: _walk(inner, leaf) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_walk(inner, leaf) for inner in value))
    if isinstance(value, tuple | list):
        return type(value)(_walk(inner, leaf) for inner in value)
    return value


def _levels(tensor: Tensor) -> Tensor | None:
    """Bytes k such that `k / 255` is the tensor, bit for bit; None if there are none."""
    if tensor.dtype != torch.float32 or tensor.numel() < _PIXELS:
        return None
    for part in (tensor.reshape(-1)[:_PIXELS], tensor):  # most are found out by their beginning
        low, high = part.aminmax()
        if not (low >= 0 and high <= 1):
            return None
        levels = (part * 255).round().to(torch.uint8)
        if not torch.equal((levels.to(torch.float32) / 255).view(torch.int32), part.view(torch.int32)):
            return None
    return levels


def _tensor_of(data: np.ndarray[Any, Any]) -> Tensor:
    with warnings.catch_warnings():
        # That it may not be written to: it is not.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(data)
