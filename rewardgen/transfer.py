"""Between host and device: copies that the host does not wait for, and the few answers that it must wait for.

A plain `.to(device)` from the CPU, a tensor made of numbers on a GPU and a tensor turned into a number all stop the
host until the GPU has done everything before them. Within a train step only these functions cross, and only `numbers`
and `score_on_host` wait.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rewardgen.types import Score


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor.to(device, dtype)` without waiting: towards CUDA through pinned memory.

    On the CPU, within one device, and for what carries a gradient, it is `tensor.to`.
    """
    tensor = tensor.to(dtype=dtype or tensor.dtype)
    if tensor.device == device or tensor.device.type != "cpu":
        return tensor.to(device)
    # Pinned memory is given back only when the copy is done: torch's allocator sees to that. Pinning has no gradient.
    pinned = device.type == "cuda" and not tensor.requires_grad
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Scalar tensors as Python floats, exactly; waits once for each device that they lie on."""
    found = [0.0] * len(scalars)
    for device in dict.fromkeys(scalar.device for scalar in scalars):
        places = [place for place, scalar in enumerate(scalars) if scalar.device == device]
        if device.type == "cpu":
            values = [float(scalars[place].detach()) for place in places]
        else:
            values = torch.stack([scalars[place].detach().double() for place in places]).tolist()
        for place, value in zip(places, values, strict=True):
            found[place] = value
    return found


def score_on_host(score: Score) -> Score:
    """A score's values, flags and metrics on the CPU, detached; waits once where the values lie elsewhere."""
    value_B, valid_B = score.value_B.detach(), score.valid_B
    told = {name: value.detach() for name, value in score.metrics.items() if isinstance(value, Tensor)}
    if value_B.device.type != "cpu":
        there, size = value_B.device, len(value_B)
        parts = [value_B, valid_B.to(there), *(value.to(there).reshape(1) for value in told.values())]
        fetched = torch.cat([part.double() for part in parts]).cpu()
        value_B, valid_B = fetched[:size].to(value_B.dtype), fetched[size : 2 * size].bool()
        told = dict(zip(told, fetched[2 * size :], strict=True))
    metrics = {**score.metrics, **{name: float(value) for name, value in told.items()}}
    return dataclasses.replace(score, value_B=value_B, valid_B=valid_B.cpu(), metrics=metrics)
