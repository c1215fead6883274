"""Differentiable picture preprocessing that equals what PIL and torchvision do to picture files.

Encoders such as CSD were trained on pictures resized by PIL. torch's own antialiased bicubic uses another kernel
placement near borders, so the resize is written out: two products with small weight matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Kernel: TypeAlias = Literal["bilinear", "bicubic", "lanczos"]
"""PIL's `BILINEAR` (a triangle), `BICUBIC` (a = -0.5) and `LANCZOS` (three lobes), stretched when shrinking."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures, per channel in [0, 1]; everything made from CLIP is normalised with them."""

_REACH: dict[Kernel, float] = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
_FRACTION_BITS = 22
"""PIL's 8-bit resize keeps its weights as integers with this many bits after the point."""
_Window: TypeAlias = tuple[int, int, int, int]
"""Input length, resized length, first kept index and number of kept indices of one axis."""


def resize_centre_crop(pixels_B3HW: Tensor, size: int, *, round_8bit: bool = False) -> Tensor:
    """Resize the short side to `size` and cut the central square: PIL bicubic with antialiasing (a = -0.5).

    Sizes and offsets are those of torchvision's `Resize(size)` and `CenterCrop(size)` on PIL pictures.

    Args:
        pixels_B3HW: floating-point pictures in RGB and [0, 1]; half precision is computed and returned in float32.
        size: side of the result in pixels.
        round_8bit: the value becomes exactly PIL's for 8-bit pictures (the input is rounded to 256 levels, and so is
            the result of each pass); the gradient stays that of the unrounded resize (straight-through). Without it
            the result is PIL's for float pictures and may overshoot [0, 1] at edges. The width is resized before the
            height, as by the Pillow that these encoders were trained with; Pillow 13 turns this round for some pictures
            that are higher than wide, which rounds differently.

    Returns:
        [B, 3, size, size].

    Raises:
        ValueError: not a batch of floating-point pictures.
    """
    _check(pixels_B3HW)
    height, width = pixels_B3HW.shape[-2:]
    rows = _window(height, min(height, width), size)
    columns = _window(width, min(height, width), size)
    return _resample(pixels_B3HW, rows, columns, "bicubic", round_8bit)


