"""Seconds by phase, memory and operations of a step."""

from __future__ import annotations

import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Clock:
    """Measures phases. On CUDA by events in the stream: nothing waits for the GPU until the times are asked for.

    There a phase lasts from when the GPU has done all before it to when it has done what the phase asked for. Work of
    the host that the GPU need not wait for takes no time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's duration in seconds to the phase."""
        begin, event = time.perf_counter(), self._event()
        try:
            yield
        finally:
            after = self._event()
            if event is None or after is None:
                self._add(name, time.perf_counter() - begin)
            else:
                self._events.append((name, event, after))

    @property
    def seconds_by_phase(self) -> dict[str, float]:
        """Seconds of each phase so far. Waits for the GPU."""
        for name, begin, end in self._events:
            end.synchronize()
            self._add(name, begin.elapsed_time(end) / 1000)
        self._events.clear()
        return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _event(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)
        torch.cuda.current_stream(self.device).record_event(event)
        return event

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
        elsewhere: tensors in other memory than what is counted, such as a dataset's pictures; nor are views of them.
    """

    def __init__(self, resident: Iterable[Tensor] = (), *, elsewhere: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, int] = {}
        self._elsewhere: set[int] = set()
        for storage in {tensor.untyped_storage() for tensor in elsewhere}:
            # What is freed may make room for another storage under the same key.
            weakref.finalize(storage, self._elsewhere.discard, storage._cdata)
            self._elsewhere.add(storage._cdata)
        for tensor in resident:
            self._see(tensor)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(result)
        return result

    def see(self, result: Any) -> None:
        """Take what an operation returned into account."""
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, tuple | list):
            for value in result:
                self.see(value)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._elsewhere:
            return
        if key not in self._known:
            # The storage's Python object lives exactly as long as the storage.
            weakref.finalize(storage, self._free, key)
            self._known[key] = 0
        self.live += size - self._known[key]
        self._known[key] = size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key)


class OperationCounter(TorchDispatchMode):
    """Counts multiplications and additions of products, convolutions and attention while it is entered.

    The formulas are torch's (`torch.utils.flop_counter`), whose own counter follows modules too and is much slower.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(func, args, kwargs or {}, result)
        return result

    def count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Take an operation into account that gave `result`."""
        packet = func.overloadpacket
        if packet in _CPU_ATTENTION:
            shapes = [value.shape for value in args[:4] if isinstance(value, Tensor)]
            self.total += _CPU_ATTENTION[packet](*shapes)
        elif packet in flop_registry:
            formula: Any = flop_registry[packet]
            self.total += int(formula(*args, **kwargs, out_val=result))


def _attention(query: Any, key: Any, value: Any, *_: Any) -> int:
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[2] * (width + value[3]))


def _attention_backward(_grad: Any, query: Any, key: Any, value: Any) -> int:
    """Five products for the forward pass's two: the scores are computed again (as torch counts on CUDA)."""
    return _attention(query, key, value) * 5 // 2


_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Of these torch knows no formula."""
