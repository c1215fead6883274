"""Attention back ends of diffusers for the blocks of a DiT, by diffusers' own names.

The blocks dispatch their attention themselves (`dispatch_attention_fn`), so that a name is all there is to choose. What
diffusers leaves to the first forward pass is found out here: whether a back end runs on this device in this precision,
and whether a gradient comes back through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rewardgen.errors import ConfigError, nearest

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

TOLERANCE = 0.05
"""Largest distance of a back end's output or gradient from torch's own in float32, relative to its length. It tells
wrong from right, not one rounding from another."""
_TORCH = ("native", "_native")
"""How the names of torch's own kernels begin; these follow autocast by themselves."""
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def check_backend(name: str | None, *, here: bool = True) -> None:
    """Refuse a back end that cannot be trained with, before any weight is read. None is diffusers' own choice.

    Args:
        here: it must also be installed and, on a machine without an accelerator, run on the CPU.

    Raises:
        ConfigError: diffusers does not know the name, something is not installed, or it has no backward pass.
    """
    if name is None:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        hint = nearest(name, known) or f" It knows: {', '.join(known)}."
        raise ConfigError(f"attention: '{name}' is no back end of diffusers.{hint}")
    if "sage" in name:
        raise ConfigError(f"attention: '{name}' has no backward pass, so nothing would be trained; use flash or native")
    if not here:
        return
    try:
        with attention_backend(name):  # looks for what it needs, and changes nothing
            pass
    except Exception as error:  # what is missing, what the hub says, what a kernel raises when it is loaded
        raise ConfigError(f"attention: '{name}' cannot be used here: {_line(error)}") from error
    if not torch.accelerator.is_available():
        probe_backend(name, heads=2, width=16, device=torch.device("cpu"), dtype=torch.float32)


class BackEnd:
    """The attention back end of one transformer.

    Args:
        name: one that `check_backend` lets pass; None leaves everything to diffusers.
        transformer: its blocks take the back end from now on.
    """

    def __init__(self, name: str | None, transformer: FluxTransformer2DModel) -> None:
        self.name = name
        self._tried: set[tuple[torch.device, torch.dtype]] = set()
        if name is None:
            return
        from diffusers.models.attention_dispatch import attention_backend

        # diffusers would make it the default of every model in the process; on leaving the block that is as it was.
        with attention_backend("native"):
            transformer.set_attention_backend(name)
        if not name.startswith(_TORCH):
            for module in transformer.modules():
                norms = (getattr(module, norm, None) for norm in _NORMS)
                for norm in (norm for norm in norms if isinstance(norm, nn.Module)):
                    norm.register_forward_hook(_in_dtype_of_input)

    def try_on(self, transformer: FluxTransformer2DModel, device: torch.device) -> None:
        """Find out, once, whether it works on a device in the caller's precision. Raises ConfigError where not."""
        if self.name is None:
            return
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else transformer.x_embedder.weight.dtype
        if (device, dtype) not in self._tried:
            heads, width = (transformer.config[key] for key in ("num_attention_heads", "attention_head_dim"))
            probe_backend(self.name, heads=heads, width=width, device=device, dtype=dtype)
            self._tried.add((device, dtype))


def _in_dtype_of_input(_norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Autocast on CUDA makes float32 of the normalised queries and keys, and only torch's own kernels turn it back."""
    return out.to(args[0].dtype)


def probe_backend(name: str, *, heads: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a back end with torch's own attention on random numbers, forward and backward.

    Args:
        heads, width: of the attention that it is to be used for.
        device, dtype: where and in which precision.

    Raises:
        ConfigError: it does not run, lets no gradient through, or computes something else.
    """
    where = f"attention: '{name}' on {device} in {str(dtype).removeprefix('torch.')}"
    try:
        found = _attention(name, heads, width, device, dtype)
    except Exception as error:  # every kernel has its own way to refuse
        raise ConfigError(f"{where} does not run: {_line(error)}; leave `attention` out, or name another") from error
    for what, got, wanted in zip(
        ("its output", *(f"its gradient of the {part}" for part in ("queries", "keys", "values"))),
        found,
        _attention("native", heads, width, device, torch.float32),
        strict=True,
    ):
        distance = float((got.float() - wanted).norm() / wanted.norm())
        if not distance <= TOLERANCE:
            raise ConfigError(f"{where}: {what} is {100 * distance:.0f} % away from torch's; name another")


def _attention(name: str, heads: int, width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients of a weighted sum of it with respect to queries, keys and values."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, 48, heads, width, generator=generator, device="cpu").to(device, dtype) for _ in range(4)]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        leaves = [tensor.clone().requires_grad_() for tensor in made[:3]]
        out: Tensor = dispatch_attention_fn(*leaves, backend=AttentionBackendName(name))
        return [out.detach(), *torch.autograd.grad(out, leaves, made[3].clone())]


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
