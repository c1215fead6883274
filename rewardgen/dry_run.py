"""Running real code on tensors that have a shape and a place but no memory, and counting what it would take.

torch's fake tensors carry shapes through every operation, also backwards and under autocast. What they cannot do is
answer for values. Positions, sizes and tokens are integers made of integers alone: their values are carried along
(`known_integers.py`). All other answers are made up, so that code which looks at its numbers runs to its end.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rewardgen import known_integers
from rewardgen.errors import ConfigError
from rewardgen.measure import LiveBytes, OperationCounter


class Observer(TorchDispatchMode):
    """Counts bytes and operations within `dry`. One mode for both: each costs as much as the operations themselves."""

    def __init__(self, resident: Iterable[Tensor], *, elsewhere: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory, self._counter = LiveBytes(resident, elsewhere=elsewhere), OperationCounter()

    def take_operations(self) -> int:
        """Operations since this was last asked."""
        total, self._counter.total = self._counter.total, 0
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.memory.see(result)
        self._counter.count(func, args, kwargs or {}, result)
        return result


class _Answers(TorchDispatchMode):
    """Only answers, see `_answer`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _answer(func, args, kwargs or {})


_ATEN = torch.ops.aten


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives. Where code asks for values that are not known, numbers are 1, flags are up, masks choose
    everything; but `any` finds nothing, since it is asked about what is wrong."""
    known = known_integers.compute(func, args, kwargs)
    if func in (_ATEN._local_scalar_dense.default, _ATEN.equal.default) and known is not None:
        return known
    if func is _ATEN._local_scalar_dense.default:
        if args[0].dtype == torch.bool:
            return not hasattr(args[0], "_of_any")
        return 1.0 if args[0].is_floating_point() else 1
    if func is _ATEN.equal.default:
        return True
    if func is _ATEN.nonzero.default and known is None and args[0].dim() == 1:
        return torch.arange(len(args[0]), device=args[0].device)[:, None]
    if func is _ATEN.index.Tensor:
        args = (args[0], [place for index in args[1] for place in _places(index)])
    try:
        result = func(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException):
        if known is None:
            raise
        result = known_integers.faked(known)
    known_integers.remember(result, known)
    if known is None and func.overloadpacket is _ATEN.any:
        result._of_any = True
    return result


def _places(mask: Tensor | None) -> list[Tensor | None]:
    """Of a mask the indices that it chooses, one tensor for each of its dimensions; another index as it is."""
    if mask is None or mask.dtype != torch.bool:
        return [mask]
    places = known_integers.places(mask)
    if places is not None:
        return [*places]
    if mask.dim() != 1:
        raise ConfigError("a mask of several dimensions chooses values, which a plan cannot follow")
    return [torch.arange(len(mask), device=mask.device)]


class _Pictures:
    """Pictures that leave torch for NumPy or Pillow leave it black, but for a number in their first three values.

    Policies and rewards encode a picture once and find it again by a digest of its values: if all were equally black,
    all examples of a batch would share one encoding.
    """

    def __init__(self) -> None:
        self._number: dict[tuple[int, int], int] = {}
        self._next = 0

    def black(self, tensor: Tensor) -> Any:
        """In place of `Tensor.numpy`; the same number for the same memory, as after `detach`, `view` and the like."""
        import numpy as np

        made = np.zeros(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        if made.dtype == np.uint8 or np.issubdtype(made.dtype, np.floating):
            number, unit = self._number_of(tensor), 1 if made.dtype == np.uint8 else 255
            digits = [number % 256, number // 256 % 256, number // 65536 % 256][: made.size]
            made.flat[: len(digits)] = [digit / unit for digit in digits]
        return made

    def _number_of(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        place = (int(storage._cdata), int(tensor.storage_offset()) * tensor.element_size())
        if place not in self._number:
            weakref.finalize(storage, self._forget, place)  # other memory may come to lie there
            self._number[place], self._next = self._next, self._next + 1
        return self._number[place]

    def _forget(self, place: tuple[int, int]) -> None:
        del self._number[place]


_tensor = torch.tensor


def _tensor_of_numbers(data: Any, **options: Any) -> Tensor:
    """`torch.tensor`, which would look into the memory of tensors that stand in a list."""
    return _tensor(_as_numbers(data), **options)


def _as_numbers(data: Any) -> Any:
    if isinstance(data, list | tuple) and any(isinstance(part, Tensor | list | tuple) for part in data):
        return [part.tolist() if isinstance(part, Tensor) else _as_numbers(part) for part in data]
    return data


@contextmanager
def dry() -> Iterator[None]:
    """Tensors made within have no memory. What functions remembered within is forgotten."""
    _forget()
    pictures = _Pictures()
    quiet = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what fails is raised, or told as not counted
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            _Answers(),  # type: ignore[no-untyped-call]
            mock.patch.object(Tensor, "numpy", lambda tensor: pictures.black(tensor)),
            mock.patch.object(torch, "tensor", _tensor_of_numbers),
            mock.patch.object(nn.Module, "_apply", _apply),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of addresses that mean nothing here
            yield
    finally:
        logging.disable(quiet)
        _forget()


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module.to` and its kin. torch's own way puts new memory under a parameter, which these have none of."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else change(buffer)
    return module


def _forget() -> None:
    for thing in gc.get_objects():
        if type(thing) is functools._lru_cache_wrapper:
            package = (getattr(thing, "__module__", None) or "").partition(".")[0]
            if package not in sys.stdlib_module_names and package not in ("torch", "transformers"):
                thing.cache_clear()