def resize(
    pixels_B3HW: Tensor,
    height: int,
    width: int,
    *,
    kernel: Kernel = "bicubic",
    round_8bit: bool = False,
    height_first: bool = False,
) -> Tensor:
    """PIL's `resize((width, height), kernel)` of whole pictures, sides not in proportion allowed.

    Args:
        pixels_B3HW: as for `resize_centre_crop`; so is `round_8bit`.
        height: of the result in pixels.
        width: of the result in pixels.
        kernel: which of PIL's filters.
        height_first: the order of the two passes; it shows only with `round_8bit`, which rounds after each.

    Returns:
        [B, 3, height, width].

    Raises:
        ValueError: not a batch of floating-point pictures.
    """
    _check(pixels_B3HW)
    rows, columns = pixels_B3HW.shape[-2:]
    down, across = (rows, height, 0, height), (columns, width, 0, width)
    return _resample(pixels_B3HW, down, across, kernel, round_8bit, height_first)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (pixels - mean) / std per channel of [..., 3, H, W]."""
    means, stds = (_by_channel(tuple(values), pixels.dtype, pixels.device) for values in (mean, std))
    return (pixels - means) / stds


@lru_cache(maxsize=64)
def _by_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept: numbers that become a tensor on a GPU stop the host until the GPU has done all before.
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def clamp_straight_through(pixels: Tensor) -> Tensor:
    """The value of `pixels.clamp(0, 1)` with the gradient of `pixels`.

    A decoder overshoots wherever a picture is black or white; with a plain clamp those pixels would never again
    receive a gradient.
    """
    return straight_through(pixels.detach().clamp(0, 1), pixels)


def straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """A tensor equal to `value`, bit for bit, whose gradient is that of `gradient_of` (both of one shape)."""
    replaced: Tensor = _StraightThrough.apply(gradient_of, value)  # type: ignore[no-untyped-call]
    return replaced


class _StraightThrough(torch.autograd.Function):
    # Not `x + (value - x).detach()`, which rounds twice and so is not quite `value`.
    @staticmethod
    def forward(_ctx: object, gradient_of: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_ctx: object, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


def _check(pixels: Tensor) -> None:
    if pixels.ndim != 4 or not pixels.is_floating_point():
        raise ValueError(f"expected floating-point pictures [B, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}")


def _window(length: int, short: int, size: int) -> _Window:
    """The central `size` pixels of an axis, after the short side became `size`."""
    resized = size if length == short else int(size * length / short)
    return length, resized, round((resized - size) / 2), size


def _stays(axis: _Window) -> bool:
    """Whether every pixel stays what it is."""
    length, resized, first, kept = axis
    return length == resized == kept and first == 0


def _resample(
    given: Tensor, rows: _Window, columns: _Window, kernel: Kernel, round_8bit: bool, height_first: bool = False
) -> Tensor:
    pixels = given if given.dtype == torch.float64 else given.float()
    # Autocast would turn the two products into bfloat16, coarser than the 8 bits of a picture.
    with torch.autocast(pixels.device.type, enabled=False):
        smooth = pixels
        if not (_stays(rows) and _stays(columns)):  # else both matrices are the identity
            across = _weights(*columns, kernel, pixels.dtype, pixels.device)
            down = _weights(*rows, kernel, pixels.dtype, pixels.device)
            smooth = down @ (pixels @ across.T)
        if not round_8bit:
            return smooth
        rounded = _resample_8bit(pixels.detach(), rows, columns, kernel, height_first).to(smooth.dtype)
    return straight_through(rounded, smooth)


@lru_cache(maxsize=128)
def _weights(
    length: int,
    resized: int,
    first: int,
    kept: int,
    kernel: Kernel,
    dtype: torch.dtype,
    device: torch.device,
    whole: bool = False,
) -> Tensor:
    """Rows `first` to `first + kept` of PIL's resize as a matrix [kept, length]; `whole`: as PIL's integers.

    When shrinking, the kernel is stretched by the scale, which is the antialiasing. Each row is normalised after the
    part beyond the border was dropped.
    """
    # A matrix made in inference mode would be useless for gradients later.
    with torch.inference_mode(False), torch.no_grad():
        scale = length / resized
        stretch = max(scale, 1.0)
        centre = (torch.arange(first, first + kept, dtype=torch.float64) + 0.5) * scale
        reach = _REACH[kernel] * stretch
        start = (centre - reach + 0.5).long().clamp(min=0)
        stop = (centre + reach + 0.5).long().clamp(max=length)
        index = torch.arange(length)
        # The order of operations is PIL's too: a last bit can turn a tie between two of the 256 levels.
        matrix = _FILTERS[kernel]((index - centre[:, None] + 0.5) * (1 / stretch))
        matrix *= (index >= start[:, None]) & (index < stop[:, None])
        matrix *= 1 / matrix.cumsum(1)[:, -1:]
        if whole:
            scaled = matrix * 2.0**_FRACTION_BITS
            matrix = torch.trunc(scaled + torch.copysign(torch.tensor(0.5, dtype=torch.float64), scaled))
        return matrix.to(dtype=dtype, device=device)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, PIL's choice."""
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _lanczos(x: Tensor) -> Tensor:
    return torch.where((x >= -3) & (x < 3), torch.sinc(x) * torch.sinc(x / 3), 0.0)


_FILTERS: dict[Kernel, Callable[[Tensor], Tensor]] = {"bilinear": _bilinear, "bicubic": _bicubic, "lanczos": _lanczos}


def _resample_8bit(pixels: Tensor, rows: _Window, columns: _Window, kernel: Kernel, height_first: bool) -> Tensor:
    """PIL's integer arithmetic in float64, whose 53 bits hold its 32-bit sums exactly; levels / 255."""
    levels = torch.round(pixels.double().clamp(0, 1) * 255)
    across = _weights(*columns, kernel, torch.float64, pixels.device, whole=True)
    down = _weights(*rows, kernel, torch.float64, pixels.device, whole=True)
    if height_first:
        return _to_level(_to_level(down @ levels) @ across.T) / 255
    return _to_level(down @ _to_level(levels @ across.T)) / 255


def _to_level(sums: Tensor) -> Tensor:
    return torch.floor(sums / 2.0**_FRACTION_BITS + 0.5).clamp(0, 255)
