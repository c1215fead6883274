"""AdamW with warm-up, gradient clipping and an optional average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.settings import Settings


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
    """Steps over which the learning rate rises linearly; constant afterwards."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient of all trained parameters together is scaled down to this norm."""


class Optimizer:
    """Applies a gradient to the trained parameters.

    Args:
        parameters: trained parameters by name, in a stable order.
        config: AdamW's settings.
        ema_decay: decay of the average of the weights, in float32; None keeps no average.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, *, ema_decay: float | None = None
    ) -> None:
        self.config = config
        self.ema_decay = ema_decay
        self._parameters = dict(parameters)
        self._adamw = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self._average = {} if ema_decay is None else {name: _wide(p) for name, p in self._parameters.items()}

    def lr(self, step: int) -> float:
        """Learning rate of a training step (0-based), a function of nothing else."""
        return self.config.lr * min(1.0, (step + 1) / max(1, self.config.warmup_steps))

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
        """Parameters, average and moments, by name. Tensors are the live ones, not copies."""
        tensors = {f"trainable/{name}": p.detach() for name, p in self._parameters.items()}
        tensors |= {f"average/{name}": average for name, average in self._average.items()}
        for name, parameter in self._parameters.items():
            tensors |= {f"adamw/{key}/{name}": value for key, value in self._adamw.state[parameter].items()}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore `state()`.

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape.
        """
        expected = {f"trainable/{name}": p.shape for name, p in self._parameters.items()}
        expected |= {f"average/{name}": average.shape for name, average in self._average.items()}
        # AdamW has no state before its first step.
        if any(key.startswith("adamw/") for key in tensors):
            for name, p in self._parameters.items():
                shapes = {"step": torch.Size([]), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                expected |= {f"adamw/{key}/{name}": shape for key, shape in shapes.items()}
        _check_layout(tensors, expected)
        _copy_into(self._parameters, {name: tensors[f"trainable/{name}"] for name in self._parameters})
        _copy_into(self._average, {name: tensors[f"average/{name}"] for name in self._average})
        state: dict[int, dict[str, Any]] = {}
        for index, name in enumerate(self._parameters):
            if f"adamw/step/{name}" in tensors:
                state[index] = {
                    key: tensors[f"adamw/{key}/{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self._adamw.load_state_dict({"state": state, "param_groups": self._adamw.state_dict()["param_groups"]})


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
