"""Gradients through PReLU, up to the side of the kink on which rounding put a unit.

A unit whose input is 0 but for rounding has one of two slopes, and which one differs between machines and between
orders of summation: the reference gradient of a deep network cannot be met to 1e-4 wherever that happened (a single
such unit was seen to move a gradient by 1 %). So the gradient is computed in float64, and where it differs from the
reference, units that are 0 but for rounding may be put on the other side, one by one. That explains a difference only
if a handful of them, named by the difference itself, make it vanish; an error in the network cannot be explained so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

ROUNDING = 1e-5
"""Inputs of a PReLU below it, in standard deviations of the layer, may have either sign in float32."""
MOST_UNITS = 8

Units = dict[str, set[int]]


def gradient_up_to_kinks(
    network: nn.Module, image_13HW: Tensor, probe_1D: Tensor, reference_13HW: Tensor, tolerance: float
) -> tuple[float, float, int]:
    """Gradient of `sum(network(image) * probe)` in the image against a reference; network and image in float64.

    Returns:
        The relative error before and after units were put on the other side, and how many were.
    """
    turned: Units = defaultdict(set)
    errors: list[float] = []
    for _ in range(MOST_UNITS + 1):
        gradient, inputs, upstream = _backward(network, image_13HW, probe_1D, turned)
        rest = reference_13HW - gradient
        errors.append(float(rest.abs().max() / reference_13HW.abs().max()))
        if errors[-1] <= tolerance:
            break
        unit = _most_likely(network, inputs, upstream, _tangents(network, image_13HW, rest), turned)
        if unit is None:
            break
        turned[unit[0]].add(unit[1])
    return errors[0], errors[-1], sum(map(len, turned.values()))


@contextmanager
def _at_each_prelu(network: nn.Module, hook: Callable[[str, nn.PReLU, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """`hook(name, layer, input, output)` replaces the output."""

    def bound(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda layer, args, out: hook(name, layer, args[0], out)  # type: ignore[arg-type]

    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.PReLU)]
    handles = [layer.register_forward_hook(bound(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _backward(
    network: nn.Module, image: Tensor, probe: Tensor, turned: Units
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str, layer: nn.PReLU, x: Tensor, out: Tensor) -> Tensor:
        if turned[name]:
            units = torch.tensor(sorted(turned[name]))
            # Adds 0 to the value and the change of slope to the gradient.
            x_U = x.flatten()[units]
            change_U = _change_of_slope(layer, x, units) * (x_U - x_U.detach())
            out = out + torch.zeros_like(out).flatten().index_put((units,), change_U).view_as(out)
        inputs[name], outputs[name] = x.detach(), out
        return out

    image = image.clone().requires_grad_()
    with _at_each_prelu(network, hook):
        value = (network(image) * probe).sum()
    gradient, *upstream = torch.autograd.grad(value, [image, *outputs.values()])
    return gradient, inputs, dict(zip(outputs, upstream, strict=True))


def _change_of_slope(layer: nn.PReLU, x_1CHW: Tensor, units_U: Tensor) -> Tensor:
    channels, height, width = x_1CHW.shape[1:]
    slope_U = layer.weight.expand(channels)[units_U // (height * width)]
    return torch.where(x_1CHW.flatten()[units_U] > 0, slope_U - 1, 1 - slope_U)


def _tangents(network: nn.Module, image: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Derivative of every PReLU input along a direction of the image."""
    tangents: dict[str, Tensor] = {}

    def hook(name: str, _: nn.PReLU, x: Tensor, out: Tensor) -> Tensor:
        tangents[name] = forward_ad.unpack_dual(x).tangent.flatten()
        return out

    with forward_ad.dual_level(), torch.no_grad(), _at_each_prelu(network, hook):
        network(forward_ad.make_dual(image, direction))
    return tangents


def _most_likely(
    network: nn.Module,
    inputs: dict[str, Tensor],
    upstream: dict[str, Tensor],
    tangents: dict[str, Tensor],
    turned: Units,
) -> tuple[str, int] | None:
    """The unit whose turning takes most of the difference away, among those that are 0 but for rounding."""
    candidates = []
    for name, x in inputs.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.PReLU)
        units_U = (x.flatten().abs() < ROUNDING * x.std()).nonzero()[:, 0]
        gain_U = upstream[name].flatten()[units_U] * _change_of_slope(layer, x, units_U) * tangents[name][units_U]
        candidates += [
            (gain, name, unit)
            for gain, unit in zip(gain_U.tolist(), units_U.tolist(), strict=True)
            if unit not in turned[name] and gain > 0
        ]
    return max(candidates)[1:] if candidates else None
