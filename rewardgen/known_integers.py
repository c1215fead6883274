"""Values of integers that a dry run knows: those made of integers alone, such as positions, sizes and tokens.

A model of pictures and text looks at them to see how long its sequences are. They are few, so each operation on them
is done twice: on tensors without memory, and on real ones that lie beside these. Whatever depends on a picture, on
chance or on a floating-point number is not known.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_any, tree_flatten, tree_leaves, tree_map, tree_map_only

MOST = 1 << 20
"""Elements of the largest tensor whose values are kept."""
_INTEGERS = (torch.int64, torch.int32)
_ATEN = torch.ops.aten
_MAKERS = (_ATEN.arange, _ATEN.full, _ATEN.ones, _ATEN.scalar_tensor, _ATEN.zeros)


def value(tensor: Tensor) -> Tensor | None:
    """The real tensor that a fake one stands for, None where it is not known."""
    found = getattr(tensor, "_known", None)
    if found is not None:
        return cast(Tensor, found)
    return tensor if type(tensor) is Tensor and tensor.dtype in _INTEGERS else None


def places(mask: Tensor) -> list[Tensor] | None:
    """Where a mask is set, one tensor for each of its dimensions; None where it is not known."""
    known = value(mask)
    if known is None:
        return None
    with _disable_current_modes():
        found = known.nonzero(as_tuple=True)
    return [cast(Tensor, faked(indices)) for indices in found]


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives on the real values: integers, flags, or a plain number; None where it is not known."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not leaves and (func.overloadpacket not in _MAKERS or not _makes_integers(func, args, kwargs)):
        return None
    if any(leaf.numel() > MOST or value(leaf) is None for leaf in leaves):
        return None
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None
    with _disable_current_modes():
        real_args, real_kwargs = tree_map_only(Tensor, value, (args, kwargs))
        found = func(*real_args, **(real_kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {})))
    return None if tree_any(_is_something_else, found) else found


def remember(result: Any, known: Any) -> None:
    """Keep the real values beside the fake ones, or, where there are none, forget those of before."""
    if known is None:
        for leaf in tree_leaves(result):
            if hasattr(leaf, "_known"):
                del leaf._known
        return
    for leaf, real in zip(tree_flatten(result)[0], tree_flatten(known)[0], strict=True):
        if isinstance(leaf, FakeTensor):
            leaf._known = real  # type: ignore[attr-defined]


def faked(known: Any) -> Any:
    """Tensors without memory for real ones, which they remember."""

    def one(real: Any) -> Any:
        if not isinstance(real, Tensor):
            return real
        fake = torch.empty(real.shape, dtype=real.dtype)
        fake._known = real  # type: ignore[attr-defined]
        return fake

    return tree_map(one, known)


def _makes_integers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a maker of tensors makes few integers: of their type, or by default of its numbers'."""
    dtype = kwargs.get("dtype")
    numbers = [leaf for leaf in tree_leaves(args) if isinstance(leaf, int | float) and not isinstance(leaf, bool)]
    by_default = func.overloadpacket is _ATEN.arange and all(isinstance(number, int) for number in numbers)
    if dtype not in _INTEGERS and not (dtype is None and by_default):
        return False
    sizes = [max(1, abs(int(number))) for number in numbers]
    return math.prod(sizes) <= MOST**2 and max(sizes, default=1) <= MOST


def _is_something_else(found: Any) -> bool:
    if isinstance(found, Tensor):
        return found.dtype not in (*_INTEGERS, torch.bool) or found.numel() > MOST
    return not isinstance(found, int | bool)
