"""Seconds by phase, memory and operations of a step."""

from __future__ import annotations

import resource
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode


class Clock:
    """Measures phases, waiting for the accelerator at both ends of each, so that the time falls where it belongs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds_by_phase: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's duration in seconds to the phase."""
        begin = self._now()
        try:
            yield
        finally:
            self.seconds_by_phase[name] = self.seconds_by_phase.get(name, 0.0) + self._now() - begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak_memory_bytes(self) -> int:
        """On CUDA the most memory allocated since this clock was made; elsewhere the process's peak so far."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        # Kilobytes on Linux, bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, storage by storage, while it is entered.

    It sees every operation, also those of backward passes, and works alike for tensors with and without memory
    (`FakeTensorMode`). What allocators and libraries hold beside tensors is not in it. An operation's own scratch
    memory is not either.

    Args:
        resident: tensors that were there before.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}
        for tensor in resident:
            self._see(tensor)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            # The storage's Python object lives exactly as long as the storage.
            weakref.finalize(storage, self._free, key)
            self._known[key] = 0
        self.live += size - self._known[key]
        self._known[key] = size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key)


def operation_counter() -> FlopCounterMode:
    """torch's counter of multiplications and additions in products, convolutions and attention, also on the CPU."""
    own = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            own._scaled_dot_product_flash_attention_for_cpu: _attention,
            own._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[2] * (width + value[3]))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Five products for the forward pass's two: the scores are computed again (as torch counts on CUDA)."""
    return _attention(query, key, value) * 5 // 2
