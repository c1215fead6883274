"""What a reward computes once: the embeddings of references and texts, which no training step changes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

CACHED = 4096
"""Embeddings that one cache keeps; the least recently used makes room."""


class TensorCache:
    """The most recently used tensors by key, made without gradient."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Tensor], limit: int = CACHED) -> Tensor:
        """The tensor of a key, made if it is not kept, and usable for gradients of others whatever the mode."""
        if key not in self._kept:
            with torch.inference_mode(False), torch.no_grad():
                self._kept[key] = make()
        self._kept.move_to_end(key)
        if len(self._kept) > limit:
            self._kept.popitem(last=False)
        return self._kept[key]


def digest(*tensors: Tensor | None) -> bytes:
    """A code of the tensors' content, types and shapes; the same picture has the same code wherever it lies."""
    code = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if tensor is None:
            code.update(b"none")
            continue
        content = tensor.detach().cpu().contiguous()
        code.update(f"{content.dtype}{tuple(content.shape)}".encode())
        code.update(content.flatten().view(torch.uint8).numpy().data)
    return code.digest()
