"""Frozen linear layers of the DiT's blocks: in 8 bits, in CPU memory, or both.

What is trained (a LoRA, a projector) stays as it is; the base only carries activations forward and gradients back to
them. So a layer may keep its weight in any form from which it can be made again: here as one byte a value with a scale
for each output channel, and here or on the device. The weight is made when it is used, in the forward and again in
the backward pass, and autograd keeps none of it.

    W[o, i] = q[o, i] * s[o],  q an integer from -127 to 127,  |W - W_before| <= s / 2

Why our own: the gradient needs the weight alone, so a layer should keep nothing else for it. Of the libraries tried,
torchao 0.18 keeps what it dequantised until the backward pass, which without recomputation is the unquantised model
again; optimum-quanto 0.2.7 keeps each layer's input, refuses autocast with a float32 base, and is on its way out of
diffusers; bitsandbytes 0.50 rounds activations to 8 bits as well on CUDA and not on the CPU, so that its tests here
would say nothing. The first two also report the bytes of the weights before quantisation to whoever counts tensors, as
the memory plan does. diffusers' and accelerate's offloading take weights away after a block's forward pass, and with
them what its backward pass needs.

Shape suffixes: O output channels, I input channels; `...` any.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rewardgen.errors import ConfigError

LEVELS = 127
"""Steps on either side of zero."""


def quantise(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as int8 [O, I] and scales [O, 1], float32, such that their product is off by half a scale at most.

    Scales are numbers that bfloat16 has, so that they are the same in every arithmetic.
    """
    largest_O1 = weight_OI.detach().abs().amax(dim=1, keepdim=True).float()
    scale_O1 = (largest_O1 / LEVELS).to(torch.bfloat16).float()
    scale_O1 = torch.where(scale_O1 > 0, scale_O1, 1.0)  # a channel of zeros
    # The rounded scale may be less than the exact one by 1 / 256: 127.5 levels, which is still within half a step.
    levels_OI = (weight_OI.detach().float() / scale_O1).round().clamp(-LEVELS, LEVELS)
    return levels_OI.to(torch.int8), scale_O1


class FrozenLinear(nn.Module):
    """A linear layer that is never trained.

    Args:
        linear: the layer that this one replaces; its weight is taken as it is, unless `eight_bit`.
        eight_bit: hold the weight as int8, see `quantise`.
        offload: hold the weight in CPU memory wherever the module is moved, and copy it over at each use. On a CUDA
            device that memory is pinned, and the copies are queued between the arithmetic without waiting for it.
    """

    weight: Tensor
    scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, *, eight_bit: bool, offload: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.offload = linear.in_features, linear.out_features, offload
        weight_OI, scale_O1 = quantise(linear.weight) if eight_bit else (linear.weight.detach(), None)
        self.register_buffer("scale", scale_O1)
        if offload:
            self.weight = weight_OI  # no buffer: `to` leaves it here
        else:
            self.register_buffer("weight", weight_OI)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], in autocast's precision where that is on, else in the input's."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        held = (self.weight, self.scale, self.bias, self.offload)
        y: Tensor = _Linear.apply(x.to(dtype), *held)  # type: ignore[no-untyped-call]
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.offload and fn(torch.empty(0)).is_cuda and not self.weight.is_pinned():
            self.weight = self.weight.pin_memory()
        return self

    def extra_repr(self) -> str:
        """What it holds, for `print`."""
        place = "CPU memory" if self.offload else "the module's device"
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype} in {place}"


class _Linear(torch.autograd.Function):
    """y = x W^T + b with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held_OI: Tensor, scale_O1: Tensor | None, bias_O: Tensor | None, off: bool) -> Any:
        ctx.save_for_backward(held_OI, scale_O1)
        ctx.off = off
        bias_O = None if bias_O is None else bias_O.to(x.dtype)
        return F.linear(x, _make(held_OI, scale_O1, x, off), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        held_OI, scale_O1 = ctx.saved_tensors
        return grad @ _make(held_OI, scale_O1, grad, ctx.off), None, None, None, None


def _make(held_OI: Tensor, scale_O1: Tensor | None, like: Tensor, off: bool) -> Tensor:
    """The weight, where and in which precision `like` is."""
    if off:
        # A copy also where nothing is to be moved: then a plan, and a measurement, on the CPU count what a GPU holds.
        held_OI = held_OI.to(like.device, non_blocking=True, copy=True)
    return held_OI.to(like.dtype) if scale_O1 is None else held_OI * scale_O1.to(like.dtype)


def hold_blocks(blocks: Iterable[nn.Module], *, eight_bit: bool, offload: bool) -> int:
    """Put a `FrozenLinear` in the place of every linear layer of the blocks but a LoRA's own.

    Returns:
        Bytes that are kept in CPU memory because of `offload`.
    """
    bytes_there = 0
    for block in blocks:
        for name, module in list(block.named_modules()):
            if type(module) is nn.Linear and not any(part.startswith("lora_") for part in name.split(".")):
                held = FrozenLinear(module, eight_bit=eight_bit, offload=offload)
                block.set_submodule(name, held)
                bytes_there += held.weight.nbytes if offload else 0
    return bytes_there


def check_frozen(trained: Collection[str], *, eight_bit: bool, offload: bool) -> None:
    """Raise ConfigError where base weights are to be trained that are to be held in 8 bits or in CPU memory."""
    if "transformer" in trained and (eight_bit or offload):
        what = "base_dtype: int8" if eight_bit else "offload: true"
        raise ConfigError(
            f"{what} is for base weights that stay as they are, but `train` names 'transformer': use base_dtype: bf16"
            " without offload, or train 'lora'"
        )
