"""A bounded memory of encodings, so that a picture or a prompt seen before is not encoded again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

CACHE_BYTES = 1 << 30


def content_hash(image_3HW: Tensor) -> str:
    """A digest of a picture's values, shape and precision."""
    tensor = image_3HW.detach().to("cpu").contiguous()
    digest = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
    digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class EncodingCache:
    """Tensors by kind and key, at rest on the CPU. The least recently used go once all exceed `max_bytes`."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, str], tuple[Tensor, ...]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, kind: str, key: str, encode: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The entry of (kind, key), made by `encode` where it is not there."""
        if (kind, key) in self._entries:
            self._entries.move_to_end((kind, key))
            return self._entries[kind, key]
        entry = tuple(tensor.detach().to("cpu") for tensor in encode())
        self._entries[kind, key] = entry
        self._bytes += _size(entry)
        while self._bytes > self.max_bytes:
            self._bytes -= _size(self._entries.popitem(last=False)[1])
        return entry

    def clear(self) -> None:
        self._entries.clear()
        self._bytes = 0


def _size(entry: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry)
