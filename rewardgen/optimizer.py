"""AdamW with warm-up, cosine decay, gradient clipping and an optional average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.settings import Settings
from rewardgen.sharding import gathered, part, part_of


class OptimizerConfig(Settings):
    """AdamW. The defaults are those of USO and UNO."""

    lr: float = Field(default=8e-5, gt=0)
    """Learning rate after warm-up. USO 8e-5, UMO 5e-6."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Step at which half a cosine, begun after the warm-up, has brought the learning rate to 0; null keeps it up."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient of all trained parameters together is scaled down to this norm."""


class Optimizer:
    """Applies a gradient to the trained parameters.

    Args:
        parameters: trained parameters by name, in a stable order. Of sharded ones each process moves its own part.
        config: AdamW's settings.
        ema_decay: decay of the average of the weights, in float32; None keeps no average.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, *, ema_decay: float | None = None
    ) -> None:
        self.config = config
        self.ema_decay = ema_decay
        self._whole = dict(parameters)
        self._parameters = {name: _own(parameter) for name, parameter in parameters.items()}
        self._adamw = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            # One kernel for all parameters; on the CPU torch's own choice, whose results runs there depend on.
            fused=all(parameter.is_cuda for parameter in self._parameters.values()) or None,
        )
        self._average = {} if ema_decay is None else {name: _wide(p) for name, p in self._parameters.items()}

    def lr(self, step: int) -> float:
        """Learning rate of a training step (0-based), a function of nothing else."""
        warmup, decay = self.config.warmup_steps, self.config.decay_steps
        if step < warmup:
            return self.config.lr * (step + 1) / warmup
        if decay is None:
            return self.config.lr
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, decay - warmup))))

    def update(self, gradient: Sequence[Tensor], grad_norm: float, *, step: int) -> None:
        """Clip, step, average. `grad_norm` is the global norm of `gradient`, which must be finite."""
        scale = min(1.0, self.config.max_grad_norm / (grad_norm + 1e-12))
        for parameter, grad in zip(self._parameters.values(), gradient, strict=True):
            parameter.grad = (grad * scale).to(parameter.dtype)
        for group in self._adamw.param_groups:
            group["lr"] = self.lr(step)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        if self.ema_decay is not None:
            for name, average in self._average.items():
                average.lerp_(self._parameters[name].detach().to(average.dtype), 1 - self.ema_decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model for the length of the block; without an average nothing changes."""
        own = {name: self._parameters[name].detach().clone() for name in self._average}
        _copy_into(self._parameters, self._average)
        try:
            yield
        finally:
            _copy_into(self._parameters, own)

    def state(self) -> dict[str, Tensor]:
        """Parameters, average and moments, by name. Tensors are the live ones, not copies.

        Where parameters are sharded all processes must call it; the first gets their wholes, the others stand-ins.
        """
        tensors = {f"trainable/{name}": gathered(self._whole[name], p.detach()) for name, p in self._parameters.items()}
        tensors |= {f"average/{name}": gathered(self._whole[name], value) for name, value in self._average.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._adamw.state[parameter].items():
                tensors[f"adamw/{key}/{name}"] = value if key == "step" else gathered(self._whole[name], value)
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore `state()`, from wholes in every process. A checkpoint may hold tensors of others (`published/`) too.

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape.
        """
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("published/")}
        expected = {f"trainable/{name}": p.shape for name, p in self._whole.items()}
        expected |= {f"average/{name}": self._whole[name].shape for name in self._average}
        # AdamW has no state before its first step.
        if any(key.startswith("adamw/") for key in tensors):
            for name, p in self._whole.items():
                shapes = {"step": torch.Size([]), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                expected |= {f"adamw/{key}/{name}": shape for key, shape in shapes.items()}
        _check_layout(tensors, expected)
        own = {name: part_of(self._whole[name], tensors[f"trainable/{name}"]) for name in self._parameters}
        _copy_into(self._parameters, own)
        _copy_into(
            self._average, {name: part_of(self._whole[name], tensors[f"average/{name}"]) for name in self._average}
        )
        state: dict[int, dict[str, Any]] = {}
        for index, (name, whole) in enumerate(self._whole.items()):
            if f"adamw/step/{name}" in tensors:
                moments = {key: part_of(whole, tensors[f"adamw/{key}/{name}"]) for key in ("exp_avg", "exp_avg_sq")}
                found = {"step": tensors[f"adamw/step/{name}"]} | moments
                state[index] = {key: value.clone() for key, value in found.items()}
        self._adamw.load_state_dict({"state": state, "param_groups": self._adamw.state_dict()["param_groups"]})


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, or of a sharded one a parameter that shares its part's memory: AdamW goes element by element."""
    held = part(parameter)
    return parameter if held is parameter else nn.Parameter(held, requires_grad=parameter.requires_grad)


def _wide(parameter: Tensor) -> Tensor:
    """A copy in at least float32: an average in half precision would stop moving."""
    return parameter.detach().clone().to(torch.promote_types(parameter.dtype, torch.float32))


def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, source in sources.items():
            targets[name].copy_(source)


def _check_layout(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    for key in sorted(expected.keys() ^ tensors.keys()):
        fault = "lacks" if key in expected else "has a surplus"
        hint = "; train.ema_decay must stay as it was" if key.startswith("average/") else ""
        raise CheckpointError(f"the checkpoint {fault} tensor '{key}': it belongs to another configuration{hint}")
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            found = list(tensors[key].shape)
            raise CheckpointError(f"the checkpoint's tensor '{key}' has shape {found}, expected {list(shape)}")
